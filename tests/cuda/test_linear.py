"""Linear against float64, for every type of weights, number of rows and epilogue."""

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
    encode,
    error,
    fold,
    reference,
    round_up,
    row_list,
    rows_of,
)

DTYPES = {
    "float32": ops.FLOAT32,
    "float16": ops.FLOAT16,
    "bfloat16": ops.BFLOAT16,
    "int8": ops.INT8,
    "int4": ops.INT4,
}
# Weights are exact in float64; integers times their scale are rounded to float16. Tensor cores take
# x as one number of 16 bits where clusters of blocks share the columns (sm_90), else in two parts.
BOUNDS = {
    ops.FLOAT32: 2e-6,
    ops.FLOAT16: 6e-4,
    ops.BFLOAT16: 3e-3,
    ops.INT8: 1.2e-3,
    ops.INT4: 1.2e-3,
}
TWO_PART_BOUNDS = {
    ops.FLOAT32: 2e-6,
    ops.FLOAT16: 2e-6,
    ops.BFLOAT16: 3e-5,
    ops.INT8: 4e-4,
    ops.INT4: 4e-4,
}
# LinearArgs.cluster: to be chosen, and the kernel that takes x in two parts.
CHOSEN, TWO_PARTS = 0, 1
SHAPES = [
    (1, 1),
    (7, 3),
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
    (200, 17000),  # more tiles than clusters run at once
]
PAD = -12345.0


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def run(
    library: ops.Library,
    w: Weights,
    x: np.ndarray,
    epilogue: int = ops.STORE,
    norm: NormWeights | None = None,
    y: np.ndarray | None = None,
    **more: Any,
) -> np.ndarray:
    """y, checked to be written nowhere but in its columns."""
    rows, out = x.shape[0], w.matrix.out
    padded = rows_of(x)
    device_x = Array(padded)
    if norm is not None:
        folded = fold(library, w, norm)
        more |= {"norm_sums": folded[0].ptr, "norm_bias": folded[1].ptr}
    full = np.full((rows, round_up(out, 8) + 8), PAD, np.float32)
    if y is not None:
        full[:, :out] = y
    device_y = Array(full)
    args = ops.LinearArgs(
        w.matrix,
        device_x.ptr,
        padded.shape[1],
        reference(None if norm is None else norm.struct),
        rows,
        device_y.ptr,
        full.shape[1],
        epilogue,
        **more,
    )
    library.call("linear", args)
    got = device_y.get()
    assert (got[:, out:] == PAD).all()
    return got[:, :out]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_", "out", "cluster"),
    [(*shape, CHOSEN) for shape in SHAPES] + [(*shape, TWO_PARTS) for shape in SHAPES[1:11:3]],
)
def test_products(library: ops.Library, dtype: str, in_: int, out: int, cluster: int) -> None:
    rng = np.random.default_rng(in_ * 7 + out)
    kind = DTYPES[dtype]
    bounds = TWO_PART_BOUNDS if cluster == TWO_PARTS else BOUNDS
    plain, biased = (Weights(rng, out, in_, kind, bias) for bias in (False, True))
    norm = NormWeights(rng, in_)
    for case, rows in enumerate((1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 70, 130)):
        w = plain if case % 3 == 0 else biased
        bias = 0.0 if w.bias is None else w.bias.astype(np.float64)
        x = rng.standard_normal((rows, in_)).astype(np.float32) * 2 + 0.5
        normed = case % 2 == 0
        exact = (norm.apply(x) if normed else x.astype(np.float64)) @ w.values.T + bias
        epilogue = (ops.STORE, ops.GELU, ops.RESIDUAL)[(case + in_) % 3]
        y = rng.standard_normal((rows, out)).astype(np.float32)
        if epilogue == ops.GELU:
            exact = gelu(exact)
        elif epilogue == ops.RESIDUAL:
            exact = y + exact
        got = run(library, w, x, epilogue, norm if normed else None, y, cluster=cluster)
        # Sums that cancel leave their rounding: the bound is for the size of what was added. The
        # roundings of few numbers do not even out.
        size = np.linalg.norm(np.abs(x if not normed else norm.apply(x)) @ np.abs(w.values).T)
        share = 1.0 if in_ < 16 else 0.2
        allowed = bounds[kind] * max(np.linalg.norm(exact), share * size) + 1e-6
        difference = np.linalg.norm(got - exact)
        assert difference <= allowed, (rows, epilogue, normed, difference, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_", "out", "cluster"),
    [
        (96, 40, CHOSEN),
        (1024, 264, CHOSEN),
        (4100, 72, CHOSEN),
        (1000, 2500, CHOSEN),
        (1024, 264, TWO_PARTS),
    ],
)
def test_rows_do_not_depend_on_each_other(
    library: ops.Library, dtype: str, in_: int, out: int, cluster: int
) -> None:
    rng = np.random.default_rng(5)
    w = Weights(rng, out, in_, DTYPES[dtype])
    norm = NormWeights(rng, in_)
    x = rng.standard_normal((70, in_)).astype(np.float32)
    whole = run(library, w, x, ops.GELU, norm, cluster=cluster)
    for first, count in ((0, 1), (69, 1), (3, 2), (5, 4), (40, 7), (1, 12), (7, 31), (2, 64)):
        part = run(library, w, x[first : first + count], ops.GELU, norm, cluster=cluster)
        assert np.array_equal(part, whole[first : first + count]), (first, count)
    noisy = x.copy()
    noisy[0], noisy[2] = np.inf, np.nan
    assert np.array_equal(run(library, w, noisy, ops.GELU, norm, cluster=cluster)[1], whole[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_do_not_change_bits(library: ops.Library, dtype: str) -> None:
    rng = np.random.default_rng(6)
    w = Weights(rng, 520, 1500, DTYPES[dtype])
    norm = NormWeights(rng, 1500)
    for rows in (1, 3, 20, 50):
        x = rng.standard_normal((rows, 1500)).astype(np.float32)
        for used in (None, norm):
            alone = run(library, w, x, norm=used, cluster=1)
            for cluster in (2, 4, 8):
                together = run(library, w, x, norm=used, cluster=cluster)
                assert np.array_equal(alone, together), (rows, cluster)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("heads", "head_size"), [(4, 64), (3, 20), (5, 9)])
def test_qkv(
    library: ops.Library, dtype: str, cache_dtype: str, heads: int, head_size: int
) -> None:
    rng = np.random.default_rng(8)
    width = heads * head_size
    w = Weights(rng, 3 * width, width, DTYPES[dtype])
    norm = NormWeights(rng, width)
    kind = DTYPES[cache_dtype]
    cache = Cache(kind, 2, heads, head_size, [1, 40, 33, 64])
    cache.host_slots[2].finished = 1
    cache.upload()
    # Slot, position; where it lands.
    rows = [(0, -1), (1, -1), (-1, -1), (2, -1), (3, 12), (1, 3), (-1, 5), (3, 63), (0, 0)]
    rows = rows[:8]
    x = rng.standard_normal((len(rows), width)).astype(np.float32)
    device_rows = row_list(rows)
    got = run(
        library,
        w,
        x,
        ops.QKV,
        norm,
        np.full((len(rows), 3 * width), PAD, np.float32),
        row_list=device_rows.ptr,
        slots=cache.slots.ptr,
        cache=cache.layout,
        layer=1,
    )
    exact = norm.apply(x) @ w.values.T + w.bias
    assert error(got[:, :width], exact[:, :width] / np.sqrt(head_size)) < 3 * BOUNDS[DTYPES[dtype]]
    assert (got[:, width:] == PAD).all()
    check_stored(cache, 1, rows, exact, 3 * BOUNDS[DTYPES[dtype]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers_stay_finite(library: ops.Library, dtype: str) -> None:
    rng = np.random.default_rng(9)
    kind = DTYPES[dtype]
    w = Weights(rng, 3 * 64, 64, kind)
    x = (rng.standard_normal((3, 64)) * 1e5).astype(np.float32)
    assert error(run(library, w, x), x.astype(np.float64) @ w.values.T + w.bias) < 3 * BOUNDS[kind]
    cache = Cache(ops.FLOAT16, 1, 1, 64, [1, 1, 1])
    rows = row_list([(0, 0), (1, 0), (2, 0)])
    run(
        library,
        w,
        x * 1000,
        ops.QKV,
        row_list=rows.ptr,
        slots=cache.slots.ptr,
        cache=cache.layout,
    )
    for slot in range(3):
        assert np.isfinite(cache.get(slot)).all()


def test_head(library: ops.Library) -> None:
    """The odd vocabulary of GPT-2."""
    rng = np.random.default_rng(10)
    w = Weights(rng, 50257, 1024, ops.FLOAT16, bias=False)
    norm = NormWeights(rng, 1024)
    x = rng.standard_normal((9, 1024)).astype(np.float32)
    exact = norm.apply(x) @ w.values.T
    assert error(run(library, w, x, norm=norm), exact) < BOUNDS[ops.FLOAT16]
    assert np.array_equal(run(library, w, x[:1], norm=norm), run(library, w, x, norm=norm)[:1])


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float32"])
@pytest.mark.parametrize("bias", [False, True])
def test_folded_norm(library: ops.Library, dtype: str, bias: bool) -> None:
    """The sums are those of the weights that products see: integers rounded to float16."""
    rng = np.random.default_rng(12)
    w = Weights(rng, 37, 300, DTYPES[dtype], bias)
    norm = NormWeights(rng, 300)
    sums, folded = (array.get() for array in fold(library, w, norm))
    seen = w.values.astype(np.float16).astype(np.float64) if "int" in dtype else w.values
    assert np.allclose(sums, seen @ norm.weight.astype(np.float64), rtol=1e-6, atol=1e-6)
    want = seen @ norm.bias.astype(np.float64) + (0.0 if w.bias is None else w.bias)
    assert np.allclose(folded, want, rtol=1e-6, atol=1e-6)


def test_encoding_of_the_tests() -> None:
    x = np.array([1.0, -2.5, 3.14159, 65504.0], np.float32)
    for dtype in (ops.FLOAT32, ops.FLOAT16, ops.BFLOAT16):
        assert error(decode(encode(x, dtype)), x.astype(np.float64)) < 4e-3


@pytest.mark.parametrize(("size", "rows"), [(512, 3), (3200, 40), (1024, 64)])
def test_graph_with_overlap(library: ops.Library, size: int, rows: int) -> None:
    """A chain in a graph, where each kernel may start before the one before it has ended."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(11)
    weights = [Weights(rng, size, size, ops.FLOAT16) for _ in range(4)]
    norm = NormWeights(rng, size)
    x = rng.standard_normal((rows, size)).astype(np.float32)
    buffers = [Array(x), *(Array(np.zeros_like(x)) for _ in weights)]
    folds = [fold(library, w, norm) for w in weights]
    chain = [
        ops.LinearArgs(
            w.matrix,
            a.ptr,
            size,
            reference(norm.struct),
            rows,
            b.ptr,
            size,
            ops.GELU,
            overlap=True,
            norm_sums=sums.ptr,
            norm_bias=bias.ptr,
        )
        for w, a, b, (sums, bias) in zip(weights, buffers, buffers[1:], folds)
    ]

    def step() -> None:
        for args in chain:
            library.launch("linear", args)

    step()
    torch.cuda.synchronize()
    want = buffers[-1].get()
    exact = x
    for w in weights:
        exact = gelu(norm.apply(exact) @ w.values.T + w.bias)
    assert error(want, exact) < 2e-3
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        for _ in range(50):
            graph.replay()
    stream.synchronize()
    assert np.array_equal(buffers[-1].get(), want)
