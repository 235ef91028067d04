"""What is built and installed: symbols, headers, packages for CMake and pkg-config, the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import fastgen
from fastgen import _capi

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc" / "include"

C_PROGRAM = r"""
#include <fastgen/fastgen.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  fastgen_model* model = NULL;
  if (fastgen_isa_count() < 1) return 1;
  if (fastgen_model_load("/nonexistent/model", NULL, &model) != FASTGEN_NOT_FOUND) return 2;
  if (model != NULL || strstr(fastgen_last_error(), "/nonexistent/model") == NULL) return 3;
  puts(fastgen_version());
  return 0;
}
"""


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
    """An installed tree, moved away from where it was installed to."""

    def __init__(self, where: Path, shared: bool) -> None:
        self.prefix = where / "moved"
        self.build = where / "build"
        run(
            *("cmake", "-S", ROOT, "-B", self.build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug"),
            *("-DCMAKE_CXX_FLAGS=-O1", "-DFASTGEN_WERROR=ON", "-DCMAKE_INSTALL_LIBDIR=lib"),
            f"-DBUILD_SHARED_LIBS={'ON' if shared else 'OFF'}",
        )
        run("cmake", "--build", self.build)
        run("cmake", "--install", self.build, "--prefix", where / "installed")
        (where / "installed").rename(self.prefix)


@pytest.fixture(scope="module", params=["shared", "static"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    need("cmake", "ninja", "g++")
    return Tree(tmp_path_factory.mktemp(request.param), shared=request.param == "shared")


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
def test_program_through_find_package(tree: Tree, tmp_path: Path) -> None:
    static = (tree.prefix / "lib" / "libfastgen.a").exists()
    (tmp_path / "main.c").write_text(C_PROGRAM)
    # C++ is only asked of those who link the static library.
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\n"
        f"project(application LANGUAGES C {'CXX' if static else ''})\n"
        f"find_package(fastgen {project_version()} EXACT REQUIRED)\n"
        "add_executable(application main.c)\n"
        "target_link_libraries(application PRIVATE fastgen::fastgen)\n"
    )
    run(
        "cmake",
        "-S",
        ".",
        "-B",
        "b",
        "-G",
        "Ninja",
        f"-DCMAKE_PREFIX_PATH={tree.prefix}",
        cwd=tmp_path,
    )
    run("cmake", "--build", "b", cwd=tmp_path)
    assert run(tmp_path / "b" / "application").strip() == project_version()


@pytest.mark.slow
def test_program_through_pkg_config(tree: Tree, tmp_path: Path) -> None:
    need("pkg-config", "gcc")
    (tmp_path / "main.c").write_text(C_PROGRAM)
    environment = {"PKG_CONFIG_PATH": str(tree.prefix / "lib" / "pkgconfig")}
    assert run("pkg-config", "--modversion", "fastgen", **environment).strip() == project_version()
    flags = run("pkg-config", "--cflags", "--libs", "fastgen", **environment).split()
    run("gcc", "-std=c11", "main.c", "-o", "application", *flags, cwd=tmp_path)
    output = run(tmp_path / "application", LD_LIBRARY_PATH=str(tree.prefix / "lib"))
    assert output.strip() == project_version()


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
    model = Path(fastgen.__file__).parent / "models" / "gpt2-docstrings"
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


def test_unknown_sanitizer_is_refused(tmp_path: Path) -> None:
    need("cmake", "ninja", "g++")
    done = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DFASTGEN_SANITIZE=adress"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "FASTGEN_SANITIZE: 'adress' is not one of" in done.stderr


# ---- Lock files --------------------------------------------------------------------------------

LOCKS = sorted((ROOT / "ci" / "lock").glob("*.txt"))


def pinned(lock: Path) -> dict[str, str]:
    """Name -> version of a lock file; every one of them has hashes and no place to come from."""
    text = lock.read_text(encoding="utf-8").replace("\\\n", " ")
    versions = {}
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)((\s+--hash=sha256:[0-9a-f]{64})+)\s*", line)
        assert match is not None, f"{lock.name}: {line[:100]}"
        versions[match.group(1)] = match.group(2)
    assert "://" not in text
    return versions


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_locks_are_pinned_and_hashed(lock: Path) -> None:
    assert pinned(lock)


def test_locks_agree_with_each_other() -> None:
    seen: dict[str, tuple[str, str]] = {}
    for lock in LOCKS:
        for name, version in pinned(lock).items():
            if name == "paddlepaddle":
                continue
            assert seen.setdefault(name, (version, lock.name))[0] == version, (
                name,
                lock.name,
                seen,
            )


def test_locks_hold_the_dependencies() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE)
    assert block is not None
    names = set(re.findall(r'"([a-z0-9-]+)', block.group(1)))
    assert names
    assert names <= set(pinned(ROOT / "ci" / "lock" / "run.txt"))
