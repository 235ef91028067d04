"""QkvAttention: the bits of the product before attention and of attention, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.cuda import ops
from tests.cuda.arrays import NormWeights, Weights, decode, error, fold
from tests.cuda.attention_case import Sequences, structures
from tests.cuda.memory import Buffer
from tests.cuda.rows_case import UNITS, pack

DTYPES = {"float16": ops.FLOAT16, "bfloat16": ops.BFLOAT16}
BOUNDS = {ops.FLOAT16: 2e-3, ops.BFLOAT16: 1.5e-2}
HEAD = 64
# Of what no kernel may leave, or write behind a row.
POISON = 0x7E7E


@pytest.fixture(scope="module", autouse=True)
def supported(library: ops.Library) -> None:
    if not library.rows_supported(ops.FLOAT16, 1024):
        pytest.skip("QkvAttention needs sm_90a")


class Case:
    """Rows of sequences, and the product and the cache that they go to."""

    def __init__(
        self,
        library: ops.Library,
        dtype: str,
        columns: int,
        heads: int,
        lengths: Sequence[int],
        slots: Sequence[int],
        finished: Sequence[int] = (),
        normed: bool = True,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.library, self.dtype, self.kind = library, dtype, DTYPES[dtype]
        self.heads, self.lengths, self.slots = heads, lengths, slots
        self.finished = finished
        self.width = heads * HEAD
        self.w = Weights(rng, 3 * self.width, columns, self.kind)
        norm = NormWeights(rng, columns) if normed else None
        self.x = rng.standard_normal((len(slots), columns)).astype(np.float32) + 0.3
        seen = self.x.astype(np.float64) if norm is None else norm.apply(self.x)
        self.exact = seen @ self.w.values.T + self.w.bias
        self.packed = pack(library, self.x, self.kind, norm)
        self.rows = structures([ops.Row(slot, -1) for slot in slots])
        self.more = {}
        if norm is not None:
            self._sums, self._bias = fold(library, self.w, norm)
            self.more = {
                "norm_sums": self._sums.ptr,
                "norm_bias": self._bias.ptr,
                "eps": norm.struct.eps,
            }

    def cache(self) -> Sequences:
        """A cache that lacks every sequence's newest position; the same one each time."""
        newest = {i: range(length - 1, length) for i, length in enumerate(self.lengths)}
        return Sequences(
            self.lengths, self.heads, HEAD, self.dtype, 3, self.finished, missing=newest
        )

    def product(self, cache: Sequences, y: Buffer | None = None) -> ops.LinearRowsArgs:
        """Arguments of the product."""
        return ops.LinearRowsArgs(
            w=self.w.matrix,
            x=self.packed.struct,
            rows=len(self.slots),
            epilogue=ops.QKV,
            y=None if y is None else y.pointer,
            ldy=self.width,
            row_list=self.rows.pointer,
            slots=cache.slots.pointer,
            cache=cache.layout,
            layer=cache.layer,
            **self.more,
        )

    def out(self) -> Buffer:
        """Room for the rows' results, and 8 columns that belong to nobody."""
        return Buffer(np.full((len(self.slots), self.width + 8), POISON, np.uint16))

    def apart(self) -> tuple[np.ndarray, np.ndarray]:
        """Bits of the results, and all pages, by a kernel each."""
        cache, out = self.cache(), self.out()
        y = Buffer(np.full((len(self.slots), self.width), np.nan, np.float32))
        self.library.call("linear_rows", self.product(cache, y))
        rows = len(self.slots)
        plan = Buffer(np.zeros(self.library.decode_plan_bytes(rows, cache.layout), np.uint8))
        partial = Buffer(np.zeros((rows, self.heads, 32, HEAD + 2), np.float32))
        arrived = Buffer(np.zeros((rows, self.heads), np.int32))
        args = ops.DecodeAttentionArgs(
            q=y.pointer,
            ldq=self.width,
            packed=out.pointer,
            ldo=self.width + 8,
            row_list=self.rows.pointer,
            slots=cache.slots.pointer,
            rows=rows,
            cache=cache.layout,
            layer=cache.layer,
            splits=1,
            partial=partial.pointer,
            arrived=arrived.pointer,
            plan=plan.pointer,
        )
        self.library.call("plan_decode_attention", args)
        self.library.call("decode_attention", args)
        return out.numpy(), cache.pool()

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """The same by one kernel."""
        cache, out = self.cache(), self.out()
        self.library.call("qkv_attention", self.joined_args(cache, out))
        return out.numpy(), cache.pool()

    def joined_args(self, cache: Sequences, out: Buffer) -> ops.QkvAttentionArgs:
        """Arguments of the one kernel."""
        return ops.QkvAttentionArgs(self.product(cache), out.pointer, self.width + 8)

    def check(self) -> np.ndarray:
        """That both are the same; returns the bits."""
        results, pool = self.joined()
        want_results, want_pool = self.apart()
        assert (results[:, self.width :] == POISON).all()
        assert np.array_equal(results, want_results)
        assert np.array_equal(pool.view(np.uint16), want_pool.view(np.uint16))
        return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "heads"), [(512, 1), (768, 12), (1024, 16), (1000, 3)])
@pytest.mark.parametrize("count", [1, 5, 8, 13, 16, 27])
def test_same_bits(library: ops.Library, dtype: str, columns: int, heads: int, count: int) -> None:
    rng = np.random.default_rng(count)
    lengths = [int(n) for n in rng.choice([1, 2, 31, 32, 33, 64, 65, 128, 300, 700], count)]
    Case(library, dtype, columns, heads, lengths, range(count), seed=count).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [4, 16])
def test_long_and_ragged(library: ops.Library, dtype: str, count: int) -> None:
    """Rings that go round, and blocks with more to do than others."""
    lengths = [(1, 1024, 993, 33, 1023, 992, 5, 800)[i % 8] for i in range(count)]
    Case(library, dtype, 512, 2, lengths, range(count)).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_token(library: ops.Library, dtype: str) -> None:
    lengths = [40, 7, 90, 128, 33]
    slots = [1, -1, 0, 3, -1, 4, 2, -1, -1, -1, -1]
    results = Case(library, dtype, 512, 2, lengths, slots, finished=[3]).check()
    for row, slot in enumerate(slots):
        assert (results[row, : 2 * HEAD] == 0).all() == (slot in (-1, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_against_float64(library: ops.Library, dtype: str, normed: bool) -> None:
    """What the sums of a product and a softmax should give."""
    lengths = [1, 50, 128, 200, 31, 32, 33, 64, 65]
    case = Case(library, dtype, 1024, 3, lengths, range(len(lengths)), normed=normed)
    results, _ = case.joined()
    kind = np.float16 if dtype == "float16" else np.uint16
    got = decode(results[:, : case.width].copy().view(kind)) * UNITS[case.kind]
    cache = case.cache()
    q, k, v = case.exact.reshape(len(lengths), 3, case.heads, HEAD).transpose(1, 0, 2, 3)
    want = np.empty_like(q)
    for row, length in enumerate(lengths):
        cache.keys[row][length - 1], cache.values[row][length - 1] = k[row], v[row]
        want[row] = cache.attend(row, q[row] / 8.0, length)
    assert error(got, want.reshape(got.shape)) < BOUNDS[case.kind]


def test_rows_do_not_depend_on_each_other(library: ops.Library) -> None:
    lengths = [100 + 7 * i for i in range(70)]
    whole, _ = Case(library, "float16", 768, 2, lengths, range(70)).apart()
    for first, count in ((0, 1), (3, 5), (7, 16), (8, 31), (2, 64)):
        case = Case(library, "float16", 768, 2, lengths, range(70))
        case.slots = range(first, first + count)
        case.rows = structures([ops.Row(slot, -1) for slot in case.slots])
        struct = case.packed.struct
        struct.data += first * struct.stride * 2
        struct.parts += first * struct.part_stride * 8
        part, _ = case.joined() if count <= 16 else case.apart()
        assert np.array_equal(part, whole[first : first + count])


def test_graph_with_overlap(library: ops.Library) -> None:
    """Kernels of one stream, each of which may start before the one before it has ended."""
    torch = pytest.importorskip("torch")
    lengths = [1, 64, 129, 1000, 33, 500, 128, 90]
    case = Case(library, "float16", 1024, 16, lengths, range(8))
    want = case.apart()[0]
    caches, outs = [case.cache() for _ in range(6)], [case.out() for _ in range(6)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for cache, out in zip(caches, outs):
                args = case.joined_args(cache, out)
                args.qkv.overlap = cache is not caches[0]
                library.launch("qkv_attention", args)
        for _ in range(30):
            graph.replay()
    stream.synchronize()
    for out in outs:
        assert np.array_equal(out.numpy(), want)
