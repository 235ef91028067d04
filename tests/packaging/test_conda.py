"""The conda recipe: that seeded faults are found by the scripts of ci/conda.

Run by ci/conda/run.sh in .venv/conda; elsewhere there is no rattler-build and they are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rattler_build", reason="runs in .venv/conda, by ci/conda/run.sh")

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


@pytest.mark.parametrize("fault", CONTENT_FAULTS)
def test_building_finds(fault: str, recipe: Path, tmp_path: Path) -> None:
    left_out, put_in, message = CONTENT_FAULTS[fault]
    text = (recipe / "recipe.yaml").read_text(encoding="utf-8")
    section = text[text.index("name: libfastgen\n") : text.index("name: libfastgen-static\n")]
    version = re.search(r"^  version: (\S+)$", text, flags=re.MULTILINE)
    assert version is not None
    files = [
        line.strip()[2:].replace("${{ version }}", version[1])
        for line in section[section.index("files:") : section.index("- etc/conda")].splitlines()
        if line.strip().startswith("- ")
    ]
    assert not left_out or left_out in files
    # What is tested is the list of files, so nothing need be compiled.
    script = ["set -e", 'cd "$PREFIX"']
    for file in [*(file for file in files if file != left_out), *filter(None, [put_in])]:
        script += [f'mkdir -p "{Path(file).parent}"', f'echo "{file}" >"{file}"']
    (recipe / "build-libfastgen.sh").write_text("\n".join(script) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", tmp_path)
    shutil.copytree(ROOT / "tests" / "cpp", tmp_path / "tests" / "cpp")
    channel = tmp_path / "work" / "channel"
    shutil.copytree(CHANNEL, channel, copy_function=os.link)
    # An index is written in place; the real channel's must stay as it is.
    for index in channel.glob("*/repodata*"):
        text = index.read_text(encoding="utf-8")
        index.unlink()
        index.write_text(text, encoding="utf-8")
    done = run("build.py", channel, "--recipe", recipe)
    assert done.returncode == 1, done.stdout
    assert "failed package content tests" in done.stderr
    assert any(message in line for line in done.stderr.splitlines() if line.startswith("[error]"))


def test_every_script_explains_itself() -> None:
    for script in ("bootstrap.py", "build.py", "render.py", "cases.py", "solve.py"):
        done = run(script, "-h")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: ")
    done = subprocess.run([CONDA / "run.sh", "-h"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(":")[0]) == (
        0,
        "conda packages without any conda channel",
    )
