"""Every kernel set of this machine against a float64 GPT-2, over shapes that fit no vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen import _capi
from fastgen.options import GenerationOptions
from fastgen.testing import strategies as fg
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, huggingface_tensors, make_tensors
from fastgen.testing.reference import gpt2_logits, normalised_error

TOLERANCE = 1e-10  # normalised mean squared error of float32 logits

ISAS = [name for name, supported in _capi.isas() if supported]
SKIPPED = [name for name, supported in _capi.isas() if not supported]

# vocabulary, positions, hidden, layers, heads, intermediate
SHAPES = [
    GPTShape(16, 8, 8, 1, 1, 1),
    GPTShape(17, 9, 9, 1, 1, 7),
    GPTShape(31, 40, 33, 2, 3, 65),
    GPTShape(100, 70, 48, 3, 4, 192),
    GPTShape(257, 33, 127, 1, 1, 129),
    GPTShape(1000, 24, 160, 2, 2, 641),
    GPTShape(3001, 16, 320, 1, 4, 1279),
    GPTShape(64, 200, 64, 4, 2, 256),
]


def test_kernel_sets_are_known() -> None:
    names = [name for name, _ in _capi.isas()]
    assert names[0] == "generic"
    assert "generic" in ISAS
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits(shape: GPTShape, isa: str) -> None:
    tensors = make_tensors(shape, WeightRecipe(seed=3))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, shape.vocab_size, shape.max_position_embeddings).tolist()
    config, renamed = shape.huggingface_config(), huggingface_tensors(shape, tensors)
    expected = gpt2_logits(config, renamed, tokens)
    with EngineModel(shape, tensors, isa=isa, num_threads=2) as model:
        assert normalised_error(model.logits(tokens), expected) <= TOLERANCE
        # Decode steps, one row and several, from the middle of the sequence on.
        start = max(1, len(tokens) // 2)
        options = GenerationOptions(max_length=len(tokens) - start, eos_token_id=-1)
        if options.max_length:
            prompts = [tokens[:start], tokens[: start - 1] or tokens[:1], tokens[:1]]
            for result, prompt in zip(model.generate(prompts, options, keep_logits=True), prompts):
                sequence = prompt + result.tokens
                decoded = gpt2_logits(config, renamed, sequence)[len(prompt) - 1 : -1]
                assert result.logits is not None
                assert normalised_error(result.logits, decoded) <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=30)
@given(shape=fg.gpt_configs(), recipe=fg.weights(kinds=("random",)), length=st.integers(1, 128))
def test_any_shape(isa: str, shape: GPTShape, recipe: WeightRecipe, length: int) -> None:
    tensors = make_tensors(shape, recipe)
    rng = np.random.default_rng(recipe.seed)
    length = min(length, shape.max_position_embeddings)
    tokens = rng.integers(0, shape.vocab_size, length).tolist()
    renamed = huggingface_tensors(shape, tensors)
    expected = gpt2_logits(shape.huggingface_config(), renamed, tokens)
    with EngineModel(shape, tensors, isa=isa) as model:
        assert normalised_error(model.logits(tokens), expected) <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS[1:])
def test_kernel_sets_agree(isa: str) -> None:
    shape = GPTShape(517, 64, 120, 2, 5, 300)
    tensors = make_tensors(shape, WeightRecipe(seed=8))
    tokens = np.random.default_rng(2).integers(0, shape.vocab_size, 64).tolist()
    with EngineModel(shape, tensors, isa="generic") as model:
        generic = model.logits(tokens)
    with EngineModel(shape, tensors, isa=isa) as model:
        other = model.logits(tokens)
    np.testing.assert_allclose(other, generic, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not SKIPPED, reason="this machine runs every kernel set of the library")
def test_a_kernel_set_that_this_machine_lacks_is_refused() -> None:
    shape = SHAPES[0]
    with pytest.raises(RuntimeError, match=SKIPPED[0]):
        EngineModel(shape, make_tensors(shape, WeightRecipe(seed=0)), isa=SKIPPED[0])


def test_an_unknown_kernel_set_is_refused() -> None:
    shape = SHAPES[0]
    with pytest.raises(ValueError, match="isa"):
        EngineModel(shape, make_tensors(shape, WeightRecipe(seed=0)), isa="sse9")
