"""The C++ programs: how tests build and run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastgen import _capi

ROOT = Path(__file__).resolve().parents[3]
STRICT = ("-Wall", "-Wextra", "-Wshadow", "-Werror", "-pedantic")


def need(*tools: str) -> None:
    """Skips the test unless these commands are there."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def compile_program(source: Path, folder: Path, *flags: str) -> Path:
    """A program of one C or C++ file, linked with the library under test."""
    in_c = source.suffix == ".c"
    compiler = os.environ.get("CC" if in_c else "CXX", "gcc" if in_c else "g++")
    need(compiler)
    library = _capi.library_path()
    program = folder / source.stem
    subprocess.run(
        [
            *(compiler, f"-std={'c11' if in_c else 'c++17'}", *STRICT, *flags, str(source)),
            *(f"-I{ROOT / 'csrc' / 'include'}", str(library), f"-Wl,-rpath,{library.parent}"),
            *("-pthread", "-o", str(program)),
        ],
        check=True,
        timeout=300,
    )
    return program


def compile_gpt(folder: Path) -> Path:
    """fastgen-gpt."""
    return compile_program(ROOT / "csrc" / "apps" / "gpt.cc", folder)


def build_gpt_paddle(folder: Path) -> Path:
    """fastgen-gpt-paddle, against the Paddle wheel of this Python."""
    need("cmake", "ninja", "g++")
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("the sources are not there")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("this Python has no shared libpython")
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DON_INFER=ON",
         f"-DPY_CMD={sys.executable}"],
        ["cmake", "--build", str(folder), "--target", "gpt_paddle"],
    ):  # fmt: skip
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout
    return folder / "fastgen-gpt-paddle"


def run(
    *command: str | bytes | Path | int | float, status: int = 0, stdin: str | bytes = b""
) -> tuple[str, str]:
    """Standard output and standard error of a command that ends with `status`."""
    done = subprocess.run(
        [part if isinstance(part, (str, bytes, Path)) else str(part) for part in command],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == status, done.stderr.decode("utf-8", "replace")
    return done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
