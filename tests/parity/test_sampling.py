"""Sampling: with the same draws, the tokens of ``fastgen.Generator`` are PaddleNLP's."""

from __future__ import annotations

import pytest
from hypothesis import given

pytest.importorskip("paddlenlp", reason="PaddleNLP is not installed")

from fastgen.options import GenerationOptions
from fastgen.testing import strategies as fg
from fastgen.testing.margins import ParityLog
from fastgen.testing.models import GPTShape, WeightRecipe
from fastgen.testing.parity import check, engine
from fastgen.testing.profiles import share


@share(0.41)
@given(case=fg.cases(decode_strategy="sampling"))
def test_sampling(parity_log: ParityLog, case: fg.Case) -> None:
    check(parity_log, "sampling", case)


@share(0.04)
@given(case=fg.cases(decode_strategy="sampling", large=True))
def test_sampling_large(parity_log: ParityLog, case: fg.Case) -> None:
    check(parity_log, "sampling_large", case)


@share(0.1)
@given(case=fg.cases(decode_strategy="sampling", kinds=("paired", "table", "flat")))
def test_tied_probabilities(parity_log: ParityLog, case: fg.Case) -> None:
    check(parity_log, "sampling_ties", case)


@share(0.1)
@given(case=fg.cases(first_sequence=True))
def test_sequence_indices(parity_log: ParityLog, case: fg.Case) -> None:
    """Through the C API, where sequences may be counted from anywhere."""
    check(parity_log, "sequence_indices", case, engine)


@pytest.mark.parametrize("sixteenths", range(1, 16))
def test_p_at_an_exact_boundary(parity_log: ParityLog, sixteenths: int) -> None:
    """Sixteen equal probabilities: every sum is exact, so `>` and `>=` differ by one token."""
    shape = GPTShape(16, 40, 8, 1, 1, 8)
    case = fg.Case(
        shape=shape,
        recipe=WeightRecipe(seed=0, kind="flat"),
        prompts=[[1], [2, 3]],
        options=GenerationOptions(
            decode_strategy="sampling",
            max_length=32,
            top_k=0,
            top_p=sixteenths / 16,
            num_return_sequences=4,
        ),
        seed=sixteenths,
    )
    before = parity_log.of("sampling_exact_p").margin_uses
    reference = check(parity_log, "sampling_exact_p", case)
    assert parity_log.of("sampling_exact_p").margin_uses == before
    # The token that crosses p stays, and a sum equal to p has not crossed it.
    kept = reference[0].kept[0]
    assert (kept > 0).tolist() == [True] * (sixteenths + 1) + [False] * (15 - sixteenths)
