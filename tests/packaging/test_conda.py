"""The conda recipe: that seeded faults are found by the scripts of ci/conda.

Run by ci/conda/run.sh in .venv/conda; elsewhere there is no rattler-build and they are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

rattler_build = pytest.importorskip(
    "rattler_build", reason="runs in .venv/conda, by ci/conda/run.sh"
)

ROOT = Path(__file__).resolve().parents[2]
CONDA = ROOT / "ci" / "conda"
CHANNEL = ROOT / ".venv" / "conda-work" / "channel"


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CONDA / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A copy of the recipe, to be damaged."""
    return Path(shutil.copytree(ROOT / "recipe", tmp_path / "recipe"))


def seed(path: Path, old: str, new: str, count: int = -1) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path} has no {old!r} any more: choose another fault"
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def test_the_recipe_is_sound(recipe: Path) -> None:
    for script in ("render.py", "cases.py"):
        done = run(script, "--recipe", recipe)
        assert done.returncode == 0, done.stderr


# File, what is replaced, by what, how often (-1: everywhere), and what render.py says of it.
RENDER_FAULTS = {
    "misspelt package": (
        "conda_build_config.yaml",
        "paddlepaddle-gpu",
        "paddlepadle-gpu",
        1,
        "no channel is known to hold paddlepadle-gpu ==2.5.2",
    ),
    "version of no channel": (
        "conda_build_config.yaml",
        '"2.5.2"',
        '"2.5.3"',
        1,
        "no channel is known to hold paddlepaddle-gpu ==2.5.3",
    ),
    "another compiler for the user's pin": (
        "conda_build_config.yaml",
        '"8.2"',
        '"8.3"',
        -1,
        "no channel is known to hold gxx_linux-64 8.3",
    ),
    "misspelt compiler": ("conda_build_config.yaml", "- gxx\n", "- gxxx\n", 1, "gxxx_linux-64"),
    "a variant less": ("conda_build_config.yaml", '  - "3.9"\n', "", 1, "different lengths"),
    "misspelt requirement": ("recipe.yaml", "- safetensors >", "- safetensor >", 1, "safetensor "),
    "another version": ("recipe.yaml", "version: 0.1.0", "version: 0.1.1", 1, "CMakeLists.txt has"),
    "no exact pin": (
        "recipe.yaml",
        'run:\n        - python\n        - ${{ pin_subpackage("libfastgen", exact=True) }}\n',
        "run:\n        - python\n",
        1,
        "is not pinned to the exact libfastgen",
    ),
    "GPU no better than CPU": (
        "recipe.yaml",
        '(0 if cuda == "None" else (cuda | replace(".", "") | int))',
        "0",
        1,
        "does not outrank",
    ),
    "CPU and CUDA libraries together": (
        "recipe.yaml",
        "then: libfastgen-cuda <0a0",
        "then: libfastgen-cuda",
        -1,
        "libfastgen cpu can be mixed with libfastgen-cuda",
    ),
    "a key that the recipe does not know": (
        "recipe.yaml",
        "run_exports:",
        "run_export:",
        1,
        "run_export",
    ),
    "no C library": ("recipe.yaml", "- __glibc >=${{ c_stdlib_version }}", "", 1, "C library"),
}


@pytest.mark.parametrize("fault", RENDER_FAULTS)
def test_rendering_finds(fault: str, recipe: Path) -> None:
    file, old, new, count, message = RENDER_FAULTS[fault]
    seed(recipe / file, old, new, count)
    done = run("render.py", "--recipe", recipe)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr


# Replacements in recipe.yaml, and what cases.py says then.
SOLVER_FAULTS = {
    "static library of another flavour": (
        [("- libfastgen-static * ${{ flavour }}_*", ""), ("- libfastgen * ${{ flavour }}_*", "")],
        "mixed: library for a GPU, static library for the CPU: not refused",
    ),
    "two Paddles": (
        [("then: paddlepaddle-gpu <0a0", "then: paddlepaddle-gpu")],
        "mixed: op for Paddle's CPU build, Paddle for GPUs: not refused",
    ),
    "no __cuda": (
        [("- __cuda >=${{ cuda }}", "- __glibc"), ("then: __cuda >=${{ cuda }}", "then: __glibc")],
        "the CUDA library without a GPU: not refused",
    ),
    "any Paddle": (
        [("- ${{ paddle_package }} ==${{ paddle_version }}", "- ${{ paddle_package }}")],
        "mixed: op for Paddle 2.6.2, Paddle 3.3.1: not refused",
    ),
}


@pytest.mark.parametrize("fault", SOLVER_FAULTS)
def test_solver_cases_find(fault: str, recipe: Path) -> None:
    replacements, message = SOLVER_FAULTS[fault]
    for old, new in replacements:
        seed(recipe / "recipe.yaml", old, new)
    done = run("cases.py", "--recipe", recipe)
    assert done.returncode == 1, done.stdout
    assert message in done.stderr


def test_an_unknown_upstream_version_is_found(recipe: Path, tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.yaml"
    shutil.copy(CONDA / "catalogue.yaml", catalogue)
    seed(catalogue, 'versions: ["2.5.2"]', 'versions: ["2.4.2"]')
    done = run("render.py", "--recipe", recipe, "--catalogue", catalogue)
    assert done.returncode == 1
    assert "no channel is known to hold paddlepaddle-gpu ==2.5.2" in done.stderr


# A file that is left out or put in, and the line of the recipe's own test about it.
CONTENT_FAULTS = {
    "missing header": ("include/fastgen/fastgen.hpp", "", "include/fastgen/fastgen.hpp"),
    "missing CMake file": (
        "lib/cmake/fastgen/fastgenTargets.cmake",
        "",
        "lib/cmake/fastgen/fastgenTargets.cmake",
    ),
    "static library": ("", "lib/libfastgen.a", "lib/libfastgen.a"),
}


def copy_channel(target: Path) -> Path:
    """The local channel, in hard links."""
    channel = Path(shutil.copytree(CHANNEL, target, copy_function=os.link))
    # An index is written in place; the real channel's must stay as it is.
    for index in channel.glob("*/repodata*"):
        text = index.read_text(encoding="utf-8")
        index.unlink()
        index.write_text(text, encoding="utf-8")
    return channel


def manifest_files(recipe: Path, name: str, version: str) -> list[str]:
    """What the build script of an output has to make, as its manifest lists it."""
    text = (recipe / "manifests" / f"{name}.txt").read_text(encoding="utf-8")
    replacements = {
        "{version}": version,
        "{soversion}": version.rpartition(".")[0],
        "{python}": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }
    for key, value in replacements.items():
        text = text.replace(key, value)
    # The build tool puts the files of tests there.
    return [line for line in text.splitlines() if not line.startswith("etc/conda/test-files/")]


def write_files(script: Path, files: list[str]) -> None:
    """Makes a build script that only writes files: lists of them need nothing compiled."""
    lines = ["set -e", 'cd "$PREFIX"']
    for file in files:
        name, link = file.removesuffix(" (link)"), file.endswith(" (link)")
        lines.append(f'mkdir -p "{Path(name).parent}"')
        lines.append(f'ln -s nothing "{name}"' if link else f'echo "{name}" >"{name}"')
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_nothing(
    recipe: Path, work: Path, left_out: str, put_in: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """build.py on a libfastgen of empty files: those of its manifest, but for two."""
    text = (recipe / "recipe.yaml").read_text(encoding="utf-8")
    (version,) = re.findall(r"^  version: (\S+)$", text, re.MULTILINE)
    files = manifest_files(recipe, "libfastgen", version)
    assert not left_out or left_out in files
    files = [*(file for file in files if file != left_out), *filter(None, [put_in])]
    write_files(recipe / "build-libfastgen.sh", files)
    shutil.copy(ROOT / "LICENSE", recipe.parent)
    shutil.copytree(ROOT / "tests" / "cpp", recipe.parent / "tests" / "cpp")
    return run("build.py", copy_channel(work / "channel"), "--recipe", recipe, *options)


@pytest.mark.parametrize("fault", CONTENT_FAULTS)
def test_building_finds(fault: str, recipe: Path, tmp_path: Path) -> None:
    left_out, put_in, message = CONTENT_FAULTS[fault]
    done = build_nothing(recipe, tmp_path / "work", left_out, put_in)
    assert done.returncode == 1, done.stdout
    assert "failed package content tests" in done.stderr
    assert any(message in line for line in done.stderr.splitlines() if line.startswith("[error]"))


@pytest.mark.parametrize("fault", CONTENT_FAULTS)
def test_building_compares_with_the_manifest(fault: str, recipe: Path, tmp_path: Path) -> None:
    left_out, put_in, _ = CONTENT_FAULTS[fault]
    # Without the recipe's own test, which would be first.
    text = (recipe / "recipe.yaml").read_text(encoding="utf-8")
    start = text.index("      - package_contents:\n", text.index("name: libfastgen\n"))
    end = text.index("      - files:\n", start)
    (recipe / "recipe.yaml").write_text(text[:start] + text[end:], encoding="utf-8")
    done = build_nothing(recipe, tmp_path / "work", left_out, put_in, "--no-tests")
    assert done.returncode == 1, done.stdout
    expected = (
        f"output libfastgen lacks {left_out}"
        if left_out
        else f"output libfastgen has {put_in}, which its manifest does not list"
    )
    assert done.stderr == f"build.py: {expected}\n"


# ---- Manifests and payloads of the packages that were really built -----------------------------


def repack(channel: Path, name: str, tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Puts a changed package in the place of the one in the channel."""
    (package,) = (channel / "linux-64").glob(f"{name}-[0-9]*.conda")
    build = package.name.removesuffix(".conda").split("-")[-1]
    version = package.name.removesuffix(".conda").split("-")[-2]
    root = tmp_path / "changed"
    # In a process of its own: see ci/conda/leave.py.
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys; from rattler.package_streaming import extract;"
            "extract(sys.argv[1], sys.argv[2]); os._exit(0)",
            package,
            root,
        ],
        check=True,
    )
    shutil.rmtree(root / "info")
    change(root)
    package.unlink()
    rattler_build.assemble_package(
        name=name,
        version=version,
        target_platform="linux-64",
        build_string=build,
        output_dir=channel / "linux-64",
        files_dir=root,
        license="none",
        summary="changed",
        compression_level=1,
    )
    assert package.is_file()


SITE = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/fastgen"
SITE_TAG = f"{sys.version_info[0]}{sys.version_info[1]}"
# Output, the file that goes or comes, and whether it goes.
MANIFEST_FAULTS = {
    "libfastgen without a header": ("libfastgen", "include/fastgen/fastgen.hpp", True),
    "libfastgen with a static library": ("libfastgen", "lib/libfastgen.a", False),
    "libfastgen-static without a CMake file": (
        "libfastgen-static",
        "lib/fastgen-static/lib/cmake/fastgen/fastgenConfig.cmake",
        True,
    ),
    # The recipe's own test of these two outputs does not ask for every file.
    "fastgen without a header": ("fastgen", f"{SITE}/include/fastgen/fastgen.hpp", True),
    "fastgen with a static library": ("fastgen", f"{SITE}/lib/libfastgen.a", False),
    "fastgen-tests without a test": (
        "fastgen-tests",
        "share/fastgen/tests/parity/test_op.py",
        True,
    ),
}


def test_the_packages_are_those_of_the_manifests() -> None:
    done = run("manifests.py", CHANNEL)
    assert done.returncode == 0, done.stderr
    assert "libfastgen-cuda: not in this channel, so not compared" in done.stdout


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_manifests_find(fault: str, tmp_path: Path) -> None:
    name, file, goes = MANIFEST_FAULTS[fault]
    channel = copy_channel(tmp_path / "channel")
    if not list((channel / "linux-64").glob(f"{name}-[0-9]*.conda")):
        pytest.skip(f"{name} was not built: ci/conda/run.sh --no-paddle")

    def change(root: Path) -> None:
        if goes:
            (root / file).unlink()
        else:
            (root / file).write_text("!<arch>\n")

    repack(channel, name, tmp_path, change)
    done = run("manifests.py", channel)
    assert done.returncode == 1, done.stdout
    sentence = "lacks {}" if goes else "has {}, which its manifest does not list"
    assert done.stderr == f"manifests.py: output {name} {sentence.format(file)}\n"


def test_a_file_in_the_place_of_a_link_is_found(tmp_path: Path) -> None:
    channel = copy_channel(tmp_path / "channel")

    def change(root: Path) -> None:
        library = root / "lib" / "libfastgen.so"
        target = library.resolve()
        library.unlink()
        shutil.copy(target, library)

    repack(channel, "libfastgen", tmp_path, change)
    done = run("manifests.py", channel)
    assert done.returncode == 1
    assert "output libfastgen lacks lib/libfastgen.so (link)" in done.stderr


def test_every_output_has_a_manifest_and_no_other(recipe: Path) -> None:
    (recipe / "manifests" / "libfastgen-cuda.txt").rename(recipe / "manifests" / "other.txt")
    done = run("manifests.py", CHANNEL, "--recipe", recipe)
    assert done.returncode == 1
    assert "output libfastgen-cuda has no manifest" in done.stderr
    assert "other.txt is of no output of the recipe" in done.stderr


def test_manifests_are_written_as_they_are(recipe: Path) -> None:
    done = run("manifests.py", CHANNEL, "--recipe", recipe, "--write")
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "recipe" / "manifests").glob("*.txt"):
        assert (recipe / "manifests" / path.name).read_text() == path.read_text(), path.name


def test_the_recipe_asks_for_what_the_manifest_of_the_unbuilt_output_lists() -> None:
    text = (ROOT / "recipe" / "recipe.yaml").read_text(encoding="utf-8")
    section = text[text.index("name: libfastgen-cuda\n") : text.index("name: fastgen\n")]
    files = re.search(r"strict: true\n\s+files:\n((?:\s+- \S+\n)+)", section)
    assert files is not None
    listed = [line.strip()[2:] for line in files[1].splitlines()]
    assert (ROOT / "recipe/manifests/libfastgen-cuda.txt").read_text().splitlines() == listed


def test_payloads_are_compared_file_by_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = run("payload.py", "unpack", CHANNEL, tmp_path / name)
        assert done.returncode == 0, done.stderr
    done = run("payload.py", "compare", tmp_path / "one", tmp_path / "two")
    assert done.returncode == 0, done.stdout
    assert all(line.startswith("identical  ") for line in done.stdout.splitlines())
    assert re.search(r"conda package libfastgen: \d+ files and \d+ of info/\n", done.stdout)

    index = tmp_path / "two" / "fastgen" / "info" / "index.json"
    assert "timestamp" not in json.loads(index.read_text())
    seed(index, "click >=8.0", "click >=8.1")
    with (tmp_path / "two" / "libfastgen" / "bin" / "fastgen-gpt").open("ab") as program:
        program.write(b"x")
    shutil.rmtree(tmp_path / "two" / "libfastgen-static")
    done = run("payload.py", "compare", tmp_path / "one", tmp_path / "two")
    assert done.returncode == 1
    different = [line for line in done.stdout.splitlines() if line.startswith("DIFFERENT")]
    assert "conda package fastgen: info/index.json: from byte" in different[0]
    assert "conda package libfastgen: bin/fastgen-gpt: from byte" in different[1]
    assert all("libfastgen-static: " in line for line in different[2:])
    assert len(different) > 12


@pytest.mark.slow
def test_byte_code_that_tells_its_directory_is_found(tmp_path: Path) -> None:
    """ci/reproduce.sh on this project's own recipe, with a fault, and without what compiles."""
    if not list((CHANNEL / "linux-64").glob("paddlepaddle-[0-9]*.conda")):
        pytest.skip("the channel has no Paddle: ci/conda/run.sh --no-paddle")
    source = tmp_path / "source"
    for name in ("csrc", "fastgen", "recipe", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    recipe = source / "recipe"
    (version,) = re.findall(
        r"^  version: (\S+)$", (recipe / "recipe.yaml").read_text(encoding="utf-8"), re.MULTILINE
    )
    for name in ("libfastgen", "libfastgen-static", "fastgen-paddle"):
        script = recipe / f"build-{name.removeprefix('libfastgen-').removeprefix('fastgen-')}.sh"
        assert script.is_file()
        write_files(script, manifest_files(recipe, name, version))
    seed(recipe / "build-python.sh", '--invalidation-mode checked-hash -s "$SP_DIR" ', "")
    work = tmp_path / "work"
    done = subprocess.run(
        [ROOT / "ci" / "reproduce.sh", "--source", source, "--only", "conda"],
        env={**os.environ, "FASTGEN_REPRODUCE_DIRECTORY": str(work)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    code = f"{SITE}/__pycache__/info.cpython-{SITE_TAG}.pyc"
    assert any(
        line.startswith(f"DIFFERENT  conda package fastgen: {code}: from byte") for line in lines
    ), done.stdout
    assert any(line.startswith(f"FOUND      '{work}' in fastgen/{code}") for line in lines)
    # The others have no fault.
    for name in ("libfastgen", "libfastgen-static", "fastgen-paddle", "fastgen-tests"):
        assert any(
            line.startswith("identical  ") and f"conda package {name}: " in line for line in lines
        ), (name, done.stdout)


def test_every_script_explains_itself() -> None:
    for script in (
        "bootstrap.py",
        "build.py",
        "render.py",
        "cases.py",
        "solve.py",
        "payload.py",
        "manifests.py",
    ):
        done = run(script, "-h")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: ")
    done = subprocess.run([CONDA / "run.sh", "-h"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(":")[0]) == (
        0,
        "conda packages without any conda channel",
    )
