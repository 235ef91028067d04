"""The sampling rules in NumPy: what the engine must do between logits and token.

The order is PaddleNLP's: min_length, repetition_penalty, no_repeat_ngram_size, forced bos, forced
eos; then the largest logit (greedy search), or temperature, softmax, top-k, top-p and one draw by
inverse CDF. Probabilities are float32, as in PaddleNLP; running sums are float64.

``options`` is a :class:`fastgen.GenerationOptions`, or anything with its attributes. There is no
model here, so an ``eos_token_id`` of None means none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastgen.testing.philox import uniform

__all__ = [
    "Choice",
    "choose",
    "filter_probs",
    "inverse_cdf",
    "log_softmax",
    "probabilities",
    "process_logits",
    "token_or_none",
]

BANNED = np.finfo(np.float32).min
"""Logit of a token that must not be generated: PaddleNLP takes the type's lowest value."""


def token_or_none(token: int | None) -> int | None:
    """An optional token id of the options: -1 means none, as None does here."""
    return None if token is None or token < 0 else token


class Choice(NamedTuple):
    """What a step came to: the token, and its contribution to the sequence's score."""

    token: int
    score: float


def process_logits(
    logits: npt.ArrayLike, history: Sequence[int], prompt_length: int, options: Any
) -> npt.NDArray[np.float32]:
    """Applies the logits processors.

    Args:
        logits: raw logits of the next token, ``[vocab]``.
        history: prompt and generated tokens so far.
        prompt_length: how many of them are the prompt.
        options: see the module.

    Returns:
        A new float32 array ``[vocab]``.
    """
    processed = np.array(logits, dtype=np.float32)
    length = len(history)
    tokens = np.asarray(history, dtype=np.int64)
    eos = token_or_none(options.eos_token_id)
    if eos is not None and length - prompt_length < options.min_length:
        processed[eos] = BANNED
    penalty = np.float32(options.repetition_penalty)
    if penalty != 1.0:
        seen = np.unique(tokens)
        value = processed[seen]
        with np.errstate(over="ignore"):
            processed[seen] = np.where(value < 0, value * penalty, value / penalty)
    ngram = options.no_repeat_ngram_size or 0
    if ngram > 0 and length + 1 > ngram:
        # Token j would end an n-gram that occurs already if the n-1 tokens before it are the last.
        tail = tuple(history[length + 1 - ngram :])
        for end in range(ngram - 1, length):
            if tuple(history[end + 1 - ngram : end]) == tail:
                processed[history[end]] = BANNED
    forced_bos = token_or_none(options.forced_bos_token_id)
    if forced_bos is not None and length == 1:
        processed[:] = BANNED
        processed[forced_bos] = 0.0
    forced_eos = token_or_none(options.forced_eos_token_id)
    if forced_eos is not None and length == prompt_length + options.max_length - 1:
        processed[:] = BANNED
        processed[forced_eos] = 0.0
    return processed


def probabilities(logits: npt.ArrayLike, temperature: float = 1.0) -> npt.NDArray[np.float32]:
    """Softmax of ``logits / temperature``, over the last axis, as float32."""
    with np.errstate(over="ignore"):
        scaled = np.asarray(logits, dtype=np.float32) / np.float32(temperature)
    shifted = (scaled - scaled.max(axis=-1, keepdims=True)).astype(np.float64)
    weights = np.exp(shifted)
    probs: npt.NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return probs.astype(np.float32)


def log_softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis in float64; finite wherever the logits are."""
    values = np.asarray(logits, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    total: npt.NDArray[np.float64] = np.exp(shifted).sum(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(total)
    return result


def filter_probs(
    probs: npt.ArrayLike, top_k: int | None = None, top_p: float | None = None
) -> npt.NDArray[np.float32]:
    """Applies top-k, then top-p, to one distribution.

    Args:
        probs: float32 ``[vocab]``.
        top_k: keeps every token as probable as the k-th; 0 or None switches it off.
        top_p: keeps the most probable tokens up to and including the one whose running sum
            exceeds p. Ties are taken in ascending id. After top-k the sum is not renormalised.
            0, None or >= 1 switches it off.

    Returns:
        float32 ``[vocab]``: the probability of what is kept, 0 elsewhere.
    """
    kept = np.array(probs, dtype=np.float32)
    vocab = kept.shape[-1]
    if top_k:
        k = min(top_k, vocab)
        threshold = np.partition(kept, vocab - k)[vocab - k]
        kept[kept < threshold] = 0.0
    if top_p and top_p < 1.0:
        order = np.argsort(-kept, kind="stable")
        running = np.cumsum(kept[order].astype(np.float64))
        crossed = running > np.float32(top_p)
        removed = np.concatenate([[False], crossed[:-1]])
        kept[order[removed]] = 0.0
    return kept


def inverse_cdf(probs: npt.ArrayLike, draws: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """First token, in ascending id, whose running sum exceeds ``draw * mass``.

    Args:
        probs: unnormalised probabilities ``[rows, vocab]``; a 0 is never chosen.
        draws: ``[rows]`` in [0, 1).

    Returns:
        int64 ``[rows]``.
    """
    running = np.cumsum(np.asarray(probs, dtype=np.float64), axis=-1)
    targets = np.asarray(draws, dtype=np.float64) * running[..., -1]
    chosen: npt.NDArray[np.int64] = np.argmax(running > targets[..., None], axis=-1)
    return chosen


def choose(
    processed: npt.ArrayLike, options: Any, seed: int = 0, sequence: int = 0, step: int = 0
) -> Choice:
    """Chooses the next token from processed logits.

    Args:
        processed: what :func:`process_logits` returned, ``[vocab]``.
        options: see the module.
        seed: of the request (sampling only).
        sequence: index of the sequence under that seed.
        step: new tokens before this one.

    Returns:
        The token and its score: its processed logit in greedy search, its log-probability before
        temperature and filters in sampling.
    """
    values = np.asarray(processed, dtype=np.float32)
    if options.decode_strategy == "greedy_search":
        token = int(np.argmax(values))
        return Choice(token, float(values[token]))
    kept = filter_probs(probabilities(values, options.temperature), options.top_k, options.top_p)
    token = int(inverse_cdf(kept[None], uniform(seed, sequence, step)[None])[0])
    return Choice(token, float(log_softmax(values)[token]))
