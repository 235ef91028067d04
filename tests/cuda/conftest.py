"""The op library, where there is a device to run it on."""

from __future__ import annotations

import pytest

from tests.cuda import ops


@pytest.fixture(scope="session")
def library() -> ops.Library:
    """Skips where PyTorch finds no CUDA device."""
    torch = pytest.importorskip("torch", reason="the op table runs on tensors of PyTorch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return ops.Library()
