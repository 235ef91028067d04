"""The lock files of ci/lock: pinned, hashed, of one mind, and naming no place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
        if lock.stem == "bench":  # its packages are newer than PaddleNLP bears
            continue
        for name, version in pinned(lock).items():
            if name in ("paddlepaddle", "paddlepaddle-gpu"):
                continue
            if name == "paddlenlp" and lock.stem == "paddle25gpu":  # newer ones need a newer Paddle
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
