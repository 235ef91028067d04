"""Tiny PaddleNLP models, and Python programs in processes of their own."""

from __future__ import annotations

import os

# Before Paddle, whose bundled zlib otherwise breaks later imports; and thread counts before the
# run-time libraries that read them: on models this small a second thread only waits.
import zlib  # noqa: F401

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("FASTGEN_NUM_THREADS", "1")

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddlenlp")

import paddle
from fastgen_tests.exports import EXPORT_SHAPE, write_model, write_tokenizer
from fastgen_tests.programs import build_gpt_paddle, compile_gpt

from fastgen.testing import profiles
from fastgen.testing.models import GPTShape, WeightRecipe

SHAPE = GPTShape(
    vocab_size=97,
    max_position_embeddings=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
)
EOS, PAD = 7, 0

# What the programs of run_python begin with.
PRELUDE = f"""
import zlib
import gc, os, sys, threading, time
import numpy as np
import paddle
from paddlenlp.transformers import GPTConfig, GPTLMHeadModel
from paddlenlp.utils.log import logger
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
logger.set_level("ERROR")

def make_model(shape={SHAPE!r}, seed=0):
    config = GPTConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_position_embeddings,
        eos_token_id={EOS}, pad_token_id={PAD}, bos_token_id=1,
    )
    model = GPTLMHeadModel(config)
    model.eval()
    tensors = make_tensors(shape, WeightRecipe(seed=seed))
    for name, parameter in model.named_parameters():
        parameter.set_value(tensors[name])
    return model
"""


def pytest_configure(config: pytest.Config) -> None:
    # Before the modules that take their share of a profile are imported.
    profiles.choose(config.getoption("--hypothesis-profile", None))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HuggingFace directory with a tokenizer, to be exported."""
    directory = tmp_path_factory.mktemp("source") / "model"
    write_model(directory, EXPORT_SHAPE, WeightRecipe(seed=5))
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fastgen-gpt, on the library under test."""
    return compile_gpt(tmp_path_factory.mktemp("gpt"))


@pytest.fixture(scope="session")
def gpt_paddle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fastgen-gpt-paddle, on this Paddle's wheel."""
    if paddle.__version__.startswith("3"):
        pytest.skip("Paddle 3's C++ jit loader is not what this program is made for")
    return build_gpt_paddle(tmp_path_factory.mktemp("gpt_paddle"))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """make_model(shape=..., seed=...) -> a GPTLMHeadModel with seeded random weights."""
    namespace: dict[str, Any] = {"GPTShape": GPTShape}
    exec(PRELUDE, namespace)
    return namespace["make_model"]


@pytest.fixture
def prompts() -> np.ndarray:
    """[3, 5], no special tokens."""
    return np.random.default_rng(0).integers(8, SHAPE.vocab_size, (3, 5))


@pytest.fixture
def start_python(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """start_python(code, **environment): a process that runs `code` after the prelude."""
    count = 0

    def start(code: str, **environment: str) -> subprocess.Popen[str]:
        nonlocal count
        count += 1
        program = tmp_path / f"program{count}.py"
        program.write_text(
            f"from fastgen.testing.models import GPTShape\n{PRELUDE}\n{textwrap.dedent(code)}"
        )
        paths = [entry for entry in sys.path if entry]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )

    return start


@pytest.fixture
def run_python(start_python: Callable[..., Any]) -> Callable[..., tuple[str, str]]:
    """Like start_python, waits for success; returns stdout and stderr."""

    def run(code: str, timeout: float = 300, **environment: str) -> tuple[str, str]:
        process = start_python(code, **environment)
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0, err
        return out, err

    return run
