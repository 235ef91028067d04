"""Tensors of a framework through the C API: batches, checksums, and what memory is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fastgen import _capi
from fastgen.errors import FastgenError, InvalidArgumentError, UnsupportedError
from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel, MemoryTensor, checksum
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors

SHAPE = GPTShape(97, 64, 32, 2, 4, 64)
GREEDY = GenerationOptions(max_length=6, eos_token_id=-1)
SAMPLING = GenerationOptions(
    max_length=9, decode_strategy="sampling", top_k=20, eos_token_id=-1, num_return_sequences=2
)
PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5]]
TYPES: dict[Any, int] = {np.int32: _capi.INT32, np.int64: _capi.INT64}


@pytest.fixture(scope="module")
def model() -> Iterator[EngineModel]:
    with EngineModel(SHAPE, make_tensors(SHAPE, WeightRecipe(1))) as loaded:
        yield loaded


def tensor(array: np.ndarray) -> MemoryTensor:
    return MemoryTensor(array.ctypes.data, TYPES[array.dtype.type], array.shape)


def padded(prompts: list[list[int]], dtype: Any, fill: int = -3) -> np.ndarray:
    """Rows of one array. What lies behind a prompt is no token at all."""
    rows = np.full((len(prompts), max(map(len, prompts))), fill, dtype)
    for row, prompt in zip(rows, prompts):
        row[: len(prompt)] = prompt
    return rows


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_batch_is_what_its_rows_are(model: EngineModel, dtype: Any) -> None:
    each = [GREEDY, SAMPLING, replace(GREEDY, max_length=4)]
    rows = padded(PROMPTS, dtype)
    with model.session() as session:
        ids = session.submit_batch(tensor(rows), each, [3, 1, 5], seed=7)
        session.run()
        expected = [session.get(i) for i in ids]
        output = np.full((len(ids), 11), -9, dtype)
        scores = np.zeros(len(ids), np.float32)
        session.get_batch(ids, tensor(output), 96, scores.ctypes.data)
        alone: list[int] = []
        for row, (prompt, options) in enumerate(zip(PROMPTS, each)):
            alone += session.submit(prompt, options, 7, [0, 1, 3][row])
        session.run()
        again = [session.get(i) for i in alone]
    assert [s.tokens for s in again] == [s.tokens for s in expected]
    for row, sequence in zip(output, expected):
        length = len(sequence.tokens)
        assert row[:length].tolist() == sequence.tokens
        assert (row[length:] == 96).all()
    assert scores.tolist() == [s.score for s in expected]


def test_full_rows_and_default_options(model: EngineModel) -> None:
    rows = np.array([[4, 5], [6, 7]], np.int32)
    lib = _capi.library()
    batch = _capi.Batch()
    lib.fastgen_batch_init(ctypes.byref(batch))
    batch.tokens, batch.rows, batch.width = rows.ctypes.data, 2, 2
    # A program compiled before these members existed.
    batch.struct_size = _capi.Batch.lengths.offset
    batch.lengths = ctypes.cast(1, ctypes.POINTER(ctypes.c_int64))
    batch.device = b"nowhere"
    ids = (ctypes.c_uint64 * 2)()
    with model.session() as session:
        _capi.check(lib.fastgen_session_submit_batch(session._handle, ctypes.byref(batch), ids))
        session.run()
        assert [len(session.get(i).tokens) for i in ids] == [20, 20]
        assert session.get(ids[1]).tokens == model.generate([[6, 7]], GenerationOptions())[0].tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lengths": [3, 1, 6]},
            r"row 2 of the batch: batch.lengths\[2\] is 6, it must be from 1 to 5 \(width\)",
        ),
        ({"lengths": [0, 1, 5]}, r"row 0 of the batch: batch.lengths\[0\] is 0"),
        (
            {"lengths": [4, 1, 5]},
            r"row 0 of the batch: prompt\[3\] is -3, token ids must be from 0 to 96",
        ),
        ({"dtype": 0}, r"batch.dtype is 0, it must be 3 \(int32\) or 4 \(int64\)"),
        ({"dtype": 77}, r"batch.dtype is 77"),
        ({"shape": (0, 5)}, r"batch.rows is 0, it must be at least 1"),
        ({"shape": (3, 0)}, r"batch.width is 0, it must be at least 1"),
        ({"pointer": 0}, r"batch.tokens is NULL"),
        ({"shape": (3, 2**62)}, r"more than memory can hold"),
        (
            {"options": [GREEDY, replace(GREEDY, max_length=90), GREEDY]},
            r"row 1 of the batch: the prompt has 1 ",
        ),
        ({"device": "tpu"}, r"batch.device=tpu is not one of: cpu, cuda, cuda:<index>"),
        ({"device": "cuda:x"}, r"batch.device=cuda:x is neither cuda nor cuda:<index>"),
        ({"device": "cuda:3"}, r"batch.device is cuda:3 and the model runs on cpu"),
    ],
)
def test_batches_that_are_refused(
    model: EngineModel, changes: dict[str, Any], message: str
) -> None:
    rows = padded(PROMPTS, np.int64)
    given = replace(tensor(rows), **{k: changes[k] for k in changes if k in ("dtype", "pointer")})
    given = replace(given, shape=changes.get("shape", given.shape))
    options = changes.get("options", [GREEDY] * given.shape[0])
    lengths = changes.get("lengths", [3, 1, 5]) if given.shape[0] == 3 else None
    with model.session() as session:
        with pytest.raises(FastgenError, match=message):
            session.submit_batch(given, options, lengths, device=changes.get("device"))
        # None of the rows was taken.
        assert session.step() == 0
        ids = session.submit_batch(tensor(rows), [GREEDY], [3, 1, 5])
        session.run()
        assert all(session.get(i).finish_reason == "length" for i in ids)


def test_tokens_beyond_32_bits(model: EngineModel) -> None:
    rows = np.array([[5, 2**32 + 5]], np.int64)
    with model.session() as session, pytest.raises(InvalidArgumentError, match="is 4294967301"):
        session.submit_batch(tensor(rows), [GREEDY])


def test_outputs_that_are_refused(model: EngineModel) -> None:
    each = [GREEDY, replace(GREEDY, max_length=4)]
    with model.session() as session:
        ids = session.submit_batch(tensor(np.array([[1], [2]], np.int32)), each)
        session.run()
        output = np.full((2, 6), -9, np.int32)
        cases: list[tuple[str, dict[str, Any]]] = [
            (r"output.width is 5 and sequence \d+ has 6 tokens", {"shape": (2, 5)}),
            (r"has 4 tokens and output.width is 6: output.pad_token_id must", {}),
            (r"output.dtype is 1, it must be 3", {"dtype": 1}),
        ]
        for message, changes in cases:
            with pytest.raises(InvalidArgumentError, match=message):
                session.get_batch(ids, replace(tensor(output), **changes))
        with pytest.raises(
            InvalidArgumentError, match=r"output.device is cuda:0 and the model runs"
        ):
            session.get_batch(ids, tensor(output), 0, device="cuda")
        with pytest.raises(InvalidArgumentError, match="is not a sequence of this session"):
            session.get_batch([*ids, 999], replace(tensor(output), shape=(3, 6)), 0)
        with pytest.raises(InvalidArgumentError, match="count is 0"):
            session.get_batch([], tensor(output), 0)
        assert (output == -9).all()
        session.get_batch(ids, None)  # nothing is asked for


def test_tensors_on_a_device_that_the_model_does_not_run_on() -> None:
    tensors = make_tensors(SHAPE, WeightRecipe(1))
    with pytest.raises(
        InvalidArgumentError,
        match=r"device=cpu cannot take tensors that lie on cuda:0 \(tensor_device\)",
    ):
        EngineModel(SHAPE, tensors, tensor_device="cuda")
    with pytest.raises(InvalidArgumentError, match=r"device=cuda:1 cannot .* lie on cuda:0 "):
        EngineModel(SHAPE, tensors, device="cuda:1", tensor_device="cuda:0")
    with pytest.raises(UnsupportedError, match="tensor_device=tpu is not one of: cpu, cuda, "):
        EngineModel(SHAPE, tensors, tensor_device="tpu")
    EngineModel(SHAPE, tensors, tensor_device="cpu", stream=1234).close()


def test_tensors_on_a_device_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_CUDA_LIBRARY", "/nonexistent/libfastgen_cuda.so")
    tensors = make_tensors(SHAPE, WeightRecipe(1))
    for call in (
        lambda: EngineModel(SHAPE, tensors, device="cuda:0", tensor_device="cuda"),
        lambda: checksum(tensors, "cuda:0"),
    ):
        with pytest.raises(UnsupportedError, match=r"device=cuda|no usable NVIDIA device") as info:
            call()
        assert "libfastgen_cuda" in str(info.value) or "NVIDIA" in str(info.value)


def test_files_lie_on_the_host() -> None:
    options = _capi.ModelOptions()
    lib = _capi.library()
    lib.fastgen_model_options_init(ctypes.byref(options))
    options.device = options.tensor_device = b"cuda:2"
    handle = ctypes.c_void_p()
    status = lib.fastgen_model_load(b".", ctypes.byref(options), ctypes.byref(handle))
    assert status == _capi.INVALID_ARGUMENT
    assert "tensor_device is cuda:2, it must be NULL or cpu" in _capi.last_error()


def test_the_checksum_sees_every_element() -> None:
    rng = np.random.default_rng(3)
    tensors = {"a": rng.standard_normal((33, 65)), "b": rng.standard_normal(3)}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    begin = checksum(tensors)
    assert begin == checksum({name: array.copy() for name, array in tensors.items()})
    seen = {begin}
    for name, array in tensors.items():
        flat = array.reshape(-1)
        for index in range(flat.size):
            kept = flat[index]
            flat[index] = np.nextafter(kept, np.float32(9))
            seen.add(checksum(tensors))
            flat[index] = kept
        assert checksum(tensors) == begin, name
    assert len(seen) == 1 + sum(array.size for array in tensors.values())
    swapped = {"a": tensors["b"], "b": tensors["a"]}
    assert checksum(swapped) != begin
    with pytest.raises(UnsupportedError, match="device=tpu is not one of"):
        checksum(tensors, "tpu")
    with pytest.raises(InvalidArgumentError, match=r"tensors\[0\].data is NULL"):
        checksum({"a": MemoryTensor(0, _capi.FLOAT32, (2,))})
    with pytest.raises(InvalidArgumentError, match=r"tensors\[0\].dtype is 3"):
        checksum({"a": MemoryTensor(8, _capi.INT32, (2,))})
