"""The library's own tokenizer, through the C API, against HuggingFace's `tokenizers`."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastgen_tests.native_tokenizer import (
    CORPUS,
    END,
    Native,
    byte_level,
    save_vocabulary,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers

from fastgen.models import DEFAULT_MODEL, resolve
from fastgen.tokenizer import Tokenizer

EXAMPLES = settings(deadline=None, max_examples=500)


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
