"""The library's own tokenizer, through the C API, against HuggingFace's `tokenizers`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import random
import re
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from ctypes import byref, c_char_p, c_int32, c_size_t, c_void_p
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from fastgen import _capi
from fastgen.errors import (
    InvalidArgumentError,
    ModelFileError,
    NotFoundError,
    UnsupportedError,
)
from fastgen.models import DEFAULT_MODEL, resolve
from fastgen.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "csrc" / "text" / "unicode_tables.h"
END = "<|endoftext|>"
EXAMPLES = settings(deadline=None, max_examples=500)

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


@pytest.fixture(scope="module", params=["trained", "embedded"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Native, Any]]:
    """The library's tokenizer and HuggingFace's, of the same files."""
    if request.param == "trained":
        directory = tmp_path_factory.mktemp("tokenizer")
        save_vocabulary(trained(900), directory)
    else:
        directory = resolve(DEFAULT_MODEL)
    reference = Tokenizer.from_directory(directory)
    assert reference is not None
    native = Native(directory)
    yield native, reference._backend
    native.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Native]:
    directory = tmp_path_factory.mktemp("small")
    save_vocabulary(trained(600), directory)
    native = Native(directory)
    yield native
    native.close()


def expected_ids(backend: Any, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


# ---- Equality with HuggingFace -----------------------------------------------------------------

# Code points that this Python's Unicode knows: later ones may be letters to one side only.
KNOWN = st.characters(blacklist_categories=("Cs", "Cn"))
PLANES = [(0, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x2FFFF), (0xE0000, 0x10FFFF)]
ANY_PLANE = st.one_of(
    [
        st.characters(min_codepoint=low, max_codepoint=high, blacklist_categories=("Cs", "Cn"))
        for low, high in PLANES
    ]
)
COMBINING = st.characters(whitelist_categories=("Mn", "Mc", "Me"))
CONTROL = st.characters(whitelist_categories=("Cc", "Cf"))
SPACE = st.sampled_from([" ", " ", " ", "\t", "\n", "\r", "\x0b", "\x1c", "\x85", "\xa0", "\u3000"])
FRAGMENTS = st.one_of(
    st.text(KNOWN, max_size=8),
    st.text(ANY_PLANE, max_size=8),
    st.text(st.sampled_from("abcXYZ"), max_size=12),
    st.text(st.sampled_from("0123456789½٣"), max_size=6),
    st.text(st.sampled_from("'!?.,-_<|>"), max_size=6),
    st.text(COMBINING, max_size=4),
    st.text(CONTROL, max_size=4),
    st.text(SPACE, max_size=6),
    st.integers(0, 200).map(lambda n: " " * n),
    st.integers(0, 100).map(lambda n: "a" * n),
    st.sampled_from(
        ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'r", "'l", " 's", "''s", "'sa"]
    ),
    st.sampled_from([END, "<|endof", "text|>", "<|endoftext|", END * 2, " " + END + " "]),
    st.sampled_from(CORPUS),
)
TEXT = st.lists(FRAGMENTS, max_size=12).map("".join)


@EXAMPLES
@given(text=TEXT)
def test_encodes_like_huggingface(pair: tuple[Native, Any], text: str) -> None:
    native, reference = pair
    ids = native.encode(text)
    assert ids == expected_ids(reference, text)
    assert native.decode(ids, skip_special_tokens=False) == text
    assert native.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@EXAMPLES
@given(data=st.data(), skip=st.booleans())
def test_decodes_any_ids_like_huggingface(
    pair: tuple[Native, Any], data: st.DataObject, skip: bool
) -> None:
    native, reference = pair
    # Single bytes often, so that characters are cut; and ids that nobody has.
    ids = data.draw(
        st.lists(
            st.one_of(
                st.integers(0, 256),
                st.integers(0, native.vocab_size + 3),
                st.sampled_from([native.token_id(END), 2**31 - 1]),
            ),
            max_size=30,
        )
    )
    expected = reference.decode(ids, skip_special_tokens=skip)
    assert native.decode(ids, skip) == expected
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=10)))
    bounds = [0, *cuts, len(ids)]
    pieces = native.stream([ids[a:b] for a, b in zip(bounds, bounds[1:])], skip)
    assert "".join(pieces) == expected
    # Half a character is never given: whatever comes out stays, so U+FFFD comes only for bytes that
    # nothing could complete, and the pieces so far are a beginning of the whole.
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert expected.startswith(so_far)


@EXAMPLES
@given(text=st.text(KNOWN, min_size=1))
def test_streams_whole_characters(pair: tuple[Native, Any], text: str) -> None:
    native, _ = pair
    ids = native.encode(text)
    pieces = native.stream([[token] for token in ids], skip_special_tokens=False)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def reference_is_of_the_same_unicode() -> bool:
    """Whether `tokenizers` knows the letters of Unicode 16 and not yet those of 17."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    return len(pieces("a\u1c89a")) == 1 and len(pieces("a\ua7cea")) > 1


def test_every_code_point_is_of_the_class_that_huggingface_has(tmp_path: Path) -> None:
    """Merges that show how a text was split: of each class's sample with any byte after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    samples = ["a", "1", "!", "\u0120"]  # the last is how a space is written
    merges = [(sample, letter) for sample in samples for letter in alphabet]
    tokens = alphabet + [a + b for a, b in merges]
    backend = byte_level(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    save_vocabulary(backend, tmp_path)
    native = Native(tmp_path)
    same = reference_is_of_the_same_unicode()
    count = 0
    for begin in range(0, sys.maxunicode + 1, 1 << 14):
        characters = [
            chr(code)
            for code in range(begin, begin + (1 << 14))
            if not 0xD800 <= code <= 0xDFFF and (same or unicodedata.category(chr(code)) != "Cn")
        ]
        count += len(characters)
        # Private use areas and the like are all of one kind: no need for every one of them.
        if len({unicodedata.category(c) for c in characters}) < 2:
            characters = characters[::64]
        text = "".join(f"a{c}1{c}!{c} {c}\n" for c in characters)
        assert native.encode(text) == expected_ids(backend, text), hex(begin)
    native.close()
    assert count > 270_000


@pytest.mark.parametrize("lines", [False, True], ids=["vocab.json", "vocab.txt"])
def test_reads_every_form_of_a_vocabulary(tmp_path: Path, lines: bool) -> None:
    backend = trained(700)
    save_vocabulary(backend, tmp_path / "split", lines=lines)
    (tmp_path / "whole").mkdir()
    backend.save(str(tmp_path / "whole" / "tokenizer.json"))
    text = "".join(CORPUS) + END + "x"
    expected = expected_ids(backend, text)
    for name in ("split", "whole"):
        native = Native(tmp_path / name)
        assert native.encode(text) == expected
        assert native.vocab_size == backend.get_vocab_size()
        assert native.token_id(END) == backend.token_to_id(END)
        assert native.token_id("no such token") == -1
        assert native.decode(expected) == backend.decode(expected)
        native.close()


def test_added_tokens_of_a_tokenizer_json(tmp_path: Path) -> None:
    """The longest of those that begin first; not normalized ones before the others."""
    backend = trained(500)
    backend.add_special_tokens([AddedToken("<a>", normalized=False), AddedToken("<a><b>")])
    backend.add_tokens(
        [AddedToken("word up"), AddedToken("word", normalized=False), AddedToken("é!")]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    native = Native(tmp_path)
    for text in ("<a>", "<a><b>", "x<a><b><a>y", "word up", "a word up<a>wordword up", "né!é!!"):
        ids = native.encode(text)
        assert ids == expected_ids(backend, text), text
        for skip in (False, True):
            assert native.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip), text
    native.close()


def test_special_tokens_of_the_other_files(tmp_path: Path) -> None:
    backend = trained(500)
    save_vocabulary(backend, tmp_path)
    path = tmp_path / "vocab.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    vocabulary.update({"[PAD]": 1000, "[BOS]": 1002})
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "[PAD]", "eos_token": "[not there]", "unk_token": None})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "[BOS]"}, "add_prefix_space": False})
    )
    reference = Tokenizer.from_directory(tmp_path)
    assert reference is not None
    native = Native(tmp_path)
    text = "a[PAD]b[BOS]c[not there]" + END
    ids = native.encode(text)
    assert ids == reference.encode(text)
    assert {1000, 1002} <= set(ids)
    assert native.decode([*ids, 1001]) == reference.decode([*ids, 1001]) == "abc[not there]"
    assert native.decode(ids, skip_special_tokens=False) == text
    native.close()


# ---- Bytes that are not UTF-8 ------------------------------------------------------------------


@EXAMPLES
@given(data=st.binary(max_size=64))
def test_bytes_that_are_not_utf8_stand_for_themselves(small: Native, data: bytes) -> None:
    # What Python replaces is what the library replaces: one U+FFFD for each maximal subpart.
    assert small.decode(small.encode(data), False) == data.decode("utf-8", "replace")


def test_invalid_bytes_split_text_as_punctuation_does(small: Native) -> None:
    assert small.encode(b"ab\xffcd") == (
        small.encode("ab") + small.encode(b"\xff") + small.encode("cd")
    )
    assert len(small.encode(b"\xff\xc3\xed\xa0\x80")) == 5
    assert small.encode("a\0b") == small.encode("a") + small.encode("\0") + small.encode("b")


# ---- Time, threads, memory ---------------------------------------------------------------------


def seconds(call: Callable[[], object]) -> float:
    """The best of three, of this thread's own time: other processes do not count."""
    best = float("inf")
    for _ in range(3):
        begin = time.thread_time()
        call()
        best = min(best, time.thread_time() - begin)
    return best


@pytest.mark.parametrize(
    "unit",
    ["a", " ", "aaaa ", "\u4e2d", "\u0301", "'", "<|endof", "\xff", "word and 12 more.\n"],
    ids=ascii,
)
def test_time_is_linear_in_the_text(small: Native, unit: str) -> None:
    size = 60_000
    short = (unit * size)[:size].encode()
    long = short * 16
    small.encode(short)
    ratio = seconds(lambda: small.encode(long)) / seconds(lambda: small.encode(short))
    # 16 if linear, 256 if quadratic; caches and a busy machine take their share.
    assert ratio < 64
    assert len(small.encode(long)) <= len(long)


def test_threads_share_a_tokenizer(small: Native) -> None:
    texts = [text * (i + 1) for i, text in enumerate(CORPUS)]
    expected = [small.encode(text) for text in texts]
    wrong: list[int] = []

    def work(first: int) -> None:
        for step in range(60):
            i = (first + step) % len(texts)
            ids = small.encode(texts[i])
            if ids != expected[i] or small.decode(ids, False) != texts[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stream_outlives_its_tokenizer(tmp_path: Path) -> None:
    save_vocabulary(trained(400), tmp_path)
    native = Native(tmp_path)
    library = _capi.library()
    stream = c_void_p()
    _capi.check(library.fastgen_text_stream_create(native.handle, 1, byref(stream)))
    ids = native.encode("naïve")
    native.close()
    text, size = c_char_p(), c_size_t()
    tokens = (c_int32 * len(ids))(*ids)
    _capi.check(
        library.fastgen_text_stream_push(stream, tokens, len(ids), byref(text), byref(size))
    )
    assert text.value is not None
    assert text.value.decode() == "naïve"
    library.fastgen_text_stream_free(stream)


def test_buffers_that_are_too_small_are_filled(small: Native) -> None:
    library = _capi.library()
    ids = small.encode("one two three four")
    tokens = (c_int32 * 3)(-7, -7, -7)
    length = c_size_t()
    data = b"one two three four"
    arguments = (small.handle, data, len(data))
    _capi.check(library.fastgen_tokenizer_encode(*arguments, tokens, 2, byref(length)))
    assert (length.value, tokens[:]) == (len(ids), [*ids[:2], -7])
    native_ids = (c_int32 * len(ids))(*ids)
    text = ctypes.create_string_buffer(b"xxxxxx")
    _capi.check(
        library.fastgen_tokenizer_decode(
            small.handle, native_ids, len(ids), 1, text, 5, byref(length)
        )
    )
    assert (length.value, text.raw) == (len(data), b"one tx\0")


def test_arguments_are_checked(small: Native) -> None:
    library = _capi.library()
    length = c_size_t()
    for arguments, message in (
        ((None, b"a", 1, None, 0, byref(length)), "tokenizer is NULL"),
        ((small.handle, None, 1, None, 0, byref(length)), "text is NULL"),
        ((small.handle, b"a", 1, None, 1, byref(length)), "tokens is NULL"),
        ((small.handle, b"a", 1, None, 0, None), "length is NULL"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            _capi.check(library.fastgen_tokenizer_encode(*arguments))
    with pytest.raises(InvalidArgumentError, match="skip_special_tokens is 2, it must be 0 or 1"):
        _capi.check(
            library.fastgen_tokenizer_decode(small.handle, None, 0, 2, None, 0, byref(length))
        )
    with pytest.raises(InvalidArgumentError, match="tokens has -5, a token id must be at least 0"):
        small.decode([1, -5])
    library.fastgen_tokenizer_free(None)
    library.fastgen_text_stream_free(None)
    assert library.fastgen_tokenizer_vocab_size(None) == 0
    assert small.encode("") == []
    assert small.decode([]) == ""


# ---- Files -------------------------------------------------------------------------------------


def write(directory: Path, **files: str | bytes | dict[str, Any]) -> Path:
    """Writes files; `vocab_json` is `vocab.json`."""
    for name, content in files.items():
        stem, suffix = name.rsplit("_", 1)
        path = directory / f"{stem}.{suffix}"
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab_json": "[]"}, r"vocab.json: is a list, it must be an object"),
        ({"vocab_json": "{"}, r"vocab.json: is not valid JSON"),
        ({"vocab_json": {}}, r"vocab.json: has no tokens"),
        ({"vocab_json": {"": 0}}, r"vocab.json: token 0 is empty"),
        ({"vocab_json": {"a": 0, "b": 0}}, r"vocab.json: id 0 is there twice, for 'b' and"),
        ({"vocab_json": '{"a": 0, "a": 1}'}, r"the key 'a' is given twice"),
        ({"vocab_json": {"a": -1}}, r"token 'a' has id -1, it must be an integer from 0 to"),
        ({"vocab_json": {"a": 1 << 20}}, r"has id 1048576, it must be an integer from 0 to"),
        ({"vocab_json": {"a": 1.5}}, r"token 'a' has id 1.5, it must be an integer"),
        ({"vocab_json": {"a": "x"}}, r"token 'a' has id 'x', it must be an integer"),
        ({"vocab_txt": ""}, r"vocab.txt: has no tokens"),
        ({"vocab_txt": "a\nb\na\n"}, r"vocab.txt: token 'a' is there twice"),
        ({"vocab_txt": b"a\nb\xff\n"}, r"vocab.txt: line 2, 'b\\xff', is not UTF-8"),
        ({"vocab_txt": "\n" * (1 << 20) + "a"}, r"vocab.txt: has more than 1048576 lines"),
        ({"merges_txt": "a"}, r"merges.txt: line 1 is 'a', it must be two tokens"),
        ({"merges_txt": "a b c"}, r"line 1 is 'a b c', it must be two tokens"),
        ({"merges_txt": "a b\n b"}, r"line 2 is ' b', it must be two tokens"),
        ({"merges_txt": "a b\n\na b"}, r"line 2 is empty, and not the last one"),
        ({"merges_txt": b"\xff a"}, r"merges.txt: line 1, '\\xff a', is not UTF-8"),
        ({"merges_txt": "a x"}, r"merge 1, 'a x', needs the token 'x', which is not in the"),
        ({"merges_txt": "a b\nb a"}, r"merges.txt: merge 2, 'b a', needs the token 'ba'"),
        ({"merges_txt": "a b\na b"}, r"merges.txt: merge 'a b' is there twice"),
        ({"special_tokens_map_json": "3"}, r"special_tokens_map.json: is 3, it must be an object"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    good = {"vocab_json": {"a": 0, "b": 1, "ab": 2}, "merges_txt": "#version: 0.2\na b\n"}
    if "vocab_txt" in files:
        del good["vocab_json"]
    Native(write(tmp_path, **{"vocab_json": {"a": 0, "b": 1, "ab": 2}}, merges_txt="a b")).close()
    (tmp_path / "vocab.json").unlink()
    write(tmp_path, **{**good, **files})
    with pytest.raises(ModelFileError, match=message):
        Native(tmp_path)


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    """A good one, with members of it, or of its model, replaced."""
    document: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    }
    for key, value in changes.items():
        (document if key in document else document["model"])[key] = value
    return document


def added(**changes: Any) -> dict[str, Any]:
    return {"added_tokens": [{"id": 3, "content": "<x>", "special": True, **changes}]}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": 3}, ModelFileError, "'model' of the file is 3, which is not what it must be"),
        ({"type": "WordPiece"}, UnsupportedError, "'model' is of type 'WordPiece', it must be"),
        ({"vocab": []}, ModelFileError, "'vocab' of 'model' is a list"),
        ({"merges": [3]}, ModelFileError, "merge 1 is 3, it must be two tokens"),
        ({"merges": [["a"]]}, ModelFileError, "merge 1 is a list, it must be two tokens"),
        ({"dropout": 0.1}, UnsupportedError, "'dropout' of 'model' is 0.1, it must be null"),
        ({"end_of_word_suffix": "</w>"}, UnsupportedError, "'end_of_word_suffix' of 'model' is"),
        ({"byte_fallback": True}, UnsupportedError, "'byte_fallback' of 'model' is true"),
        ({"normalizer": {"type": "NFC"}}, UnsupportedError, "'normalizer' is an object, it must"),
        ({"pre_tokenizer": None}, UnsupportedError, "'pre_tokenizer' is missing, it must be"),
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            UnsupportedError,
            "'pre_tokenizer' is of type 'Whitespace', it must be of type ByteLevel",
        ),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            UnsupportedError,
            "'add_prefix_space' of 'pre_tokenizer' is true, it must be false",
        ),
        ({"decoder": {"type": "BPEDecoder"}}, UnsupportedError, "'decoder' is of type 'BPEDec"),
        ({"added_tokens": {}}, ModelFileError, "'added_tokens' is an object, it must be a list"),
        ({"added_tokens": [1]}, ModelFileError, "added token 1 is 1, it must be an object"),
        (added(content=3), ModelFileError, "'content' of added token 1 is 3"),
        (added(content=""), ModelFileError, "token 3 is empty"),
        (added(id=-1), ModelFileError, "added token 1 has id -1, it must be from 0 to"),
        (added(id=1), ModelFileError, "id 1 is there twice"),
        (added(content="a"), ModelFileError, "'a' has id 3, and id 0 in the vocabulary"),
        (added(special=1), ModelFileError, "'special' of added token 1 is 1, it must be true or"),
        (added(lstrip=True), UnsupportedError, "'lstrip' of the added token '<x>' is true"),
    ],
)
def test_a_bad_tokenizer_json_is_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    Native(write(tmp_path, tokenizer_json=tokenizer_json(**added()))).close()
    write(tmp_path, tokenizer_json=tokenizer_json(**changes))
    with pytest.raises(kind, match=message):
        Native(tmp_path)


def test_directories_without_a_tokenizer(tmp_path: Path) -> None:
    for directory in (tmp_path / "absent", tmp_path):
        with pytest.raises(NotFoundError, match=r"has no tokenizer, which is tokenizer.json, or"):
            Native(directory)
    write(tmp_path, vocab_json={"a": 0})
    with pytest.raises(NotFoundError, match=r"with merges.txt"):
        Native(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(NotFoundError, match=r"tokenizer.json: cannot be opened"):
        Native(tmp_path)


def test_a_vocabulary_may_lack_bytes_and_ids(tmp_path: Path) -> None:
    native = Native(write(tmp_path, vocab_txt="a\r\n\r\nb\r\nab", merges_txt="a b\r\n\r\n"))
    assert native.vocab_size == 3
    assert native.encode("aabb") == [0, 3, 2]
    assert native.decode([0, 1, 3, 4]) == "aab"
    with pytest.raises(
        InvalidArgumentError, match=r"text has the byte '\\xc3' at 2, for which the tokenizer's"
    ):
        native.encode("abé")
    native.close()


@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt", "merges.txt", "tokenizer.json"])
def test_damaged_files_never_do_harm(tmp_path: Path, name: str) -> None:
    """Truncations and changed bytes: an error with a sentence, or a tokenizer that works."""
    backend = trained(300)
    save_vocabulary(backend, tmp_path, lines=name == "vocab.txt")
    if name == "tokenizer.json":
        backend.save(str(tmp_path / name), pretty=False)
    path = tmp_path / name
    whole = path.read_bytes()
    rng = random.Random(5)
    loaded = 0
    messages = []
    for step in range(300):
        data = bytearray(whole)
        if step % 3 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(step % 3):
            data[rng.randrange(len(data))] = rng.choice(b'\0\n "{}[],:\\a\xff')
        path.write_bytes(data)
        try:
            native = Native(tmp_path)
        except (ModelFileError, UnsupportedError) as error:
            messages.append(str(error))
            continue
        loaded += 1
        # A byte whose token is gone cannot be encoded; everything else comes back as it was.
        with contextlib.suppress(InvalidArgumentError):
            assert native.decode(native.encode(CORPUS[0]), False) == CORPUS[0]
        native.close()
    assert 0 < loaded < 300
    for message in messages:
        assert re.fullmatch(re.escape(str(tmp_path)) + r"/\S+: [^\n]+", message)


# ---- The tables of Unicode ---------------------------------------------------------------------


def table_maker() -> ModuleType:
    path = ROOT / "tools" / "make_unicode_tables.py"
    spec = importlib.util.spec_from_file_location("make_unicode_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unicode_tables_are_those_of_the_script() -> None:
    maker = table_maker()
    header = TABLES.read_text()
    version, changes = maker.parse(header)
    database = maker.newest_database()
    if database.unidata_version == version:
        assert maker.render(database) == header
    assert changes[0][0] == 0
    assert all(a[0] < b[0] and a[1] != b[1] for a, b in zip(changes, changes[1:]))
    # An older Unicode knows fewer characters, and has every one of them in the same class.
    assert maker.as_numbers(version) >= maker.as_numbers(unicodedata.unidata_version)
    ends = [first for first, _ in changes[1:]] + [sys.maxunicode + 1]
    for (first, kind), end in zip(changes, ends):
        for code in range(first, end):
            known = unicodedata.category(chr(code)) != "Cn"
            assert not known or maker.class_of(code) == kind, hex(code)
