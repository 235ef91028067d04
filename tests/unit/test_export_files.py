"""Exports that no Paddle wrote, good and bad: what libfastgen and Generator make of them.

The files are made by hand, because Paddle writes good ones only, and tests of a reader should not
need it. `tests/paddle/test_export.py` has those that Paddle writes.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastgen_tests.native_tokenizer import END, Native, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen import Generator
from fastgen._checkpoint import load_directory
from fastgen._export import scan_records
from fastgen.convert import convert
from fastgen.errors import FastgenError, InvalidArgumentError, ModelFileError, NotFoundError
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from fastgen.tokenizer import Tokenizer

SHAPE = GPTShape(23, 16, 12, 2, 2, 20)
PROMPT = [1, 5, 3]
VARTYPES = {"float32": 5, "float16": 4, "bfloat16": 22}


def to_bytes(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":
        return (array.astype("<f4").view("<u4") >> np.uint32(16)).astype("<u2").tobytes()
    return array.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def record_header(shape: Iterable[int], dtype: str) -> bytes:
    """What Paddle writes before the bytes of a tensor."""
    desc = b"\x08" + varint(VARTYPES[dtype]) + b"".join(b"\x10" + varint(n) for n in shape)
    return struct.pack("<IQIi", 0, 0, 0, len(desc)) + desc


def make_export(directory: Path, dtype: str = "float32") -> Path:
    directory.mkdir(parents=True)
    content = b""
    tensors = []
    # Of few bits, so that every type holds the same values; in another order than the network's.
    arrays = {
        name: np.round(array * 4) / 4
        for name, array in make_tensors(SHAPE, WeightRecipe(seed=3)).items()
    }
    for name in sorted(arrays, reverse=True):
        shape = list(arrays[name].shape)
        content += record_header(shape, dtype)
        tensors.append({"name": name, "dtype": dtype, "shape": shape, "offset": len(content)})
        content += to_bytes(arrays[name], dtype)
    manifest = {
        "format": "fastgen-export",
        "format_version": 1,
        "program": "gpt.pdmodel",
        "config": {
            "vocab_size": SHAPE.vocab_size,
            "max_positions": SHAPE.max_position_embeddings,
            "hidden_size": SHAPE.hidden_size,
            "num_layers": SHAPE.num_hidden_layers,
            "num_heads": SHAPE.num_attention_heads,
            "intermediate_size": SHAPE.intermediate_size,
            "layer_norm_eps": 1e-5,
            "bos_token_id": -1,
            "eos_token_id": 0,
            "pad_token_id": -1,
        },
        "dtype": dtype,
        "generation": {},
        "inputs": [],
        "tokenizer": None,
        "tensors": tensors,
    }
    (directory / "gpt.pdiparams").write_bytes(content)
    write_manifest(directory, manifest)
    return directory


def write_manifest(directory: Path, manifest: Any) -> None:
    (directory / "fastgen.json").write_text(json.dumps(manifest))


def load(directory: Path) -> Generator:
    return Generator.from_pretrained(directory, num_threads=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("good") / "export")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "export"))


def refused(directory: Path, *words: str, error: type[Exception] = ModelFileError) -> None:
    with pytest.raises(error) as caught:
        load(directory)
    sentence = str(caught.value)
    assert sentence.isprintable(), repr(sentence)
    assert len(sentence) < 1000
    for word in words:
        assert word in sentence, sentence


# ---- Good exports ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_type_gives_the_same_logits(good: Path, tmp_path: Path, dtype: str) -> None:
    tensors = {
        name: (np.round(array * 4) / 4).astype(np.float32)
        for name, array in make_tensors(SHAPE, WeightRecipe(seed=3)).items()
    }
    config = {**SHAPE.huggingface_config(), "model_type": "gpt2", "eos_token_id": 0}
    expected = Generator.from_tensors(config, tensors, num_threads=1).logits(PROMPT)
    with load(make_export(tmp_path / "export", dtype)) as model:
        np.testing.assert_array_equal(model.logits(PROMPT), expected)
        assert model.info.eos_token_id == 0
        assert model.info.pad_token_id is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_python_reads_the_same_tensors(tmp_path: Path, dtype: str) -> None:
    directory = make_export(tmp_path / "export", dtype)
    config, tensors = load_directory(directory)
    again = Generator.from_tensors({**config, "model_type": "gpt2"}, tensors, num_threads=1)
    np.testing.assert_array_equal(again.logits(PROMPT), load(directory).logits(PROMPT))


@pytest.mark.parametrize("shape", [(2**31, 2**31, 4), (2**62,), (-4,), (5,)])
def test_python_refuses_records_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "gpt.pdiparams"
    header = record_header([size % 2**64 for size in shape], "float32")
    path.write_bytes(header + bytes(16))
    with pytest.raises(ModelFileError, match="truncated"):
        scan_records(path)


def test_an_export_is_not_converted(good: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="is an export"):
        convert(str(good), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- Tokenizer ---------------------------------------------------------------------------------


def test_vocabulary_files_hold_the_tokenizer(tiny: Any, tmp_path: Path) -> None:
    source = Tokenizer.from_directory(tiny.directory)
    assert source is not None
    special = source.write_vocabulary(tmp_path, 400)
    assert special == ["<|endoftext|>"]
    lines = (tmp_path / "vocab.txt").read_bytes().decode().split("\n")
    assert lines[-1] == ""  # every line ends
    for token_id, token in enumerate(lines[:-1]):
        assert source.token_to_id(token) == token_id
    manifest = {"format": "fastgen-export", "format_version": 1,
                "tokenizer": {"special_tokens": special}}  # fmt: skip
    write_manifest(tmp_path, manifest)
    copy = Tokenizer.from_directory(tmp_path)
    assert copy is not None
    for text in ("Return the naïve 中文 😀\n\t x", "<|endoftext|>a", " ", "\x00\x7f\u2028"):
        assert copy.encode(text) == source.encode(text)
        assert copy.decode(source.encode(text)) == source.decode(source.encode(text))


def test_special_tokens_are_those_that_the_export_lists(good: Path, tmp_path: Path) -> None:
    backend = trained(400)
    backend.add_special_tokens(["[PAD]", "[PAD][X]"])
    directory = Path(shutil.copytree(good, tmp_path / "export"))
    backend.save(str(tmp_path / "tokenizer.json"))
    source = Tokenizer.from_directory(tmp_path)
    assert source is not None
    listed = source.write_vocabulary(directory, 500)
    assert listed == [END, "[PAD]", "[PAD][X]"]
    manifest = json.loads((directory / "fastgen.json").read_text())
    text = f"a[PAD]b[PAD][X]{END}c"
    for special in (listed, listed[1:], []):
        manifest["tokenizer"] = {"type": "byte-level-bpe", "special_tokens": special}
        write_manifest(directory, manifest)
        copy = Tokenizer.from_directory(directory)
        assert copy is not None
        native = Native(directory)
        ids = native.encode(text)
        assert ids == copy.encode(text)
        assert (ids == source.encode(text)) == (special == listed)
        assert native.decode(ids) == copy.decode(ids)
        native.close()
    for tokenizer in (None, 3, {}, {"special_tokens": "x"}, {"special_tokens": [1]}):
        manifest["tokenizer"] = tokenizer
        write_manifest(directory, manifest)
        with pytest.raises(ModelFileError, match=r"fastgen\.json: .*special.token"):
            Native(directory)
        with pytest.raises(ModelFileError, match=r"fastgen\.json: .*special_tokens"):
            Tokenizer.from_directory(directory)


def test_ids_without_a_token_are_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"a\n\nb\nab\n")
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\na b\n")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("abba") == [3, 2, 0]
    assert tokenizer.vocab_size == 3
    tokenizer.write_vocabulary(tmp_path / "..", 4)
    assert (tmp_path / ".." / "vocab.txt").read_bytes() == b"a\n\nb\nab\n"
    with pytest.raises(ModelFileError, match="has the id 3"):
        tokenizer.write_vocabulary(tmp_path, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"type": "WordLevel"}}, "its model is WordLevel"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not ByteLevel"),
        ({"normalizer": {"type": "NFC"}}, "normalizer NFC"),
        ({"token": {"lstrip": True}}, "takes the space"),
        ({"token": {"special": False}}, "is not special"),
        ({"token": {"content": "a\nb"}}, "does not fit in a line"),
    ],
)
def test_tokenizers_that_the_files_cannot_hold(
    tiny: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    parts = json.loads((tiny.directory / "tokenizer.json").read_text())
    for key, value in change.items():
        if key == "token":
            parts["added_tokens"][0].update(value)
        elif key == "model":
            parts["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
            parts["added_tokens"] = []
        else:
            parts[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer is not None
    with pytest.raises(ModelFileError, match=words):
        tokenizer.write_vocabulary(tmp_path, 10_000)


@pytest.mark.parametrize("line", [b"a\n", b"a b c\n", b" a\n", b"a \n"])
def test_merges_that_are_none(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"a\nb\n")
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\n" + line)
    with pytest.raises(ModelFileError, match="not a pair of tokens"):
        Tokenizer.from_directory(tmp_path)


# ---- Bad exports -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": ...}, ["format is missing"]),
        ({"format": "other"}, ["'other'", "'fastgen-export'"]),
        ({"format_version": 2}, ["format_version is 2"]),
        ({"format_version": True}, ["format_version is true"]),
        ({"program": "../gpt.pdmodel"}, ["program"]),
        ({"program": 3}, ["program is 3"]),
        ({"config": []}, ["config"]),
        ({"tensors": {}}, ["tensors"]),
        ({"tensors": [1]}, ["tensors"]),
        ({"tensors": []}, ["belong to no tensor"]),
        ({"inputs": ["input_ids"]}, ["inputs"]),
    ],
)
def test_bad_manifest(copy: Path, changes: dict[str, Any], words: list[str]) -> None:
    manifest = json.loads((copy / "fastgen.json").read_text())
    manifest.update(changes)
    write_manifest(copy, {key: value for key, value in manifest.items() if value is not ...})
    refused(copy, *words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("vocab_size", 24, ["word_embeddings", "[23, 12]"]),
        ("vocab_size", -1, ["vocab_size is -1"]),
        ("vocab_size", 2**40, ["vocab_size"]),
        ("vocab_size", "23", ["vocab_size", "'23'"]),
        ("num_layers", 1, ["left over"]),
        ("num_layers", 3, ["missing"]),
        ("num_heads", 5, ["multiple"]),
        ("layer_norm_eps", 0, ["layer_norm_eps"]),
        ("layer_norm_eps", "1", ["layer_norm_eps"]),
        ("eos_token_id", 23, ["eos_token_id is 23"]),
        ("eos_token_id", None, ["eos_token_id"]),
    ],
)
def test_bad_config(copy: Path, name: str, value: Any, words: list[str]) -> None:
    manifest = json.loads((copy / "fastgen.json").read_text())
    manifest["config"][name] = value
    write_manifest(copy, manifest)
    refused(copy, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offset": 1}, ["data at byte"]),
        ({"offset": -1}, ["offset"]),
        ({"offset": 2**62}, ["offset"]),
        ({"offset": 1.5}, ["offset"]),
        ({"shape": [12, 1]}, ["shape"]),
        ({"shape": [0]}, ["the size 0"]),
        ({"shape": [2**62, 2**62]}, ["shape"]),
        ({"shape": [1] * 9}, ["shape"]),
        ({"dtype": "float16"}, ["the type float32", "float16"]),
        ({"dtype": "int8"}, ["'int8'"]),
        ({"name": "x"}, ["has no word embedding", "'x'"]),
        ({"name": 3}, ["name"]),
        ({"name": "bell\u0007" * 1000}, ["\\x07"]),
    ],
)
def test_bad_tensor_entry(copy: Path, change: dict[str, Any], words: list[str]) -> None:
    manifest = json.loads((copy / "fastgen.json").read_text())
    manifest["tensors"][0].update(change)
    write_manifest(copy, manifest)
    refused(copy, *words)


def test_overlapping_tensors(copy: Path) -> None:
    manifest = json.loads((copy / "fastgen.json").read_text())
    manifest["tensors"].append({**manifest["tensors"][0], "name": "lm_head.weight"})
    write_manifest(copy, manifest)
    refused(copy, "'lm_head.weight' has the shape [16, 12]")


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"\1", ["version 1"]),
        (4, b"\1", ["levels of detail"]),
        (12, b"\1", ["version 1"]),
        (16, b"\xff\xff\xff\x7f", ["description of 2147483647 bytes"]),
        (16, b"\xff\xff\xff\xff", ["description of"]),
        (16, b"\x04", ["the shape [23]"]),
        (20, b"\x18", ["TensorDesc"]),
        (21, b"\x06", ["Paddle's type number 6"]),
        (23, b"\x0d", ["the shape"]),
        (24, b"\x80", ["TensorDesc"]),
    ],
)
def test_bad_record_header(copy: Path, at: int, value: bytes, words: list[str]) -> None:
    content = bytearray((copy / "gpt.pdiparams").read_bytes())
    content[at : at + len(value)] = value
    (copy / "gpt.pdiparams").write_bytes(content)
    refused(copy, "gpt.pdiparams", *words)


def test_a_byte_more(copy: Path) -> None:
    with (copy / "gpt.pdiparams").open("ab") as file:
        file.write(b"\0")
    refused(copy, "the last 1 bytes")


@pytest.mark.parametrize("name", ["fastgen.json", "gpt.pdiparams"])
def test_every_truncation(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    # Every one of a small file; of the larger every one near a border and many between.
    sizes = set(range(0, len(content), max(1, len(content) // 700)))
    for record in scan_records(copy / "gpt.pdiparams"):
        sizes |= set(range(record.offset - 30, record.offset + 2))
    for size in sorted(size for size in sizes if 0 <= size < len(content)):
        (copy / name).write_bytes(content[:size])
        refused(copy)


@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.integers(0, 2**31), mask=st.integers(1, 255), header=st.booleans())
def test_flipped_bytes(copy: Path, good: Path, place: int, mask: int, header: bool) -> None:
    name = "gpt.pdiparams" if header else "fastgen.json"
    content = bytearray((good / name).read_bytes())
    if header:
        records = scan_records(good / name)
        offset = records[place % len(records)].offset
        places = range(offset - 24, offset)
        place = places[place // len(records) % len(places)]
    content[place % len(content)] ^= mask
    (copy / name).write_bytes(content)
    sentence = ""
    try:
        with load(copy) as model:
            # Of the JSON, what says nothing about the tensors may change; of the headers nothing,
            # but some of these bytes belong to the tensor before.
            assert model.logits(PROMPT).shape == (3, SHAPE.vocab_size)
    except FastgenError as error:
        sentence = str(error)
    finally:
        shutil.copyfile(good / name, copy / name)
    assert sentence == "" or sentence.isprintable()


@pytest.mark.parametrize("name", ["fastgen.json", "gpt.pdiparams"])
def test_one_file_missing(copy: Path, name: str) -> None:
    (copy / name).unlink()
    refused(copy, name, error=NotFoundError)


@pytest.mark.parametrize("name", ["fastgen.json", "gpt.pdiparams"])
def test_symlink_loop(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / name).symlink_to(copy / "other")
    (copy / "other").symlink_to(copy / name)
    refused(copy, name, error=NotFoundError)
