"""The workflow, which cannot run here: its scripts are there, all of ci/test.sh among them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
SCRIPTS = sorted(
    set(re.findall(r"\bci/(?:\w+/)*\w+\.sh", re.sub(r"^ *#.*$", "", WORKFLOW, flags=re.M)))
)


def test_every_script_of_test_sh_has_a_job() -> None:
    text = re.sub(r"^ *#.*$", "", (ROOT / "ci" / "test.sh").read_text(encoding="utf-8"), flags=re.M)
    called = set(re.findall(r"\bci/(?:\w+/)*\w+\.sh", text))
    assert {"ci/lint.sh", "ci/conda/run.sh"} <= called
    assert called <= set(SCRIPTS)


ALL_SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "ci").rglob("*.sh"))
# Only the build tool runs it.
ALL_SCRIPTS.remove("ci/conda/python/build.sh")


def test_the_table_of_scripts_has_them_all() -> None:
    table = (ROOT / "ci" / "README.md").read_text(encoding="utf-8")
    for script in [*ALL_SCRIPTS, "ci/artifacts.py", "ci/sbom.py"]:
        assert f"`{script.removeprefix('ci/')}" in table, script


def test_the_scripts_of_jobs_are_there() -> None:
    assert set(SCRIPTS) <= set(ALL_SCRIPTS)


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_scripts_say_what_they_do(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    done = subprocess.run([str(path), "-h"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert script in done.stdout


def test_jobs_use_options_that_their_scripts_know() -> None:
    for script, options in re.findall(r"run: (ci/(?:\w+/)*\w+\.sh)((?: --[a-z-]+)*)\}", WORKFLOW):
        usage = subprocess.run([str(ROOT / script), "-h"], capture_output=True, text=True).stdout
        for option in options.split():
            assert option in usage, (script, option)
