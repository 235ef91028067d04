"""The good model that every test of bad files must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastgen_tests.model_files import PROMPT, generate, load, write_model

import fastgen


@pytest.fixture(scope="module")
def good_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def good_model(good_directory: Path) -> tuple[fastgen.Generator, list[list[int]], np.ndarray]:
    model = load(good_directory)
    return model, generate(model), model.logits(PROMPT)


@pytest.fixture(autouse=True)
def survivor(
    good_model: tuple[fastgen.Generator, list[list[int]], np.ndarray],
) -> Iterator[None]:
    """Whatever a test loads in vain, the good model still generates the same."""
    yield
    model, expected, _ = good_model
    assert generate(model) == expected


@pytest.fixture
def expected_logits(
    good_model: tuple[fastgen.Generator, list[list[int]], np.ndarray],
) -> np.ndarray:
    """Of the good model, [len(PROMPT), VOCAB]."""
    return good_model[2]
