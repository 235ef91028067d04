"""Models of PaddleNLP in memory: out of them, and into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastgen._checkpoint import (
    END_NAMES,
    LAYER_NAMES,
    PADDLENLP_EPS,
    huggingface_form,
    import_paddle,
    import_paddlenlp,
    load_directory,
    to_numpy,
)
from fastgen._safetensors import Tensors, drop_pages
from fastgen.errors import ModelFileError

_PADDLE_MAX_EPS = 1e-3
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


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
        drop_pages(array)
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
