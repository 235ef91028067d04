"""The fuzz targets and their first inputs: they build, and the inputs are the good files that they
should be. Fuzzing itself takes clang and minutes: ci/fuzz.sh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fastgen_tests.programs import ROOT, need, run

FUZZ = ROOT / "tests" / "fuzz"
#: Inputs that are refused; all others are good.
REFUSED = {
    "tokenizer/vocab_json": "text has the byte '<' at 14, for which",
    "tokenizer/vocab_txt": r"text has the byte '\xc3' at 7, for which",
}


@pytest.mark.slow
def test_first_inputs() -> None:
    """Of every target, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    need("bash", "g++")
    output, errors = run(ROOT / "ci" / "fuzz.sh", "--replay")
    assert errors == ""
    became = dict(line.split(": ", 1) for line in output.splitlines())
    corpus = FUZZ / "corpus"
    targets = {path.stem.removeprefix("fuzz_") for path in FUZZ.glob("fuzz_*.cc")}
    assert targets == {path.name for path in corpus.iterdir()}
    assert {corpus.parents[2] / path for path in became} == set(corpus.glob("*/*"))
    for path, what in became.items():
        name = path.removeprefix("tests/fuzz/corpus/")
        assert what.startswith(REFUSED.get(name, "good")), path


def test_first_inputs_are_those_of_the_script(tmp_path: Path) -> None:
    script = FUZZ / "make_corpus.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=300)
    for target in ("safetensors", "export"):
        made = {path.name: path.read_bytes() for path in (tmp_path / target).iterdir()}
        kept = {path.name: path.read_bytes() for path in (FUZZ / "corpus" / target).iterdir()}
        assert made == kept
