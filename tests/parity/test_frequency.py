"""The unmodified path: frequencies of what is drawn, against the exact probabilities.

Nothing here is taken from ``fastgen.testing.sampling``: the expected distribution is worked out
anew in float64. Seeds are fixed, so every run sees the same draws.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastgen.generator import Generator
from fastgen.options import GenerationOptions
from fastgen.testing.models import GPTShape, controlled_tensors

VOCAB = 61
STEPS = 40
RETURNED = 25
SEEDS = range(20)
DRAWS = STEPS * RETURNED * len(SEEDS)


def exact_distribution(
    logits: npt.NDArray[np.float64], options: dict[str, Any]
) -> npt.NDArray[np.float64]:
    """What a draw must follow, by the definitions of the options."""
    scaled = logits / options.get("temperature", 1.0)
    weights = np.exp(scaled - scaled.max())
    probs = weights / weights.sum()
    order = sorted(range(probs.size), key=lambda token: (-probs[token], token))
    kept = list(order)
    if options.get("top_k"):
        least = probs[order[min(options["top_k"], probs.size) - 1]]
        kept = [token for token in order if probs[token] >= least]
    if options.get("top_p"):
        mass, count = 0.0, 0
        for token in kept:
            count += 1
            mass += probs[token]
            if mass > options["top_p"]:
                break
        kept = kept[:count]
    result = np.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


def normal_score(observed: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    """Chi-square of counts as a standard normal score (Wilson and Hilferty); rare bins pooled."""
    rare = expected < 5
    counts = np.append(observed[~rare], observed[rare].sum())
    means = np.append(expected[~rare], expected[rare].sum())
    counts, means = counts[means > 0], means[means > 0]
    freedom = len(counts) - 1
    if freedom == 0:
        return 0.0
    chi_square = float(((counts - means) ** 2 / means).sum())
    spread = 2 / (9 * freedom)
    return ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize("log_std", [0.5, 2.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": VOCAB + 5},
        {"top_p": 0.1},
        {"top_p": 0.8},
        {"top_k": 12, "top_p": 0.6},
        {"top_k": 30, "top_p": 0.95, "temperature": 0.6},
        {"temperature": 0.25},
        {"temperature": 3.0},
    ],
    ids=str,
)
def test_frequencies(options: dict[str, Any], log_std: float) -> None:
    rng = np.random.default_rng(17)
    logits = (rng.standard_normal(VOCAB) * log_std).astype(np.float32)
    logits[[3, 40]] = logits[[7, 11]]  # two ties
    shape = GPTShape(VOCAB, STEPS + 1, 8, 1, 1, 8)
    tensors = controlled_tensors(shape, logits)
    counts = np.zeros(VOCAB, dtype=np.int64)
    with Generator.from_tensors(shape.huggingface_config(), tensors, num_threads=1) as model:
        for seed in SEEDS:
            result = model.generate(
                [[seed % VOCAB]],
                GenerationOptions(
                    **{"top_k": 0, **options},
                    decode_strategy="sampling",
                    max_length=STEPS,
                    num_return_sequences=RETURNED,
                    eos_token_id=-1,
                    seed=seed,
                ),
            )
            tokens = np.concatenate(result.token_ids)
            counts += np.bincount(tokens, minlength=VOCAB)
    assert counts.sum() == DRAWS
    probs = exact_distribution(logits.astype(np.float64), options)
    assert counts[probs == 0].sum() == 0, "a filtered token was drawn"
    score = normal_score(counts, probs * DRAWS)
    assert abs(score) < 4.0, f"chi-square is {score:.1f} standard deviations off"


def test_seeds_sequences_and_steps_are_independent() -> None:
    """Pairs of draws that differ in one of seed, sequence and step are jointly uniform."""
    vocab = 16
    shape = GPTShape(vocab, 65, 8, 1, 1, 8)
    tensors = controlled_tensors(shape, np.zeros(vocab, np.float32))
    draws = []
    with Generator.from_tensors(shape.huggingface_config(), tensors, num_threads=1) as model:
        for seed in range(16):
            result = model.generate(
                [[0]],
                GenerationOptions(
                    decode_strategy="sampling",
                    top_k=0,
                    max_length=64,
                    num_return_sequences=16,
                    eos_token_id=-1,
                    seed=seed,
                ),
            )
            draws.append(result.token_ids)
    cube = np.array(draws)  # [seed, sequence, step]
    for axis in range(3):
        moved = np.moveaxis(cube, axis, 0)
        pairs = (vocab * moved[0::2] + moved[1::2]).ravel()
        counts = np.bincount(pairs, minlength=vocab * vocab)
        expected = np.full(vocab * vocab, pairs.size / vocab**2)
        assert abs(normal_score(counts, expected)) < 4.0, f"axis {axis}"
