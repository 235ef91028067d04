"""The model files that the contestants of `python -m benchmarks.cpu` share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from benchmarks.cpu_cells import VOCAB_SIZE
from benchmarks.cuda_models import make_model


def token_name(token: int) -> str:
    """A word for a token: random weights have no vocabulary, and converters want one."""
    return "<|endoftext|>" if token == VOCAB_SIZE - 1 else f"t{token}"


def write_model(directory: Path, shape: str) -> Path:
    """A directory as HuggingFace writes it, with random float32 weights, unless it is there."""
    path = directory / shape / "huggingface"
    if path.is_dir():
        return path
    from safetensors.numpy import save_file

    partial = path.with_name(".partial-huggingface")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config, tensors = make_model(shape)
    config = {**config, "architectures": ["GPT2LMHeadModel"], "torch_dtype": "float32"}
    (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    arrays = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(arrays, partial / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(partial)
    partial.replace(path)
    return path


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    end = token_name(VOCAB_SIZE - 1)
    vocabulary = {token_name(token): token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
