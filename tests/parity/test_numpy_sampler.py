"""The NumPy rules of ``fastgen.testing.sampling`` are PaddleNLP's, and wrong rules are noticed.

No engine takes part: this is about what the engine is measured with. Examples are not counted as
parity of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings

pytest.importorskip("paddlenlp", reason="PaddleNLP is not installed")

from fastgen.testing import strategies as fg
from fastgen.testing.margins import ParityLog
from fastgen.testing.parity import check, numpy_decoder
from fastgen.testing.philox import uniform
from fastgen.testing.profiles import share
from fastgen.testing.sampling import (
    Choice,
    choose,
    filter_probs,
    inverse_cdf,
    log_softmax,
    probabilities,
    process_logits,
)

# Not "paired": the logits of equal embeddings are equal or not as the matrix product happens to
# round, and the decoder here runs PaddleNLP's network without the cache that `generate` uses.
KINDS = ("random", "random", "table", "flat")


def test_numpy_rules() -> None:
    log = ParityLog()

    @share(0.05)
    @given(case=fg.cases(first_sequence=True, kinds=KINDS))
    def run(case: fg.Case) -> None:
        check(log, "numpy_sampler", case, numpy_decoder)

    run()
    assert not log.too_many_margin_uses, log.summary()


def draw_from(
    filtered: Callable[[Any, Any], Any], draw: Callable[[int, int, int], Any] = uniform
) -> Callable[..., Choice]:
    """A `choose` with another filter, or another draw."""

    def wrong(logits: Any, options: Any, seed: int, sequence: int, step: int) -> Choice:
        if options.decode_strategy == "greedy_search":
            return choose(logits, options)
        kept = filtered(probabilities(logits, options.temperature), options)
        token = int(inverse_cdf(kept[None], draw(seed, sequence, step)[None])[0])
        return Choice(token, float(log_softmax(logits)[token]))

    return wrong


def right(probs: Any, options: Any) -> Any:
    return filter_probs(probs, options.top_k, options.top_p)


def exactly_k(probs: Any, options: Any) -> Any:
    kept = np.zeros_like(probs)
    order = np.argsort(-probs, kind="stable")[: options.top_k or None]
    kept[order] = probs[order]
    return filter_probs(kept, None, options.top_p)


def renormalised_before_p(probs: Any, options: Any) -> Any:
    kept = filter_probs(probs, options.top_k)
    return filter_probs(kept / kept.sum(), None, options.top_p)


def without_the_crossing_token(probs: Any, options: Any) -> Any:
    kept = right(probs, options)
    if options.top_p < 1 and np.count_nonzero(kept) > 1:
        kept[np.argmin(np.where(kept > 0, kept, np.inf))] = 0
    return kept


def last_to_first(logits: Any, options: Any, seed: int, sequence: int, step: int) -> Choice:
    if options.decode_strategy == "greedy_search":
        return choose(logits, options)
    kept = right(probabilities(logits, options.temperature), options)
    draw = uniform(seed, sequence, step)
    token = logits.size - 1 - int(inverse_cdf(kept[None, ::-1], draw[None])[0])
    return Choice(token, float(log_softmax(logits)[token]))


def last_of_equals(logits: Any, options: Any, *draw: int) -> Choice:
    if options.decode_strategy != "greedy_search":
        return choose(logits, options, *draw)
    token = logits.size - 1 - int(np.argmax(logits[::-1]))
    return Choice(token, float(logits[token]))


def with_options(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """`process_logits` with options changed by functions of the options."""

    def wrong(logits: Any, history: Any, prompt_length: int, options: Any) -> Any:
        changed = {name: change(options) for name, change in changes.items()}
        return process_logits(logits, history, prompt_length, replace(options, **changed))

    return wrong


def score_after_temperature(logits: Any, options: Any, *draw: int) -> Choice:
    choice = choose(logits, options, *draw)
    if options.decode_strategy == "greedy_search":
        return choice
    score = log_softmax(np.asarray(logits, np.float64) / options.temperature)[choice.token]
    return Choice(choice.token, float(score))


WRONG: dict[str, dict[str, Callable[..., Any]]] = {
    "top_k keeps exactly k": {"choose": draw_from(exactly_k)},
    "top_k keeps k + 1": {
        "choose": draw_from(
            lambda probs, options: filter_probs(
                probs, options.top_k and options.top_k + 1, options.top_p
            )
        )
    },
    "top_p of a renormalised top_k": {"choose": draw_from(renormalised_before_p)},
    "top_p drops the crossing token": {"choose": draw_from(without_the_crossing_token)},
    "no filter": {"choose": draw_from(lambda probs, options: probs)},
    "draw of the next step": {
        "choose": draw_from(right, lambda seed, sequence, step: uniform(seed, sequence, step + 1))
    },
    "draw of another sequence": {
        "choose": draw_from(right, lambda seed, sequence, step: uniform(seed, sequence + 1, step))
    },
    "draw from the last id down": {"choose": last_to_first},
    "greedy takes the last of equals": {"choose": last_of_equals},
    "score after temperature": {"choose": score_after_temperature},
    "min_length one short": {
        "process": with_options(min_length=lambda o: max(0, o.min_length - 1))
    },
    "no repetition penalty": {"process": with_options(repetition_penalty=lambda o: 1.0)},
    "penalty inverted": {
        "process": with_options(repetition_penalty=lambda o: 1 / o.repetition_penalty)
    },
    "n-grams one longer": {
        "process": with_options(
            no_repeat_ngram_size=lambda o: o.no_repeat_ngram_size and o.no_repeat_ngram_size + 1
        )
    },
    "no forced bos": {"process": with_options(forced_bos_token_id=lambda o: -1)},
    "no forced eos": {"process": with_options(forced_eos_token_id=lambda o: -1)},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_noticed(name: str) -> None:
    """Each of these fails within the examples that every run tries."""

    @settings(
        share(1.0),
        max_examples=600,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        print_blob=False,
    )
    @given(case=fg.cases(kinds=KINDS))
    def run(case: fg.Case) -> None:
        check(ParityLog(), "wrong", case, partial(numpy_decoder, **WRONG[name]))

    with pytest.raises(AssertionError):
        run()
