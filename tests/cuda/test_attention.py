"""Attention kernels against float64, over a cache full of NaN where nothing may be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.cuda import ops
from tests.cuda.attention_case import DTYPES, Sequences, decode, distance, encode, structures
from tests.cuda.memory import Array, Buffer

DECODE_PARTS = 32
POISON = 12345.0


def run_decode(
    library: ops.Library,
    cache: Sequences,
    rows: Sequence[tuple[int, int]],
    q: Array,
    splits: int,
) -> Array:
    """Outputs [rows, heads, head_size] of rows (slot, position)."""
    width = cache.heads * cache.head_size
    padded = np.full((len(rows), width + 3), np.nan, np.float32)
    padded[:, :width] = q.reshape(len(rows), width)
    query = Buffer(padded)
    out = Buffer(np.full((len(rows), width + 5), POISON, np.float32))
    arrived = Buffer(np.zeros((len(rows), cache.heads), np.int32))
    partial = Buffer(
        np.full((len(rows), cache.heads, DECODE_PARTS, cache.head_size + 2), np.nan, np.float32)
    )
    row_list = structures([ops.Row(*row) for row in rows])
    library.call(
        "decode_attention",
        ops.DecodeAttentionArgs(
            q=query.pointer,
            ldq=width + 3,
            out=out.pointer,
            ldo=width + 5,
            row_list=row_list.pointer,
            slots=cache.slots.pointer,
            rows=len(rows),
            cache=cache.layout,
            layer=cache.layer,
            splits=splits,
            partial=partial.pointer if splits > 1 else None,
            arrived=arrived.pointer,
        ),
    )
    assert not arrived.numpy().any()
    result = out.numpy()
    assert (result[:, width:] == POISON).all()
    return result[:, :width].reshape(q.shape)


def run_prefill(
    library: ops.Library,
    cache: Sequences,
    runs: Sequence[tuple[int, int, int, int]],
    q: Array,
    dtype: str,
    spare: int = 0,
) -> Array:
    """Outputs [rows, heads, head_size] of runs (slot, first_row, begin, count), as elements."""
    rows, width = q.shape[0], cache.heads * cache.head_size
    padded = encode(np.full((rows, width + spare), np.float32(POISON)), dtype)
    out = Buffer(padded.copy())
    poison = padded[0, 0]
    padded[:, :width] = encode(q.reshape(rows, width), dtype)
    query = Buffer(padded)
    run_list = structures([ops.PrefillRun(*run) for run in runs])
    library.call(
        "prefill_attention",
        ops.PrefillAttentionArgs(
            q=query.pointer,
            ldq=width + spare,
            out=out.pointer,
            ldo=width + spare,
            dtype=DTYPES[dtype],
            runs=run_list.pointer,
            num_runs=len(runs),
            longest_run=max(run[3] for run in runs),
            slots=cache.slots.pointer,
            cache=cache.layout,
            layer=cache.layer,
        ),
    )
    result = out.numpy()
    assert (result[:, width:] == poison).all()
    covered = np.zeros(rows, bool)
    for slot, first, _, count in runs:
        covered[first : first + count] |= slot >= 0
    assert (result[~covered] == poison).all()
    return result[:, :width].reshape(q.shape)


def queries(count: int, cache: Sequences, seed: int = 1) -> Array:
    """Scaled queries as a network would have them: scores of a few units."""
    rng = np.random.default_rng(seed)
    size = (count, cache.heads, cache.head_size)
    return (rng.standard_normal(size) * 2 / np.sqrt(cache.head_size)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_size", [8, 20, 33, 64, 80, 128, 200, 256])
def test_decode_matches_float64(library: Any, dtype: str, head_size: int) -> None:
    lengths = [1, 31, 32, 33, 97, 130, 513, 1056]
    cache = Sequences(lengths, 3, head_size, dtype)
    rows = [(slot, -1) for slot in range(len(lengths))] + [(7, 1024), (5, 0), (6, 300)]
    q = queries(len(rows), cache)
    for splits in (1, 3, 8):
        out = run_decode(library, cache, rows, q, splits)
        for index, (slot, position) in enumerate(rows):
            visible = lengths[slot] if position < 0 else position + 1
            expected = cache.attend(slot, q[index].astype(np.float64), visible)
            assert distance(out[index], expected) < 3e-6, (splits, slot, position)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_decode_bits_depend_on_the_row_alone(library: Any, dtype: str) -> None:
    lengths = [5, 100, 129, 640, 1025, 1500]
    cache = Sequences(lengths, 2, 64, dtype, seed=3)
    rows = [(slot, -1) for slot in range(len(lengths))]
    q = queries(len(rows), cache)
    together = run_decode(library, cache, rows, q, 1)
    for splits in (2, 5, 8, 16):
        np.testing.assert_array_equal(run_decode(library, cache, rows, q, splits), together)
    for index, row in enumerate(rows):
        alone = run_decode(library, cache, [row], q[index : index + 1], 4)
        np.testing.assert_array_equal(alone[0], together[index])


@pytest.mark.parametrize("splits", [1, 4])
def test_decode_leaves_out_padding_and_what_has_finished(library: Any, splits: int) -> None:
    lengths = [300, 200, 40]
    cache = Sequences(lengths, 4, 64, "float16", finished=[1])
    rows = [(-1, -1), (0, -1), (1, -1), (-1, 3), (2, -1), (1, 150)]
    q = queries(len(rows), cache)
    out = run_decode(library, cache, rows, q, splits)
    for index in (0, 2, 3):
        assert not out[index].any()
    for index, visible in ((1, 300), (4, 40), (5, 151)):
        expected = cache.attend(rows[index][0], q[index].astype(np.float64), visible)
        assert distance(out[index], expected) < 3e-6


def test_decode_of_large_scores(library: Any) -> None:
    cache = Sequences([700], 2, 64, "float32", scale=30.0)
    q = queries(1, cache) * 50
    out = run_decode(library, cache, [(0, -1)], q, 4)
    assert distance(out[0], cache.attend(0, q[0].astype(np.float64), 700)) < 2e-3


LIMITS = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}


def check_prefill(
    library: Any,
    cache: Sequences,
    runs: Sequence[tuple[int, int, int, int]],
    dtype: str,
    spare: int,
) -> None:
    """Compares every row of the runs with float64."""
    rows = max(first + count for _, first, _, count in runs) + 1
    q = decode(encode(queries(rows, cache), dtype), dtype)
    out = decode(run_prefill(library, cache, runs, q.astype(np.float32), dtype, spare), dtype)
    for slot, first, begin, count in runs:
        if slot < 0:
            continue
        expected = np.stack([cache.attend(slot, q[first + i], begin + i + 1) for i in range(count)])
        assert distance(out[first : first + count], expected) < LIMITS[dtype], (slot, begin)
        worst = max(distance(out[first + i], expected[i]) for i in range(count))
        assert worst < 4 * LIMITS[dtype], (slot, begin)


# Slot, first row, position of the first query, queries.
RUNS = [(0, 0, 0, 1), (1, 1, 0, 47), (-1, 48, 0, 9), (2, 57, 30, 65), (3, 122, 129, 150)]
RUN_LENGTHS = [1, 47, 95, 279]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_size", [8, 20, 33, 64, 80, 128, 200, 256])
def test_prefill_matches_float64(library: Any, dtype: str, head_size: int) -> None:
    cache = Sequences(RUN_LENGTHS, 2, head_size, dtype)
    check_prefill(library, cache, RUNS, dtype, spare=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("cache_dtype", ["float16", "bfloat16", "float32"])
def test_prefill_of_any_pair_of_types(library: Any, dtype: str, cache_dtype: str) -> None:
    cache = Sequences(RUN_LENGTHS, 2, 64, cache_dtype)
    check_prefill(library, cache, RUNS, dtype, spare=3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_prefill_bits_depend_on_the_query_alone(library: Any, dtype: str) -> None:
    lengths = [300] * 10
    cache = Sequences(lengths, 16, 64, dtype, seed=5)
    q = queries(3000, cache)
    runs = [(slot, 300 * slot, 0, 300) for slot in range(10)]
    together = run_prefill(library, cache, runs, q, dtype)
    alone = run_prefill(library, cache, [(4, 0, 0, 300)], q[1200:1500], dtype)
    np.testing.assert_array_equal(alone, together[1200:1500])
    pieces = [(4, 0, 0, 7), (4, 7, 7, 100), (4, 107, 107, 193)]
    cut = run_prefill(library, cache, pieces, q[1200:1500], dtype)
    np.testing.assert_array_equal(cut, together[1200:1500])
