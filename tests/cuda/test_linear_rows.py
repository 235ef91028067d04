"""LinearRows and PackRows against float64: products of rows that travel as 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.cuda import ops
from tests.cuda.arrays import (
    Array,
    Cache,
    NormWeights,
    Weights,
    check_stored,
    decode,
    error,
    fold,
    row_list,
)
from tests.cuda.rows_case import Packed, pack, run
from tests.cuda.test_linear import gelu

DTYPES = {"float16": ops.FLOAT16, "bfloat16": ops.BFLOAT16}
BOUNDS = {ops.FLOAT16: 6e-4, ops.BFLOAT16: 4e-3}
SHAPES = [
    (32, 1),
    (33, 9),
    (64, 64),
    (100, 70),
    (513, 129),
    (768, 2304),
    (1024, 1000),
    (1600, 331),
    (4096, 1024),
    (6400, 200),
    (1024, 3072),
    (200, 17000),
]
ROWS = (1, 5, 8, 9, 16, 17, 33, 64, 70, 130)


@pytest.fixture(scope="module", autouse=True)
def supported(library: ops.Library) -> None:
    if not library.rows_supported(ops.FLOAT16, 64):
        pytest.skip("LinearRows needs sm_90a")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 60, 64, 65, 1024, 1600])
def test_packing(library: ops.Library, dtype: str, size: int) -> None:
    rng = np.random.default_rng(size)
    kind = DTYPES[dtype]
    # A mean that is large beside the deviation.
    x = (rng.standard_normal((7, size)) + 50.0).astype(np.float32)
    x[3] *= 1e5
    norm = NormWeights(rng, size)
    for used in (None, norm):
        packed = pack(library, x, kind, used)
        want = x.astype(np.float64) * (1.0 if used is None else used.weight)
        got = packed.values()
        assert np.isfinite(got).all()
        for row in range(7):
            if row != 3 or kind == ops.BFLOAT16:
                assert error(got[row], want[row]) < BOUNDS[kind]
        if used is None:
            continue
        for part, sums in enumerate(packed.parts().transpose(1, 0, 2)):
            columns = x[:, part * 64 : part * 64 + 64].astype(np.float64)
            mean = columns.mean(axis=1)
            squares = ((columns - mean[:, None]) ** 2).sum(axis=1)
            assert np.allclose(sums[:, 0], mean, rtol=2e-6)
            assert np.allclose(sums[:, 1], squares, rtol=1e-3, atol=1e-3 * np.abs(mean).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_", "out"), SHAPES)
def test_products(library: ops.Library, dtype: str, in_: int, out: int) -> None:
    rng = np.random.default_rng(in_ * 7 + out)
    kind = DTYPES[dtype]
    plain, biased = (Weights(rng, out, in_, kind, bias) for bias in (False, True))
    norm, later = NormWeights(rng, in_), NormWeights(rng, out)
    for case, rows in enumerate(ROWS):
        w = plain if case % 3 == 0 else biased
        bias = 0.0 if w.bias is None else w.bias.astype(np.float64)
        x = rng.standard_normal((rows, in_)).astype(np.float32) * 2 + 0.5
        normed = norm if case % 2 == 0 else None
        seen = x.astype(np.float64) if normed is None else normed.apply(x)
        exact = seen @ w.values.T + bias
        epilogue = (ops.STORE, ops.GELU, ops.RESIDUAL)[(case + in_) % 3]
        y = rng.standard_normal((rows, out)).astype(np.float32)
        if epilogue == ops.GELU:
            exact = gelu(exact)
        elif epilogue == ops.RESIDUAL:
            exact = y + exact
        next_norm = later if epilogue == ops.RESIDUAL and case % 4 < 3 else None
        got, packed = run(library, w, x, epilogue, normed, y, next_norm)
        size = np.linalg.norm(np.abs(seen) @ np.abs(w.values).T)
        allowed = BOUNDS[kind] * max(np.linalg.norm(exact), 0.2 * size) + 1e-6
        result = got if epilogue != ops.GELU else packed.values()
        if epilogue == ops.GELU:
            allowed += 1e-6 * np.sqrt(exact.size)  # the smallest numbers of float16, in its unit
        difference = np.linalg.norm(result - exact)
        assert difference <= allowed, (rows, epilogue, normed is not None, difference, allowed)
        if next_norm is None:
            continue
        again = pack(library, got, kind, next_norm)
        assert np.array_equal(packed.data.get()[:, :out], again.data.get()[:, :out])
        assert np.allclose(packed.parts(), again.parts(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_", "out"), [(96, 40), (1024, 264), (4100, 72), (1000, 2500), (300, 20000)]
)
def test_rows_do_not_depend_on_each_other(
    library: ops.Library, dtype: str, in_: int, out: int
) -> None:
    rng = np.random.default_rng(5)
    w = Weights(rng, out, in_, DTYPES[dtype])
    norm = NormWeights(rng, in_)
    x = rng.standard_normal((70, in_)).astype(np.float32)

    def bits(rows: np.ndarray) -> np.ndarray:
        return run(library, w, rows, ops.STORE, norm)[0]

    whole = bits(x)
    for first, count in ((0, 1), (69, 1), (3, 2), (5, 4), (40, 7), (1, 12), (7, 31), (2, 64)):
        assert np.array_equal(bits(x[first : first + count]), whole[first : first + count])
    noisy = x.copy()
    noisy[0], noisy[2] = np.inf, np.nan
    assert np.array_equal(bits(noisy)[1], whole[1])


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize(("in_", "out"), [(64, 100), (1000, 300)])
def test_clusters(library: ops.Library, cluster: int, in_: int, out: int) -> None:
    rng = np.random.default_rng(6)
    w = Weights(rng, out, in_, ops.FLOAT16)
    norm = NormWeights(rng, in_)
    for rows in (3, 20, 50, 100):
        x = rng.standard_normal((rows, in_)).astype(np.float32)
        got, _ = run(library, w, x, ops.STORE, norm, cluster=cluster)
        assert error(got, norm.apply(x) @ w.values.T + w.bias) < BOUNDS[ops.FLOAT16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("heads", "head_size"), [(4, 64), (3, 20), (5, 9)])
@pytest.mark.parametrize("placed", [False, True])
def test_qkv(
    library: ops.Library, dtype: str, cache_dtype: str, heads: int, head_size: int, placed: bool
) -> None:
    rng = np.random.default_rng(8)
    width = heads * head_size
    w = Weights(rng, 3 * width, width, DTYPES[dtype])
    norm = NormWeights(rng, width)
    kind = {"float32": ops.FLOAT32, "float16": ops.FLOAT16, "bfloat16": ops.BFLOAT16}[cache_dtype]
    lengths = [1, 40, 33, 64]
    cache = Cache(kind, 2, heads, head_size, lengths)
    cache.host_slots[2].finished = 1
    cache.upload()
    # Slot, position; where it lands.
    rows = [(0, -1), (1, -1), (-1, -1), (2, -1), (3, 12), (1, 3), (-1, 5), (3, 63), (1, 11)]
    x = rng.standard_normal((len(rows), width)).astype(np.float32)
    device_rows = row_list(rows)
    more: dict[str, Any] = {"row_list": device_rows.ptr, "slots": cache.slots.ptr}
    places = cache.places(rows)
    if placed:
        more = {"places": places.ptr}
    y = np.full((len(rows), 3 * width), -5.0, np.float32)
    got, _ = run(library, w, x, ops.QKV, norm, y, cache=cache.layout, layer=1, **more)
    exact = norm.apply(x) @ w.values.T + w.bias
    assert error(got[:, :width], exact[:, :width] / np.sqrt(head_size)) < 3 * BOUNDS[DTYPES[dtype]]
    assert (got[:, width:] == -5.0).all()
    check_stored(cache, 1, rows, exact, 3 * BOUNDS[DTYPES[dtype]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers_stay_finite(library: ops.Library, dtype: str) -> None:
    rng = np.random.default_rng(9)
    kind = DTYPES[dtype]
    w = Weights(rng, 192, 64, kind)
    x = (rng.standard_normal((3, 64)) * 1e5).astype(np.float32)
    got, _ = run(library, w, x)
    assert error(got, x.astype(np.float64) @ w.values.T + w.bias) < 3 * BOUNDS[kind]
    _, packed = run(library, w, x * 1e4, ops.GELU)
    assert np.isfinite(decode(packed.data.get())).all()


@pytest.mark.parametrize(("size", "rows"), [(512, 3), (3200, 40), (1024, 64)])
def test_graph_with_overlap(library: ops.Library, size: int, rows: int) -> None:
    """A chain in a graph, where each kernel may start before the one before it has ended."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(11)
    weights = [Weights(rng, size, size, ops.FLOAT16) for _ in range(4)]
    norm = NormWeights(rng, size)
    x = rng.standard_normal((rows, size)).astype(np.float32)
    first = pack(library, x, ops.FLOAT16, norm)
    stream_x = [Array(np.zeros_like(x)) for _ in weights]
    rest = [Packed(rows, size, ops.FLOAT16) for _ in weights]
    folds = [fold(library, w, norm) for w in weights]
    chain = [
        ops.LinearRowsArgs(
            w=w.matrix,
            x=a.struct,
            norm_sums=sums.ptr,
            norm_bias=bias.ptr,
            eps=1e-5,
            rows=rows,
            epilogue=ops.RESIDUAL,
            y=y.ptr,
            ldy=size,
            out=b.struct,
            out_weight=norm.struct.weight,
            overlap=True,
        )
        for w, y, a, b, (sums, bias) in zip(weights, stream_x, [first, *rest], rest, folds)
    ]
    exact = x
    for w in weights:
        exact = norm.apply(exact) @ w.values.T + w.bias

    def step() -> None:
        for y in stream_x:
            y.zero()
        for args in chain:
            library.launch("linear_rows", args)

    step()
    torch.cuda.synchronize()
    want = stream_x[-1].get()
    assert error(want, exact) < 3e-3
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        for _ in range(50):
            graph.replay()
    stream.synchronize()
    assert np.array_equal(stream_x[-1].get(), want)
