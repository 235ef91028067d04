"""ci/sbom.py: the SBOM and the sums say what lies beside them, and notice when it changes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv" / "release" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="ci/sbom.py needs the environment .venv/release of ci/wheel.sh"
)


def sbom(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [str(PYTHON), str(ROOT / "ci" / "sbom.py"), *map(str, arguments)],
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    folder = tmp_path / "dist"
    folder.mkdir()
    (folder / "fastgen.tar.gz").write_bytes(b"sources")
    (folder / "fastgen-manylinux_2_28.whl").write_bytes(b"wheel")
    code, output = sbom(folder)
    assert code == 0, output
    return folder


def test_what_is_written(dist: Path) -> None:
    (path,) = dist.glob("*.spdx.json")
    document = json.loads(path.read_text())
    assert document["spdxVersion"] == "SPDX-2.3"
    assert document["creationInfo"]["created"].startswith("2023-11-14T22:13")
    names = {package["name"] for package in document["packages"]}
    assert {"fastgen", "numpy", "tokenizers", "ziglang"} <= names
    kinds = {relation["relationshipType"] for relation in document["relationships"]}
    assert kinds >= {"DESCRIBES", "DEPENDS_ON", "BUILD_TOOL_OF", "STATIC_LINK"}
    sums = dict(reversed(line.split()) for line in (dist / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {"fastgen.tar.gz", "fastgen-manylinux_2_28.whl", path.name}
    assert sums["fastgen.tar.gz"] == hashlib.sha256(b"sources").hexdigest()
    assert sbom("--check", dist)[0] == 0


def test_written_again_it_is_the_same(dist: Path) -> None:
    before = {path.name: path.read_bytes() for path in dist.iterdir()}
    assert sbom(dist)[0] == 0
    assert {path.name: path.read_bytes() for path in dist.iterdir()} == before


@pytest.mark.parametrize("change", ["artifact", "another", "sbom", "sums"])
def test_changes_are_noticed(dist: Path, change: str) -> None:
    if change == "artifact":
        (dist / "fastgen.tar.gz").write_bytes(b"other sources")
    elif change == "another":
        (dist / "more.whl").write_bytes(b"more")
    elif change == "sbom":
        (path,) = dist.glob("*.spdx.json")
        path.write_text(path.read_text().replace("Apache-2.0", "MIT"))
    else:
        text = (dist / "SHA256SUMS").read_text()
        (dist / "SHA256SUMS").write_text(text.replace(text[0], "x", 1))
    code, output = sbom("--check", dist)
    assert code == 1, output
    assert "does not tell the files" in output
