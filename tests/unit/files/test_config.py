"""Configurations, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastgen_tests.model_files import POSITIONS, PROMPT, load, make_config, refused, write_model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": ...}, ["n_embd", "missing"]),
        ({"n_positions": ...}, ["n_positions", "missing"]),
        ({"vocab_size": None}, ["vocab_size", "null"]),
        ({"vocab_size": "17"}, ["vocab_size", "'17'"]),
        ({"vocab_size": 0}, ["vocab_size", "0", "16777216"]),
        ({"vocab_size": 2**24 + 1}, ["vocab_size", "16777217"]),
        ({"vocab_size": 2**70}, ["vocab_size", "integer"]),
        ({"n_embd": -8}, ["n_embd", "-8"]),
        ({"n_embd": 8.0}, ["n_embd", "integer"]),
        ({"n_embd": True}, ["n_embd", "true", "integer"]),
        ({"n_embd": 65544}, ["n_embd", "65544", "65536"]),
        ({"n_head": 3}, ["n_embd", "multiple", "n_head", "3"]),
        ({"n_embd": 4096, "n_head": 2}, ["n_embd", "2048", "1024"]),
        ({"n_layer": 1025}, ["n_layer", "1025", "1024"]),
        ({"n_positions": 2**20 + 1}, ["n_positions", "1048577"]),
        ({"n_inner": 0}, ["n_inner", "0"]),
        ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon", "0"]),
        ({"layer_norm_epsilon": 1.0}, ["layer_norm_epsilon", "1"]),
        ({"layer_norm_epsilon": -1e-5}, ["layer_norm_epsilon", "-1e-05"]),
        ({"layer_norm_epsilon": 1e-60}, ["layer_norm_epsilon", "1e-60"]),
        ({"layer_norm_epsilon": "1e-5"}, ["layer_norm_epsilon", "number"]),
        ({"eos_token_id": 17}, ["eos_token_id", "17"]),
        ({"eos_token_id": -2}, ["eos_token_id", "-2"]),
        ({"eos_token_id": [3, 4]}, ["eos_token_id", "several"]),
        ({"bos_token_id": "a"}, ["bos_token_id", "'a'"]),
        ({"pad_token_id": 1.5}, ["pad_token_id", "1.5"]),
        ({"model_type": "llama"}, ["model_type", "'llama'", "'gpt2'"]),
        ({"model_type": 3}, ["model_type", "3"]),
        ({"model_type": ..., "architectures": ["OPTForCausalLM"]}, ["model_type"]),
        ({"activation_function": "relu"}, ["activation_function", "'relu'", "gelu_new"]),
        ({"activation_function": "gelu"}, ["activation_function", "'gelu'", "gelu_new"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"reorder_and_upcast_attn": True}, ["reorder_and_upcast_attn"]),
        ({"add_cross_attention": True}, ["add_cross_attention"]),
        ({"add_cross_attention": "no"}, ["add_cross_attention", "'no'"]),
    ],
)
def test_bad_config(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    refused(write_model(tmp_path, make_config(**changes)), "config.json", *words)


@pytest.mark.parametrize("key", ["vocab_size", "n_embd", "layer_norm_epsilon", "eos_token_id"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-NaN"])
def test_config_numbers_that_are_none(tmp_path: Path, key: str, number: str) -> None:
    text = json.dumps(make_config(**{key: "HERE"})).replace('"HERE"', number)
    refused(write_model(tmp_path, text), "config.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "gpt2",
        "{",
        "{}",
        "[" * 100_000,
        '{"n_embd": 8, "n_embd": 8}',
        "\ufeff{}",
    ],
)
def test_config_that_is_none(tmp_path: Path, text: str) -> None:
    refused(write_model(tmp_path, text), "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ...},
        {"n_positions": ..., "n_ctx": POSITIONS},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": ...},
        {"layer_norm_epsilon": ...},
        {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
        {"eos_token_id": [16]},
        {"architectures": None},
        {"name_or_path": "\U0001f600 é \u0000"},
    ],
)
def test_config_that_says_the_same(
    tmp_path: Path, expected_logits: np.ndarray, changes: dict[str, Any]
) -> None:
    model = load(write_model(tmp_path, make_config(**changes)))
    np.testing.assert_array_equal(model.logits(PROMPT), expected_logits)
