"""Attention kernels against float64, over a cache full of NaN where nothing may be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.cuda import ops
from tests.cuda.arrays import Weights
from tests.cuda.attention_case import DTYPES, Sequences, decode, distance, encode, structures
from tests.cuda.memory import Array, Buffer
from tests.cuda.rows_case import UNITS

DECODE_PARTS = 32
POISON = 12345.0


def run_decode(
    library: ops.Library,
    cache: Sequences,
    rows: Sequence[tuple[int, int]],
    q: Array,
    splits: int,
    planned: bool = False,
    share: bool = True,
    overlap: bool = False,
) -> Array:
    """Outputs [rows, heads, head_size] of rows (slot, position); `share`: heads may be cut."""
    width = cache.heads * cache.head_size
    padded = np.full((len(rows), width + 3), np.nan, np.float32)
    padded[:, :width] = q.reshape(len(rows), width)
    query = Buffer(padded)
    out = Buffer(np.full((len(rows), width + 5), POISON, np.float32))
    arrived = Buffer(np.zeros((len(rows), cache.heads), np.int32))
    partial = Buffer(
        np.full((len(rows), cache.heads, DECODE_PARTS, cache.head_size + 2), np.nan, np.float32)
    )
    plan = None
    if planned:
        plan = Buffer(np.full(library.decode_plan_bytes(len(rows), cache.layout), 0xFF, np.uint8))
    row_list = structures([ops.Row(*row) for row in rows])
    args = ops.DecodeAttentionArgs(
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
        partial=partial.pointer if share else None,
        arrived=arrived.pointer,
        plan=plan.pointer if plan else None,
        overlap=overlap,
    )
    if planned:
        library.call("plan_decode_attention", args)
    library.call("decode_attention", args)
    assert not arrived.numpy().any()
    result = out.numpy()
    if planned and cache.dtype != "float32":
        packed = Buffer(encode(np.full((len(rows), width + 5), POISON, np.float32), cache.dtype))
        args.packed = packed.pointer
        library.call("decode_attention", args)
        want = result / UNITS[args.cache.dtype]
        want[:, width:] = POISON
        assert (packed.numpy() == encode(want, cache.dtype)).all()
    assert (result[:, width:] == POISON).all()
    return result[:, :width].reshape(q.shape)


@pytest.fixture(params=["loads", "streams"])
def planned(request: pytest.FixtureRequest, library: Any) -> bool:
    """Whether the kernel is the one that streams pages, by a plan."""
    wanted = bool(request.param == "streams")
    if wanted and library.decode_plan_bytes(1, ops.CacheLayout(ops.FLOAT16, 1, 1, 64, 64)) == 0:
        pytest.skip("the device has no bulk copies")
    return wanted


def run_prefill(
    library: ops.Library,
    cache: Sequences,
    runs: Sequence[tuple[int, int, int, int]],
    q: Array,
    dtype: str,
    spare: int = 0,
    scale: float = 1.0,
    fresh: bool = False,
) -> Array:
    """Outputs [rows, heads, head_size] of runs (slot, first_row, begin, count), as elements.

    `fresh`: the runs' keys and values come in the rows of the queries.
    """
    rows, width = q.shape[0], cache.heads * cache.head_size
    padded = encode(np.full((rows, width + spare), np.float32(POISON)), dtype)
    out = Buffer(padded.copy())
    poison = padded[0, 0]
    columns = 3 * width if fresh else width
    inputs = encode(np.full((rows, columns + spare), np.float32(np.nan)), "float32")
    inputs[:, :width] = q.reshape(rows, width)
    if fresh:
        for slot, first, begin, count in runs:
            for part, store in ((1, cache.keys), (2, cache.values)):
                numbers = store[slot][begin : begin + count].reshape(-1, width)
                inputs[first : first + count, part * width : (part + 1) * width] = numbers
    query = Buffer(encode(inputs, dtype))
    element = 4 if dtype == "float32" else 2
    run_list = structures([ops.PrefillRun(*run) for run in runs])
    library.call(
        "prefill_attention",
        ops.PrefillAttentionArgs(
            q=query.pointer,
            ldq=columns + spare,
            k=query.pointer + width * element if fresh else None,
            v=query.pointer + 2 * width * element if fresh else None,
            out=out.pointer,
            ldo=width + spare,
            scale=scale,
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
@pytest.mark.parametrize("head_size", [8, 20, 33, 57, 60, 64, 80, 128, 200, 256])
def test_decode_matches_float64(library: Any, planned: bool, dtype: str, head_size: int) -> None:
    lengths = [1, 31, 32, 33, 97, 130, 513, 1056]
    cache = Sequences(lengths, 3, head_size, dtype)
    rows = [(slot, -1) for slot in range(len(lengths))] + [(7, 1024), (5, 0), (6, 300)]
    q = queries(len(rows), cache)
    for splits in (1, 3, 8):
        out = run_decode(library, cache, rows, q, splits, planned, share=splits > 1)
        for index, (slot, position) in enumerate(rows):
            visible = lengths[slot] if position < 0 else position + 1
            expected = cache.attend(slot, q[index].astype(np.float64), visible)
            assert distance(out[index], expected) < 3e-6, (splits, slot, position)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_decode_bits_depend_on_the_row_alone(library: Any, planned: bool, dtype: str) -> None:
    lengths = [5, 100, 129, 640, 1025, 1500]
    cache = Sequences(lengths, 2, 64, dtype, seed=3)
    rows = [(slot, -1) for slot in range(len(lengths))]
    q = queries(len(rows), cache)
    together = run_decode(library, cache, rows, q, 1, planned, share=False)
    for splits in (1,) if planned else (2, 5, 8, 16):
        shared = run_decode(library, cache, rows, q, splits, planned)
        np.testing.assert_array_equal(shared, together)
    for index, row in enumerate(rows):
        for share in (False, True):
            splits = 4 if share else 1
            alone = run_decode(library, cache, [row], q[index : index + 1], splits, planned, share)
            np.testing.assert_array_equal(alone[0], together[index])


@pytest.mark.parametrize("splits", [1, 4])
def test_decode_leaves_out_padding_and_what_has_finished(
    library: Any, planned: bool, splits: int
) -> None:
    lengths = [300, 200, 40]
    cache = Sequences(lengths, 4, 64, "float16", finished=[1])
    rows = [(-1, -1), (0, -1), (1, -1), (-1, 3), (2, -1), (1, 150)]
    q = queries(len(rows), cache)
    out = run_decode(library, cache, rows, q, splits, planned, share=splits > 1)
    for index in (0, 2, 3):
        assert not out[index].any()
    for index, visible in ((1, 300), (4, 40), (5, 151)):
        expected = cache.attend(rows[index][0], q[index].astype(np.float64), visible)
        assert distance(out[index], expected) < 3e-6
    nobody = run_decode(library, cache, rows[2:4], q[2:4], splits, planned)
    assert not nobody.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_decode_of_large_scores(library: Any, planned: bool, dtype: str) -> None:
    cache = Sequences([700], 2, 64, dtype, scale=30.0)
    q = queries(1, cache) * 50
    out = run_decode(library, cache, [(0, -1)], q, 4, planned)
    assert distance(out[0], cache.attend(0, q[0].astype(np.float64), 700)) < 2e-3


@pytest.mark.parametrize(
    ("dtype", "many"), [("float16", 300), ("float16", 1500), ("bfloat16", 1500), ("float32", 900)]
)
def test_decode_of_many_ragged_rows(library: Any, planned: bool, dtype: str, many: int) -> None:
    """Heads are cut where rows are few or unequal; many rows, some of them without a token; so many
    that warps go through several runs and blocks keep their results in turns."""
    rng = np.random.default_rng(11)
    lengths = [int(n) for n in rng.integers(1, 400, 40)] + [1300, 2100]
    cache = Sequences(lengths, 3, 64, dtype, seed=7, finished=[3, 17])
    rows = [(int(slot), -1) for slot in rng.integers(-1, len(lengths), many)]
    rows += [(int(slot), int(rng.integers(0, lengths[slot]))) for slot in range(len(lengths))]
    q = queries(len(rows), cache)
    out = run_decode(library, cache, rows, q, 2, planned, overlap=True)
    uncut = run_decode(library, cache, rows, q, 1, planned, share=False)
    np.testing.assert_array_equal(uncut, out)
    for count in (1, 2, 7, 60):
        few = run_decode(library, cache, rows[-count:], q[-count:], 8, planned)
        np.testing.assert_array_equal(few, out[-count:])
    for index, (slot, position) in enumerate(rows):
        if slot < 0 or (position < 0 and slot in (3, 17)):
            assert not out[index].any(), index
            continue
        visible = lengths[slot] if position < 0 else position + 1
        expected = cache.attend(slot, q[index].astype(np.float64), visible)
        assert distance(out[index], expected) < 3e-6, (index, slot, position)


@pytest.mark.parametrize("batch", [1, 6, 40])
def test_decode_that_overlaps_the_kernel_before(library: Any, batch: int) -> None:
    """The query and the newest position come from a product that has not ended when it starts."""
    torch = pytest.importorskip("torch")
    plan_bytes = library.decode_plan_bytes(batch, ops.CacheLayout(ops.FLOAT16, 2, 16, 64, 64))
    if plan_bytes == 0:
        pytest.skip("the device has no bulk copies")
    plan = torch.zeros(plan_bytes, dtype=torch.uint8, device="cuda")
    heads, head_size, hidden = 16, 64, 1024
    width = heads * head_size
    rng = np.random.default_rng(5)
    lengths = [int(n) for n in rng.integers(1, 300, batch)]
    cache = Sequences(lengths, heads, head_size, "float16", seed=2)
    w = Weights(rng, 3 * width, hidden, ops.FLOAT16)
    x = torch.zeros((batch, hidden), dtype=torch.float32, device="cuda")
    q = torch.zeros((batch, width), dtype=torch.float32, device="cuda")
    out = torch.zeros_like(q)
    partial = torch.zeros((batch, heads, DECODE_PARTS, head_size + 2), device="cuda")
    arrived = torch.zeros((batch, heads), dtype=torch.int32, device="cuda")
    rows = structures([ops.Row(index, -1) for index in range(batch)])
    product = ops.LinearArgs(
        w=w.matrix,
        x=x.data_ptr(),
        ldx=hidden,
        rows=batch,
        y=q.data_ptr(),
        ldy=width,
        epilogue=ops.QKV,
        row_list=rows.pointer,
        slots=cache.slots.pointer,
        cache=cache.layout,
        layer=cache.layer,
        overlap=True,
    )

    def attention(overlap: bool) -> ops.DecodeAttentionArgs:
        return ops.DecodeAttentionArgs(
            q=q.data_ptr(),
            ldq=width,
            out=out.data_ptr(),
            ldo=width,
            row_list=rows.pointer,
            slots=cache.slots.pointer,
            rows=batch,
            cache=cache.layout,
            layer=cache.layer,
            splits=2,
            partial=partial.data_ptr(),
            arrived=arrived.data_ptr(),
            plan=plan.data_ptr(),
            overlap=overlap,
        )

    library.call("plan_decode_attention", attention(False))
    inputs = torch.randn((12, batch, hidden), device="cuda")

    def steps(overlap: bool) -> list[Array]:
        results = []
        for one in inputs:
            x.copy_(one)
            library.launch("linear", product)
            if not overlap:
                torch.cuda.synchronize()
            library.launch("decode_attention", attention(overlap))
            results.append(out.clone())
        torch.cuda.synchronize()
        return [result.cpu().numpy() for result in results]

    for separate, overlapping in zip(steps(False), steps(True)):
        assert np.isfinite(separate).all()
        np.testing.assert_array_equal(overlapping, separate)


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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_wider_heads_are_refused(library: Any, dtype: str) -> None:
    """By both kernels of decode steps, which have no room for what is beyond 256 numbers."""
    cache = Sequences([5], 1, 264, dtype)
    with pytest.raises(RuntimeError, match="CUDA error"):
        run_decode(library, cache, [(0, -1)], np.zeros((1, 1, 264), np.float32), 1)
    if library.decode_plan_bytes(1, ops.CacheLayout(ops.FLOAT16, 1, 1, 64, 64)) > 0:
        with pytest.raises(RuntimeError, match="CUDA error"):
            library.decode_plan_bytes(1, cache.layout)


# Slot, first row, position of the first query, queries.
RUNS = [(0, 0, 0, 1), (1, 1, 0, 47), (-1, 48, 0, 9), (2, 57, 30, 65), (3, 122, 129, 150)]
RUN_LENGTHS = [1, 47, 95, 279]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_size", [8, 20, 33, 57, 60, 64, 80, 128, 200, 256])
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_size", [8, 64, 80, 128, 200])
def test_prefill_stores_its_keys(library: Any, dtype: str, head_size: int) -> None:
    """Keys and values from the rows give the bits of those in the cache, and come into it."""
    lengths = [1, 47, 95, 279, 700]
    runs = [(0, 0, 0, 1), (1, 1, 0, 47), (2, 50, 30, 65), (3, 122, 129, 150), (4, 280, 0, 700)]
    whole = Sequences(lengths, 2, head_size, dtype)
    missing = {slot: range(begin, begin + count) for slot, _, begin, count in runs}
    cache = Sequences(lengths, 2, head_size, dtype, missing=missing)
    q = queries(980, whole) * np.float32(8)
    expected = run_prefill(library, whole, runs, q, dtype, spare=8, scale=0.125)
    actual = run_prefill(library, cache, runs, q, dtype, spare=8, scale=0.125, fresh=True)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(cache.pool().view(np.uint16), whole.pool().view(np.uint16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_prefill_scales_scores(library: Any, dtype: str) -> None:
    cache = Sequences(RUN_LENGTHS, 2, 64, dtype)
    q = queries(280, cache)
    plain = run_prefill(library, cache, RUNS, q, dtype)
    scaled = run_prefill(library, cache, RUNS, q * np.float32(8), dtype, scale=0.125)
    for _, first, _, count in (run for run in RUNS if run[0] >= 0):
        rows = slice(first, first + count)
        np.testing.assert_array_equal(scaled[rows], plain[rows])
