"""Bad files of weights: every one is refused with a sentence, and nothing is lost.

They are made from a good one by hand, because no writer would make them: truncated, bit-flipped,
foreign, with absurd headers, contradicting their configuration.
"""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastgen_tests.model_files import (
    FUZZ,
    HIDDEN,
    load_or_refuse,
    make_config,
    make_tensors,
    refused,
    safetensors_bytes,
    write_model,
)
from hypothesis import given
from hypothesis import strategies as st

# ---- Damaged files ---------------------------------------------------------------------------


def test_truncated(tmp_path: Path, good_directory: Path) -> None:
    content = (good_directory / "model.safetensors").read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    write_model(tmp_path)
    # In the length, in the header and around its end, in the data, before the last byte.
    places = {*range(10), *range(10, header_end, 7), *range(header_end - 5, header_end + 5)}
    places |= {*range(header_end, len(content), 97), len(content) - 1}
    for size in sorted(places):
        (tmp_path / "model.safetensors").write_bytes(content[:size])
        refused(tmp_path, "model.safetensors")


def test_bytes_after_the_end(tmp_path: Path, good_directory: Path) -> None:
    content = (good_directory / "model.safetensors").read_bytes()
    refused(write_model(tmp_path, tensors=content + b"\0"), "last 1 bytes", "no tensor")


def test_truncated_config(tmp_path: Path) -> None:
    text = json.dumps(make_config())
    for size in range(len(text)):
        refused(write_model(tmp_path, text[:size]), "config.json")


@FUZZ
@given(data=st.data())
def test_flipped_bits_of_weights(
    tmp_path_factory: pytest.TempPathFactory, good_directory: Path, data: st.DataObject
) -> None:
    content = bytearray((good_directory / "model.safetensors").read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    # Most in the header, where they hurt.
    ends = st.sampled_from([8, header_end, header_end, header_end, len(content)])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, data.draw(ends) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    directory = tmp_path_factory.getbasetemp() / "flipped-weights"
    load_or_refuse(write_model(directory, tensors=bytes(content)))


@FUZZ
@given(data=st.data())
def test_flipped_bits_of_config(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(json.dumps(make_config()).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    directory = write_model(tmp_path_factory.getbasetemp() / "flipped-config")
    (directory / "config.json").write_bytes(bytes(content))
    load_or_refuse(directory)


@FUZZ
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "wte.weight"])
                | st.text(),
                inner,
            )
        ),
    ),
    data=st.binary(max_size=64),
)
def test_arbitrary_headers(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp() / "arbitrary-header"
    refused(write_model(directory, tensors=safetensors_bytes(header, data)))


def test_foreign_files(tmp_path: Path) -> None:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", "x" * 1000)
    for content in (
        b"",
        b"{}",
        archive.read_bytes(),
        b"\x80\x02}q\x00." * 40,  # a pickle, as in model_state.pdparams
        b"GGUF\x03\0\0\0" + bytes(100),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        bytes(1000),
        np.random.default_rng(1).bytes(1000),
    ):
        refused(write_model(tmp_path / "model", tensors=content), "model.safetensors")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**63 - 1, 2**40, 100_000_001])
def test_huge_header_length(tmp_path: Path, good_directory: Path, length: int) -> None:
    content = (good_directory / "model.safetensors").read_bytes()
    bad = struct.pack("<Q", length) + content[8:]
    refused(write_model(tmp_path, tensors=bad), "model.safetensors", str(length), "header")


def one_tensor(**changes: Any) -> dict[str, Any]:
    """Header of a file with the one tensor `a` of 16 bytes."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return {"a": {key: value for key, value in entry.items() if value is not ...}}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (one_tensor(data_offsets=[0, 17]), ["'a'", "[0, 17)", "16"]),
        (one_tensor(data_offsets=[16, 0]), ["'a'", "[16, 0)"]),
        (one_tensor(data_offsets=[-16, 0]), ["'a'", "-16"]),
        (one_tensor(data_offsets=[0, 2**63 - 1]), ["'a'", str(2**63 - 1)]),
        (one_tensor(data_offsets=[0, 2**64]), ["'a'", "offset"]),
        (one_tensor(data_offsets=[0.0, 16.0]), ["'a'", "offset"]),
        (one_tensor(data_offsets=[0]), ["'a'", "'data_offsets'"]),
        (one_tensor(data_offsets=...), ["'a'", "'data_offsets'"]),
        (one_tensor(data_offsets=[0, 12], shape=[3]), ["last 4 bytes"]),
        (one_tensor(data_offsets=[4, 16], shape=[3]), ["[0, 4)", "no tensor"]),
        (one_tensor(shape=[2, 3]), ["'a'", "[2, 3]"]),
        (one_tensor(shape=[2, -2]), ["'a'", "-2"]),
        (one_tensor(shape=[2, 2.0]), ["'a'", "shape"]),
        (one_tensor(shape=[2**32, 2**32]), ["'a'", "too many"]),
        (one_tensor(shape=[2**62, 4]), ["'a'", "too many"]),
        (one_tensor(shape=[2**61]), ["'a'", "does not fill"]),
        (one_tensor(shape=[2**63]), ["'a'", "shape"]),
        (one_tensor(shape=[1] * 65), ["'a'", "65"]),
        (one_tensor(shape=...), ["'a'", "'shape'"]),
        (one_tensor(dtype="F16"), ["'a'", "F16"]),
        (one_tensor(dtype=32), ["'a'", "'dtype'"]),
        (one_tensor(dtype=...), ["'a'", "'dtype'"]),
        ({**one_tensor(), "b": one_tensor()["a"]}, ["overlaps", "'a'", "'b'"]),
        ({**one_tensor(), "b": one_tensor(data_offsets=[12, 16], shape=[1])["a"]}, ["overlaps"]),
        ({**one_tensor(), "__metadata__": {"a": 1}}, ["__metadata__"]),
        ({**one_tensor(), "__metadata__": "a"}, ["__metadata__"]),
        ({"a": [1, 2]}, ["'a'"]),
        ([1, 2], ["object"]),
        (b"", ["JSON"]),
        (b'{"a":1,"a":1}', ["'a'", "twice"]),
        (b'{"a\xff":1}', ["UTF-8"]),
        (b'{"\xed\xa0\x80":1}', ["UTF-8"]),
        (b'{"\xc0\x80":1}', ["UTF-8"]),
        (b'{"\\ud800":1}', ["surrogate"]),
        (b'{"a\n":1}', ["control character"]),
        (b'{"a":1}x', ["after the end"]),
        (b'{"a":01}', ["begin with 0"]),
        (b"[" * 100_000, ["deeper"]),
        (b'{"a":' * 100, ["deeper"]),
        (b"[" + b"0," * 1_100_000 + b"0]", ["more than"]),
        (b'{"' + b"\\u001b[31m" * 500 + b'":1}', ["\\x1b"]),
    ],
)
def test_bad_headers(tmp_path: Path, header: Any, words: list[str]) -> None:
    content = safetensors_bytes(header, bytes(16))
    refused(write_model(tmp_path, tensors=content), "model.safetensors", *words)


@pytest.mark.parametrize(
    "header",
    [
        one_tensor(),
        {**one_tensor(), "z": one_tensor(shape=[0], data_offsets=[16, 16])["a"]},
        one_tensor(dtype="F7", shape=[1]),  # a type of the future may be there, if nobody asks
    ],
)
def test_tensors_of_another_network(tmp_path: Path, header: Any) -> None:
    content = safetensors_bytes(header, bytes(16))
    refused(write_model(tmp_path, tensors=content), "no word embedding", "'a'")


def test_file_without_tensors(tmp_path: Path) -> None:
    refused(write_model(tmp_path, tensors=safetensors_bytes({}, b"")), "no tensor at all")


# ---- Tensors and configuration that do not belong together ------------------------------------


def test_missing_tensors(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    refused(write_model(tmp_path, tensors=tensors), "'transformer.h.1.mlp.c_fc.bias'", "missing")
    del tensors["transformer.ln_f.bias"]
    refused(write_model(tmp_path, tensors=tensors), "'transformer.h.1.mlp.c_fc.bias'", "2 missing")


@pytest.mark.parametrize(
    "name", ["transformer.h.0.more.weight", "score.weight", "transformer.h.0.attn.bias2"]
)
def test_left_over_tensor(tmp_path: Path, name: str) -> None:
    tensors = {**make_tensors(), name: np.zeros(3, np.float32)}
    refused(write_model(tmp_path, tensors=tensors), repr(name), "left over")


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.bool_])
def test_weights_of_a_type_that_is_not_read(tmp_path: Path, dtype: Any) -> None:
    tensors = make_tensors()
    name = "transformer.h.0.ln_1.weight"
    tensors[name] = np.ones(HIDDEN, dtype)
    refused(write_model(tmp_path, tensors=tensors), repr(name), "float32, float16 or bfloat16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 16}, ["'transformer.wte.weight'", "[17, 8]", "[17, 16]"]),
        ({"vocab_size": 18}, ["'transformer.wte.weight'", "[17, 8]", "[18, 8]"]),
        ({"n_positions": 11}, ["'transformer.wpe.weight'", "[12, 8]", "[11, 8]"]),
        ({"n_inner": 24}, ["'transformer.h.0.mlp.c_fc.weight'", "[8, 20]", "[8, 24]"]),
        ({"n_inner": None}, ["'transformer.h.0.mlp.c_fc.weight'", "[8, 20]", "[8, 32]"]),
        ({"n_layer": 3}, ["'transformer.h.2.ln_1.weight'", "12 missing"]),
        ({"n_layer": 1024}, ["'transformer.h.2.ln_1.weight'", "missing"]),
        ({"n_layer": 1}, ["'transformer.h.1.attn.c_attn.bias'", "left over"]),
    ],
)
def test_config_that_contradicts_the_weights(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    refused(write_model(tmp_path, make_config(**changes)), *words)
