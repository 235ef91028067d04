"""KV caches of 16 and 8 bits on the CPU: what they lose, and that nothing else is lost."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen import Generator, _capi
from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, huggingface_tensors, make_tensors
from fastgen.testing.reference import gpt2_logits, normalised_error

ISAS = [name for name, supported in _capi.isas() if supported]
# Normalised mean squared error of logits, of the design.
BOUNDS = {"float16": 1e-5, "bfloat16": 1e-4, "int8": 1e-3}

# vocabulary, positions, hidden, layers, heads, intermediate
SHAPES = [
    GPTShape(16, 40, 3, 1, 1, 8),
    GPTShape(31, 270, 33, 2, 3, 65),  # nothing is a multiple of anything
    GPTShape(100, 70, 80, 3, 4, 192),
    GPTShape(257, 300, 127, 1, 1, 129),
    GPTShape(515, 64, 320, 2, 5, 640),
]


def tokens_of(shape: GPTShape, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, shape.vocab_size, count).tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_is_within_bounds(shape: GPTShape, dtype: str, isa: str) -> None:
    tensors = make_tensors(shape, WeightRecipe(seed=5))
    tokens = tokens_of(shape, shape.max_position_embeddings)
    expected = gpt2_logits(shape.huggingface_config(), huggingface_tensors(shape, tensors), tokens)
    with EngineModel(shape, tensors, isa=isa, cache_dtype=dtype) as model:
        error = normalised_error(model.logits(tokens), expected)
    assert error <= BOUNDS[dtype]
    assert error > 1e-12  # it is this type that was used


@pytest.mark.parametrize("dtype", ["float32", *BOUNDS])
def test_kernel_sets_agree(dtype: str) -> None:
    """They round alike, so what they differ in is the order of sums, and what that tips over."""
    shape = GPTShape(517, 300, 120, 2, 5, 300)
    tensors = make_tensors(shape, WeightRecipe(seed=8))
    tokens = tokens_of(shape, 300)
    logits = []
    for isa in ISAS:
        with EngineModel(shape, tensors, isa=isa, cache_dtype=dtype) as model:
            logits.append(model.logits(tokens))
    for other in logits[1:]:
        assert normalised_error(other, logits[0]) <= 1e-2 * BOUNDS.get(dtype, 1e-8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_rows_and_threads_do_not_matter(dtype: str, isa: str, weights: str) -> None:
    shape = GPTShape(215, 96, 60, 2, 5, 121)
    tensors = make_tensors(shape, WeightRecipe(seed=2))
    options = GenerationOptions(
        max_length=12, decode_strategy="sampling", top_k=30, top_p=0.9, eos_token_id=-1
    )
    prompts = [tokens_of(shape, 1 + 7 * i % 40, seed=i) for i in range(17)]
    types = {"weight_dtype": weights, "cache_dtype": dtype}
    with EngineModel(shape, tensors, isa=isa, num_threads=1, **types) as model:
        together = model.generate(prompts, options, seed=4, keep_logits=True)
        whole = model.logits(prompts[3] + together[3].tokens)
    np.testing.assert_array_equal(together[3].logits, whole[len(prompts[3]) - 1 : -1])
    for threads in (1, 3):
        with EngineModel(shape, tensors, isa=isa, num_threads=threads, **types) as model:
            for i in (0, 8, 16):
                (alone,) = model.generate([prompts[i]], options, 4, i, keep_logits=True)
                assert alone.tokens == together[i].tokens
                np.testing.assert_array_equal(alone.logits, together[i].logits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_large_keys_and_values_stay_finite(dtype: str, isa: str) -> None:
    """Beyond what a half can hold."""
    shape = GPTShape(64, 40, 32, 1, 2, 64)
    tensors = make_tensors(shape, WeightRecipe(seed=1))
    for name, values in tensors.items():
        if "k_proj.weight" in name or "v_proj.weight" in name:
            tensors[name] = values * np.float32(1e6)
    with EngineModel(shape, tensors, isa=isa, cache_dtype=dtype) as model:
        assert np.isfinite(model.logits(tokens_of(shape, 40))).all()


def test_bytes_of_a_position() -> None:
    taken = {}
    for dtype in (None, "float32", *BOUNDS):
        with Generator.from_pretrained("gpt2-docstrings", cache_dtype=dtype) as generator:
            assert generator.info.cache_dtype == (dtype or "float32")
            taken[dtype] = generator.info.cache_bytes_per_token
            options = GenerationOptions(max_length=8, eos_token_id=-1)
            assert len(generator.generate(["Return the"], options).token_ids[0]) == 8
    assert taken[None] == taken["float32"]
    assert taken["float16"] * 2 == taken["bfloat16"] * 2 == taken["float32"]
    scales = 5 * 7 * 2 * 4  # layers, heads
    assert (taken["int8"] - scales) * 4 == taken["float32"]


@pytest.mark.parametrize(
    ("weights", "cache"),
    [
        ("float32", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("int8", "bfloat16"),
        ("int4", "bfloat16"),
    ],
)
def test_the_default_goes_with_the_weights(weights: str, cache: str) -> None:
    with (
        Generator.from_pretrained("gpt2-docstrings", weight_dtype=weights) as default,
        Generator.from_pretrained(
            "gpt2-docstrings", weight_dtype=weights, cache_dtype=cache
        ) as named,
    ):
        assert default.info.cache_dtype == cache
        ids = list(range(1, 70))
        np.testing.assert_array_equal(default.logits(ids), named.logits(ids))


def test_a_type_that_there_is_not() -> None:
    sentence = "cache_dtype=int4 is not one that device=cpu has: float32, float16, bfloat16, int8"
    with pytest.raises(RuntimeError, match=sentence):
        Generator.from_pretrained("gpt2-docstrings", cache_dtype="int4")


@pytest.mark.parametrize(
    ("weights", "cache", "has"),
    [
        ("float32", "float16", "float32"),
        ("bfloat16", "float16", "bfloat16"),
        ("float16", "int8", "float16"),
        ("int4", "bfloat16", "float16"),
    ],
)
def test_cuda_has_the_one_that_goes_with_the_weights(weights: str, cache: str, has: str) -> None:
    sentence = (
        f"cache_dtype={cache} is not one that device=cuda has with weight_dtype={weights}: {has}$"
    )
    with pytest.raises(RuntimeError, match=sentence):
        Generator.from_pretrained(
            "gpt2-docstrings", device="cuda", weight_dtype=weights, cache_dtype=cache
        )
