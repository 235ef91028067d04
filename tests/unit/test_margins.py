"""The margin rule of parity tests: what counts as undecided, and what does not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fastgen.options import GenerationOptions
from fastgen.testing.margins import MARGIN, margin_at
from fastgen.testing.sampling import BANNED, probabilities


def margin(logits: list[float], prompt: list[int], **options: object) -> float:
    given = GenerationOptions(**options)
    values = np.array(logits, np.float32)
    reference = SimpleNamespace(
        prompt=prompt,
        tokens=[],
        sequence=0,
        logits=[values],
        kept=[probabilities(values, given.temperature)],
    )
    return margin_at(reference, 0, given, seed=3).value


def test_equals_are_decided_by_their_ids() -> None:
    assert margin([1.0, 3.0, 3.0, 2.0], [0]) == pytest.approx(1 / 3)


def test_a_small_gap_is_undecided() -> None:
    assert margin([1.0, 3.0, 3.0001, 2.0], [0]) < MARGIN


@pytest.mark.parametrize("penalized", [1, 2])
def test_equals_of_which_a_penalty_rounded_one_are_undecided(penalized: int) -> None:
    logits = [1.0, 3.75, 3.75, 2.0]
    assert margin(logits, [penalized], repetition_penalty=1.2) < MARGIN
    # A power of two rounds nothing, and a token that was not penalized is as it was.
    assert margin(logits, [penalized], repetition_penalty=2.0) > MARGIN
    assert margin(logits, [0], repetition_penalty=1.2) > MARGIN


@pytest.mark.parametrize("banned", [float(BANNED), -np.inf])
def test_what_is_banned_stays_out(banned: float) -> None:
    logits = [banned, 3.0, 2.0, 1.0]
    assert margin(logits, [0], repetition_penalty=1.2) == pytest.approx(1 / 3)


@pytest.mark.parametrize("penalized", [1, 2, 3])
@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_among_such_equals_is_undecided(penalized: int, top_k: int) -> None:
    logits = [1.0, 3.75, 3.75, 3.75, 2.0]
    sampling = {"decode_strategy": "sampling", "top_k": top_k}
    assert margin(logits, [penalized], repetition_penalty=1.2, **sampling) < MARGIN
    assert margin(logits, [0], repetition_penalty=1.2, **sampling) > MARGIN
