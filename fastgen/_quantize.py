"""Weights of fewer bits in files: what is rounded, and how the files say so.

The library rounds, as it does when it loads a model; docs/weights.md has the format.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastgen import _capi
from fastgen._safetensors import Entry, Source, array_source, drop_pages
from fastgen.errors import InvalidArgumentError, ModelFileError

__all__ = ["KEY", "WEIGHT_DTYPES", "scheme", "sources", "stored_weight_dtype"]

WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")

#: Member of config.json.
KEY = "fastgen_weights"
_VERSION = 1
_GROUP = 32

_TABLES = ("wte.weight", "lm_head.weight")
_MATRIX = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
_WORDS = {"float16": "F16", "bfloat16": "BF16"}


def scheme(weight_dtype: str) -> dict[str, Any] | None:
    """What config.json says of weights of a type; None: nothing."""
    if weight_dtype == "float32":
        return None
    result = {"version": _VERSION, "weight_dtype": weight_dtype}
    return result if weight_dtype in _WORDS else {**result, "group_size": _GROUP}


def stored_weight_dtype(config: Mapping[str, Any], where: Path) -> str | None:
    """The type that the tensors of a model directory were rounded to; None: no type is named.

    Raises:
        ModelFileError: config.json names one that this version does not know.
    """
    found = config.get(KEY)
    if found is None:
        return None
    for known in WEIGHT_DTYPES:
        if found == scheme(known):
            return known
    raise ModelFileError(
        f"{where}: {KEY} is {found!r}, which this version of fastgen does not know"
    )


def check_weight_dtype(weight_dtype: str) -> None:
    """Raises InvalidArgumentError unless there is such a type."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise InvalidArgumentError(
            f"weight_dtype is {weight_dtype!r}: it must be one of {', '.join(WEIGHT_DTYPES)}"
        )


def sources(tensors: Mapping[str, np.ndarray], weight_dtype: str | None) -> list[Source]:
    """What a file of tensors (names of HuggingFace, without `transformer.`) is written from.

    Args:
        weight_dtype: of the matrices, the rest is float32; None: everything as it is.
    """
    result = [_source(name, array, weight_dtype) for name, array in tensors.items()]
    # Wide elements first, so that they all lie at multiples of their size.
    order = {"F64": 0, "F32": 1, "F16": 2, "BF16": 2}
    result.sort(key=lambda s: (order.get(s.entries[0].dtype, 3), s.entries[0].name))
    return result


def _source(name: str, array: np.ndarray, weight_dtype: str | None) -> Source:
    if weight_dtype is None:
        return array_source(name, array)
    is_table = name in _TABLES
    if weight_dtype == "float32" or not (is_table or _MATRIX.fullmatch(name)):
        shape = array.shape
        return Source([Entry(name, "F32", shape)], lambda: [np.asarray(array, dtype=np.float32)])
    if array.ndim != 2 or 0 in array.shape:
        raise ModelFileError(
            f"tensor {name} has shape {list(array.shape)}: it must have two dimensions"
        )
    if weight_dtype == "int4" and is_table:
        weight_dtype = "int8"
    return Source(
        _entries(name, array.shape, weight_dtype, is_table),
        lambda: _quantize(name, array, weight_dtype, is_table),
    )


def _entries(name: str, shape: tuple[int, ...], weight_dtype: str, is_table: bool) -> list[Entry]:
    if weight_dtype in _WORDS:
        return [Entry(name, _WORDS[weight_dtype], shape)]
    rows, columns = shape
    groups = -(-(columns if is_table else rows) // _GROUP)
    if weight_dtype == "int4":
        values = Entry(f"{name}.int4", "U8", (-(-rows // 2), columns))
    else:
        values = Entry(f"{name}.int8", "I8", shape)
    scales = (rows, groups) if is_table else (groups, columns)
    return [values, Entry(f"{name}.scales", "F16", scales)]


def _quantize(name: str, array: np.ndarray, weight_dtype: str, is_table: bool) -> list[np.ndarray]:
    """The arrays of :func:`_entries`, with bits instead of floats."""
    types = {np.dtype(np.float32): _capi.FLOAT32, np.dtype(np.float16): _capi.FLOAT16}
    if array.dtype not in types:
        array = array.astype(np.float32)
    array = np.ascontiguousarray(array)
    matrix = _capi.Tensor()
    matrix.name = name.encode()
    matrix.data = array.ctypes.data
    matrix.dtype = types[array.dtype]
    matrix.num_dims = 2
    matrix.shape[:2] = array.shape
    kinds = {"I8": np.int8, "U8": np.uint8}
    result = [
        np.empty(entry.shape, kinds.get(entry.dtype, np.uint16))
        for entry in _entries(name, array.shape, weight_dtype, is_table)
    ]
    status = _capi.library().fastgen_quantize(
        ctypes.byref(matrix),
        int(is_table),
        weight_dtype.encode(),
        result[0].ctypes.data,
        result[1].ctypes.data if len(result) > 1 else None,
    )
    _capi.check(status)
    drop_pages(array)
    return result
