"""How steps of few rows run on the CUDA device: as one kernel where that is possible, or not."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from fastgen import _capi

AUTOMATIC, KERNELS, CHOICE_APART, ONE_KERNEL = range(4)  # StepPolicy of csrc/cuda/cuda_device.h
_chosen = [AUTOMATIC]


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_capi.library_path().resolve().parent / "libfastgen_cuda.so"))


def _counts() -> tuple[int, int, int]:
    counts = [ctypes.c_int64() for _ in range(3)]
    _library().fastgen_cuda_test_steps(*(ctypes.byref(count) for count in counts))
    one_kernel, choosing, joined = (count.value for count in counts)
    return one_kernel, choosing, joined


def steps_as_one_kernel() -> int:
    """How many steps ran as one kernel so far."""
    return _counts()[0]


def steps_that_chose() -> int:
    """How many of these chose tokens in it."""
    return _counts()[1]


def steps_with_joined_attention() -> int:
    """How many steps were a graph of kernels, one of which is attention and its input."""
    return _counts()[2]


@contextmanager
def _policy(policy: int) -> Iterator[None]:
    _chosen.append(policy)
    _library().fastgen_cuda_test_step_policy(policy)
    try:
        yield
    finally:
        _chosen.pop()
        _library().fastgen_cuda_test_step_policy(_chosen[-1])


@contextmanager
def kernels_only() -> Iterator[None]:
    """Steps of few rows run as those of many."""
    with _policy(KERNELS):
        yield


@contextmanager
def one_kernel() -> Iterator[None]:
    """Steps of few rows are one kernel wherever they can be."""
    with _policy(ONE_KERNEL):
        yield


@contextmanager
def choice_apart() -> Iterator[None]:
    """Such steps are one kernel, but tokens are chosen by another."""
    with _policy(CHOICE_APART):
        yield
