"""PyTorch's tensors as the C API takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fastgen import _capi
from fastgen.testing.engine import MemoryTensor

torch = pytest.importorskip("torch")  # the modules that import this one are skipped without

TYPES = {
    torch.float32: _capi.FLOAT32,
    torch.float16: _capi.FLOAT16,
    torch.bfloat16: _capi.BFLOAT16,
    torch.int32: _capi.INT32,
    torch.int64: _capi.INT64,
}


def view(tensor: Any) -> MemoryTensor:
    assert tensor.is_contiguous()
    return MemoryTensor(tensor.data_ptr(), TYPES[tensor.dtype], tuple(tensor.shape))


def views(tensors: Mapping[str, Any]) -> dict[str, MemoryTensor]:
    return {name: view(tensor) for name, tensor in tensors.items()}


def on_device(arrays: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    return {name: torch.from_numpy(array).cuda().to(dtype) for name, array in arrays.items()}


def on_host(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}


def fused(arrays: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """PaddleNLP's other form: q, k and v of a head side by side in one tensor."""
    result = {}
    for name, array in arrays.items():
        if ".q_proj." in name:
            parts = [arrays[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            split = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
            whole = np.stack(split, axis=-2).reshape(*array.shape[:-1], -1)
            result[name.replace(".q_proj.", ".qkv_proj.")] = np.ascontiguousarray(whole)
        elif ".k_proj." not in name and ".v_proj." not in name:
            result[name] = array
    return result


def with_head(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A head of its own."""
    (name,) = [name for name in arrays if name.endswith("word_embeddings.weight")]
    return {**arrays, "lm_head.weight": arrays[name][::-1].copy()}
