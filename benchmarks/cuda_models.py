"""Random weights of GPT-2's published sizes, made in a second for all contestants."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastgen.bench import gpt2_config, layer_tensors

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]


def make_model(shape: str) -> tuple[Config, Tensors]:
    """Configuration and float32 tensors in HuggingFace's form. All matrices are stretches of one
    sequence of random numbers, each from a place of its own."""
    config = gpt2_config(shape)
    layers, hidden = config["n_layer"], config["n_embd"]
    shift = 4099  # between the beginnings of two matrices
    noise = np.random.default_rng(0).standard_normal(
        4 * hidden**2 + shift * (4 * layers + 1) + 1, dtype=np.float32
    )
    noise *= np.float32(0.02)
    taken = 0

    def matrix(rows: int, columns: int) -> np.ndarray:
        nonlocal taken
        taken += shift
        return noise[taken - shift :][: rows * columns].reshape(rows, columns)

    tensors = dict(layer_tensors(shape, matrix))
    # Begins again where the sequence ends, which is not where a row ends.
    odd = noise[: noise.size - (noise.size % hidden == 0)]
    tensors["wte.weight"] = np.resize(odd, (config["vocab_size"], hidden))
    tensors["wpe.weight"] = np.resize(odd[shift // 2 :], (config["n_positions"], hidden))
    return config, tensors
