"""Greedy search: the tokens of ``fastgen.Generator`` are PaddleNLP's."""

from __future__ import annotations

import pytest
from hypothesis import given

pytest.importorskip("paddlenlp", reason="PaddleNLP is not installed")

from fastgen.options import GenerationOptions
from fastgen.testing import strategies as fg
from fastgen.testing.margins import ParityLog
from fastgen.testing.models import GPTShape, WeightRecipe
from fastgen.testing.parity import check
from fastgen.testing.profiles import share

SHAPE = GPTShape(
    vocab_size=29,
    max_position_embeddings=24,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=50,
)


@share(0.25)
@given(case=fg.cases(decode_strategy="greedy_search", max_new_tokens=10))
def test_greedy(parity_log: ParityLog, case: fg.Case) -> None:
    check(parity_log, "greedy", case)


@share(0.02)
@given(case=fg.cases(decode_strategy="greedy_search", large=True))
def test_greedy_large(parity_log: ParityLog, case: fg.Case) -> None:
    check(parity_log, "greedy_large", case)


def test_a_penalty_that_rounds_to_a_tie(parity_log: ParityLog) -> None:
    """4.5 / 1.2 against 3.75: a tie by Paddle 2, which multiplies by the reciprocal."""
    case = fg.Case(
        shape=GPTShape(29, 8, 8, 1, 1, 32),
        recipe=WeightRecipe(seed=0, logit_std=2.0, kind="table"),
        prompts=[[0]],
        options=GenerationOptions(max_length=2, repetition_penalty=1.2),
        seed=0,
    )
    (reference,) = check(parity_log, "greedy_penalty", case)
    first, second = sorted(reference.logits[0])[-2:]
    assert (first, second) == (3.75, 4.5)


@pytest.mark.parametrize("length", [1, 2, 23])
@pytest.mark.parametrize("kind", ["random", "paired", "table", "flat"])
def test_prompt_and_tokens_fill_the_position_table(
    parity_log: ParityLog, kind: str, length: int
) -> None:
    case = fg.Case(
        shape=SHAPE,
        recipe=WeightRecipe(seed=length, kind=kind),
        prompts=[[(5 * i + 1) % SHAPE.vocab_size for i in range(length)]],
        options=GenerationOptions(max_length=SHAPE.max_position_embeddings - length),
        seed=0,
    )
    reference = check(parity_log, "greedy_full_table", case)
    assert len(reference[0].tokens) == case.options.max_length


def test_equal_logits_give_the_smallest_id(parity_log: ParityLog) -> None:
    case = fg.Case(
        shape=SHAPE,
        recipe=WeightRecipe(seed=0, kind="flat"),
        prompts=[[3], [1, 2]],
        options=GenerationOptions(max_length=4, no_repeat_ngram_size=1),
        seed=0,
    )
    first, second = check(parity_log, "greedy_ties", case)
    assert first.tokens == [0, 1, 2, 4]
    assert second.tokens == [0, 3, 4, 5]


def test_eos_first(parity_log: ParityLog) -> None:
    case = fg.Case(
        shape=SHAPE,
        recipe=WeightRecipe(seed=7),
        prompts=[[3, 4, 5], [6], [7, 8]],
        options=GenerationOptions(max_length=6, pad_token_id=2),
        seed=0,
        eos_choice="first",
    )
    reference = check(parity_log, "greedy_eos", case)
    assert (len(reference[0].tokens), reference[0].finish_reason) == (1, "eos")
