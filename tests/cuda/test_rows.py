"""Embed, LayerNorm, StoreQkv and Dequantize against float64."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.cuda import ops
from tests.cuda.arrays import (
    Array,
    Cache,
    NormWeights,
    Weights,
    decode,
    encode,
    error,
    round_up,
    row_list,
    rows_of,
)
from tests.cuda.rows_case import Packed, pack
from tests.cuda.test_linear import DTYPES

FLOATS = {name: DTYPES[name] for name in ("float32", "float16", "bfloat16")}
ROUNDING = {ops.FLOAT32: 1e-6, ops.FLOAT16: 5e-4, ops.BFLOAT16: 4e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 20, 33, 1024, 1600])
def test_embed(library: ops.Library, dtype: str, hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    table = Weights(rng, 50, hidden, DTYPES[dtype], bias=False)
    positions = rng.standard_normal((12, hidden + 3)).astype(np.float32)
    device_positions = Array(positions)
    tokens = [rng.integers(0, 50, 12).astype(np.int32) for _ in range(3)]
    device_tokens = [Array(t) for t in tokens]
    slots = (ops.Slot * 3)()
    for slot, ids, length in zip(slots, device_tokens, (12, 5, 7)):
        slot.length, slot.tokens = length, ids.ptr
    slots[2].finished = 1
    tables = [Array(np.array([1000 + slot], np.uint64)) for slot in range(3)]
    for slot, page_table in zip(slots, tables):
        slot.pages = page_table.ptr
    device_slots = Array(np.frombuffer(bytes(slots), np.uint8))
    rows = [(0, -1), (1, -1), (2, -1), (-1, -1), (0, 0), (2, 3), (-1, 4)]
    at = [(0, 11), (1, 4), None, None, (0, 0), (2, 3), None]
    device_rows = row_list(rows)
    ldo = round_up(hidden, 8) + 8
    out = Array(np.full((len(rows), ldo), 7.0, np.float32))
    places = Array(np.full(len(rows) * 24, 0xEE, np.uint8))
    args = ops.EmbedArgs(
        table.matrix,
        device_positions.ptr,
        hidden + 3,
        device_rows.ptr,
        device_slots.ptr,
        len(rows),
        out.ptr,
        ldo,
        places=places.ptr,
    )
    library.call("embed", args)
    for row, place in enumerate(at):
        got_place = ops.RowPlace.from_buffer_copy(places.get().tobytes(), row * 24)
        seen = (got_place.pages, got_place.page, got_place.in_page, got_place.length)
        if place is None:
            assert seen == (None, None, 0, 0)
        else:
            assert seen == (tables[place[0]].ptr, 1000 + place[0], place[1], place[1] + 1)
    want = np.zeros((len(rows), ldo))
    for row, place in enumerate(at):
        if place is not None:
            token = tokens[place[0]][place[1]]
            want[row, :hidden] = table.values[token] + positions[place[1], :hidden]
    got = out.get()
    assert np.abs(got - want).max() < 1e-6
    assert (got[:, hidden:] == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("hidden", [33, 1024, 1600])
def test_embed_packed(library: ops.Library, dtype: str, hidden: int) -> None:
    """Beside float32, what PackRows makes of it."""
    if not library.rows_supported(DTYPES[dtype], hidden):
        pytest.skip("LinearRows needs sm_90a")
    rng = np.random.default_rng(hidden)
    table = Weights(rng, 50, hidden, DTYPES[dtype], bias=False)
    norm = NormWeights(rng, hidden)
    positions = Array(rng.standard_normal((12, hidden)).astype(np.float32))
    tokens = Array(rng.integers(0, 50, 12).astype(np.int32))
    slots = (ops.Slot * 1)()
    slots[0].length, slots[0].tokens = 12, tokens.ptr
    device_slots = Array(np.frombuffer(bytes(slots), np.uint8))
    rows = [(0, -1), (-1, -1), (0, 0), (0, 7)]
    device_rows = row_list(rows)
    ldo = round_up(hidden, 8)
    out = Array(np.full((len(rows), ldo), 7.0, np.float32))
    packed = Packed(len(rows), hidden, DTYPES[dtype])
    args = ops.EmbedArgs(
        table.matrix,
        positions.ptr,
        hidden,
        device_rows.ptr,
        device_slots.ptr,
        len(rows),
        out.ptr,
        ldo,
        packed=packed.struct,
        weight=norm.struct.weight,
        dtype=DTYPES[dtype],
    )
    library.call("embed", args)
    again = pack(library, out.get()[:, :hidden], DTYPES[dtype], norm)
    assert np.array_equal(packed.values(), again.values())
    assert np.array_equal(packed.parts(), again.parts())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 5, 31, 768, 1024, 1600, 5001])
def test_layer_norm(library: ops.Library, dtype: str, size: int) -> None:
    rng = np.random.default_rng(size)
    norm = NormWeights(rng, size)
    x = (rng.standard_normal((19, size)) * 3 + 40).astype(np.float32)
    padded = rows_of(x)
    device_x = Array(padded)
    ldo = round_up(size, 8)
    kind = FLOATS[dtype]
    out = Array(encode(np.full((19, ldo), 7.0, np.float32), kind))
    args = ops.LayerNormArgs(
        device_x.ptr, padded.shape[1], norm.struct, size, 19, kind, out.ptr, ldo
    )
    library.call("layer_norm", args)
    got = decode(out.get())
    assert error(got[:, :size], norm.apply(x)) < ROUNDING[kind] + 1e-5
    assert (got[:, size:] == 0).all()


@pytest.mark.parametrize(("dtype", "top"), [("float16", 65504.0), ("bfloat16", 3.3895e38)])
def test_layer_norm_saturates(library: ops.Library, dtype: str, top: float) -> None:
    """A column of 64 that stands out is normed to about 7.9: finite in float32, not in `dtype`."""
    norm = NormWeights(np.random.default_rng(1), 64)
    scale = np.float32(1e5 if dtype == "float16" else 3.402e38 / 8)
    weight = Array(np.full(64, scale, np.float32))
    norm.struct.weight = weight.ptr
    spike = np.zeros((2, 64), np.float32)
    spike[0, 3], spike[1, 60] = 8.0, -8.0
    x = Array(spike)
    out = Array(encode(np.zeros((2, 64), np.float32), FLOATS[dtype]))
    args = ops.LayerNormArgs(x.ptr, 64, norm.struct, 64, 2, FLOATS[dtype], out.ptr, 64)
    library.call("layer_norm", args)
    got = decode(out.get())
    assert np.isfinite(got).all()
    if dtype == "float16":
        assert got[0, 3] == top
        assert got[1, 60] == -top
    assert np.abs(got).max() <= top * 1.0001


def test_saturate(library: ops.Library) -> None:
    """Every number of 16 bits: infinite ones become the largest, others stay, what is none too."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(32, 2048)
    device_bits = Array(bits)
    library.call("saturate", ops.SaturateArgs(device_bits.ptr, 2048, 32))
    expected = bits.copy()
    expected[bits == 0x7C00] = 0x7BFF
    expected[bits == 0xFC00] = 0xFBFF
    assert (device_bits.get() == expected).all()


@pytest.mark.parametrize("dtype", ["float16", "int4"])
@pytest.mark.parametrize(("size", "outputs"), [(64, 96), (1000, 33), (1, 5)])
def test_bound_of_a_normed_product(
    library: ops.Library, dtype: str, size: int, outputs: int
) -> None:
    """No input exceeds what folding says: neither random ones nor those that suit an output."""
    rng = np.random.default_rng(size)
    norm = NormWeights(rng, size)
    w = Weights(rng, outputs, size, {"float16": ops.FLOAT16, "int4": ops.INT4}[dtype])
    sums, bias, most = (Array(np.zeros(n, np.float32)) for n in (outputs, outputs, 1))
    library.call("fold_norm", w.matrix, norm.struct, sums.pointer, bias.pointer, most.pointer)
    bound = most.get()[0]
    scaled = w.values * norm.weight
    shift = (w.values * norm.bias).sum(axis=1) + w.bias
    x = np.concatenate([rng.standard_normal((50, size)), scaled, -scaled])
    products = (norm.apply(x) - norm.bias) @ w.values.T + shift
    assert np.abs(products).max() <= bound
    each = np.sqrt(size * (scaled**2).sum(axis=1)) + np.abs(w.values * norm.bias).sum(axis=1)
    # Integer weights are rounded to float16 once more.
    rel = 1e-5 if dtype == "float16" else ROUNDING[ops.FLOAT16]
    assert bound == pytest.approx((each + np.abs(w.bias)).max(), rel=rel)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_size"), [(4, 64), (3, 20), (5, 9)])
def test_store_qkv(
    library: ops.Library, dtype: str, cache_dtype: str, heads: int, head_size: int
) -> None:
    rng = np.random.default_rng(2)
    width = heads * head_size
    kind, cache_kind = FLOATS[dtype], FLOATS[cache_dtype]
    rows = [(0, p) for p in range(40)] + [(-1, 0)] + [(1, p) for p in range(5, 9)]
    ld = round_up(3 * width, 8)
    values = encode(rng.standard_normal((len(rows), ld)).astype(np.float32), kind)
    qkv, device_rows = Array(values), row_list(rows)
    cache = Cache(cache_kind, 3, heads, head_size, [40, 9])
    args = ops.QkvArgs(
        qkv.ptr, ld, kind, device_rows.ptr, cache.slots.ptr, len(rows), cache.layout, 2
    )
    library.call("store_qkv", args)
    exact = decode(values)
    got = decode(qkv.get())
    real = [i for i, (slot, _) in enumerate(rows) if slot >= 0]
    assert np.array_equal(got[:, width:], exact[:, width:])
    q = exact[real, :width] / np.sqrt(head_size)
    assert error(got[real, :width], q) < ROUNDING[kind]
    stored = [cache.get(slot) for slot in range(2)]
    for i in real:
        slot, position = rows[i]
        for part in (0, 1):
            want = exact[i, width * (part + 1) :][:width].reshape(heads, head_size)
            have = stored[slot][2, part, :, position]
            assert error(have[:, :head_size], want) < ROUNDING[cache_kind]
            assert (have[:, head_size:] == 0).all()
    assert (stored[0][:2] == Cache.FILL).all()
    assert (stored[1][2, :, :, 9:] == Cache.FILL).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize(("out", "in_"), [(1, 1), (30, 45), (70, 1024)])
def test_dequantize(library: ops.Library, dtype: str, to: str, out: int, in_: int) -> None:
    rng = np.random.default_rng(3)
    w = Weights(rng, out, in_, DTYPES[dtype], bias=False)
    kind = FLOATS[to]
    ldo = round_up(in_, 8) + 8
    result = Array(encode(np.full((out, ldo), 7.0, np.float32), kind))
    library.call("dequantize", w.matrix, kind, ctypes.c_void_p(result.ptr), ctypes.c_int64(ldo))
    got = decode(result.get())
    assert error(got[:, :in_], w.values) < ROUNDING[kind]
    assert (got[:, in_:] == 0).all()
