"""Where Paddle's core is found: `paddle.base`, or `paddle.fluid` up to Paddle 2.5.

On packages that stand for Paddle's: the Paddle that is installed has one of the two places only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = {
    "__init__.py": "",
    "core.py": "",
    "framework.py": "class OpProtoHolder: pass",
    "layer_helper.py": "class LayerHelper: pass",
    "dygraph/__init__.py": "",
    "dygraph/base.py": "def _convert_into_variable(parameter): return __name__, parameter",
}
PROGRAM = """
from fastgen import _paddle_compat as compat

print(compat.PACKAGE)
print(compat.core.__name__)
print(compat.OpProtoHolder.__module__)
print(compat.LayerHelper.__module__)
print(*compat.convert_into_variable("weight"))
print(compat.core_library())
"""


def paddle_with(folder: Path, *packages: str) -> None:
    """Writes a package `paddle` with these in it."""
    for package in packages:
        for name, text in MODULES.items():
            path = folder / "paddle" / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (folder / "paddle" / "__init__.py").write_text("")


def found(folder: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(folder), *(entry for entry in sys.path if entry)]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        pytest.param(("fluid",), "fluid", id="2.5"),
        pytest.param(("base",), "base", id="2.6"),
        pytest.param(("fluid", "base"), "base", id="both"),
    ],
)
def test_the_package_of_the_core(tmp_path: Path, packages: tuple[str, ...], expected: str) -> None:
    paddle_with(tmp_path, *packages)
    done = found(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"paddle.{expected}",
        f"paddle.{expected}.core",
        f"paddle.{expected}.framework",
        f"paddle.{expected}.layer_helper",
        f"paddle.{expected}.dygraph.base weight",
        str(tmp_path / "paddle" / expected / "libpaddle.so"),
    ]


def test_a_failure_inside_the_package_is_not_hidden(tmp_path: Path) -> None:
    paddle_with(tmp_path, "fluid", "base")
    (tmp_path / "paddle" / "base" / "core.py").write_text("import no_such_library")
    done = found(tmp_path)
    assert done.returncode != 0
    assert "No module named 'no_such_library'" in done.stderr
