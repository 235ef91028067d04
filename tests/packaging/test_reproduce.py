"""ci/reproduce.sh on a project of one file and on this one: what it takes, what it must find."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(tiny LANGUAGES CXX)
list(APPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_SOURCE_DIR}")
include(FastgenReproducible)
fastgen_map_paths("${CMAKE_CURRENT_SOURCE_DIR}" tiny)
fastgen_map_paths("${CMAKE_CURRENT_BINARY_DIR}" tiny/build)
fastgen_deterministic_archives()
option(BUILD_SHARED_LIBS "" ON)
add_library(tiny tiny.cc)
target_compile_definitions(tiny PRIVATE PLACE="${CMAKE_CURRENT_BINARY_DIR}")
install(TARGETS tiny LIBRARY DESTINATION lib ARCHIVE DESTINATION lib)
"""


def run_reproduce(tmp_path: Path, source: Path, only: str, **environment: str) -> tuple[int, str]:
    """Exit status and output."""
    for tool in ("g++", "git"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if not (ROOT / ".venv" / "build").is_dir():
        pytest.skip("ci/reproduce.sh needs the environment .venv/build, which ci/test.sh makes")
    done = subprocess.run(
        [str(ROOT / "ci" / "reproduce.sh"), "--source", str(source), "--only", only],
        env={
            **os.environ,
            "FASTGEN_REPRODUCE_DIRECTORY": str(tmp_path / "work"),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1000,
    )
    return done.returncode, done.stdout


def reproduce(tmp_path: Path, value: str, only: str = "shared,static") -> tuple[int, str]:
    """Exit status and output for a library that holds one string."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(CMAKE)
    (source / "tiny.cc").write_text(f"extern const char* value;\nconst char* value = {value};\n")
    shutil.copy(ROOT / "cmake" / "FastgenReproducible.cmake", source)
    return run_reproduce(tmp_path, source, only)


def test_the_name_of_a_source_file_is_no_trace(tmp_path: Path) -> None:
    code, output = reproduce(tmp_path, "__FILE__")
    assert code == 0, output
    lines = [line.split() for line in output.splitlines() if line.startswith("identical")]
    assert [line[-1] for line in lines] == ["shared/lib/libtiny.so", "static/lib/libtiny.a"]
    assert "no traces of the builds" in output
    assert b"tiny/tiny.cc" in (tmp_path / "work/out-a/shared/lib/libtiny.so").read_bytes()


def test_a_planted_date_is_found(tmp_path: Path) -> None:
    # gcc takes it from SOURCE_DATE_EPOCH, so the bytes agree: the search has to find it.
    code, output = reproduce(tmp_path, "__DATE__", "shared")
    assert code == 1, output
    assert "FOUND      a date in shared/lib/libtiny.so" in output


def test_a_planted_time_is_found(tmp_path: Path) -> None:
    code, output = reproduce(tmp_path, "__TIME__", "shared")
    assert code == 1, output
    assert "FOUND      a time in shared/lib/libtiny.so" in output


def test_a_planted_path_is_found(tmp_path: Path) -> None:
    code, output = reproduce(tmp_path, "PLACE", "static")
    assert code == 1, output
    assert "DIFFERENT  static/lib/libtiny.a" in output
    assert f"FOUND      '{tmp_path}/work' in static/lib/libtiny.a" in output


# ---- The project itself ------------------------------------------------------------------------


# File, what is replaced in it, by what, and how the lines about it begin.
FAULTS = [
    (
        "csrc/api/fastgen.cc",
        "return FASTGEN_VERSION;",
        'return FASTGEN_VERSION " of " __DATE__;',
        # gcc takes it from SOURCE_DATE_EPOCH, so the bytes agree.
        ["FOUND      a date in shared/lib/libfastgen.so."],
    ),
    (
        "cmake/fastgen.pc.in",
        "Name: fastgen\n",
        "builddir=@CMAKE_CURRENT_BINARY_DIR@\nName: fastgen\n",
        [
            "DIFFERENT  shared/lib/pkgconfig/fastgen.pc:",
            "FOUND      '{work}' in shared/lib/pkgconfig/fastgen.pc:",
        ],
    ),
]


@pytest.mark.slow
def test_faults_planted_in_this_project_are_found(tmp_path: Path) -> None:
    """A date in the library and a path beside it, in one pair of builds."""
    source = tmp_path / "source"
    # What CMake reads of the project.
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "cmake", "csrc"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    for file, old, new, _ in FAULTS:
        text = (source / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{file} has no {old!r} any more: choose another fault"
        (source / file).write_text(text.replace(old, new), encoding="utf-8")
    # The same compiler, with less work: what is looked for does not depend on optimisation.
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -O0\n', encoding="utf-8")
    compiler.chmod(0o755)
    code, output = run_reproduce(tmp_path, source, "shared", CXX=str(compiler))
    assert code == 1, output
    # These, and nothing else.
    found = sorted(line for line in output.splitlines() if line.startswith(("FOUND", "DIFFERENT")))
    begins = (begin for *_, expected in FAULTS for begin in expected)
    expected = sorted(begin.format(work=tmp_path / "work") for begin in begins)
    assert len(found) == len(expected), output
    for line, begin in zip(found, expected):
        assert line.startswith(begin), output


# ---- ci/artifacts.py by itself -----------------------------------------------------------------


def artifacts(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "ci" / "artifacts.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def write_wheel(path: Path, *members: tuple[str, str], year: int = 2020) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members:
            archive.writestr(zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0)), text)


def test_compare_looks_into_wheels(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "x.whl", tmp_path / "two" / "x.whl"
    write_wheel(one, ("a", "1"), ("b", "2"))
    write_wheel(two, ("a", "1"), ("b", "2"))
    assert artifacts("compare", one.parent, two.parent)[0] == 0
    write_wheel(two, ("a", "1"), ("b", "3"))
    code, output = artifacts("compare", one.parent, two.parent)
    assert (code, "DIFFERENT  x.whl!b: from byte 0" in output) == (1, True), output
    write_wheel(two, ("b", "2"), ("a", "1"))
    code, output = artifacts("compare", one.parent, two.parent)
    assert (code, "the order of its members" in output) == (1, True), output
    # Equal members, other times.
    write_wheel(two, ("a", "1"), ("b", "2"), year=2021)
    assert artifacts("compare", one.parent, two.parent)[0] == 1


def test_compare_sees_files_of_one_build_only(tmp_path: Path) -> None:
    write_wheel(tmp_path / "one" / "x.whl", ("a", "1"))
    (tmp_path / "two").mkdir()
    for pair in (("one", "two"), ("two", "one")):
        code, output = artifacts("compare", *(tmp_path / name for name in pair))
        assert code == 1
        assert "x.whl: in one build only" in output
    assert artifacts("compare", tmp_path / "two", tmp_path / "two")[0] == 1, "nothing was built"


def test_search_looks_into_packed_files(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_wheel(folder / "x.whl", ("a", "made by somebody" * 100))
    (tmp_path / "inner").write_text("on another-host" * 100)
    with tarfile.open(folder / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "inner", "inner")
    code, output = artifacts("search", folder, "somebody", "another-host")
    assert code == 1
    assert "'somebody' in x.whl!a" in output
    assert "'another-host' in x.tar.gz!inner" in output
    assert artifacts("search", folder, "nobody")[0] == 0


# Spelt in pieces, because this file is part of the sdist, which is searched too.
TRACES = (
    "Nov  7 2@031",
    "12:34@:56",
    "/ho@me/someone/src/x.cc",
    "/ro@ot/x",
    "Sat Nov  7 12:3@4:56 20@31",
)


@pytest.mark.parametrize("trace", [trace.replace("@", "") for trace in TRACES])
def test_search_knows_traces(tmp_path: Path, trace: str) -> None:
    (tmp_path / "lib.so").write_bytes(b"\x7fELF\0" + trace.encode() + b"\0")
    assert artifacts("search", tmp_path)[0] == 1
    (tmp_path / "lib.so").write_bytes(b"\x7fELF\0" + b"a word\0")
    assert artifacts("search", tmp_path)[0] == 0
