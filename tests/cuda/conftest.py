"""Tests of the CUDA device: skipped, with a reason, where there is none.

They need the CUDA toolkit's build of this project and Python with NumPy, PyTorch, hypothesis and
pytest; neither Paddle nor a network. ``ci/cuda.sh`` builds what is needed and runs them, and then
nothing may be skipped: FASTGEN_CUDA_REQUIRED=1 makes a missing device an error.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastgen.errors import FastgenError
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from tests.cuda import ops


def _reason() -> str | None:
    """Why nothing can be tested here, or None."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    shape = GPTShape(8, 4, 8, 1, 1, 8)
    try:
        EngineModel(shape, make_tensors(shape, WeightRecipe(0)), device="cuda").close()
    except FastgenError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    if not mine:
        return
    reason = _reason()
    if reason is None:
        return
    if os.environ.get("FASTGEN_CUDA_REQUIRED") == "1":
        raise pytest.UsageError(f"tests/cuda cannot run: {reason}")
    for item in mine:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def library() -> ops.Library:
    """The kernels' launchers."""
    return ops.Library()
