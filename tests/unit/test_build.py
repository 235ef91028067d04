"""What is built and installed: symbols, headers, packages for CMake and pkg-config, the wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import fastgen
from fastgen import _capi
from fastgen.models import DEFAULT_MODEL, resolve

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc" / "include"
CONSUMER = ROOT / "tests" / "cpp" / "consumer"


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def declared_functions() -> set[str]:
    text = (HEADERS / "fastgen" / "fastgen.h").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return set(re.findall(r"FASTGEN_API\s[^;]*?\b(fastgen_\w+)\s*\(", text))


def project_version() -> str:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    match = re.search(r"^project\(fastgen VERSION ([0-9.]+)", text, flags=re.MULTILINE)
    assert match is not None
    return match.group(1)


# ---- The installed package ---------------------------------------------------------------------


@pytest.mark.skipif(
    os.environ.get("FASTGEN_TEST_INSTALLED") != "1", reason="only ci/test.sh promises an install"
)
def test_the_installed_package_is_tested() -> None:
    package = Path(fastgen.__file__).parent
    assert package != ROOT / "fastgen"
    assert _capi.library_path().parent == package / "lib"


def test_wheel_holds_what_users_need() -> None:
    package = Path(fastgen.__file__).parent
    if package == ROOT / "fastgen":
        pytest.skip("the package is the source tree")
    for name in (
        "py.typed",
        "lib/libfastgen.so",
        "include/fastgen/fastgen.h",
        "include/fastgen/fastgen.hpp",
        "share/paddle/fusion_gpt.cc",
        "models/gpt2-docstrings/config.json",
        "models/gpt2-docstrings/model.safetensors",
        "models/gpt2-docstrings/tokenizer.json",
        "testing/__init__.py",
    ):
        assert (package / name).is_file(), name
    for source in (ROOT / "csrc" / "paddle").iterdir():
        installed = package / "share" / "paddle" / source.name
        assert installed.read_bytes() == source.read_bytes(), source.name


def test_one_version_everywhere() -> None:
    assert _capi.library_version() == project_version()
    assert fastgen.__version__ == project_version()
    if Path(fastgen.__file__).parent != ROOT / "fastgen":
        assert metadata.version("fastgen") == project_version()


def test_exported_symbols_are_the_declared_functions() -> None:
    need("nm")
    declared = declared_functions()
    assert "fastgen_version" in declared
    lines = run("nm", "-D", "--defined-only", _capi.library_path()).splitlines()
    assert {line.split()[-1] for line in lines} == declared


def test_library_needs_the_system_only() -> None:
    need("ldd")
    needed = re.findall(r"^\s*(\S+)", run("ldd", _capi.library_path()), flags=re.MULTILINE)
    names = {re.sub(r"\.so.*", "", Path(name).name) for name in needed}
    system = {"linux-vdso", "libc", "libm", "libdl", "libpthread", "libstdc++", "libgcc_s"}
    unexpected = {name for name in names - system if not name.startswith("ld-linux")}
    assert "libc" in names
    assert not unexpected


# ---- Headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiler", "standard", "header"),
    [
        ("gcc", "c11", "fastgen.h"),
        ("g++", "c++11", "fastgen.h"),
        ("g++", "c++17", "fastgen.h"),
        ("g++", "c++17", "fastgen.hpp"),
    ],
)
def test_headers_compile_alone_without_warnings(
    tmp_path: Path, compiler: str, standard: str, header: str
) -> None:
    need(compiler)
    source = tmp_path / ("main.c" if compiler == "gcc" else "main.cc")
    # Twice: the include guard works.
    source.write_text(f"#include <fastgen/{header}>\n" * 2 + "int main(void) { return 0; }\n")
    run(
        *(compiler, f"-std={standard}", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pedantic"),
        *("-fsyntax-only", f"-I{HEADERS}", source),
    )


# ---- The C and C++ library as CMake installs it ------------------------------------------------


class Tree:
    """A build, and the tree that it installs, moved away from where it was installed to.

    tests/cpp/consumer/check.cmake installs and moves it, and builds and runs the C and the C++
    application beside it, by find_package and by pkg-config, without any environment.
    """

    def __init__(self, where: Path, shared: bool) -> None:
        self.prefix = where / "consumer" / "moved"
        self.build = where / "build"
        run(
            *("cmake", "-S", ROOT, "-B", self.build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug"),
            *("-DCMAKE_CXX_FLAGS=-O1", "-DFASTGEN_WERROR=ON", "-DCMAKE_INSTALL_LIBDIR=lib"),
            f"-DBUILD_SHARED_LIBS={'ON' if shared else 'OFF'}",
        )
        run("cmake", "--build", self.build)
        self.report = run(
            *("cmake", f"-DBUILD={self.build}", f"-DWORK={where / 'consumer'}"),
            *(f"-DMODEL={resolve(DEFAULT_MODEL)}", "-P", CONSUMER / "check.cmake"),
        )


@pytest.fixture(scope="module", params=["shared", "static"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    need("cmake", "ninja", "gcc", "g++", "pkg-config", "ldd")
    return Tree(tmp_path_factory.mktemp(request.param), shared=request.param == "shared")


@pytest.mark.slow
def test_applications_run_with_the_moved_tree(tree: Tree) -> None:
    assert f"C and C++ applications run with {tree.prefix}/lib/libfastgen." in tree.report


@pytest.mark.slow
def test_package_version(tree: Tree) -> None:
    environment = {"PKG_CONFIG_PATH": str(tree.prefix / "lib" / "pkgconfig")}
    assert run("pkg-config", "--modversion", "fastgen", **environment).strip() == project_version()


@pytest.mark.slow
def test_installed_files(tree: Tree) -> None:
    files = {str(path.relative_to(tree.prefix)) for path in tree.prefix.rglob("*.*")}
    version = project_version()
    soname = ".".join(version.split(".")[: 2 if version.startswith("0.") else 1])
    shared = {"lib/libfastgen.so", f"lib/libfastgen.so.{soname}", f"lib/libfastgen.so.{version}"}
    static = {"lib/libfastgen.a"}
    libraries = {name for name in files if name.startswith("lib/libfastgen")}
    assert libraries in (shared, static)
    assert files - libraries == {
        "include/fastgen/fastgen.h",
        "include/fastgen/fastgen.hpp",
        "lib/cmake/fastgen/fastgenConfig.cmake",
        "lib/cmake/fastgen/fastgenConfigVersion.cmake",
        "lib/cmake/fastgen/fastgenTargets.cmake",
        "lib/cmake/fastgen/fastgenTargets-debug.cmake",
        "lib/pkgconfig/fastgen.pc",
    }


@pytest.mark.slow
def test_application_of_the_guide(tree: Tree, tmp_path: Path) -> None:
    """docs/cpp.md: its application through its CMakeLists.txt and through its compiler command."""
    need("pkg-config", "g++")
    guide = (ROOT / "docs" / "cpp.md").read_text()
    blocks = dict(re.findall(r"^```(cpp|cmake)\n(.*?)^```$", guide, flags=re.M | re.S))
    (tmp_path / "main.cc").write_text(blocks["cpp"])
    (tmp_path / "CMakeLists.txt").write_text(blocks["cmake"])
    prefix = f"-DCMAKE_PREFIX_PATH={tree.prefix}"
    run("cmake", "-S", ".", "-B", "b", "-G", "Ninja", prefix, cwd=tmp_path)
    run("cmake", "--build", "b", cwd=tmp_path)
    (command,) = re.findall(r"^g\+\+ .*$", guide, flags=re.M)
    environment = {"PKG_CONFIG_PATH": str(tree.prefix / "lib" / "pkgconfig")}
    run("sh", "-c", command, cwd=tmp_path, **environment)
    model = resolve(DEFAULT_MODEL)
    library = {"LD_LIBRARY_PATH": str(tree.prefix / "lib")}
    for program in (tmp_path / "b" / "application", tmp_path / "application"):
        output = run(program, model, "Return a list of", **library)
        assert re.search(r"\n\d+ tokens, seed \d+\n$", output)
    # The installed program finds its library by itself.
    assert run(tree.prefix / "bin" / "fastgen-gpt", "--version").split()[1] == project_version()


@pytest.mark.slow
def test_kernel_sets_share_no_code(tree: Tree) -> None:
    """A weak symbol of one set could be what a machine without its instructions is given."""
    need("nm")
    objects = sorted(tree.build.rglob("kernels_*.o"))
    assert any("generic" in path.name for path in objects)
    for path in objects:
        symbols = [line.split()[-2:] for line in run("nm", path).splitlines()]
        weak = [name for kind, name in symbols if kind in "WwVvu"]
        assert not weak, f"{path.name}: {weak}"


def build_info(tmp_path: Path, *options: str, **environment: str) -> dict[str, Any]:
    """What a build that is configured so would tell; nothing is compiled."""
    run(
        *("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DFASTGEN_BUILD_APPS=OFF", *options),
        **environment,
    )
    text = (tmp_path / "build_info" / "fastgen_build_info.h").read_text(encoding="utf-8")
    match = re.fullmatch(r'#define FASTGEN_BUILD_INFO R"json\((.*)\)json"\n', text)
    assert match is not None, text
    document: dict[str, Any] = json.loads(match.group(1))
    return document


def test_build_info_tells_inputs_and_no_place(tmp_path: Path) -> None:
    need("cmake", "ninja", "g++")
    document = build_info(
        *(tmp_path / "with a space", "-DCMAKE_BUILD_TYPE=MinSizeRel", "-DBUILD_SHARED_LIBS=OFF"),
        "-DFASTGEN_WITHOUT_AVX512=ON",
        f"-DCMAKE_CXX_FLAGS=-isystem {tmp_path} -fdebug-prefix-map={tmp_path}=. -DQUOTED='\"x\"'",
        SOURCE_DATE_EPOCH="1700000000",
        FASTGEN_COMMIT="0123abcd",
    )
    assert document["version"] == project_version()
    assert document["commit"] == "0123abcd"
    assert document["source_date_epoch"] == 1700000000
    assert document["build_type"] == "MinSizeRel"
    assert document["shared"] is False
    assert document["cuda"] is None
    assert "avx512" not in document["kernels"]
    assert document["kernels"]["generic"] == ""
    assert document["flags"].split()[:3] == ['-DQUOTED="x"', "-Os", "-DNDEBUG"]
    assert "/" not in json.dumps(document)


def test_build_info_refuses_what_it_cannot_tell(tmp_path: Path) -> None:
    need("cmake", "ninja", "g++")
    with pytest.raises(AssertionError, match="FASTGEN_COMMIT is 'main'"):
        build_info(tmp_path / "a", FASTGEN_COMMIT="main")
    with pytest.raises(AssertionError, match="SOURCE_DATE_EPOCH is 'today'"):
        build_info(tmp_path / "b", SOURCE_DATE_EPOCH="today")


def test_unknown_sanitizer_is_refused(tmp_path: Path) -> None:
    need("cmake", "ninja", "g++")
    done = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DFASTGEN_SANITIZE=adress"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "FASTGEN_SANITIZE: 'adress' is not one of" in done.stderr
