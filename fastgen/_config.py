"""Configurations of HuggingFace's GPT-2, checked by the library: it alone knows what it can run."""

from __future__ import annotations

import ctypes
import json
import operator
from collections.abc import Mapping
from typing import Any

from fastgen import _capi
from fastgen.errors import InvalidArgumentError, ModelFileError

#: Member of HuggingFace's configuration -> of `fastgen_config`.
NAMES = {
    "vocab_size": "vocab_size",
    "n_positions": "max_positions",
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_inner": "intermediate_size",
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def parse(config: Mapping[str, Any], where: str = "config") -> _capi.Config:
    """What the library makes of a configuration; one that names no kind of model is a GPT-2's.

    Args:
        where: what messages call it.

    Raises:
        InvalidArgumentError: it is not a mapping that JSON can hold.
        ModelFileError: the library cannot run such a network, or a size is missing.
    """
    if not isinstance(config, Mapping):
        raise InvalidArgumentError(f"{where} is a {type(config).__name__}: it must be a mapping")
    known = {"model_type": "gpt2", **config}
    try:
        text = json.dumps(known, default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{where} cannot be written as JSON: {error}") from error
    native = _capi.Config()
    library = _capi.library()
    library.fastgen_config_init(ctypes.byref(native))
    name = where.encode("utf-8", "surrogateescape")
    _capi.check(library.fastgen_config_parse(text, len(text), name, ctypes.byref(native)))
    return native


def complete(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration with every size that the library would take from elsewhere, and special
    tokens that are ids or None.

    Raises:
        InvalidArgumentError, ModelFileError: see :func:`parse`.
    """
    native = parse(config, where)
    result = dict(config)
    for name, ours in NAMES.items():
        if name != "n_inner" and result.get(name) is None:
            result[name] = getattr(native, ours)
    for name in SPECIAL_TOKENS:
        if result.get(name) is not None:
            token = getattr(native, name)
            result[name] = None if token < 0 else token
    return result


def check_head(config: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> None:
    """Raises ModelFileError where the configuration promises a head that is not there."""
    has_head = any(name.startswith("lm_head.") for name in tensors)  # PaddleNLP has other names
    if config.get("tie_word_embeddings") is False and not has_head:
        raise ModelFileError(
            f"{where}: tie_word_embeddings is false, and there is no tensor lm_head.weight"
        )


def _plain(value: Any) -> Any:
    """Integers and floats of NumPy; whatever else a library puts there is of no matter here."""
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
