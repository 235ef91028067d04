"""The kernel launchers of csrc/cuda through ctypes, on tensors of PyTorch.

The structures mirror csrc/cuda/{types,kernels}.h member by member. `Library.call` checks the launch
and synchronises, so that a fault names the op that caused it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

PAGE = 32
GROUP = 32
FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 = range(5)
STORE, GELU, RESIDUAL, QKV = range(4)

_i32, _i64, _u32, _u64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64
_f32, _ptr = ctypes.c_float, ctypes.c_void_p


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", _ptr),
        ("row_bytes", _i64),
        ("dtype", _i32),
        ("in_", _i32),
        ("out", _i32),
        ("scales", _ptr),
        ("scale_stride", _i32),
        ("bias", _ptr),
    ]


class Norm(ctypes.Structure):
    _fields_ = [("weight", _ptr), ("bias", _ptr), ("eps", _f32)]


class SamplingParams(ctypes.Structure):
    _fields_ = [
        ("sample", _i32),
        ("max_length", _i32),
        ("min_length", _i32),
        ("top_k", _i32),
        ("top_p", _f32),
        ("temperature", _f32),
        ("repetition_penalty", _f32),
        ("no_repeat_ngram_size", _i32),
        ("eos_token_id", _i32),
        ("forced_bos_token_id", _i32),
        ("forced_eos_token_id", _i32),
        ("sequence", _u32),
        ("seed", _u64),
    ]


class Slot(ctypes.Structure):
    _fields_ = [
        ("length", _i32),
        ("prompt_length", _i32),
        ("finished", _i32),
        ("reserved", _i32),
        ("tokens", _ptr),
        ("pages", _ptr),
        ("sampling", SamplingParams),
    ]


class Row(ctypes.Structure):
    _fields_ = [("slot", _i32), ("position", _i32)]


class CacheLayout(ctypes.Structure):
    _fields_ = [
        ("dtype", _i32),
        ("num_layers", _i32),
        ("num_heads", _i32),
        ("head_size", _i32),
        ("head_stride", _i32),
    ]


class StepResult(ctypes.Structure):
    _fields_ = [("token", _i32), ("score", _f32), ("finished", _i32), ("ready", _i32)]


class LinearArgs(ctypes.Structure):
    _fields_ = [
        ("w", Matrix),
        ("x", _ptr),
        ("ldx", _i64),
        ("norm", ctypes.POINTER(Norm)),
        ("rows", _i32),
        ("y", _ptr),
        ("ldy", _i64),
        ("epilogue", _i32),
        ("row_list", _ptr),
        ("slots", _ptr),
        ("cache", CacheLayout),
        ("layer", _i32),
        ("overlap", ctypes.c_bool),
        ("cluster", _i32),
        ("norm_sums", _ptr),
        ("norm_bias", _ptr),
    ]


class PackedRows(ctypes.Structure):
    _fields_ = [("data", _ptr), ("stride", _i64), ("parts", _ptr), ("part_stride", _i32)]


class PiecesAhead(ctypes.Structure):
    _fields_ = [("pieces", _ptr), ("count", _i32), ("behind", _i64), ("bytes", ctypes.c_uint32)]


class LinearRowsArgs(ctypes.Structure):
    _fields_ = [
        ("w", Matrix),
        ("x", PackedRows),
        ("norm_sums", _ptr),
        ("norm_bias", _ptr),
        ("eps", _f32),
        ("rows", _i32),
        ("epilogue", _i32),
        ("y", _ptr),
        ("ldy", _i64),
        ("out", PackedRows),
        ("out_weight", _ptr),
        ("row_list", _ptr),
        ("slots", _ptr),
        ("cache", CacheLayout),
        ("layer", _i32),
        ("places", _ptr),
        ("ahead", PiecesAhead),
        ("overlap", ctypes.c_bool),
        ("first", ctypes.c_bool),
        ("cluster", _i32),
    ]


class RowPlace(ctypes.Structure):
    _fields_ = [("pages", _ptr), ("page", _ptr), ("in_page", _i32), ("length", _i32)]


class QkvAttentionArgs(ctypes.Structure):
    _fields_ = [("qkv", LinearRowsArgs), ("packed", _ptr), ("ld", _i64)]


class PackRowsArgs(ctypes.Structure):
    _fields_ = [
        ("x", _ptr),
        ("ldx", _i64),
        ("rows", _i32),
        ("size", _i32),
        ("weight", _ptr),
        ("dtype", _i32),
        ("out", PackedRows),
        ("overlap", ctypes.c_bool),
    ]


class EmbedArgs(ctypes.Structure):
    _fields_ = [
        ("table", Matrix),
        ("positions", _ptr),
        ("position_stride", _i64),
        ("row_list", _ptr),
        ("slots", _ptr),
        ("rows", _i32),
        ("out", _ptr),
        ("ldo", _i64),
        ("overlap", ctypes.c_bool),
        ("beside", ctypes.c_bool),
        ("packed", PackedRows),
        ("weight", _ptr),
        ("dtype", _i32),
        ("places", _ptr),
    ]


class LayerNormArgs(ctypes.Structure):
    _fields_ = [
        ("x", _ptr),
        ("ldx", _i64),
        ("norm", Norm),
        ("size", _i32),
        ("rows", _i32),
        ("dtype", _i32),
        ("out", _ptr),
        ("ldo", _i64),
        ("overlap", ctypes.c_bool),
    ]


class SaturateArgs(ctypes.Structure):
    _fields_ = [("x", _ptr), ("ld", _i64), ("rows", _i32)]


class QkvArgs(ctypes.Structure):
    _fields_ = [
        ("qkv", _ptr),
        ("ld", _i64),
        ("dtype", _i32),
        ("row_list", _ptr),
        ("slots", _ptr),
        ("rows", _i32),
        ("cache", CacheLayout),
        ("layer", _i32),
    ]


class DecodeAttentionArgs(ctypes.Structure):
    _fields_ = [
        ("q", _ptr),
        ("ldq", _i64),
        ("out", _ptr),
        ("ldo", _i64),
        ("packed", _ptr),
        ("row_list", _ptr),
        ("slots", _ptr),
        ("rows", _i32),
        ("cache", CacheLayout),
        ("layer", _i32),
        ("splits", _i32),
        ("partial", _ptr),
        ("arrived", _ptr),
        ("plan", _ptr),
        ("overlap", ctypes.c_bool),
    ]


class PrefillRun(ctypes.Structure):
    _fields_ = [("slot", _i32), ("first_row", _i32), ("begin", _i32), ("count", _i32)]


class PrefillAttentionArgs(ctypes.Structure):
    _fields_ = [
        ("q", _ptr),
        ("ldq", _i64),
        ("k", _ptr),
        ("v", _ptr),
        ("out", _ptr),
        ("ldo", _i64),
        ("scale", _f32),
        ("dtype", _i32),
        ("runs", _ptr),
        ("num_runs", _i32),
        ("longest_run", _i32),
        ("slots", _ptr),
        ("cache", CacheLayout),
        ("layer", _i32),
        ("overlap", ctypes.c_bool),
    ]


class SampleArgs(ctypes.Structure):
    _fields_ = [
        ("logits", _ptr),
        ("ld", _i64),
        ("vocab", _i32),
        ("row_list", _ptr),
        ("slots", _ptr),
        ("rows", _i32),
        ("results", _ptr),
        ("result_steps", _i32),
        ("result_rows", _i32),
        ("step", _ptr),
        ("workspace", _ptr),
        ("overlap", ctypes.c_bool),
    ]


class PersistentProduct(ctypes.Structure):
    _fields_ = [
        ("weights", _ptr),
        ("scales", _ptr),
        ("bias", _ptr),
        ("norm_weight", _ptr),
        ("sums", _ptr),
    ]


class PersistentArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", _i32),
        ("hidden", _i32),
        ("intermediate", _i32),
        ("vocab", _i32),
        ("layers", _i32),
        ("heads", _i32),
        ("eps", _f32),
        ("qkv", PersistentProduct),
        ("attention_out", PersistentProduct),
        ("feed_forward_in", PersistentProduct),
        ("feed_forward_out", PersistentProduct),
        ("layer_bytes", _i64),
        ("head", PersistentProduct),
        ("embedding", Matrix),
        ("positions", _ptr),
        ("position_stride", _i64),
        ("cache", CacheLayout),
        ("row_list", _ptr),
        ("slots", _ptr),
        ("rows", _i32),
        ("logits", _ptr),
        ("ld", _i64),
        ("choice", ctypes.POINTER(SampleArgs)),
        ("exchange", _ptr),
        ("stamps", _ptr),
        ("overlap", ctypes.c_bool),
    ]


def library_path() -> Path:
    """Built from ops.cc and csrc/cuda; FASTGEN_CUDA_OPS names it."""
    return Path(os.environ.get("FASTGEN_CUDA_OPS", "build-cuda/libfastgen_cuda_ops.so"))


class Library:
    """The op library."""

    def __init__(self, path: Path | None = None) -> None:
        self._library = ctypes.CDLL(str((path or library_path()).resolve()))
        self._library.fastgen_op_sample_workspace.restype = ctypes.c_size_t
        self._library.fastgen_op_persistent_exchange.restype = ctypes.c_size_t

    def launch(self, name: str, *arguments: Any) -> None:
        """Launches on PyTorch's current stream; a structure goes by reference."""
        import torch

        converted = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(self._library, f"fastgen_op_{name}")(*converted, stream)
        if status != 0:
            raise RuntimeError(f"{name}: CUDA error {status}")

    def call(self, name: str, *arguments: Any) -> None:
        """Launches and waits."""
        import torch

        self.launch(name, *arguments)
        torch.cuda.synchronize()

    def sample_workspace(self, rows: int, vocab: int) -> int:
        """Bytes of zeroed workspace that `sample` needs."""
        return int(self._library.fastgen_op_sample_workspace(rows, vocab))

    def rows_supported(self, dtype: int, normed_columns: int) -> bool:
        """Whether there are products of packed rows."""
        supported = ctypes.c_bool()
        status = self._library.fastgen_op_rows_supported(
            dtype, normed_columns, ctypes.byref(supported)
        )
        if status != 0:
            raise RuntimeError(f"rows_supported: CUDA error {status}")
        return supported.value

    def decode_plan_bytes(self, rows: int, cache: CacheLayout) -> int:
        """Bytes of a plan of decode attention; 0 if the device or the cache allow none."""
        size = ctypes.c_size_t()
        status = self._library.fastgen_op_decode_plan_bytes(
            rows, ctypes.byref(cache), ctypes.byref(size)
        )
        if status != 0:
            raise RuntimeError(f"decode_plan_bytes: CUDA error {status}")
        return size.value

    def persistent_blocks(self, args: PersistentArgs) -> int:
        """Blocks of a persistent step; 0 if there can be none."""
        return int(self._library.fastgen_op_persistent_blocks(ctypes.byref(args)))

    def persistent_exchange(self, args: PersistentArgs) -> int:
        """Bytes that the blocks of a persistent step exchange."""
        return int(self._library.fastgen_op_persistent_exchange(ctypes.byref(args)))
