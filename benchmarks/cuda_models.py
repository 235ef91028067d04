"""Random weights of GPT-2's published sizes, made in a second for all contestants."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cuda_cells import MAX_POSITIONS, VOCAB_SIZE
from fastgen.bench import SHAPES

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]


def make_model(shape: str) -> tuple[Config, Tensors]:
    """Configuration and float32 tensors in HuggingFace's form. All matrices are stretches of one
    sequence of random numbers, each from a place of its own."""
    layers, hidden, heads = SHAPES[shape]
    config = {
        "vocab_size": VOCAB_SIZE,
        "n_positions": MAX_POSITIONS,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": 4 * hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
    }
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

    tensors: Tensors = {}
    norms = ["ln_f"]
    for i in range(layers):
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            tensors[f"h.{i}.{name}.weight"] = matrix(rows, columns)
            tensors[f"h.{i}.{name}.bias"] = np.zeros(columns, np.float32)
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
    for name in norms:
        tensors[f"{name}.weight"] = np.ones(hidden, np.float32)
        tensors[f"{name}.bias"] = np.zeros(hidden, np.float32)
    # Begins again where the sequence ends, which is not where a row ends.
    odd = noise[: noise.size - (noise.size % hidden == 0)]
    tensors["wte.weight"] = np.resize(odd, (VOCAB_SIZE, hidden))
    tensors["wpe.weight"] = np.resize(odd[shift // 2 :], (MAX_POSITIONS, hidden))
    return config, tensors
