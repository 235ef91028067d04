"""Tests of the CUDA device: skipped, with a reason, where there is none.

They need the CUDA toolkit's build of this project and Python with NumPy, PyTorch, hypothesis and
pytest; neither Paddle nor a network. ``ci/cuda.sh`` builds what is needed and runs them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgen.errors import FastgenError
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors


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
    for item in mine:
        item.add_marker(pytest.mark.skip(reason=reason))
