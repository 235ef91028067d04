"""The op library: built once whoever asks, refused if it is not for this Paddle."""

from __future__ import annotations

import os
import shutil
import stat
import zlib  # noqa: F401
from pathlib import Path

import pytest

pytest.importorskip("paddle")

import paddle

from fastgen import _capi, jit

LOAD = """
from fastgen.jit import load_op_library
library = load_op_library({argument})
print(library.path)
"""
GENERATE = """
from fastgen import FasterGPT
layer = FasterGPT(make_model(), decoding_lib={argument!r})
print(layer._library.path)
layer(paddle.to_tensor([[1, 2]]), max_length=3)
"""
# Prints the sentence of a refusal, and fails when there is none.
REFUSED = """
from fastgen.jit import load_op_library
try:
    load_op_library({argument})
except RuntimeError as error:
    print(error)
else:
    raise AssertionError("accepted")
"""


@pytest.fixture(scope="module")
def built() -> Path:
    """The library of this process, registered with Paddle."""
    return jit.load_op_library().path


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_two_processes_build_once(start_python, tmp_path):
    compiler = shutil.which(jit.find_compiler()[0])
    log = tmp_path / "compilations"
    wrapper = _script(
        tmp_path / "cxx",
        f'case "$*" in *-shared*) echo one >> {log}; sleep 3;; esac\nexec {compiler} "$@"',
    )
    cache = tmp_path / "cache"
    processes = [
        start_python(LOAD.format(argument=""), CXX=wrapper, FASTGEN_CACHE=str(cache))
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert log.read_text() == "one\n"
    assert results[0][0] == results[1][0]
    path = Path(results[0][0].strip())
    assert cache in path.parents
    assert path.name == "libdecoding_op.so"
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "build.log",
        "libdecoding_op.so",
        "lock",
    ]
    messages = [err for _, err in results]
    assert sum("building the op fusion_gpt" in err for err in messages) == 1
    # A third takes it from the cache, without a word.
    process = start_python(LOAD.format(argument=""), CXX=wrapper, FASTGEN_CACHE=str(cache))
    out, err = process.communicate(timeout=300)
    assert out == results[0][0]
    assert "fastgen:" not in err
    assert log.read_text() == "one\n"


def test_missing_compiler_is_named(run_python, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cache = str(tmp_path / "cache")
    out, _ = run_python(REFUSED.format(argument=""), PATH=str(empty), CXX="", FASTGEN_CACHE=cache)
    assert "no C++ compiler (g++, c++ or clang++) was found" in out
    assert "apt-get install g++" in out
    out, _ = run_python(REFUSED.format(argument=""), CXX="g++-none -m64", FASTGEN_CACHE=cache)
    assert "the C++ compiler g++-none that CXX names was not found" in out


def test_failing_compiler_leaves_its_output(run_python, tmp_path):
    wrapper = _script(
        tmp_path / "cxx",
        'case "$*" in *-shared*) echo "no space left" >&2; exit 3;; esac\necho a compiler',
    )
    out, _ = run_python(
        REFUSED.format(argument=""), CXX=wrapper, FASTGEN_CACHE=str(tmp_path / "cache")
    )
    assert "failed with status 3, its output is in " in out
    log = Path(out.rsplit("its output is in ", 1)[1].strip())
    assert "no space left" in log.read_text()
    assert "-shared" in log.read_text()
    assert sorted(entry.name for entry in log.parent.iterdir()) == ["build.log", "lock"]


def test_cache_that_cannot_be_written(run_python, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    out, _ = run_python(REFUSED.format(argument=""), FASTGEN_CACHE=str(blocker))
    assert "set FASTGEN_CACHE to a folder that can be written" in out


def test_prebuilt_library_needs_no_compiler(run_python, built, tmp_path):
    copy = tmp_path / "elsewhere.so"
    shutil.copy(built, copy)
    out, err = run_python(
        GENERATE.format(argument=str(copy)),
        CXX=str(tmp_path / "none"),
        FASTGEN_CACHE=str(tmp_path / "cache"),
    )
    assert out.strip() == str(copy)
    assert "building" not in err
    assert not (tmp_path / "cache").exists()


def test_build_info_is_that_of_this_paddle(built):
    assert jit.read_build_info(built) == jit.running_paddle()
    assert jit.running_paddle().version == paddle.__version__


@pytest.mark.parametrize("field", ["paddle", "commit", "cxx11_abi"])
def test_library_for_another_paddle_is_refused(built, tmp_path, field):
    data = built.read_bytes()
    marker = data.index(b"fastgen-op-build-info:")
    begin = data.index(f"{field}=".encode(), marker) + len(field) + 1
    changed = bytearray(data)
    changed[begin] = ord("9")
    other = tmp_path / "other.so"
    other.write_bytes(changed)
    with pytest.raises(RuntimeError, match=r"was built for Paddle .* this process runs Paddle"):
        jit.load_op_library(other)


def test_foreign_files_are_refused(built, tmp_path):
    text = tmp_path / "text.so"
    text.write_text("fastgen-op-build-info:paddle=1;commit=2;cuda=3;cxx11_abi=1;")
    empty = tmp_path / "empty.so"
    empty.write_bytes(b"")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF\x02\x01" + bytes(80) + b"fastgen-op-build-info:paddle=1;")
    for path in (text, empty, broken, _capi.library_path()):
        with pytest.raises(RuntimeError, match="is not a fastgen op library"):
            jit.load_op_library(path)
    for path in (tmp_path / "none.so", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            jit.load_op_library(path)


def test_truncated_library_is_refused(built, tmp_path):
    data = built.read_bytes()
    truncated = tmp_path / "truncated.so"
    marker = data.index(b"fastgen-op-build-info:")
    for size in (marker + 400, marker + 2000, len(data) // 2 + marker // 2):
        truncated.write_bytes(data[:size])
        with pytest.raises(RuntimeError, match=f"is truncated: it has {size} bytes of"):
            jit.load_op_library(truncated)


def test_library_that_does_not_load_is_refused(run_python, built, tmp_path):
    data = bytearray(built.read_bytes())
    # Another machine's, in the header.
    data[18:20] = b"\xb7\x00"
    path = tmp_path / "foreign.so"
    path.write_bytes(data)
    out, _ = run_python(REFUSED.format(argument=repr(str(path))))
    assert f"the op library {path} cannot be loaded: " in out
    assert len(out.strip().splitlines()) == 1


def test_one_library_for_each_process(built, tmp_path):
    assert jit.load_op_library(built) is jit.load_op_library()
    copy = tmp_path / "copy.so"
    shutil.copy(built, copy)
    with pytest.raises(RuntimeError, match=r"has been registered from .* in this process"):
        jit.load_op_library(copy)
    link = tmp_path / "link.so"
    link.symlink_to(built)
    assert jit.load_op_library(link) is jit.load_op_library()


def test_key_depends_on_compiler_and_paddle(monkeypatch):
    compiler, build = jit.find_compiler(), jit.running_paddle()
    key = jit._key(compiler, build)
    assert key == jit._key(compiler, build)
    other = jit.PaddleBuild("9.9.9", build.commit, build.cuda, build.cxx11_abi)
    assert jit._key(compiler, other) != key
    assert jit._key([*compiler, "-g"], build) != key
    monkeypatch.setattr(jit, "_FLAGS", (*jit._FLAGS, "-O3"))
    assert jit._key(compiler, build) != key


def test_op_runs_on_the_library_of_the_package(built):
    assert jit.load_op_library().uses(_capi.library())
    loaded = Path("/proc/self/maps").read_text()
    names = {line.split()[5] for line in loaded.splitlines() if "libfastgen" in line}
    assert names == {os.fspath(_capi.library_path())}
