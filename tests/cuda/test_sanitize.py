"""Every kernel once on small shapes: what `ci/cuda.sh sanitize` runs under compute-sanitizer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel, checksum
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from tests.cuda.torch_tensors import on_device, views, with_head

SHAPES = [
    GPTShape(97, 160, 32, 1, 4, 64),
    GPTShape(515, 160, 60, 1, 5, 121),  # nothing is a multiple of anything
    GPTShape(300, 160, 256, 1, 4, 512),  # head size 64
]


GREEDY = GenerationOptions(max_length=3, eos_token_id=-1)
SAMPLING = GenerationOptions(
    max_length=3,
    decode_strategy="sampling",
    top_k=20,
    top_p=0.9,
    temperature=0.8,
    repetition_penalty=1.2,
    no_repeat_ngram_size=2,
    min_length=2,
    eos_token_id=3,
    num_return_sequences=2,
)
FEW = GenerationOptions(max_length=3, decode_strategy="sampling", top_k=4, eos_token_id=-1)


def _prompts(shape: GPTShape) -> list[list[int]]:
    return [[i * 7 % shape.vocab_size for i in range(n)] for n in (1, 5, 40, 90, 130)]


def _prefill(model: EngineModel, shape: GPTShape) -> None:
    assert np.isfinite(model.logits(_prompts(shape)[-1])).all()


def _batch(options: GenerationOptions) -> Callable[[EngineModel, GPTShape], None]:
    def run(model: EngineModel, shape: GPTShape) -> None:
        sequences = model.generate(_prompts(shape), options, seed=1)
        assert all(1 <= len(s.tokens) <= 3 for s in sequences)

    return run


def _few_rows(model: EngineModel, shape: GPTShape) -> None:
    for count in (1, 2):
        sequences = model.generate(_prompts(shape)[:count], FEW, seed=1)
        assert all(len(s.tokens) == 3 for s in sequences)


def _kept_logits(model: EngineModel, shape: GPTShape) -> None:
    (one,) = model.generate(_prompts(shape)[:1], GREEDY, keep_logits=True)
    assert one.logits is not None
    assert one.logits.shape == (3, shape.vocab_size)


PARTS = {
    "prefill": _prefill,
    "greedy": _batch(GREEDY),
    "sampling": _batch(SAMPLING),
    "few-rows": _few_rows,
    "kept-logits": _kept_logits,
}


@pytest.mark.parametrize("part", PARTS)  # apart, as racecheck takes minutes for each
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"h{s.hidden_size}")
def test_every_kernel(shape: GPTShape, dtype: str, part: str) -> None:
    tensors = make_tensors(shape, WeightRecipe(2))
    with EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as model:
        PARTS[part](model, shape)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int4"])
def test_tensors_on_the_device(dtype: str) -> None:
    import torch

    shape = SHAPES[1]
    for source in (torch.float32, torch.bfloat16):
        tensors = views(on_device(with_head(make_tensors(shape, WeightRecipe(2))), source))
        assert checksum(tensors, "cuda") == checksum(tensors, "cuda")
        kind = {"device": "cuda", "weight_dtype": dtype, "tensor_device": "cuda"}
        with EngineModel(shape, tensors, **kind) as model:
            assert np.isfinite(model.logits([1, 2, 3])).all()
