"""One parity example: PaddleNLP and another decoder on the same case, sequence by sequence."""

from __future__ import annotations

import zlib  # noqa: F401  see fastgen.testing.paddlenlp
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fastgen.generator import Generator
from fastgen.testing.engine import EngineModel
from fastgen.testing.margins import MARGIN, ParityLog, compare, timed_example
from fastgen.testing.paddlenlp import PaddleNLPReference, ReferenceSequence
from fastgen.testing.sampling import (
    Choice,
    choose,
    filter_probs,
    probabilities,
    process_logits,
    token_or_none,
)
from fastgen.testing.strategies import Case

__all__ = ["Decoded", "Decoder", "check", "engine", "generator", "numpy_decoder", "resolve"]


@dataclass
class Decoded:
    """What a decoder made of one sequence; None where it does not say."""

    tokens: list[int]
    score: float | None = None
    finish_reason: str | None = None


Decoder = Callable[[Case, PaddleNLPReference], Sequence[Decoded]]
"""Runs a case; returns ``num_return_sequences`` sequences per prompt, in order. The reference has
the case's weights."""


def generator(case: Case, reference: PaddleNLPReference) -> Sequence[Decoded]:
    """:class:`fastgen.Generator` on the tensors, all prompts as one ragged batch.

    It counts sequences from 0, so ``case.first_sequence`` must be 0.
    """
    assert case.first_sequence == 0
    config = case.shape.huggingface_config()
    with Generator.from_tensors(config, case.tensors(), num_threads=1) as model:
        result = model.generate(case.prompts, replace(case.options, seed=case.seed))
    return [
        Decoded(tokens, score, reason)
        for tokens, score, reason in zip(result.token_ids, result.scores, result.finish_reasons)
    ]


def engine(case: Case, reference: PaddleNLPReference) -> Sequence[Decoded]:
    """The engine through the C API, all prompts as one ragged batch."""
    with EngineModel(case.shape, case.tensors()) as model:
        sequences = model.generate(case.prompts, case.options, case.seed, case.first_sequence)
    return [Decoded(each.tokens, each.score, each.finish_reason) for each in sequences]


def numpy_decoder(
    case: Case,
    reference: PaddleNLPReference,
    process: Callable[..., npt.NDArray[np.float32]] = process_logits,
    choose: Callable[..., Choice] = choose,
) -> Sequence[Decoded]:
    """PaddleNLP's network, without a cache, and rules in NumPy.

    Args:
        case: what to run.
        reference: with the case's weights.
        process: stands for :func:`fastgen.testing.sampling.process_logits`.
        choose: stands for :func:`fastgen.testing.sampling.choose`.
    """
    options = case.options
    eos = token_or_none(options.eos_token_id)
    results = []
    for row in range(len(case.prompts) * options.num_return_sequences):
        prompt = case.prompts[row // options.num_return_sequences]
        history, scores, reason = list(prompt), [], "length"
        for step in range(options.max_length):
            raw = reference.logits(history)[-1]
            processed = process(raw, history, len(prompt), options)
            choice = choose(processed, options, case.seed, case.first_sequence + row, step)
            history.append(choice.token)
            scores.append(choice.score)
            if choice.token == eos:
                reason = "eos"
                break
        results.append(Decoded(history[len(prompt) :], sum(scores) / len(scores), reason))
    return results


def resolve(case: Case, reference: PaddleNLPReference) -> Case:
    """Settles ``eos_choice`` and ``p_choice`` by what PaddleNLP does first.

    Returns:
        A case with ``eos_choice`` ``drawn`` and no ``p_choice``.
    """
    if case.eos_choice == "drawn" and case.p_choice is None:
        return case
    options = case.options
    plain = replace(
        options,
        max_length=1,
        min_length=0,
        num_return_sequences=1,
        eos_token_id=-1,
        forced_eos_token_id=-1,
    )
    if case.p_choice is not None:
        # The running sum that top_p is compared with, or what is just clearly to either side of it.
        rank, side = case.p_choice
        factor = {"below": 1 - 3 * MARGIN, "at": 1.0, "above": 1 + 3 * MARGIN}[side]
        probe = replace(plain, top_p=1.0)
        first = reference.generate(case.prompts[:1], probe, case.seed, case.first_sequence)[0]
        kept = filter_probs(probabilities(first.logits[0], options.temperature), options.top_k)
        running = np.cumsum(np.sort(kept)[::-1], dtype=np.float32)
        options = replace(options, top_p=min(float(np.float32(factor * running[rank])), 1.0))
    if case.eos_choice == "first":
        probe = replace(plain, top_p=options.top_p)
        first = reference.generate(case.prompts[:1], probe, case.seed, case.first_sequence)[0]
        options = replace(options, eos_token_id=first.tokens[0])
    return replace(case, options=options, eos_choice="drawn", p_choice=None)


def check(
    log: ParityLog, test: str, case: Case, decoder: Decoder = generator
) -> list[ReferenceSequence]:
    """Runs one example and compares every sequence.

    Args:
        log: counts go here.
        test: name under which they are counted.
        case: what to run.
        decoder: what is put on trial.

    Returns:
        The reference's sequences.

    Raises:
        AssertionError: see :func:`fastgen.testing.margins.compare`.
    """
    with timed_example(log, test):
        reference = PaddleNLPReference.cached(case.shape, case.tensors())
        case = resolve(case, reference)
        expected = reference.generate(case.prompts, case.options, case.seed, case.first_sequence)
        actual = decoder(case, reference)
        assert len(actual) == len(expected), f"{len(actual)} sequences instead of {len(expected)}"
        for theirs, ours in zip(expected, actual):
            compare(
                log,
                test,
                theirs,
                ours.tokens,
                case.options,
                case.seed,
                score=ours.score,
                finish_reason=ours.finish_reason,
            )
    return expected
