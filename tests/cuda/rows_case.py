"""Rows that travel as 16 bits, and products of them, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.cuda import ops
from tests.cuda.arrays import (
    Array,
    NormWeights,
    Weights,
    decode,
    fold,
    round_up,
    rows_of,
)

# What a number is divided by on its way to 16 bits.
UNITS = {ops.FLOAT16: 16.0, ops.BFLOAT16: 1.0}
PAD = -12345.0


class Packed:
    """PackedRows in device memory; what is not written is NaN."""

    def __init__(self, rows: int, size: int, dtype: int) -> None:
        self._size, self._dtype = size, dtype
        nan = {ops.FLOAT16: np.uint16(0x7E00).view(np.float16), ops.BFLOAT16: 0x7FC0}[dtype]
        kind = np.float16 if dtype == ops.FLOAT16 else np.uint16
        self.data = Array(np.full((rows, round_up(size, 8)), nan, kind))
        self._parts = Array(np.full((rows, -(-size // 64), 2), np.nan, np.float32))
        self.struct = ops.PackedRows(
            self.data.ptr, self.data.shape[1], self._parts.ptr, self._parts.shape[1]
        )

    def values(self) -> np.ndarray:
        """The numbers, as float64."""
        return decode(self.data.get())[:, : self._size] * UNITS[self._dtype]

    def parts(self) -> np.ndarray:
        """[rows, parts, 2]: mean, sum of squares about it."""
        return self._parts.get()


def pack(library: ops.Library, x: np.ndarray, dtype: int, norm: NormWeights | None) -> Packed:
    """The rows, for products with weights of that type."""
    padded = rows_of(x)
    device_x = Array(padded)
    packed = Packed(*x.shape, dtype)
    out = packed.struct
    if norm is None:
        out = ops.PackedRows(out.data, out.stride, None, 0)
    args = ops.PackRowsArgs(
        x=device_x.ptr,
        ldx=padded.shape[1],
        rows=x.shape[0],
        size=x.shape[1],
        weight=None if norm is None else norm.struct.weight,
        dtype=dtype,
        out=out,
    )
    library.call("pack_rows", args)
    return packed


def run(
    library: ops.Library,
    w: Weights,
    x: np.ndarray,
    epilogue: int = ops.STORE,
    norm: NormWeights | None = None,
    y: np.ndarray | None = None,
    next_norm: NormWeights | None = None,
    **more: Any,
) -> tuple[np.ndarray, Packed]:
    """y, checked to be written nowhere but in its columns, and what the product packs."""
    rows, out = x.shape[0], w.matrix.out
    packed = pack(library, x, w.matrix.dtype, norm)
    if norm is not None:
        sums, bias = fold(library, w, norm)
        more |= {"norm_sums": sums.ptr, "norm_bias": bias.ptr, "eps": norm.struct.eps}
    full = np.full((rows, round_up(out, 8) + 8), PAD, np.float32)
    if y is not None:
        full[:, :out] = y
    device_y = Array(full)
    result = Packed(rows, out, w.matrix.dtype)
    if epilogue == ops.GELU or next_norm is not None:
        more["out"] = result.struct
    if next_norm is not None:
        more["out_weight"] = next_norm.struct.weight
    args = ops.LinearRowsArgs(
        w=w.matrix,
        x=packed.struct,
        rows=rows,
        epilogue=epilogue,
        y=device_y.ptr,
        ldy=full.shape[1],
        **more,
    )
    library.call("linear_rows", args)
    got = device_y.get()
    assert (got[:, out:] == PAD).all()
    return got[:, :out], result
