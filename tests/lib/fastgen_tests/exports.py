"""Models to export, and exports run by Paddle Inference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fastgen.jit import load_op_library
from fastgen.testing.models import GPTShape, WeightRecipe, huggingface_tensors, make_tensors

EXPORT_SHAPE = GPTShape(320, 48, 32, 2, 4, 64)
PROMPTS = [[9, 8, 7], [300, 5, 11, 23, 42], [17]]


def write_model(directory: Path, shape: GPTShape, recipe: WeightRecipe, **config: Any) -> Path:
    """A HuggingFace directory without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "gpt2", "eos_token_id": 0, **shape.huggingface_config(), **config}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = huggingface_tensors(shape, make_tensors(shape, recipe))
    save_file(tensors, str(directory / "model.safetensors"))
    return directory


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Return the number of items in the list."] * 9, trainer)
    backend.save(str(directory / "tokenizer.json"))


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = [len(prompt) for prompt in prompts]
    # What stands in the padding must not matter.
    ids = np.full((len(prompts), max(lengths)), 3, dtype=np.int64)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    return ids, np.array(lengths, dtype=np.int32)


def predict(
    directory: Path, prompts: Sequence[Sequence[int]], **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores of paddle.inference."""
    import paddle

    load_op_library()
    manifest = json.loads((directory / "fastgen.json").read_text())
    config = paddle.inference.Config(
        str(directory / manifest["program"]), str(directory / "gpt.pdiparams")
    )
    config.disable_glog_info()
    predictor = paddle.inference.create_predictor(config)
    feeds: dict[str, np.ndarray] = dict(zip(("input_ids", "seq_len"), pad(prompts)))
    types = {entry["name"]: entry["dtype"] for entry in manifest["inputs"]}
    for name, value in options.items():
        feeds[name] = np.array(value, dtype=types[name])
    assert predictor.get_input_names() == list(types)
    for name in predictor.get_input_names():
        predictor.get_input_handle(name).copy_from_cpu(feeds[name])
    predictor.run()
    ids, scores = (
        predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()
    )
    return ids, scores
