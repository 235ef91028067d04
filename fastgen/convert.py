"""Checkpoints of PaddleNLP to directories that the engine maps, and back into PaddleNLP models.

The target layout is that of a HuggingFace GPT-2: `config.json`, `model.safetensors` and the
tokenizer's files.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastgen._checkpoint import (
    END_NAMES,
    LAYER_NAMES,
    PADDLENLP_EPS,
    Tensors,
    huggingface_form,
    import_paddle,
    import_paddlenlp,
    is_paddlenlp_directory,
    load_directory,
    read_safetensors,
    to_numpy,
)
from fastgen.errors import InvalidArgumentError, ModelFileError
from fastgen.tokenizer import TOKENIZER_FILES

__all__ = [
    "build_paddlenlp",
    "convert",
    "from_paddlenlp",
    "import_paddle",
    "import_paddlenlp",
    "is_paddlenlp_directory",
    "load_directory",
    "read_safetensors",
    "to_paddlenlp",
    "write_directory",
]

Progress = Callable[[int, int], None]

_PADDLE_MAX_EPS = 1e-3
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


# ---- PaddleNLP models in memory ----------------------------------------------------------------


def from_paddlenlp(model: Any) -> tuple[dict[str, Any], Tensors]:
    """Configuration and tensors of a PaddleNLP `GPTLMHeadModel`, in HuggingFace's form.

    Raises:
        ModelFileError: the model is a variant that the engine does not run.
    """
    config = dict(model.config.to_dict())
    # What the code of PaddleNLP reads, whether or not to_dict() wrote it.
    for name in ("hidden_activation", "normalize_before", "scale_qk_coeff", "eos_token_id",
                 "bos_token_id", "pad_token_id"):  # fmt: skip
        config[name] = getattr(model.config, name)
    config["_layer_norm_eps"] = float(model.gpt.decoder.norm._epsilon)
    state = {name: to_numpy(value) for name, value in model.state_dict().items()}
    return huggingface_form(config, state, "the model")


def to_paddlenlp(directory: Path) -> tuple[Any, dict[str, Any]]:
    """A PaddleNLP `GPTLMHeadModel` in evaluation mode with the weights of a model directory.

    Returns:
        The model, and its configuration in HuggingFace's form.
    """
    config, tensors = load_directory(Path(directory))
    return build_paddlenlp(config, tensors), config


def build_paddlenlp(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    """A PaddleNLP `GPTLMHeadModel` in evaluation mode, float32, of configuration and tensors in
    HuggingFace's form.

    Raises:
        ModelFileError: PaddleNLP's GPT cannot represent the model.
    """
    transformers = import_paddlenlp()
    paddle = import_paddle()
    activation = config.get("activation_function", "gelu_new")
    if activation not in _TANH_GELU:
        raise ModelFileError(
            f"activation_function is {activation!r}: it must be one of {', '.join(_TANH_GELU)}"
        )
    eps = float(config.get("layer_norm_epsilon", PADDLENLP_EPS))
    if eps > _PADDLE_MAX_EPS:
        raise ModelFileError(
            f"layer_norm_epsilon is {eps:g}: Paddle's layers take at most {_PADDLE_MAX_EPS:g}"
        )
    hidden, layers = config["n_embd"], config["n_layer"]
    gpt_config = transformers.GPTConfig(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=config["n_head"],
        intermediate_size=config.get("n_inner") or 4 * hidden,
        max_position_embeddings=config["n_positions"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **{
            name: config[name]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            if config.get(name) is not None
        },
    )
    default_dtype = paddle.get_default_dtype()
    paddle.set_default_dtype("float32")
    try:
        model = transformers.GPTLMHeadModel(gpt_config)
    finally:
        paddle.set_default_dtype(default_dtype)
    state = model.state_dict()
    for name, array in _paddlenlp_names(tensors, layers):
        if name not in state:
            raise ModelFileError(f"PaddleNLP's GPT has no tensor {name}")
        if list(state[name].shape) != list(array.shape):
            raise ModelFileError(
                f"tensor {name} has shape {list(array.shape)}: the configuration asks for "
                f"{list(state[name].shape)}"
            )
        state[name].set_value(np.ascontiguousarray(array, dtype=np.float32))
    if "lm_head.weight" in tensors:
        head = np.ascontiguousarray(tensors["lm_head.weight"], dtype=np.float32)
        if not np.array_equal(head, np.asarray(tensors["wte.weight"], dtype=np.float32)):
            parameter = model.lm_head.create_parameter(shape=list(head.shape), dtype="float32")
            parameter.set_value(head)
            model.lm_head.weight = parameter
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.LayerNorm):
            layer._epsilon = eps  # the class fixes it at 1e-5
    model.eval()
    return model


def _paddlenlp_names(
    tensors: Mapping[str, np.ndarray], layers: int
) -> Iterator[tuple[str, np.ndarray]]:
    for ours, theirs in END_NAMES.items():
        yield f"gpt.{theirs}", tensors[ours]
    for i in range(layers):
        for kind in ("weight", "bias"):
            for ours, theirs in LAYER_NAMES.items():
                yield f"gpt.decoder.layers.{i}.{theirs}.{kind}", tensors[f"h.{i}.{ours}.{kind}"]
            parts = np.split(tensors[f"h.{i}.attn.c_attn.{kind}"], 3, axis=-1)
            for part, array in zip("qkv", parts):
                yield f"gpt.decoder.layers.{i}.self_attn.{part}_proj.{kind}", array


# ---- Writing -----------------------------------------------------------------------------------


def write_directory(
    destination: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer_source: Path | None,
    *,
    force: bool = False,
) -> None:
    """Writes a model directory aside and renames it, so that it is there whole or not at all.

    Raises:
        InvalidArgumentError: `destination` exists, and `force` is off or it is not a model.
        OSError: it cannot be written.
    """
    from safetensors.numpy import save_file

    check_destination(destination, force)
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        new = aside / "new"
        new.mkdir()
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (new / "config.json").write_text(text, encoding="utf-8")
        save_file(dict(tensors), str(new / "model.safetensors"), metadata={"format": "pt"})
        for name in TOKENIZER_FILES:
            if tokenizer_source is not None and (tokenizer_source / name).is_file():
                shutil.copyfile(tokenizer_source / name, new / name)
        if destination.exists():
            destination.rename(aside / "old")
        new.rename(destination)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_destination(destination: Path, force: bool) -> None:
    """Raises InvalidArgumentError unless `destination` may be written."""
    if not os.path.lexists(destination):
        return
    if not force:
        raise InvalidArgumentError(f"{destination} exists: give --force to replace it")
    is_model = (destination / "config.json").is_file()
    if not destination.is_dir() or (not is_model and any(destination.iterdir())):
        raise InvalidArgumentError(
            f"{destination} is not a model directory, so --force does not replace it"
        )


def convert(
    source: str, destination: Path, *, force: bool = False, progress: Progress | None = None
) -> Path:
    """Converts a checkpoint directory of PaddleNLP, or a model known to PaddleNLP by name, to a
    directory that the engine loads. A HuggingFace directory is copied.

    Args:
        source: the directory or name.
        destination: the directory to write.
        force: replace `destination` if it is a model directory.
        progress: called with steps done and steps in all.

    Returns:
        `destination`.

    Raises:
        InvalidArgumentError: `destination` exists, or is `source`.
        NotFoundError, ModelFileError: see :func:`load_directory`.
    """
    from fastgen import models

    destination = Path(destination)
    report = progress or (lambda done, total: None)
    directory = models.resolve(source)
    if directory.resolve() == destination.resolve():
        raise InvalidArgumentError(f"{source} cannot be converted into itself")
    check_destination(destination, force)
    report(1, 3)
    config, tensors = load_directory(directory)
    report(2, 3)
    write_directory(destination, config, tensors, directory, force=force)
    report(3, 3)
    return destination


@click.command("convert")
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace DESTINATION if it is a model directory.")
def command(source: str, destination: Path, force: bool) -> None:
    """Convert a PaddleNLP checkpoint directory, or a PaddleNLP model name, to DESTINATION.

    DESTINATION becomes a HuggingFace GPT-2 directory: config.json, model.safetensors and the
    tokenizer's files. It is written aside and renamed, so it is there whole or not at all.
    """
    from tqdm import tqdm

    with tqdm(total=3, desc="convert", unit="step", disable=not sys.stderr.isatty()) as bar:

        def report(done: int, _: int) -> None:
            bar.update(done - bar.n)

        convert(source, destination, force=force, progress=report)
    size = (destination / "model.safetensors").stat().st_size
    click.echo(f"{destination}: {size / 1e6:.1f} MB of weights", err=True)
