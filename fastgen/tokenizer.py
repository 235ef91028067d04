"""Text to token ids and back, through the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastgen import _export
from fastgen._json import read_json
from fastgen.errors import InvalidArgumentError, ModelFileError

__all__ = ["TOKENIZER_FILES", "TextStream", "Tokenizer"]

#: Every file a tokenizer may be made of; what `fastgen convert` copies.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "sentencepiece.model",
)

VOCABULARY = "vocab.txt"

_REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer:
    """A tokenizer of a model directory.

    Args:
        backend: a `tokenizers.Tokenizer`.
        source: the file it came from, for messages.
    """

    def __init__(self, backend: Any, source: Path) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.source = source

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer of a model directory; None if it has no files that we can read.

        `tokenizer.json` is taken first, else `vocab.json` or `vocab.txt` (one token a line) with
        `merges.txt` (byte-level BPE).

        Raises:
            ModelFileError: the files are there but are not what they should be.
        """
        import tokenizers

        path = directory / "tokenizer.json"
        try:
            if path.is_file():
                return cls(tokenizers.Tokenizer.from_file(str(path)), path)
            path = directory / "vocab.json"
            merges = directory / "merges.txt"
            if path.is_file() and merges.is_file():
                backend = tokenizers.Tokenizer(
                    tokenizers.models.BPE.from_file(str(path), str(merges))
                )
                return cls(_byte_level(backend, _special_tokens(directory)), path)
            path = directory / VOCABULARY
            if path.is_file() and merges.is_file():
                tokens = _special_tokens(directory)
                if _export.is_export(directory):
                    tokens = _export.special_tokens(directory)
                return cls(_byte_level(_read_vocabulary(path, merges), tokens), path)
        except ModelFileError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ModelFileError(f"{path} is not a tokenizer: {error}") from error
        return None

    def write_vocabulary(self, folder: Path, vocab_size: int) -> list[str]:
        """Writes `vocab.txt` and `merges.txt`: byte-level BPE as its tokens and merges alone.

        Line i of `vocab.txt` is token i in byte-level form. An empty line is an id without a token;
        ids from the number of lines to `vocab_size` have none either.

        Returns:
            The special tokens.

        Raises:
            ModelFileError: the tokenizer does more than these files can say, or has an id that the
                model does not have.
        """
        parts = json.loads(self._backend.to_str())
        _check_plain(parts, self.source)
        vocabulary: dict[str, int] = dict(parts["model"]["vocab"])
        for added in parts["added_tokens"]:
            vocabulary[added["content"]] = added["id"]
        merges = [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in parts["model"]["merges"]
        ]
        lines = [""] * (max(vocabulary.values(), default=-1) + 1)
        if len(lines) > vocab_size:
            raise ModelFileError(
                f"{self.source}: the tokenizer has the id {len(lines) - 1}: the model's embedding "
                f"ends at {vocab_size - 1}"
            )
        for token, token_id in vocabulary.items():
            lines[token_id] = token
        _write_lines(folder / VOCABULARY, lines)
        _write_lines(folder / "merges.txt", ["#version: 0.2", *merges])
        special = [added["content"] for added in parts["added_tokens"]]
        written = _byte_level(_read_vocabulary(folder / VOCABULARY, folder / "merges.txt"), special)
        copy = json.loads(written.to_str())
        if (
            written.get_vocab(with_added_tokens=True) != vocabulary
            or [m if isinstance(m, str) else " ".join(m) for m in copy["model"]["merges"]] != merges
        ):
            raise ModelFileError(
                f"{self.source}: {VOCABULARY} and merges.txt cannot hold this tokenizer"
            )
        return special

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing put before or after it.

        Special tokens written out in the text (`<|endoftext|>`) become their one id.

        Raises:
            InvalidArgumentError: it has half of a surrogate pair, as Python makes it of bytes that
                are not UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(f"the text {text!r} is not UTF-8: {error.reason}") from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`. Bytes that are not UTF-8 become U+FFFD; ids that the tokenizer does
        not have (a padded vocabulary) are left out."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """Id of one token, as it stands in the vocabulary; None if it does not."""
        token_id = self._backend.token_to_id(token)
        return None if token_id is None else int(token_id)

    def stream(self) -> TextStream:
        """A decoder that is fed token by token."""
        return TextStream(self)


class TextStream:
    """Turns tokens into pieces of text as they come, never half a character.

    The pieces joined are `Tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0  # the window that is decoded: some context that is already out, then news
        self._end_of_context = 0
        self._given = 0  # characters of the window that are already out

    def push(self, token_ids: Iterable[int]) -> str:
        """Adds tokens; returns the text that is now certain, often ''."""
        self._ids.extend(token_ids)
        text = self._tokenizer.decode(self._ids[self._begin :])
        # An unfinished character shows as one U+FFFD at the end; what is before it is settled.
        settled = text[:-1] if text.endswith(_REPLACEMENT) else text
        piece = settled[self._given :]
        self._given = max(self._given, len(settled))
        if settled is text and text:
            # Decoders may treat the start of a text differently, so the window keeps some context.
            self._begin, self._end_of_context = self._end_of_context, len(self._ids)
            self._given = len(self._tokenizer.decode(self._ids[self._begin :]))
        return piece

    def flush(self) -> str:
        """The rest, at the end of the sequence: an unfinished character as U+FFFD."""
        text = self._tokenizer.decode(self._ids[self._begin :])
        piece = text[self._given :]
        self._given = len(text)
        return piece


def missing_tokenizer_message(directory: Path) -> str:
    """Why text cannot be used with this directory, and what can be."""
    if (directory / "sentencepiece.model").is_file():
        return (
            f"{directory} has a sentencepiece.model, which fastgen does not read: encode the text "
            "with the model's own tokenizer and give the token ids as the prompt"
        )
    return (
        f"{directory} has no tokenizer (tokenizer.json, or merges.txt with vocab.json or "
        "vocab.txt): give token ids as the prompt, or put the tokenizer's files there"
    )


def require(tokenizer: Tokenizer | None, directory: Path) -> Tokenizer:
    """The tokenizer, or the error that says why there is none."""
    if tokenizer is None:
        raise InvalidArgumentError(missing_tokenizer_message(directory))
    return tokenizer


def _special_tokens(directory: Path) -> list[str]:
    """Special tokens that a vocab.json does not mark as such."""
    tokens = {"<|endoftext|>"}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        values = read_json(path)
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = values.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str) and value:
                tokens.add(value)
    return sorted(tokens)


def _byte_level(backend: Any, special_tokens: list[str]) -> Any:
    """A `tokenizers.Tokenizer` around a BPE model, as GPT-2 has it."""
    from tokenizers import AddedToken, decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # Only those of the vocabulary: adding others would make up ids that the model does not have.
    known = [token for token in special_tokens if backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in known])
    return backend


# ---- vocab.txt and merges.txt ------------------------------------------------------------------


def _check_plain(parts: dict[str, Any], source: Path) -> None:
    """Raises ModelFileError unless a tokenizer (as JSON) is GPT-2's byte-level BPE."""
    model = parts["model"]
    pre_tokenizer = parts.get("pre_tokenizer") or {}
    decoder = parts.get("decoder") or {}
    odd = None
    if model.get("type") != "BPE":
        odd = f"its model is {model.get('type')}"
    elif pre_tokenizer.get("type") != "ByteLevel" or decoder.get("type") != "ByteLevel":
        odd = "its pre_tokenizer and decoder are not ByteLevel"
    elif pre_tokenizer.get("add_prefix_space") or not pre_tokenizer.get("use_regex", True):
        odd = "its pre_tokenizer does not split as GPT-2's does"
    elif parts.get("normalizer"):
        odd = f"it has the normalizer {parts['normalizer'].get('type')}"
    for name in (
        "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
        "ignore_merges",
    ):  # fmt: skip
        # tokenizers writes "" for what is not there in some files of GPT-2.
        if model.get(name) and not (name == "unk_token" and model[name] in model["vocab"]):
            odd = f"its model has {name}"
    for added in parts["added_tokens"]:
        if not added["special"]:
            odd = f"its added token {added['content']!r} is not special"
        elif added["lstrip"] or added["rstrip"] or added["single_word"]:
            odd = f"its special token {added['content']!r} takes the space around it"
    for token in (*model.get("vocab", ()), *(added["content"] for added in parts["added_tokens"])):
        if not token or "\n" in token or "\r" in token:
            odd = f"its token {token!r} does not fit in a line"
    if odd is not None:
        raise ModelFileError(
            f"{source}: {VOCABULARY} and merges.txt cannot hold this tokenizer, because {odd}"
        )


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))


def _read_lines(path: Path) -> list[str]:
    # Not splitlines(), which also splits at characters that tokens may have.
    text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    return text.removesuffix("\n").split("\n")


def _read_vocabulary(vocab: Path, merges: Path) -> Any:
    from tokenizers import Tokenizer, models

    ids = {token: i for i, token in enumerate(_read_lines(vocab)) if token}
    lines = _read_lines(merges)
    if lines[:1] and lines[0].startswith("#version"):
        del lines[0]
    pairs: list[tuple[str, str]] = []
    for line in filter(None, lines):
        first, _, second = line.partition(" ")
        if not (first and second) or " " in second:
            raise ModelFileError(f"{merges}: the line {line!r} is not a pair of tokens")
        pairs.append((first, second))
    return Tokenizer(models.BPE(vocab=ids, merges=pairs))
