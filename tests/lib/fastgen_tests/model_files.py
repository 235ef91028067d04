"""Directories of a tiny HuggingFace GPT-2, good ones and ones that no writer would make."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from safetensors.numpy import save_file

import fastgen
from fastgen.errors import ModelFileError, NotFoundError

VOCAB, POSITIONS, HIDDEN, LAYERS, HEADS, INNER = 17, 12, 8, 2, 2, 20
PROMPT = [1, 5, 3]

Tensors = dict[str, np.ndarray]

#: Every example loads a whole model from one directory that the examples share.
FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def make_config(**changes: Any) -> dict[str, Any]:
    """A HuggingFace configuration; a value of `...` leaves the key out."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": INNER,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 16,
        "eos_token_id": 16,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def make_tensors(prefix: str = "transformer.", dtype: Any = np.float32) -> Tensors:
    """Random weights with HuggingFace's names. Their values do not depend on the arguments."""
    rng = np.random.default_rng(7)

    def random(*shape: int) -> np.ndarray:
        # Of few bits, so that half precision holds the same values.
        return (rng.integers(-32, 33, shape) / 64).astype(dtype)

    tensors = {
        f"{prefix}wte.weight": random(VOCAB, HIDDEN),
        f"{prefix}wpe.weight": random(POSITIONS, HIDDEN),
    }
    for i in range(LAYERS):
        for name, shape in (
            ("ln_1", (HIDDEN,)),
            ("attn.c_attn", (HIDDEN, 3 * HIDDEN)),
            ("attn.c_proj", (HIDDEN, HIDDEN)),
            ("ln_2", (HIDDEN,)),
            ("mlp.c_fc", (HIDDEN, INNER)),
            ("mlp.c_proj", (INNER, HIDDEN)),
        ):
            tensors[f"{prefix}h.{i}.{name}.weight"] = random(*shape)
            tensors[f"{prefix}h.{i}.{name}.bias"] = random(shape[-1])
    tensors[f"{prefix}ln_f.weight"] = random(HIDDEN)
    tensors[f"{prefix}ln_f.bias"] = random(HIDDEN)
    return tensors


def to_paddlenlp(tensors: Mapping[str, np.ndarray], prefix: str, fused: bool) -> Tensors:
    """HuggingFace's tensors under PaddleNLP's names, q, k and v apart or interleaved by head."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        parts = name.removeprefix("transformer.").split(".")
        kind = parts[-1]
        if parts[0] in ("wte", "wpe"):
            word = {"wte": "word", "wpe": "position"}[parts[0]]
            renamed[f"{prefix}embeddings.{word}_embeddings.weight"] = value
        elif parts[0] == "ln_f":
            renamed[f"{prefix}decoder.norm.{kind}"] = value
        else:
            layer = f"{prefix}decoder.layers.{parts[1]}."
            role = ".".join(parts[2:-1])
            if role != "attn.c_attn":
                word = {
                    "ln_1": "norm1",
                    "ln_2": "norm2",
                    "attn.c_proj": "self_attn.out_proj",
                    "mlp.c_fc": "linear1",
                    "mlp.c_proj": "linear2",
                }[role]
                renamed[f"{layer}{word}.{kind}"] = value
            elif fused:
                by_head = value.reshape(-1, 3, HEADS, HIDDEN // HEADS).swapaxes(1, 2)
                renamed[f"{layer}self_attn.qkv_proj.{kind}"] = by_head.reshape(value.shape).copy()
            else:
                for word, part in zip("qkv", np.split(value, 3, axis=-1)):
                    renamed[f"{layer}self_attn.{word}_proj.{kind}"] = part.copy()
    renamed["lm_head.weight"] = renamed[f"{prefix}embeddings.word_embeddings.weight"].copy()
    return renamed


def safetensors_bytes(header: Any, data: bytes, padding: int = 0) -> bytes:
    """A safetensors file of a header (JSON or bytes) and data that need not belong together."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * padding
    return struct.pack("<Q", len(text)) + text + data


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_model(directory: Path, config: Any = None, tensors: Any = None) -> Path:
    """A model directory; None: the good configuration or tensors, bytes and str: as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    config = make_config() if config is None else config
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / "config.json").write_text(text, encoding="utf-8")
    weights = directory / "model.safetensors"
    if isinstance(tensors, bytes):
        weights.write_bytes(tensors)
    else:
        save_file(tensors or make_tensors(), weights, metadata={"format": "pt"})
    return directory


def load(directory: Path) -> fastgen.Generator:
    return fastgen.Generator.from_pretrained(directory, num_threads=1)


def generate(model: fastgen.Generator) -> list[list[int]]:
    return model.generate([PROMPT], decode_strategy="greedy_search", max_length=6).token_ids


def refused(
    directory: Path,
    *words: str,
    error: type[Exception] = ModelFileError,
) -> str:
    """Loading `directory` raises `error` with one printable sentence that has all the words."""
    with pytest.raises(error) as caught:
        load(directory)
    sentence = str(caught.value)
    assert sentence
    assert len(sentence) < 1000
    assert sentence.isprintable(), repr(sentence)
    for word in words:
        assert word in sentence, sentence
    return sentence


def load_or_refuse(directory: Path) -> None:
    """A damaged directory either loads, and then generates, or is refused with a sentence."""
    try:
        model = load(directory)
    except (ModelFileError, NotFoundError) as error:
        sentence = str(error)
        assert sentence
        assert len(sentence) < 1000
        assert sentence.isprintable(), repr(sentence)
    else:
        with model:
            (tokens,) = model.generate(
                [PROMPT], decode_strategy="greedy_search", max_length=2
            ).token_ids
            assert 1 <= len(tokens) <= 2
            assert all(0 <= token < model.info.vocab_size for token in tokens)
