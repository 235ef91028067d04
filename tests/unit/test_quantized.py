"""Weights rounded ahead of time: the model is the one that loading would have made, bit by bit."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastgen_tests.model_files import safetensors_bytes, split_file

from fastgen import Generator, _capi, _quantize
from fastgen.convert import convert, load_directory, write_directory
from fastgen.errors import InvalidArgumentError, ModelFileError
from fastgen.testing.reference import normalised_error

DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
PROMPT = [5, 6, 7, 30, 11, 2]
# Inputs that are no multiple of 32, of 2 and of anything; outputs that are no multiple of a panel.
ODD = {"vocab_size": 67, "n_positions": 24, "n_embd": 33, "n_head": 3, "n_inner": 71}
EVEN = {"vocab_size": 128, "n_positions": 24, "n_embd": 64, "n_head": 4, "n_inner": 160}


def same_bits(a: Generator, b: Generator) -> None:
    ids = [token % a.info.vocab_size for token in PROMPT]
    assert np.array_equal(a.logits(ids).view(np.uint32), b.logits(ids).view(np.uint32))
    options = {"decode_strategy": "sampling", "max_length": 12, "seed": 3, "eos_token_id": -1}
    assert a.generate([ids], **options).token_ids == b.generate([ids], **options).token_ids


def head_of(config: dict[str, Any], tensors: dict[str, np.ndarray], kind: str) -> None:
    """Gives the model a head of its own, or a copy of the embedding."""
    if kind != "none":
        factor = np.float32(1.25 if kind == "separate" else 1.0)
        tensors["lm_head.weight"] = tensors["wte.weight"] * factor
        config["tie_word_embeddings"] = kind != "separate"


@pytest.mark.parametrize("head", ["none", "copied", "separate"])
@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_is_the_one_that_loading_makes(
    make_model: Callable[..., Any], tmp_path: Path, dtype: str, sizes: dict[str, int], head: str
) -> None:
    model = make_model(seed=4, **sizes)
    head_of(model.config, model.tensors, head)
    source = tmp_path / "source"
    write_directory(source, model.config, model.tensors, None)
    steps: list[tuple[int, int]] = []
    target = convert(
        str(source), tmp_path / "out", weight_dtype=dtype, progress=lambda *s: steps.append(s)
    )
    assert steps == [(i + 1, len(model.tensors)) for i in range(len(model.tensors))]
    with (
        Generator.from_pretrained(source, weight_dtype=dtype) as loaded,
        Generator.from_pretrained(target) as ahead,
        Generator.from_pretrained(target, weight_dtype=dtype) as asked,
    ):
        assert ahead.info == loaded.info
        assert ahead.info.weight_dtype == dtype
        same_bits(loaded, ahead)
        same_bits(loaded, asked)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_on_disk(make_model: Callable[..., Any], tmp_path: Path, dtype: str) -> None:
    """Exactly the bits of the type, and 16 for each scale, of all matrices; the rest is float32."""
    model = make_model(seed=4, **ODD)
    target = convert(str(model.directory), tmp_path / "out", weight_dtype=dtype)
    header, data = split_file(target / "model.safetensors")
    expected = 0
    for name, array in model.tensors.items():
        rows, columns = array.shape if array.ndim == 2 else (1, array.size)
        if array.ndim == 1 or name == "wpe.weight" or dtype == "float32":
            expected += 4 * array.size
        elif dtype in ("float16", "bfloat16"):
            expected += 2 * array.size
        elif name == "wte.weight":
            expected += array.size + 2 * rows * -(-columns // 32)
        else:
            scales = 2 * -(-rows // 32) * columns
            expected += scales + columns * (rows if dtype == "int8" else -(-rows // 2))
    assert len(data) == expected
    kinds = {entry["dtype"] for name, entry in header.items() if name.startswith("h.0.mlp.c_fc.w")}
    words = {
        "float32": {"F32"}, "float16": {"F16"}, "bfloat16": {"BF16"}, "int8": {"I8", "F16"},
        "int4": {"U8", "F16"},
    }  # fmt: skip
    assert kinds == words[dtype]
    named = json.loads((target / "config.json").read_text()).get("fastgen_weights", {})
    assert named.get("weight_dtype", "float32") == dtype


def hard_tensors(model: Any) -> dict[str, np.ndarray]:
    """Groups whose scales are subnormal, zero, negative or saturated."""
    tensors = dict(model.tensors)
    rng = np.random.default_rng(9)
    for name in ("wte.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight"):
        array = tensors[name] = tensors[name].copy()
        # Largest magnitudes from half the smallest subnormal scale to some dozens of it.
        sizes = 127 * 2.0**-24 * rng.uniform(0.3, 40, array.shape[1])
        rows = slice(0, 32)
        array[rows] = (rng.uniform(-1, 1, array[rows].shape) * sizes).astype(np.float32)
        array[:, 5] = 0
        array[:, 6] = -np.abs(array[:, 6])
        array[-1, 7] = 1e9
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_every_kind(make_model: Callable[..., Any], tmp_path: Path, dtype: str) -> None:
    model = make_model(seed=5, **ODD)
    source = tmp_path / "source"
    write_directory(source, model.config, hard_tensors(model), None)
    target = convert(str(source), tmp_path / "out", weight_dtype=dtype)
    with (
        Generator.from_pretrained(source, weight_dtype=dtype) as loaded,
        Generator.from_pretrained(target) as ahead,
    ):
        same_bits(loaded, ahead)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_type_is_made_of_the_stored_weights(
    make_model: Callable[..., Any], tmp_path: Path, stored: str, dtype: str
) -> None:
    """As of a float32 model that has just those weights."""
    model = make_model(seed=4, **ODD)
    target = convert(str(model.directory), tmp_path / "out", weight_dtype=stored)
    values = decoded(target, model.tensors)
    plain = tmp_path / "plain"
    write_directory(plain, model.config, values, None)
    with (
        Generator.from_pretrained(target, weight_dtype=dtype) as other,
        Generator.from_pretrained(plain, weight_dtype=dtype) as expected,
    ):
        assert other.info.weight_dtype == dtype
        if stored == "int4" and dtype == "int4":
            return  # the scales of the file are kept, which a search may not find again
        same_bits(expected, other)


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_groups_of_a_run_may_differ(
    make_model: Callable[..., Any], tmp_path: Path, stored: str
) -> None:
    """Where fastgen gives 128 inputs one scale, another writer may give each 32 their own."""
    sizes = {"vocab_size": 67, "n_positions": 24, "n_embd": 160, "n_head": 4, "n_inner": 300}
    model = make_model(seed=4, **sizes)
    uniform = convert(str(model.directory), tmp_path / "uniform", weight_dtype=stored)
    header, data = split_file(uniform / "model.safetensors")
    content = bytearray(data)
    rng = np.random.default_rng(3)
    changed = 0
    for name, entry in header.items():
        if not name.endswith(".scales") or (stored == "int4" and name != "wte.weight.scales"):
            continue
        begin, end = entry["data_offsets"]
        scales = np.frombuffer(data[begin:end], np.float16).reshape(entry["shape"])
        if stored == "int8":
            runs = np.moveaxis(scales, 1, 0) if name == "wte.weight.scales" else scales
            assert all((runs[i] == runs[i // 4 * 4]).all() for i in range(len(runs)))
        factors = rng.choice([0.25, 0.5, 1.0, 2.0], scales.shape).astype(np.float16)
        content[begin:end] = (scales * factors).tobytes()
        changed += 1
    assert changed
    directory = tmp_path / "groups"
    directory.mkdir()
    (directory / "config.json").write_bytes((uniform / "config.json").read_bytes())
    (directory / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(content)))
    with (
        Generator.from_pretrained(directory) as groups,
        Generator.from_pretrained(directory, weight_dtype="float32") as exact,
        Generator.from_pretrained(uniform) as runs_of_128,
    ):
        assert groups.info.step_bytes > runs_of_128.info.step_bytes
        ids = [token % 67 for token in PROMPT]
        assert normalised_error(groups.logits(ids), exact.logits(ids)) <= 1e-3
        assert normalised_error(runs_of_128.logits(ids), exact.logits(ids)) > 1e-2


def decoded(directory: Path, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights that the files describe, read independently of fastgen."""
    header, data = split_file(directory / "model.safetensors")
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}
    raw = {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }
    result = {}
    for name, array in like.items():
        if f"{name}.scales" in raw:
            axis = 1 if name == "wte.weight" else 0
            count = array.shape[axis]
            scales = np.repeat(raw[f"{name}.scales"].astype(np.float32), 32, axis)
            scales = np.take(scales, range(count), axis)
            if f"{name}.int8" in raw:
                whole = raw[f"{name}.int8"].astype(np.float32)
            else:
                pairs = raw[f"{name}.int4"]
                whole = np.stack([pairs & 15, pairs >> 4], 1).reshape(-1, pairs.shape[1])[:count]
                whole = whole.astype(np.float32) - 8
            result[name] = whole * scales
        elif header[name]["dtype"] == "BF16":
            result[name] = (raw[name].astype("<u4") << np.uint32(16)).view(np.float32)
        else:
            result[name] = raw[name].astype(np.float32)
        assert result[name].shape == array.shape
    return result


def test_what_may_be_read_again(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """16 bits are plain tensors, which keep their type in a copy; integers are refused."""
    model = make_model(seed=4, **ODD)
    for dtype in ("float16", "bfloat16"):
        first = convert(str(model.directory), tmp_path / dtype, weight_dtype=dtype)
        copy = convert(str(first), tmp_path / f"{dtype}-copy")
        for name in ("config.json", "model.safetensors"):
            assert (copy / name).read_bytes() == (first / name).read_bytes()
        plain = convert(str(first), tmp_path / f"{dtype}-plain", weight_dtype="float32")
        config, tensors = load_directory(plain)
        assert _quantize.KEY not in config
        assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    for dtype in ("int8", "int4"):
        first = convert(str(model.directory), tmp_path / dtype, weight_dtype=dtype)
        with pytest.raises(ModelFileError, match=f"rounded to {dtype}, which only the engine re"):
            convert(str(first), tmp_path / "again", weight_dtype="int4")
    with pytest.raises(InvalidArgumentError, match="weight_dtype is 'int3': it must be one of"):
        convert(str(model.directory), tmp_path / "again", weight_dtype="int3")
    assert not (tmp_path / "again").exists()


def test_source_tensors_of_16_bits(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model(seed=4, **ODD)
    half = {name: array.astype(np.float16) for name, array in model.tensors.items()}
    source = tmp_path / "source"
    write_directory(source, model.config, half, None)
    target = convert(str(source), tmp_path / "out", weight_dtype="int4")
    with (
        Generator.from_pretrained(source, weight_dtype="int4") as loaded,
        Generator.from_pretrained(target) as ahead,
    ):
        same_bits(loaded, ahead)


def test_threads_do_not_matter(
    make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(seed=4, **EVEN)
    files = []
    for threads in ("1", "3"):
        monkeypatch.setenv("FASTGEN_NUM_THREADS", threads)
        target = convert(str(model.directory), tmp_path / threads, weight_dtype="int4")
        files.append((target / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    monkeypatch.setenv("FASTGEN_NUM_THREADS", "none")
    with pytest.raises(ValueError, match="FASTGEN_NUM_THREADS=none is not a number of threads"):
        convert(str(model.directory), tmp_path / "none", weight_dtype="int4")
    assert not (tmp_path / "none").exists()


def test_a_matrix_without_two_dimensions(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model(seed=4, **ODD)
    model.tensors["h.0.mlp.c_fc.weight"] = model.tensors["h.0.mlp.c_fc.weight"].reshape(-1)
    source = tmp_path / "source"
    write_directory(source, model.config, model.tensors, None)
    with pytest.raises(ModelFileError, match=r"tensor h\.0\.mlp\.c_fc\.weight has shape \[2343\]"):
        convert(str(source), tmp_path / "out", weight_dtype="int8")


# ---- fastgen_quantize() ------------------------------------------------------------------------


def native_matrix(array: np.ndarray, dtype: int = _capi.FLOAT32) -> _capi.Tensor:
    matrix = _capi.Tensor()
    matrix.name = b"x"
    matrix.data = array.ctypes.data
    matrix.dtype = dtype
    matrix.num_dims = array.ndim
    matrix.shape[: array.ndim] = array.shape
    return matrix


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"matrix": None}, "matrix is NULL"),
        ({"values": None}, "values is NULL"),
        ({"weight_dtype": None}, "weight_dtype is NULL"),
        ({"scales": None}, "scales is NULL"),
        ({"is_table": 2}, "is_table is 2, it must be 0 or 1"),
        ({"weight_dtype": b"float32"}, "weight_dtype is 'float32', it must be float16, bfloat16,"),
        ({"weight_dtype": b"int3"}, "weight_dtype is 'int3', it must be float16, bfloat16, int8"),
        (
            {"weight_dtype": b"int4", "is_table": 1},
            "weight_dtype is int4 for the table 'x', it mus",
        ),
        ({"num_dims": 1}, "matrix 'x' has the shape [4], it must have two dimensions"),
        ({"shape": (0, 5)}, "tensors[0].shape of 'x' has the size 0"),
        ({"shape": (2**62, 4)}, "has too many elements"),
        ({"dtype": _capi.INT32}, "tensors[0].dtype is 3, it must be 0 (float32), 1 (float16) or"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_rounded(changes: dict[str, Any], sentence: str) -> None:
    array = np.ones((4, 5), np.float32)
    values, scales = np.zeros(20, np.int8), np.zeros(5, np.uint16)
    matrix = native_matrix(array, changes.get("dtype", _capi.FLOAT32))
    matrix.num_dims = changes.get("num_dims", 2)
    matrix.shape[:2] = changes.get("shape", array.shape)
    status = _capi.library().fastgen_quantize(
        ctypes.byref(matrix) if changes.get("matrix", True) else None,
        changes.get("is_table", 0),
        changes.get("weight_dtype", b"int8"),
        values.ctypes.data if changes.get("values", True) else None,
        scales.ctypes.data if changes.get("scales", True) else None,
    )
    assert status == _capi.INVALID_ARGUMENT
    assert sentence in _capi.last_error()
    assert not values.any()


@pytest.mark.parametrize("is_table", [0, 1])
def test_rounding_by_hand(is_table: int) -> None:
    """int8 of one group: the largest magnitude is 127 steps; a table is a layer transposed."""
    array = np.array([[1.0, -254.0, 0.0], [-0.5, 127.0, 0.0]], np.float32)
    given = np.ascontiguousarray(array.T) if is_table else array
    values, scales = np.zeros(given.shape, np.int8), np.zeros(3, np.float16)
    status = _capi.library().fastgen_quantize(
        ctypes.byref(native_matrix(given)), is_table, b"int8", values.ctypes.data,
        scales.ctypes.data,
    )  # fmt: skip
    assert status == _capi.OK
    expected = [[127, -127, 0], [-64, 64, 0]]  # ties go to even
    assert (values.T if is_table else values).tolist() == expected
    assert scales.tolist() == [float(np.float16(1 / 127)), 2.0, 0.0]
