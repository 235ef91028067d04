"""A device that is nearly full: sequences wait for memory, and nothing fails that can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from fastgen.errors import OutOfMemoryError
from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors

# 16 KiB of cache for a token; a prefill of 8,192 rows works in 187 MB.
SHAPE = GPTShape(1000, 1024, 1024, 4, 16, 4096)
MIB = 1 << 20
FEW_TOKENS = GenerationOptions(max_length=4, eos_token_id=-1)


@contextmanager
def free_mib(count: int) -> Iterator[None]:
    """Takes all memory of the device but so much."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - count * MIB, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del filler
        torch.cuda.empty_cache()


@pytest.fixture(scope="module", name="tensors")
def _tensors() -> dict[str, np.ndarray]:
    return make_tensors(SHAPE, WeightRecipe(4))


def prompts(count: int, length: int) -> list[list[int]]:
    """Prompts of which no two begin alike."""
    return [[(31 * i + 7 * n) % SHAPE.vocab_size for n in range(length)] for i in range(count)]


def tokens(
    model: EngineModel, batch: list[list[int]], options: GenerationOptions
) -> list[list[int]]:
    """What the model generates."""
    return [s.tokens for s in model.generate(batch, options, seed=1)]


def test_what_does_not_fit_waits(tensors: dict[str, np.ndarray]) -> None:
    """Pages must not take what the prompts need to be fed: they would fail, where some can wait."""
    batch = prompts(64, 1000)  # 1 GB of cache
    with EngineModel(SHAPE, tensors, device="cuda", weight_dtype="float16") as model:
        with free_mib(600):
            scarce = tokens(model, batch, FEW_TOKENS)
        assert tokens(model, batch, FEW_TOKENS) == scarce


def test_unused_pages_make_room(tensors: dict[str, np.ndarray]) -> None:
    """Many steps of short prompts take pages, after which few long prompts need room to be fed."""
    many_steps = GenerationOptions(max_length=1000, eos_token_id=-1)
    with EngineModel(SHAPE, tensors, device="cuda", weight_dtype="float16") as model:
        with free_mib(600):
            assert all(len(t) == 1000 for t in tokens(model, prompts(30, 3), many_steps))
            scarce = tokens(model, prompts(16, 900), FEW_TOKENS)
        assert tokens(model, prompts(16, 900), FEW_TOKENS) == scarce


def test_alone_after_many() -> None:
    """A sequence alone gets what the spaces of those before it have taken."""
    shape = GPTShape(1000, 8192, 1024, 4, 16, 4096)
    tensors = make_tensors(shape, WeightRecipe(4))
    # 134 MB of cache, beside 67 to spare. With 200 to 260 MiB the many leave less than that.
    whole = GenerationOptions(max_length=8180, eos_token_id=-1)
    with EngineModel(shape, tensors, device="cuda", weight_dtype="float16") as model:
        with free_mib(215):
            tokens(model, prompts(8, 700), FEW_TOKENS)
            scarce = tokens(model, prompts(1, 10), whole)
        assert tokens(model, prompts(1, 10), whole) == scarce


def test_too_little_for_one(tensors: dict[str, np.ndarray]) -> None:
    """The error says how much is missing, and the model goes on when there is enough."""
    with EngineModel(SHAPE, tensors, device="cuda", weight_dtype="float16") as model:
        one = prompts(1, 900)
        with free_mib(40), pytest.raises(OutOfMemoryError, match=r"needs \d+ bytes of the device"):
            model.generate(one, FEW_TOKENS, seed=1)
        assert len(tokens(model, one, FEW_TOKENS)[0]) == 4
