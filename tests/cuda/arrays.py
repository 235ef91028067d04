"""NumPy arrays in device memory, and the arguments that tests of kernels have in common."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.cuda import ops


def round_up(size: int, unit: int) -> int:
    """The multiple of `unit` that is not below `size`."""
    return (size + unit - 1) // unit * unit


class Array:
    """A copy of a NumPy array in device memory, byte by byte."""

    def __init__(self, values: np.ndarray) -> None:
        import torch

        self.dtype, self.shape = values.dtype, values.shape
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._tensor = torch.from_numpy(data.copy()).cuda()

    @property
    def ptr(self) -> int:
        """Device address."""
        return int(self._tensor.data_ptr())

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The address as an argument of a C function."""
        return ctypes.c_void_p(self.ptr)

    def zero(self) -> None:
        """Makes all bytes zero, on PyTorch's current stream."""
        self._tensor.zero_()

    def get(self) -> np.ndarray:
        """What is there now."""
        return self._tensor.cpu().numpy().view(self.dtype).reshape(self.shape)


def to_brain(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even; for finite numbers."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_brain(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(x: np.ndarray, dtype: int) -> np.ndarray:
    """float32 as float32, float16, or the bits of bfloat16."""
    if dtype == ops.BFLOAT16:
        return to_brain(x)
    return x.astype(np.float32 if dtype == ops.FLOAT32 else np.float16)


def decode(x: np.ndarray) -> np.ndarray:
    """The inverse of `encode`, as float64."""
    return (from_brain(x) if x.dtype == np.uint16 else x).astype(np.float64)


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Norm of the difference over the norm; infinite for NaN."""
    size = max(float(np.linalg.norm(want)), 1e-30)
    value = float(np.linalg.norm(got.astype(np.float64) - want)) / size
    return value if np.isfinite(value) else float("inf")


class Weights:
    """Random weights in the layout of types.h: `matrix` for kernels, `values` as float64."""

    def __init__(
        self, rng: np.random.Generator, out: int, in_: int, dtype: int, bias: bool = True
    ) -> None:
        w = rng.standard_normal((out, in_)).astype(np.float32) * 0.05
        scales = None
        stride = 0
        if dtype in (ops.INT8, ops.INT4):
            rows, scales, self.values = self._quantize(rng, w, dtype)
            stride = scales.shape[1]
        else:
            width = round_up(in_ * (4 if dtype == ops.FLOAT32 else 2), 16)
            encoded = encode(w, dtype)
            rows = np.zeros((out, width // encoded.itemsize), encoded.dtype)
            rows[:, :in_] = encoded
            self.values = decode(encoded)
        self.bias = rng.standard_normal(out).astype(np.float32) * 0.1 if bias else None
        self._held = [Array(rows)]
        row_bytes = rows.shape[1] * rows.itemsize
        scales_ptr = bias_ptr = None
        if scales is not None:
            self._held.append(Array(scales))
            scales_ptr = self._held[-1].ptr
        if self.bias is not None:
            self._held.append(Array(self.bias))
            bias_ptr = self._held[-1].ptr
        self.bytes = rows.nbytes + (0 if scales is None else scales.nbytes)
        self.matrix = ops.Matrix(
            self._held[0].ptr, row_bytes, dtype, in_, out, scales_ptr, stride, bias_ptr
        )

    def copy(self) -> Weights:
        """The same in another place of device memory."""
        copy = object.__new__(Weights)
        copy.__dict__.update(self.__dict__)
        copy._held = [Array(array.get()) for array in self._held]
        pointers = [array.ptr for array in copy._held]
        m = self.matrix
        copy.matrix = ops.Matrix(
            pointers[0],
            m.row_bytes,
            m.dtype,
            m.in_,
            m.out,
            pointers[1] if m.scales else None,
            m.scale_stride,
            pointers[-1] if m.bias else None,
        )
        return copy

    @staticmethod
    def _quantize(
        rng: np.random.Generator, w: np.ndarray, dtype: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        out, in_ = w.shape
        groups = -(-in_ // ops.GROUP)
        padded = np.zeros((out, groups * ops.GROUP), np.float32)
        padded[:, :in_] = w * rng.uniform(0.2, 5.0, (out, 1)).astype(np.float32)
        grouped = padded.reshape(out, groups, ops.GROUP)
        top = 127 if dtype == ops.INT8 else 7
        scales = (np.abs(grouped).max(axis=2) / top).astype(np.float16)
        step = np.maximum(scales.astype(np.float32), 1e-8)[:, :, None]
        q = np.clip(np.rint(grouped / step), -top, top).astype(np.int8)
        values = (q * scales.astype(np.float64)[:, :, None]).reshape(out, -1)[:, :in_]
        flat = q.reshape(out, -1)[:, :in_]
        if dtype == ops.INT8:
            rows = np.zeros((out, round_up(in_, 16)), np.int8)
            rows[:, :in_] = flat
            return rows, scales, values
        nibbles = np.zeros((out, round_up(in_, 32)), np.uint8)
        nibbles[:, :in_] = (flat + 8).astype(np.uint8)
        return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scales, values


class NormWeights:
    """Random weights of a layer norm."""

    def __init__(self, rng: np.random.Generator, size: int, eps: float = 1e-5) -> None:
        self.weight = (1.0 + 0.2 * rng.standard_normal(size)).astype(np.float32)
        self.bias = (0.2 * rng.standard_normal(size)).astype(np.float32)
        self._held = (Array(self.weight), Array(self.bias))
        self.struct = ops.Norm(self._held[0].ptr, self._held[1].ptr, eps)
        self._eps = eps

    def apply(self, x: np.ndarray) -> np.ndarray:
        """The norm in float64."""
        x = x.astype(np.float64)
        centred = x - x.mean(axis=1, keepdims=True)
        scale = 1.0 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + self._eps)
        return centred * scale * self.weight + self.bias


def fold(library: ops.Library, w: Weights, norm: NormWeights) -> tuple[Array, Array]:
    """What lets a product take its input before the norm: its sums and its bias."""
    sums, bias = (Array(np.zeros(w.matrix.out, np.float32)) for _ in range(2))
    library.call("fold_norm", w.matrix, norm.struct, sums.pointer, bias.pointer, None)
    return sums, bias


def rows_of(x: np.ndarray, columns: int = 8) -> np.ndarray:
    """Activations with rows that start at multiples of 32 bytes, zero up to there."""
    padded = np.zeros((x.shape[0], round_up(x.shape[1], columns)), np.float32)
    padded[:, : x.shape[1]] = x
    return padded


def turn(pages: np.ndarray, head_size: int) -> np.ndarray:
    """Pages [..., PAGE, stride] of 16-bit numbers as they lie in memory, or what they are again.

    Of heads of 64 numbers piece i of 8 numbers lies in place i ^ position % 8.
    """
    if head_size != 64:
        return pages
    pieces = pages.reshape(*pages.shape[:-1], 8, 8)
    places = np.arange(8) ^ np.arange(ops.PAGE)[:, None] % 8
    places = places.reshape((1,) * (pages.ndim - 2) + (ops.PAGE, 8, 1))
    return np.take_along_axis(pieces, places, axis=-2).reshape(pages.shape)


class Cache:
    """Slots with pages of their own, filled with a number that nothing writes."""

    FILL = 77.0

    def __init__(
        self, dtype: int, layers: int, heads: int, head_size: int, lengths: Sequence[int]
    ) -> None:
        unit = 16 // (4 if dtype == ops.FLOAT32 else 2)
        self.layout = ops.CacheLayout(dtype, layers, heads, head_size, round_up(head_size, unit))
        shape = (layers, 2, heads, ops.PAGE, self.layout.head_stride)
        fill = encode(np.full(shape, self.FILL, np.float32), dtype)
        self._pages = [[Array(fill) for _ in range(length // ops.PAGE + 1)] for length in lengths]
        self._tables = [
            Array(np.array([page.ptr for page in pages], np.uint64)) for pages in self._pages
        ]
        slots = (ops.Slot * len(lengths))()
        for slot, length, table in zip(slots, lengths, self._tables):
            slot.length, slot.prompt_length, slot.pages = length, 1, table.ptr
        self.host_slots = slots
        self.slots: Array
        self.upload()

    def upload(self) -> None:
        """Copies `host_slots` to the device."""
        self.slots = Array(np.frombuffer(bytes(self.host_slots), np.uint8))

    def places(self, rows: Sequence[tuple[int, int]]) -> Array:
        """RowPlace of each row (slot, position), as Embed writes them."""
        places = (ops.RowPlace * len(rows))()
        for place, (slot, position) in zip(places, rows):
            if slot < 0 or (position < 0 and self.host_slots[slot].finished):
                continue
            at = position if position >= 0 else self.host_slots[slot].length - 1
            page = self._pages[slot][at // ops.PAGE].ptr
            table = self._tables[slot].ptr
            place.pages, place.page, place.in_page, place.length = (
                table,
                page,
                at % ops.PAGE,
                at + 1,
            )
        return Array(np.frombuffer(bytes(places), np.uint8))

    def get(self, slot: int) -> np.ndarray:
        """[layers, 2, heads, positions, head_stride] as float64."""
        pages = [decode(page.get()) for page in self._pages[slot]]
        if self.layout.dtype != ops.FLOAT32:
            pages = [turn(page, self.layout.head_size) for page in pages]
        return np.concatenate(pages, axis=3)


def check_stored(
    cache: Cache, layer: int, rows: Sequence[tuple[int, int]], qkv: np.ndarray, bound: float
) -> None:
    """Looks for keys and values of `qkv` [rows, 3 * width], of rows (slot, position), in the cache.

    They are within `bound` beside the rounding of its type, and nothing is written anywhere else.
    """
    layout, slots = cache.layout, cache.host_slots
    heads, head_size = layout.num_heads, layout.head_size
    width = heads * head_size
    bound += {ops.FLOAT32: 0.0, ops.FLOAT16: 4e-4, ops.BFLOAT16: 3e-3}[layout.dtype]
    stored = [cache.get(slot) for slot in range(len(slots))]
    written = [np.zeros((2, pages.shape[3]), bool) for pages in stored]
    for row, (slot, position) in enumerate(rows):
        if slot < 0 or (position < 0 and slots[slot].finished):
            continue
        place = position if position >= 0 else slots[slot].length - 1
        written[slot][:, place] = True
        for part in (0, 1):
            want = qkv[row, width * (part + 1) :][:width].reshape(heads, head_size)
            have = stored[slot][layer, part, :, place, :]
            assert error(have[:, :head_size], want) < bound
            assert (have[:, head_size:] == 0).all()
    for pages, places in zip(stored, written):
        others = [i for i in range(layout.num_layers) if i != layer]
        assert (pages[others] == Cache.FILL).all()
        for part in (0, 1):
            assert (pages[layer, part][:, ~places[part]] == Cache.FILL).all()


def row_list(rows: Sequence[tuple[int, int]]) -> Array:
    """An array of Row."""
    return Array(np.array(rows, np.int32).reshape(-1, 2))


def reference(struct: ctypes.Structure | None) -> Any:
    """A pointer to a structure, or null."""
    return None if struct is None else ctypes.pointer(struct)
