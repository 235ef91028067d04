"""device="cuda" where there is no GPU: what is missing is said, and nothing else is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(os.environ.get("FASTGEN_TEST_CUDA_LIBRARY", "/nonexistent"))

PROGRAM = """
import sys
from fastgen.errors import FastgenError
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors

shape = GPTShape(8, 4, 8, 1, 1, 8)
tensors = make_tensors(shape, WeightRecipe(0))
for _ in range(2):
    try:
        EngineModel(shape, tensors, device=sys.argv[1]).close()
        print("ok")
    except FastgenError as error:
        print(type(error).__name__, error)
EngineModel(shape, tensors).close()
"""


def attempt(device: str = "cuda", **environment: str) -> str:
    """What two attempts say, which must be the same."""
    clean = {k: v for k, v in os.environ.items() if k != "FASTGEN_CUDA_LIBRARY"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, device],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == second
    return first


def test_the_library_is_missing() -> None:
    says = attempt()
    if says == "ok":
        pytest.skip("libfastgen_cuda and a GPU are here")
    assert says.startswith(
        (
            "UnsupportedError device=cuda needs libfastgen_cuda.so beside libfastgen",
            "UnsupportedError device=cuda: there is no usable NVIDIA device",
        )
    )
    says = attempt(FASTGEN_CUDA_LIBRARY="/nonexistent/libfastgen_cuda.so")
    assert says.startswith(
        "UnsupportedError device=cuda: FASTGEN_CUDA_LIBRARY=/nonexistent/libfastgen_cuda.so"
    )


def test_another_library() -> None:
    says = attempt(FASTGEN_CUDA_LIBRARY="libm.so.6")
    assert "is no library of fastgen" in says


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "cuda:-1", "cuda0", "tpu", "cuda:99999"])
def test_devices_that_do_not_exist(device: str) -> None:
    says = attempt(device)
    assert f"device={device}" in says
    assert "cuda:<index>" in says


@pytest.mark.skipif(not LIBRARY.exists(), reason="libfastgen_cuda was not built: no nvcc")
def test_there_is_no_gpu() -> None:
    says = attempt(FASTGEN_CUDA_LIBRARY=str(LIBRARY))
    if says == "ok":
        pytest.skip("there is a GPU")
    assert says.startswith("UnsupportedError device=cuda: there is no usable NVIDIA device: ")
