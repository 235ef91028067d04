"""The workflow, which cannot run here: its scripts are there, all of ci/test.sh among them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
SCRIPTS = sorted(set(re.findall(r"\bci/\w+\.sh", re.sub(r"^ *#.*$", "", WORKFLOW, flags=re.M))))


def test_every_script_of_test_sh_has_a_job() -> None:
    text = re.sub(r"^ *#.*$", "", (ROOT / "ci" / "test.sh").read_text(encoding="utf-8"), flags=re.M)
    called = set(re.findall(r"\bci/\w+\.sh", text))
    assert "ci/lint.sh" in called
    assert called <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_there_and_say_what_they_do(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    done = subprocess.run([str(path), "-h"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert script in done.stdout


def test_jobs_use_options_that_their_scripts_know() -> None:
    for script, options in re.findall(r"run: (ci/\w+\.sh)((?: --[a-z-]+)*)\}", WORKFLOW):
        usage = subprocess.run([str(ROOT / script), "-h"], capture_output=True, text=True).stdout
        for option in options.split():
            assert option in usage, (script, option)
