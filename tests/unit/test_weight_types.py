"""Weights of 16, 8 and 4 bits on the CPU: what they lose, and that nothing else is lost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fastgen import Generator, _capi
from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import (
    GPTShape,
    Tensors,
    WeightRecipe,
    huggingface_tensors,
    make_tensors,
)
from fastgen.testing.reference import gpt2_logits, normalised_error, to_bfloat16

ISAS = [name for name, supported in _capi.isas() if supported]
# Normalised mean squared error of logits, of the design.
BOUNDS = {"float16": 1e-5, "bfloat16": 1e-4, "int8": 1e-3, "int4": 5e-2}
GROUPS = {"int8": 128, "int4": 32}  # inputs that share a scale of the weights
STEP_RUN = 128  # elements of a row in 8 bits that share a step

# vocabulary, positions, hidden, layers, heads, intermediate
SHAPES = [
    GPTShape(16, 8, 8, 1, 1, 1),
    GPTShape(31, 40, 33, 2, 3, 65),  # nothing is a multiple of anything
    GPTShape(100, 70, 48, 3, 4, 192),
    GPTShape(257, 33, 127, 1, 1, 129),
    GPTShape(3001, 16, 320, 1, 4, 1279),
]


def is_matrix(name: str) -> bool:
    """Whether it is one of a layer's; positions and vectors stay float32."""
    return name.endswith(("_proj.weight", "linear1.weight", "linear2.weight"))


def representable(
    values: npt.NDArray[np.float32], dtype: str, axis: int
) -> npt.NDArray[np.float32]:
    """Weights of about that size that the type holds exactly, whatever scale its groups get."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    rng = np.random.default_rng(values.size)
    inputs = np.moveaxis(np.empty_like(values), axis, 0)
    for begin in range(0, inputs.shape[0], GROUPS[dtype]):
        part = inputs[begin : begin + GROUPS[dtype]]
        step = np.exp2(rng.integers(-3, 2, part.shape[1]) - (9 if dtype == "int8" else 5))
        most = 127 if dtype == "int8" else 7
        q = rng.integers(-most, most + 1, part.shape)
        # The largest magnitude is what the scale follows from.
        q[rng.integers(0, len(part))] = 127 if dtype == "int8" else -8
        part[:] = q * step
    return np.ascontiguousarray(np.moveaxis(inputs, 0, axis))


def representable_tensors(tensors: Tensors, dtype: str) -> Tensors:
    """All that is packed, made representable. With int4 the embedding is int8."""
    result = dict(tensors)
    for name, values in tensors.items():
        if "word_embeddings" in name:
            result[name] = representable(values, "int8" if dtype == "int4" else dtype, 1)
        elif is_matrix(name):
            result[name] = representable(values, dtype, 0)
    return result


def rounded_rows(x: npt.NDArray[np.float64], dtype: str, isa: str) -> npt.NDArray[np.float64]:
    """What a kernel set multiplies by weights of the type: x [rows, n], or less exact numbers."""
    values = x.astype(np.float32)
    if dtype in ("int8", "int4"):
        # Runs in 8 bits, the largest magnitude of each being 127 steps.
        count = -(-x.shape[1] // STEP_RUN)
        padded = np.zeros((len(x), count * STEP_RUN), np.float32)
        padded[:, : x.shape[1]] = values
        runs = padded.reshape(len(x), count, STEP_RUN)
        most = np.abs(runs).max(axis=2, keepdims=True)
        step = np.maximum(most / np.float32(127), np.float32(1e-32))
        rounded = np.rint(runs * (np.float32(1) / step)).astype(np.float64) * step
        return rounded.reshape(padded.shape)[:, : x.shape[1]]
    if dtype == "bfloat16" and isa == "avx512_bf16":
        return to_bfloat16(values).astype(np.float64)
    return x


def tokens_of(shape: GPTShape, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, shape.vocab_size, count).tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_the_type_holds_is_not_changed(shape: GPTShape, dtype: str, isa: str) -> None:
    # Rounded rows: an element between two steps may fall to the other one in float32, which most
    # seeds have with some shape and type. None of this one's does.
    tensors = representable_tensors(make_tensors(shape, WeightRecipe(seed=10)), dtype)
    tokens = tokens_of(shape, shape.max_position_embeddings)
    expected = gpt2_logits(
        shape.huggingface_config(),
        huggingface_tensors(shape, tensors),
        tokens,
        lambda x: rounded_rows(x, dtype, isa),
    )
    types = {"weight_dtype": dtype, "cache_dtype": "float32"}
    with EngineModel(shape, tensors, isa=isa, num_threads=2, **types) as model:
        error = normalised_error(model.logits(tokens), expected)
    kept = dtype == "float16" or (dtype == "bfloat16" and isa != "avx512_bf16")
    assert error <= (1e-10 if kept else 1e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_rounding_is_within_bounds(dtype: str, isa: str) -> None:
    shape = GPTShape(1000, 64, 160, 3, 4, 640)
    tensors = make_tensors(shape, WeightRecipe(seed=5))
    tokens = tokens_of(shape, 64)
    expected = gpt2_logits(shape.huggingface_config(), huggingface_tensors(shape, tensors), tokens)
    with EngineModel(shape, tensors, isa=isa, weight_dtype=dtype) as model:
        error = normalised_error(model.logits(tokens), expected)
    assert error <= BOUNDS[dtype]
    assert error > BOUNDS[dtype] * 1e-3  # it is this type that was used


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_rows_and_threads_do_not_matter(dtype: str, isa: str) -> None:
    """Bit by bit: one row and many, one thread and more, a prompt at once and step by step."""
    shape = GPTShape(515, 96, 60, 2, 5, 121)
    tensors = make_tensors(shape, WeightRecipe(seed=2))
    options = GenerationOptions(
        max_length=12, decode_strategy="sampling", top_k=30, top_p=0.9, eos_token_id=-1
    )
    prompts = [tokens_of(shape, 1 + 7 * i % 40, seed=i) for i in range(17)]
    with EngineModel(shape, tensors, isa=isa, num_threads=1, weight_dtype=dtype) as model:
        together = model.generate(prompts, options, seed=4, keep_logits=True)
        whole = model.logits(prompts[3] + together[3].tokens)
    assert together[3].logits is not None
    assert (together[3].logits == whole[len(prompts[3]) - 1 : -1]).all()
    # One thread takes all panels of a product in one piece, three take few at a time.
    for threads in (1, 3):
        with EngineModel(shape, tensors, isa=isa, num_threads=threads, weight_dtype=dtype) as model:
            for i in (0, 8, 16):
                (alone,) = model.generate([prompts[i]], options, 4, i, keep_logits=True)
                assert alone.tokens == together[i].tokens
                assert alone.logits is not None
                assert (alone.logits == together[i].logits).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_large_weights_stay_finite(dtype: str) -> None:
    shape = GPTShape(64, 16, 32, 1, 2, 64)
    tensors = make_tensors(shape, WeightRecipe(seed=1))
    tensors["gpt.decoder.layers.0.linear2.weight"][5] = 1e6
    with EngineModel(shape, tensors, weight_dtype=dtype) as model:
        assert np.isfinite(model.logits(tokens_of(shape, 16))).all()


def test_bytes_of_a_step() -> None:
    """A step reads what the type promises, and the model says which type it is."""
    read = {}
    for dtype in ("float32", *BOUNDS):
        with Generator.from_pretrained("gpt2-docstrings", weight_dtype=dtype) as generator:
            assert generator.info.weight_dtype == dtype
            read[dtype] = generator.info.step_bytes
            options = GenerationOptions(max_length=8, eos_token_id=-1)
            assert len(generator.generate(["Return the"], options).token_ids[0]) == 8
    # Vectors stay float32, and rows are rounded up to whole groups and panels. With int4 the head
    # is int8: 2048 outputs beside 12 times 224 in each of five layers.
    head = 2048 / (2048 + 5 * 12 * 224)
    int8 = 65 / 256
    int4 = 9 / 64 * (1 - head) + int8 * head
    shares = {"float16": 1 / 2, "bfloat16": 1 / 2, "int8": int8, "int4": int4}
    for dtype, share in shares.items():
        assert share <= read[dtype] / read["float32"] < 1.1 * share


def test_a_type_that_there_is_not() -> None:
    with pytest.raises(RuntimeError, match="weight_dtype=int3 is not one that device=cpu has"):
        Generator.from_pretrained("gpt2-docstrings", weight_dtype="int3")
