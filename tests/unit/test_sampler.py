"""The engine's logits processing and sampler against their NumPy rules, on chosen logits.

The model's logits are the same at every position and are set exactly (`controlled_tensors`), so
any distribution can be put before the sampler through the public interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel, EngineSequence
from fastgen.testing.margins import ParityLog, compare
from fastgen.testing.models import GPTShape, controlled_tensors
from fastgen.testing.philox import uniform
from fastgen.testing.sampling import (
    choose,
    filter_probs,
    inverse_cdf,
    probabilities,
    process_logits,
)

SAMPLING = GenerationOptions(decode_strategy="sampling", top_k=0, eos_token_id=-1)


def model_with(logits: npt.ArrayLike, positions: int = 72) -> EngineModel:
    values = np.asarray(logits, dtype=np.float32)
    shape = GPTShape(values.size, positions, 8, 1, 1, 8)
    return EngineModel(shape, controlled_tensors(shape, values))


def by_the_rules(
    logits: npt.NDArray[np.float32],
    prompt: Sequence[int],
    options: GenerationOptions,
    seed: int,
    sequence: int,
) -> Any:
    """Decodes in NumPy; a reference in the sense of `fastgen.testing.margins.compare`."""
    history, scores, seen, kept, reason = list(prompt), [], [], [], "length"
    for step in range(options.max_length):
        processed = process_logits(logits, history, len(prompt), options)
        choice = choose(processed, options, seed, sequence, step)
        seen.append(processed)
        probs = probabilities(processed, options.temperature)
        kept.append(filter_probs(probs, options.top_k, options.top_p))
        history.append(choice.token)
        scores.append(choice.score)
        if choice.token == options.eos_token_id:
            reason = "eos"
            break
    return SimpleNamespace(
        prompt=list(prompt),
        tokens=history[len(prompt) :],
        score=float(np.mean(scores)),
        finish_reason=reason,
        sequence=sequence,
        logits=seen,
        kept=kept,
    )


def check(
    logits: npt.NDArray[np.float32],
    prompt: Sequence[int],
    options: GenerationOptions,
    seed: int = 0,
    first_sequence: int = 0,
) -> tuple[list[EngineSequence], ParityLog]:
    """Runs the engine and compares every sequence with the rules."""
    log = ParityLog()
    with model_with(logits) as model:
        results = model.generate([prompt], options, seed, first_sequence)
    for index, result in enumerate(results):
        expected = by_the_rules(logits, prompt, options, seed, first_sequence + index)
        compare(
            log,
            "sampler",
            expected,
            result.tokens,
            options,
            seed,
            score=result.score,
            finish_reason=result.finish_reason,
        )
    return results, log


@settings(deadline=None, max_examples=300)
@given(
    vocab=st.one_of(st.integers(2, 100), st.integers(2, 3000), st.sampled_from([255, 256, 257])),
    logit_seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
    tied=st.booleans(),
    data=st.data(),
)
def test_everything(
    vocab: int, logit_seed: int, spread: float, tied: bool, data: st.DataObject
) -> None:
    rng = np.random.default_rng(logit_seed)
    logits = (rng.standard_normal(vocab) * spread).astype(np.float32)
    if tied:
        logits = np.rint(logits).astype(np.float32)
    prompt = rng.integers(0, vocab, data.draw(st.integers(1, 12))).tolist()
    # 24 tokens at most, so with more than 30 ids an n-gram ban always leaves some.
    token = st.integers(0, vocab - 1)
    special = st.one_of(st.just(-1), token)
    greedy = data.draw(st.integers(0, 4)) == 4
    options = GenerationOptions(
        decode_strategy="greedy_search" if greedy else "sampling",
        max_length=data.draw(st.integers(1, 12)),
        min_length=data.draw(st.integers(0, 4)),
        top_k=data.draw(st.one_of(st.just(0), st.integers(1, vocab + 3))),
        top_p=data.draw(st.one_of(st.just(1.0), st.floats(0.0, 1.0, width=32))),
        temperature=data.draw(st.sampled_from([0.05, 0.5, 1.0, 2.0, 50.0])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3, 0.7])),
        no_repeat_ngram_size=data.draw(st.sampled_from([0, 0, 1, 2, 3] if vocab > 30 else [0])),
        num_return_sequences=1 if greedy else data.draw(st.integers(1, 4)),
        eos_token_id=data.draw(special),
        forced_bos_token_id=data.draw(special),
        forced_eos_token_id=data.draw(special),
    )
    seed = data.draw(st.integers(0, 2**64 - 1))
    check(logits, prompt, options, seed, data.draw(st.sampled_from([0, 3, 2**32 - 4])))


@pytest.mark.parametrize("vocab", [2, 16, 256, 4096])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**64 - 1])
def test_draws_are_philox(vocab: int, seed: int) -> None:
    """With 2^n equal probabilities a token is the leading bits of the draw itself."""
    options = replace(SAMPLING, max_length=64, num_return_sequences=8)
    with model_with(np.zeros(vocab)) as model:
        for first in (0, 2**32 - 8):
            results = model.generate([[0]], options, seed, first)
            draws = uniform(seed, first + np.arange(8)[:, None], np.arange(64))
            tokens = np.array([result.tokens for result in results])
            np.testing.assert_array_equal(tokens, np.floor(draws * vocab))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 1000])
def test_ties_with_the_kth_stay(k: int) -> None:
    """Probabilities in groups of 1, 3, 5: k in a group keeps the whole group."""
    logits = np.array([0, 1, 2, 1, 0, 0, 1, 0, 0], np.float32)
    kept = {1: [2]}.get(k, [1, 2, 3, 6] if k <= 4 else list(range(9)))
    options = replace(SAMPLING, top_k=k, max_length=64, num_return_sequences=16)
    results, log = check(logits, [0], options)
    assert log.total().margin_uses == 0
    assert sorted({token for result in results for token in result.tokens}) == kept


@pytest.mark.parametrize("sixteenths", range(17))
def test_p_at_exact_boundaries(sixteenths: int) -> None:
    """A sum equal to p has not crossed it; among equals the smallest ids stay; 0 and 1 are off."""
    options = replace(SAMPLING, top_p=sixteenths / 16, max_length=64, num_return_sequences=16)
    with model_with(np.zeros(16)) as model:
        results = model.generate([[0]], options, seed=sixteenths)
    tokens = {token for result in results for token in result.tokens}
    count = sixteenths + 1 if 0 < sixteenths < 16 else 16
    assert tokens == set(range(count))


def test_p_after_k_is_of_the_whole_mass() -> None:
    """Top-k leaves four tokens of 1/16 each: their sum never crosses 0.5, so all of them stay."""
    logits = np.zeros(1024, np.float32)
    logits[[10, 20, 30, 40]] = np.log(85)  # 85 / (1020 + 4 * 85) = 1/16
    options = replace(SAMPLING, top_k=4, max_length=64, num_return_sequences=8)
    for top_p, kept in ((0.5, [10, 20, 30, 40]), (0.2, [10, 20, 30, 40]), (0.15, [10, 20, 30])):
        with model_with(logits) as model:
            results = model.generate([[0]], replace(options, top_p=top_p))
        assert sorted({t for result in results for t in result.tokens}) == kept


def test_greedy_takes_the_smallest_of_equals() -> None:
    logits = np.zeros(300, np.float32)
    logits[[257, 33, 150]] = 5.0
    with model_with(logits) as model:
        (result,) = model.generate([[0]], GenerationOptions(max_length=3, eos_token_id=-1))
    assert result.tokens == [33, 33, 33]
    assert result.score == 5.0


def test_extreme_logits_stay_finite() -> None:
    """float32 probabilities underflow here; tokens and scores must not."""
    logits = np.array([100.0, -100.0, 99.0, 0.0], np.float32)
    options = replace(SAMPLING, temperature=50.0, max_length=64, num_return_sequences=8)
    results, log = check(logits, [0], options)
    assert log.total().sequences == 8
    assert {t for result in results for t in result.tokens} == {0, 1, 2, 3}
    assert all(np.isfinite(result.score) for result in results)


def test_min_length_then_eos() -> None:
    logits = np.array([0.0, 30.0, 1.0], np.float32)
    options = GenerationOptions(max_length=8, min_length=3, eos_token_id=1)
    (result,), _ = check(logits, [0], options)
    assert result.tokens == [2, 2, 2, 1]
    assert result.finish_reason == "eos"


def test_inverse_cdf_of_the_rules() -> None:
    probs = np.array([[0.0, 0.25, 0.0, 0.25], [0.5, 0.0, 0.0, 0.0]], np.float32)
    assert inverse_cdf(probs, [0.0, 0.0]).tolist() == [1, 0]
    assert inverse_cdf(probs, [0.499, 0.999]).tolist() == [1, 0]
    assert inverse_cdf(probs, [0.5, 0.999]).tolist() == [3, 0]
