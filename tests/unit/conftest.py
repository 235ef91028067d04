"""Tiny random models, written as files, for the tests of the Python package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastgen_tests.native_tokenizer import Native, save_vocabulary, trained

from fastgen import Generator
from fastgen._checkpoint import tensor_shapes

END = "<|endoftext|>"
TEXT = [
    "Return the number of items in the list.",
    "Return a new string with the é, the ü and the 中文 of the text: naïve café 😀 🎉.",
    "Raise ValueError if the argument is not an integer.",
]


@dataclass(frozen=True)
class TinyModel:
    """A model directory and what is in it."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def random_weights(seed: int = 1, **sizes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and float32 tensors of a random GPT-2, in HuggingFace's form."""
    config: dict[str, Any] = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 320,
        "n_positions": 96,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 160,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **sizes,
    }
    rng = np.random.default_rng(seed)
    hidden = config["n_embd"]

    def normal(*shape: int, scale: float = 0.3, mean: float = 0.0) -> np.ndarray:
        return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    tensors = {
        "wte.weight": normal(config["vocab_size"], hidden, scale=0.6),
        "wpe.weight": normal(config["n_positions"], hidden),
    }
    layers = {n: shape for n, shape in tensor_shapes(config).items() if n not in tensors}
    norms = [name for name in layers if "ln_" in name]
    for name, shape in layers.items():
        if name not in norms:
            tensors[name] = normal(*shape)
    for name in norms:
        mean = 1.0 if name.endswith(".weight") else 0.0
        tensors[name] = normal(hidden, mean=mean, scale=0.1)
    return config, tensors


def write_model(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> TinyModel:
    """Writes a HuggingFace directory without a tokenizer."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(directory / "model.safetensors"))
    return TinyModel(directory, config, tensors)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE as `tokenizer.json`, whose token 0 is the special `<|endoftext|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny model with a tokenizer."""
    model = write_model(tmp_path_factory.mktemp("model") / "tiny", *random_weights())
    write_tokenizer(model.directory, model.config["vocab_size"])
    return model


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny model without a tokenizer, an eos or a pad."""
    config, tensors = random_weights(seed=2)
    del config["eos_token_id"], config["bos_token_id"]
    return write_model(tmp_path_factory.mktemp("model") / "bare", config, tensors)


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model with many positions, so that a request can be interrupted."""
    config, tensors = random_weights(
        seed=3, n_positions=40000, n_embd=64, n_inner=256, n_layer=4, eos_token_id=None
    )
    model = write_model(tmp_path_factory.mktemp("model") / "slow", config, tensors)
    write_tokenizer(model.directory, config["vocab_size"])
    return model


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., TinyModel]:
    """Writes a model: `make_model(name, seed=1, **sizes)`."""

    def make(name: str = "model", seed: int = 1, **sizes: Any) -> TinyModel:
        return write_model(tmp_path / name, *random_weights(seed, **sizes))

    return make


@pytest.fixture
def generator(tiny: TinyModel) -> Iterator[Generator]:
    """The tiny model, loaded."""
    with Generator.from_pretrained(tiny.directory) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Native]:
    """The library's tokenizer of a small vocabulary."""
    directory = tmp_path_factory.mktemp("small")
    save_vocabulary(trained(600), directory)
    native = Native(directory)
    yield native
    native.close()
