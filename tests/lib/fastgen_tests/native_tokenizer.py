"""The library's tokenizer through the C API, and HuggingFace's of the same files."""

from __future__ import annotations

import ctypes
import json
from ctypes import byref, c_char_p, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastgen import _capi

END = "<|endoftext|>"

CORPUS = [
    "I've said it's he'll, we'd, you're; they 'll not and DON'T 'S isn't. I'm 'm.",
    "def f(x):\n    if x > 10:\n        return [1, 22, 333, 4444]\n\n\n# 100% ...!!! ???",
    "naïve café, Ünïcödé é é, ελληνικά, русский язык, עברית, العربية, हिन्दी, ไทย",
    "中文分词 日本語のテキスト 한국어 텍스트 😀😀🎉 👩‍👩‍👧 ①②③ ½ ⅷ ٣٤",
    "a a  a   a    a     a      a\t\tb\r\n\r\nc\u3000d\u00a0e\u2028f",
    "aaaa aaaaaaaa aaaaaaaaaaaaaaaa bbbb",
]


class Native:
    """`fastgen_tokenizer` of a directory."""

    def __init__(self, directory: Path) -> None:
        self._library = _capi.library()
        self._handle = c_void_p()
        _capi.check(
            self._library.fastgen_tokenizer_load(str(directory).encode(), byref(self._handle))
        )

    def close(self) -> None:
        self._library.fastgen_tokenizer_free(self._handle)
        self._handle = c_void_p()

    @property
    def handle(self) -> c_void_p:
        return self._handle

    def encode(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        tokens = (c_int32 * max(1, len(data)))()
        length = c_size_t()
        _capi.check(
            self._library.fastgen_tokenizer_encode(
                self._handle, data, len(data), tokens, len(data), byref(length)
            )
        )
        assert length.value <= len(data)
        return tokens[: length.value]

    def decode_bytes(self, ids: list[int], skip_special_tokens: bool = True) -> bytes:
        tokens = (c_int32 * max(1, len(ids)))(*ids)
        size = c_size_t()
        arguments = (self._handle, tokens, len(ids), int(skip_special_tokens))
        _capi.check(self._library.fastgen_tokenizer_decode(*arguments, None, 0, byref(size)))
        text = ctypes.create_string_buffer(size.value + 1)
        _capi.check(
            self._library.fastgen_tokenizer_decode(*arguments, text, size.value, byref(size))
        )
        return text.raw[: size.value]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8")

    def token_id(self, token: str) -> int:
        found = c_int32()
        _capi.check(
            self._library.fastgen_tokenizer_token_id(self._handle, token.encode(), byref(found))
        )
        return found.value

    @property
    def vocab_size(self) -> int:
        return int(self._library.fastgen_tokenizer_vocab_size(self._handle))

    def stream(self, pushes: list[list[int]], skip_special_tokens: bool = True) -> list[str]:
        """The pieces that a text stream gives for these pushes, and for the flush."""
        stream = c_void_p()
        _capi.check(
            self._library.fastgen_text_stream_create(
                self._handle, int(skip_special_tokens), byref(stream)
            )
        )
        text, size = c_char_p(), c_size_t()
        pieces = []

        def piece(status: int) -> None:
            _capi.check(status)
            data = ctypes.string_at(ctypes.cast(text, c_void_p), size.value + 1)
            assert data[-1] == 0
            pieces.append(data[:-1].decode("utf-8"))

        for ids in pushes:
            tokens = (c_int32 * max(1, len(ids)))(*ids)
            piece(
                self._library.fastgen_text_stream_push(
                    stream, tokens, len(ids), byref(text), byref(size)
                )
            )
        piece(self._library.fastgen_text_stream_flush(stream, byref(text), byref(size)))
        self._library.fastgen_text_stream_free(stream)
        return pieces


def byte_level(model: models.BPE) -> Any:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def trained(vocab_size: int) -> Any:
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def save_vocabulary(backend: Any, directory: Path, lines: bool = False) -> None:
    """Writes `vocab.json`, or `vocab.txt`, and `merges.txt`."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.model.save(str(directory))
    if lines:
        vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
        ids = {value: token for token, value in vocabulary.items()}
        tokens = [ids.get(i, "") for i in range(max(ids) + 1)]
        (directory / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
        (directory / "vocab.json").unlink()
