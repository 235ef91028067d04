"""Sequences in a paged KV cache with random contents, and what attention over them should give."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np

from tests.cuda import ops
from tests.cuda.arrays import turn
from tests.cuda.memory import Array, Buffer, from_bfloat16, to_bfloat16

DTYPES = {"float32": ops.FLOAT32, "float16": ops.FLOAT16, "bfloat16": ops.BFLOAT16}


def encode(values: Array, dtype: str) -> Array:
    """float32 numbers as the elements of a dtype; bfloat16 as its bits."""
    if dtype == "bfloat16":
        return to_bfloat16(values)
    return np.asarray(values).astype(dtype)


def decode(elements: Array, dtype: str) -> Array:
    """Elements of a dtype as float64."""
    values = from_bfloat16(elements) if dtype == "bfloat16" else elements
    return np.asarray(values.astype(np.float64))


def structures(items: Sequence[ctypes.Structure]) -> Buffer:
    """An array of structures in device memory."""
    raw = b"".join(bytes(item) for item in items)
    return Buffer(np.frombuffer(raw, np.uint8))


class Sequences:
    """Sequences of given lengths, whose pages lie in any order among others.

    What no query may see (other layers, positions at or after `length`, pages of nobody) is NaN,
    and so are positions of sequences that are `missing` yet.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        heads: int,
        head_size: int,
        dtype: str,
        seed: int = 0,
        finished: Sequence[int] = (),
        scale: float = 1.0,
        missing: Mapping[int, range] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.lengths, self.heads, self.head_size, self.dtype = lengths, heads, head_size, dtype
        per_16_bytes = 4 if dtype == "float32" else 8
        stride = -(-head_size // per_16_bytes) * per_16_bytes
        self.layout = ops.CacheLayout(DTYPES[dtype], 2, heads, head_size, stride)
        self.layer = 1
        page_counts = [-(-length // ops.PAGE) for length in lengths]
        total = sum(page_counts) + 2
        pool = encode(
            np.full((total, 2, 2, heads, ops.PAGE, stride), np.nan, np.float32), "float32"
        )
        order = list(rng.permutation(total - 1))
        self.keys: list[Array] = []
        self.values: list[Array] = []
        page_lists: list[list[int]] = []
        for index, (length, page_count) in enumerate(zip(lengths, page_counts)):
            own = [int(order.pop()) for _ in range(page_count)]
            page_lists.append(own)
            for kv, store in ((0, self.keys), (1, self.values)):
                numbers = rng.standard_normal((length, heads, head_size)).astype(np.float32) * scale
                elements = encode(numbers, dtype)
                store.append(decode(elements, dtype))
                back = store[-1].astype(np.float32)
                for position in range(length):
                    if position in (missing or {}).get(index, ()):
                        continue
                    page = pool[own[position // ops.PAGE], self.layer, kv, :, position % ops.PAGE]
                    page[:, :head_size] = back[position]
                    page[:, head_size:] = 0.0
        if dtype == "bfloat16":
            nan = np.isnan(pool)
            stored = np.where(nan, np.uint16(0x7FC0), to_bfloat16(np.where(nan, 0, pool)))
        else:
            stored = pool.astype(dtype)
        if dtype != "float32":
            stored = turn(stored, head_size)
        self._pool = Buffer(stored)
        page_bytes = stored[0].nbytes
        table: list[int] = []
        starts: list[int] = []
        for own in page_lists:
            starts.append(len(table))
            table += [self._pool.pointer + index * page_bytes for index in own] + [0]
        self._table = Buffer(np.array(table, np.uint64))
        slots = []
        for index, length in enumerate(lengths):
            slot = ops.Slot()
            slot.length = length
            slot.finished = int(index in finished)
            slot.pages = self._table.pointer + 8 * starts[index]
            slots.append(slot)
        self.slots = structures(slots)

    def pool(self) -> Array:
        """All pages, as they are now."""
        return self._pool.numpy()

    def attend(self, slot: int, query: Array, visible: int) -> Array:
        """What a query [heads, head_size] sees in the first positions, in float64."""
        keys, values = self.keys[slot][:visible], self.values[slot][:visible]
        scores = np.einsum("hd,phd->hp", query, keys)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.asarray(np.einsum("hp,phd->hd", weights, values))


def distance(actual: Array, expected: Array) -> float:
    """Relative error of an array, by norms; NaN where it holds one."""
    return float(np.linalg.norm(actual - expected)) / max(float(np.linalg.norm(expected)), 1e-30)
