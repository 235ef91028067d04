"""Attention on the CPU: a row's bits are its own, whatever else is computed."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen import _capi
from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, huggingface_tensors, make_tensors
from fastgen.testing.reference import gpt2_logits, normalised_error

# Normalised mean squared error of logits, of the design.
TOLERANCES = {"float32": 1e-10, "float16": 1e-5, "bfloat16": 1e-4, "int8": 1e-3}
CACHES = tuple(TOLERANCES)
ISAS = [name for name, supported in _capi.isas() if supported]

# vocabulary, positions, hidden, layers, heads, intermediate: heads of 1, 7, 16, 20, 33, 64 and 80
SHAPES = [
    GPTShape(40, 300, 3, 2, 3, 8),
    GPTShape(50, 70, 14, 2, 2, 33),
    GPTShape(31, 600, 48, 1, 3, 40),
    GPTShape(33, 130, 60, 2, 3, 65),
    GPTShape(64, 290, 33, 2, 1, 48),
    GPTShape(40, 540, 64, 1, 1, 64),
    GPTShape(45, 100, 160, 1, 2, 64),
]


def tokens_of(shape: GPTShape, count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, shape.vocab_size, count).tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompt_at_once_is_a_prompt_step_by_step(shape: GPTShape, cache: str, isa: str) -> None:
    """Tiles of up to six rows, at every place relative to blocks and spans, against rows alone;
    many threads split the cache, one does not."""
    tensors = make_tensors(shape, WeightRecipe(seed=4))
    longest = shape.max_position_embeddings
    options = GenerationOptions(max_length=longest - 1, eos_token_id=-1)
    with EngineModel(shape, tensors, isa=isa, num_threads=1, cache_dtype=cache) as model:
        (stepped,) = model.generate([tokens_of(shape, 1)], options, keep_logits=True)
        sequence = tokens_of(shape, 1) + stepped.tokens
        assert stepped.logits is not None
        config, renamed = shape.huggingface_config(), huggingface_tensors(shape, tensors)
        expected = gpt2_logits(config, renamed, sequence)[:-1]
        assert normalised_error(stepped.logits, expected) <= TOLERANCES[cache]
        for length in {longest, longest - 1, 2, 6, 7, 33, 38, 65, min(longest, 259)}:
            at_once = model.logits(sequence[:length])
            np.testing.assert_array_equal(at_once[: longest - 1], stepped.logits[:length])
    with EngineModel(shape, tensors, isa=isa, num_threads=8, cache_dtype=cache) as model:
        np.testing.assert_array_equal(model.logits(sequence)[:-1], stepped.logits)
        (split,) = model.generate([sequence[:1]], options, keep_logits=True)
        np.testing.assert_array_equal(split.logits, stepped.logits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("threads", [1, 8])
def test_what_comes_later_does_not_touch_a_row(isa: str, cache: str, threads: int) -> None:
    """Not even where its keys and values are infinite or not numbers."""
    shape = GPTShape(40, 320, 40, 2, 2, 64)
    tensors = make_tensors(shape, WeightRecipe(seed=6))
    bad = shape.vocab_size - 1
    name = next(n for n in tensors if "word_embeddings" in n)
    tensors[name] = tensors[name].copy()
    tensors[name][bad] = 3e38
    tokens = [t % bad for t in tokens_of(shape, 320)]
    with EngineModel(shape, tensors, isa=isa, num_threads=threads, cache_dtype=cache) as model:
        clean = model.logits(tokens)
        with np.errstate(invalid="ignore"):
            assert np.isfinite(np.delete(clean, bad, axis=1)).all()
        for at in (1, 5, 6, 31, 32, 33, 100, 254, 255, 256, 257, 300):
            spoilt = model.logits([*tokens[:at], bad, *tokens[at + 1 :]])
            np.testing.assert_array_equal(
                spoilt[:at].view(np.uint32), clean[:at].view(np.uint32), err_msg=str(at)
            )
            assert np.isnan(spoilt[at:]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_several_sequences_are_no_run(isa: str) -> None:
    """Positions that follow one another by chance, of different sequences, in one step."""
    shape = GPTShape(60, 80, 24, 2, 2, 48)
    tensors = make_tensors(shape, WeightRecipe(seed=9))
    options = GenerationOptions(max_length=20, eos_token_id=-1)
    prompts = [tokens_of(shape, length) for length in (30, 31, 32, 33, 34, 5, 6, 7)]
    with EngineModel(shape, tensors, isa=isa, num_threads=2) as model:
        together = model.generate(prompts, options, keep_logits=True)
        for prompt, result in zip(prompts, together):
            (alone,) = model.generate([prompt], options, keep_logits=True)
            assert result.tokens == alone.tokens
            np.testing.assert_array_equal(result.logits, alone.logits)
