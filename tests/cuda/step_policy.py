"""How steps of few rows run on the CUDA device: as one kernel where that is possible, or not."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from fastgen import _capi


def steps_as_one_kernel(policy: int = 0) -> int:
    """How many steps ran as one kernel so far; sets how the next ones run."""
    library = ctypes.CDLL(str(_capi.library_path().resolve().parent / "libfastgen_cuda.so"))
    library.fastgen_cuda_test_step_policy.restype = ctypes.c_int64
    return int(library.fastgen_cuda_test_step_policy(policy))


@contextmanager
def kernels_only() -> Iterator[None]:
    """Steps of few rows run as those of many."""
    steps_as_one_kernel(1)
    try:
        yield
    finally:
        steps_as_one_kernel(0)
