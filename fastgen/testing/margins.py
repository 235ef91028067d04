"""Compares sequences with a reference, and judges what differs by the reference's own margin.

Two correct programs may disagree where the reference itself was undecided: two logits a rounding
error apart, a draw that falls on the border between two tokens. Such a disagreement is accepted
only if the reference's margin at that very step is below :data:`MARGIN`; everything else fails.
Accepted ones are counted, and too many of them fail as well.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgen.testing.philox import uniform
from fastgen.testing.sampling import BANNED, choose, log_softmax, probabilities

__all__ = [
    "MARGIN",
    "MARGIN_USES_ALLOWED",
    "Margin",
    "ParityLog",
    "compare",
    "margin_at",
    "timed_example",
]

MARGIN = 1e-4
"""A step of the reference with a smaller relative margin than this is undecided."""

MARGIN_USES_ALLOWED = 0.01
"""Largest share of compared sequences that may be decided by the margin rule."""

SCORE_TOLERANCE = 1e-4

# Paddle's softmax on the CPU raises every exponent to at least -64: a token further than that below
# the largest logit gets a log-probability that is too large, so PaddleNLP's score is no measure.
_CLIPPED = -63.0


@dataclass(frozen=True)
class Margin:
    """How close a step was to another outcome, relative; and which decision was that close."""

    value: float
    decision: str


TIE_AT_TOP_P = "a tie at top_p"


def _versions_of(
    logits: npt.NDArray[np.float32], penalized: Sequence[int], options: Any
) -> list[npt.NDArray[np.float64]]:
    """The logits [vocab] as another correct decoder may see them; usually only as they are.

    A repetition penalty rounds the logits that it reaches, and Paddle 2 multiplies by its
    reciprocal where Paddle 3 divides: whether such a logit equals another one is an accident, so it
    is taken to be slightly more, and slightly less.
    """
    exact = logits.astype(np.float64)
    penalty = float(options.repetition_penalty)
    if math.frexp(penalty)[0] == 0.5:  # a power of two, 1 among them, rounds nothing
        return [exact]
    shift = np.zeros_like(exact)
    reached = np.unique(penalized)
    reached = reached[np.isfinite(exact[reached])]  # a banned logit may have overflowed to -inf
    shift[reached] = np.abs(exact[reached]) * 2.0**-22  # a rounding or two of float32
    return [exact + shift, exact - shift]


def _greedy_margin(logits: npt.NDArray[np.float64]) -> Margin:
    """Gap of the two largest distinct logits, relative to the largest magnitude of allowed ones.

    Equal logits are no close call: the smallest id wins.
    """
    values = np.unique(logits)
    allowed = np.abs(values[values > float(BANNED) / 2])
    if values.size < 2:
        return Margin(float("inf"), "the largest logit")
    scale = allowed.max() if allowed.size and allowed.max() > 0 else 1.0
    return Margin(float((values[-1] - values[-2]) / scale), "the largest logit")


def _sampling_margins(
    logits: npt.NDArray[np.float64],
    probs: npt.NDArray[np.float32],
    kept: npt.NDArray[np.float32],
    options: Any,
    draw: float,
) -> list[Margin]:
    vocab = logits.size
    order = np.argsort(-logits, kind="stable")
    sorted_logits = logits[order]
    descending = probs[order].astype(np.float64)
    margins = []
    if options.top_k and options.top_k < vocab:
        # Tokens with the very logit of the k-th stay with it; the next lower one is outside.
        count = int(np.count_nonzero(logits >= sorted_logits[options.top_k - 1]))
        inside = descending[count - 1]
        if count < vocab:
            gap = (inside - descending[count]) / inside if inside else 0.0
            margins.append(Margin(float(gap), "top_k"))
        descending[count:] = 0.0
    if options.top_p and options.top_p < 1.0:
        p = float(np.float32(options.top_p))
        running = np.cumsum(descending)
        margins.append(Margin(float(np.abs(running - p).min() / p), "top_p"))
        count = int(np.searchsorted(running, p, side="right")) + 1
        if count < vocab and descending[count] > 0:
            gap = (descending[count - 1] - descending[count]) / descending[count - 1]
            equal = sorted_logits[count - 1] == sorted_logits[count]
            margins.append(Margin(float(gap), TIE_AT_TOP_P if equal else "the order at top_p"))
    running = np.cumsum(kept.astype(np.float64))
    distance = np.abs(running[kept > 0] - draw * running[-1]).min() / running[-1]
    margins.append(Margin(float(distance), "the draw"))
    return margins


def margin_at(reference: Any, step: int, options: Any, seed: int) -> Margin:
    """The smallest margin of one step of a reference sequence.

    An exact tie at the border of top-p, whose order PaddleNLP leaves to an unstable sort, is
    reported only if every other decision was clear.

    Args:
        reference: a :class:`fastgen.testing.paddlenlp.ReferenceSequence`.
        step: index of the new token.
        options: that it was generated with.
        seed: that it was generated with.
    """
    logits = reference.logits[step]
    versions = _versions_of(logits, [*reference.prompt, *reference.tokens[:step]], options)
    if options.decode_strategy == "greedy_search":
        return min(map(_greedy_margin, versions), key=lambda margin: margin.value)
    draw = float(uniform(seed, reference.sequence, step))
    probs = probabilities(logits, options.temperature)
    margins = [
        margin
        for version in versions
        for margin in _sampling_margins(version, probs, reference.kept[step], options, draw)
    ]
    ties = [margin for margin in margins if margin.decision == TIE_AT_TOP_P]
    smallest = min((m for m in margins if m not in ties), key=lambda margin: margin.value)
    return ties[0] if ties and smallest.value >= MARGIN else smallest


@dataclass
class _Counts:
    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    margin_uses: int = 0
    seconds: float = 0.0


@dataclass
class ParityLog:
    """Counts what was compared, by test, and how often the margin rule was needed."""

    tests: dict[str, _Counts] = field(default_factory=dict)
    decisions: dict[str, int] = field(default_factory=dict)

    def of(self, test: str) -> _Counts:
        """The counts of a test."""
        return self.tests.setdefault(test, _Counts())

    def accept(self, test: str, margin: Margin) -> None:
        """Counts one use of the margin rule."""
        self.of(test).margin_uses += 1
        self.decisions[margin.decision] = self.decisions.get(margin.decision, 0) + 1

    def total(self) -> _Counts:
        """All tests together."""
        total = _Counts()
        for counts in self.tests.values():
            for name, value in asdict(counts).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    @property
    def margin_share(self) -> float:
        """Share of the compared sequences that needed the margin rule."""
        total = self.total()
        return total.margin_uses / total.sequences if total.sequences else 0.0

    @property
    def too_many_margin_uses(self) -> bool:
        """Whether the margin rule was needed too often, if there is enough to tell by."""
        total = self.total()
        return total.margin_uses > max(20, MARGIN_USES_ALLOWED * total.sequences)

    def summary(self) -> str:
        """One line for people."""
        total = self.total()
        per_example = 1000 * total.seconds / total.examples if total.examples else 0.0
        why = ", ".join(f"{count} {name}" for name, count in sorted(self.decisions.items()))
        return (
            f"parity: {total.examples} examples, {total.sequences} sequences, "
            f"{total.tokens} tokens compared; margin rule used {total.margin_uses} times "
            f"({100 * self.margin_share:.3f} % of sequences, "
            f"{100 * MARGIN_USES_ALLOWED:g} % allowed{': ' + why if why else ''}); "
            f"{per_example:.1f} ms per example"
        )

    def write(self, path: Path, **facts: Any) -> None:
        """Writes the counts and ``facts`` as JSON."""
        report = {
            **facts,
            "total": asdict(self.total()),
            "margin_share": self.margin_share,
            "margin_decisions": self.decisions,
            "tests": {name: asdict(counts) for name, counts in self.tests.items()},
        }
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@contextmanager
def timed_example(log: ParityLog, test: str) -> Iterator[None]:
    """Counts one example of a test, and its time, if it ends without an exception."""
    start = time.perf_counter()
    yield
    counts = log.of(test)
    counts.examples += 1
    counts.seconds += time.perf_counter() - start


def _expected_score(reference: Any, options: Any) -> float:
    """The reference's score, worked out in float64 where Paddle's softmax clips."""
    if options.decode_strategy == "greedy_search":
        return float(reference.score)
    chosen = list(zip(reference.logits, reference.tokens))
    if min(float(logits[token]) - float(logits.max()) for logits, token in chosen) < _CLIPPED:
        return float(np.mean([log_softmax(logits)[token] for logits, token in chosen]))
    return float(reference.score)


def _check_score(reference: Any, score: float, options: Any) -> None:
    expected = _expected_score(reference, options)
    # A score is a mean of numbers that come out of the logits; what rounding does to it goes with
    # their magnitude, not with the score's, which may be near 0.
    allowed = np.stack(reference.logits).astype(np.float64)
    magnitude = np.abs(allowed[allowed > float(BANNED) / 2]).max(initial=0.0)
    tolerance = SCORE_TOLERANCE * (1.0 + max(abs(expected), magnitude / 10))
    assert abs(score - expected) <= tolerance, (
        f"score {score!r} of sequence {reference.sequence}, the reference has {expected!r} "
        f"(tolerance {tolerance:.2e}); prompt {reference.prompt}, tokens {reference.tokens}, "
        f"options {options}"
    )


def compare(
    log: ParityLog,
    test: str,
    reference: Any,
    tokens: Sequence[int],
    options: Any,
    seed: int,
    score: float | None = None,
    finish_reason: str | None = None,
    allowed: float = MARGIN,
) -> bool:
    """Compares one sequence with the reference's.

    Args:
        log: counts go here.
        test: name under which they are counted.
        reference: a :class:`fastgen.testing.paddlenlp.ReferenceSequence`.
        tokens: new tokens, eos included, without padding.
        options: that both were generated with.
        seed: that both were generated with.
        score: compared too, unless None.
        finish_reason: ``eos`` or ``length``; compared too, unless None.
        allowed: margin below which a step is undecided, for a decoder that rounds more than
            float32.

    Returns:
        True if all is equal, False if a difference was accepted by the margin rule; what follows
        such a difference is not compared.

    Raises:
        AssertionError: they differ where the reference was decided.
    """
    counts = log.of(test)
    counts.sequences += 1
    new = [int(token) for token in tokens]
    if new == reference.tokens:
        counts.tokens += len(new)
        if finish_reason is not None:
            assert finish_reason == reference.finish_reason, (
                f"finish reason {finish_reason!r}, the reference has "
                f"{reference.finish_reason!r}; tokens {new}, options {options}"
            )
        if score is not None:
            _check_score(reference, score, options)
        return True
    step = 0
    while step < min(len(new), len(reference.tokens)) and new[step] == reference.tokens[step]:
        step += 1
    counts.tokens += step
    where = (
        f"at step {step} of sequence {reference.sequence}: tokens {new}, the reference has "
        f"{reference.tokens}; prompt {reference.prompt}, seed {seed}, options {options}"
    )
    assert step < min(len(new), len(reference.tokens)), f"lengths differ {where}"
    margin = margin_at(reference, step, options, seed)
    assert margin.value < allowed, (
        f"tokens differ {where}; the reference's smallest margin is {margin.value:.3e} "
        f"({margin.decision}), the rule accepts below {allowed:g}"
    )
    if margin.decision == TIE_AT_TOP_P:
        # PaddleNLP's choice among equals is unspecified, ours is not: ascending id.
        rule = choose(reference.logits[step], options, seed, reference.sequence, step).token
        assert new[step] == rule, (
            f"tokens differ {where}; among the equal tokens at the border of top_p those of "
            f"smallest id must stay, which makes {rule} of this draw"
        )
    log.accept(test, margin)
    return False
