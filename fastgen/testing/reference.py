"""GPT-2 in NumPy and float64: what the engine's logits are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["gpt2_logits", "greedy_search", "normalised_error", "to_bfloat16"]


def gpt2_logits(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    token_ids: Sequence[int],
    rounded: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> np.ndarray:
    """Logits of every position of one token sequence.

    Args:
        config: HuggingFace's configuration (`n_embd`, `n_head`, `n_layer`, `layer_norm_epsilon`).
        tensors: the weights under HuggingFace's names, without `transformer.`.
        token_ids: [length].
        rounded: what a kernel makes of rows [length, n] before it multiplies them by a matrix.

    Returns:
        [length, vocab] float64; row i is the distribution after `token_ids[: i + 1]`.
    """
    heads = config["n_head"]
    eps = config.get("layer_norm_epsilon", 1e-5)
    ids = np.asarray(token_ids)
    length = len(ids)
    embedding = _get(tensors, "wte.weight")
    hidden = embedding[ids] + _get(tensors, "wpe.weight")[:length]
    size = hidden.shape[-1] // heads
    causal = np.tril(np.ones((length, length), dtype=bool))
    for i in range(config["n_layer"]):
        x = _norm(tensors, f"h.{i}.ln_1", hidden, eps)
        qkv = _linear(tensors, f"h.{i}.attn.c_attn", rounded(x))
        # [3, heads, length, size]
        query, key, value = qkv.reshape(length, 3, heads, size).transpose(1, 2, 0, 3)
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(size)
        scores = np.where(causal, scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        context = (scores @ value).transpose(1, 0, 2).reshape(length, heads * size)
        hidden = hidden + _linear(tensors, f"h.{i}.attn.c_proj", rounded(context))
        x = _norm(tensors, f"h.{i}.ln_2", hidden, eps)
        x = _linear(tensors, f"h.{i}.mlp.c_fc", rounded(x))
        x = 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))
        hidden = hidden + _linear(tensors, f"h.{i}.mlp.c_proj", rounded(x))
    hidden = rounded(_norm(tensors, "ln_f", hidden, eps))
    head = _get(tensors, "lm_head.weight") if "lm_head.weight" in tensors else embedding
    logits: np.ndarray = hidden @ head.T
    return logits


def greedy_search(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    prompt: Sequence[int],
    max_length: int,
    eos_token_id: int = -1,
) -> list[int]:
    """New tokens of a greedy search; eos is included, ties go to the smallest id."""
    tokens = list(prompt)
    for _ in range(max_length):
        tokens.append(int(np.argmax(gpt2_logits(config, tensors, tokens)[-1])))
        if tokens[-1] == eos_token_id:
            break
    return tokens[len(prompt) :]


def normalised_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Mean squared error over the variance of what is expected."""
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.mean((actual - expected) ** 2) / np.var(expected))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even; finite numbers, any shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    rounded: np.ndarray = bits.view(np.float32)
    return rounded


def _get(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return np.asarray(tensors[name], dtype=np.float64)


def _linear(tensors: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    result: np.ndarray = x @ _get(tensors, f"{name}.weight") + _get(tensors, f"{name}.bias")
    return result


def _norm(tensors: Mapping[str, np.ndarray], name: str, x: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = 1.0 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    scaled: np.ndarray = centred * scale * _get(tensors, f"{name}.weight")
    result: np.ndarray = scaled + _get(tensors, f"{name}.bias")
    return result
