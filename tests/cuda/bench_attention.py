"""Times of the attention kernels for GPT-2 medium: python -m tests.cuda.bench_attention

Decode goes through 24 layers of a cache of its own, so that nothing but what fits is found in the
L2 cache, as in a real step: attention alone, and what it adds between the products before and after
it. Times are per layer, medians of graph replays. ``--other`` names builds of the op library to be
measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.cuda import ops
from tests.cuda.attention_case import DTYPES, structures
from tests.cuda.memory import Buffer

LAYERS, HEADS, HEAD_SIZE = 24, 16, 64
WIDTH = HEADS * HEAD_SIZE
TORCH_NAMES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


class Cache:
    """Random pages of sequences of these lengths."""

    def __init__(self, lengths: Sequence[int], dtype: str) -> None:
        import torch

        size = 4 if dtype == "float32" else 2
        self.layout = ops.CacheLayout(DTYPES[dtype], LAYERS, HEADS, HEAD_SIZE, HEAD_SIZE)
        pages = [-(-length // ops.PAGE) for length in lengths]
        shape = (sum(pages), LAYERS * 2 * HEADS * ops.PAGE * HEAD_SIZE)
        kind = getattr(torch, TORCH_NAMES[dtype])
        self.pool = torch.empty(shape, dtype=kind, device="cuda").normal_()
        order = np.random.default_rng(0).permutation(sum(pages)).astype(np.uint64)
        page_bytes = np.uint64(shape[1] * size)
        self.table = Buffer(order * page_bytes + np.uint64(self.pool.data_ptr()))
        slots = []
        for index, length in enumerate(lengths):
            slot = ops.Slot()
            slot.length = length
            slot.pages = self.table.pointer + 8 * sum(pages[:index])
            slots.append(slot)
        self.slots = structures(slots)


def milliseconds(launch_all: Callable[[], None], repeats: int = 15) -> float:
    """Median time of a graph of the launches."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch_all()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            launch_all()
        times = []
        for _ in range(repeats + 3):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return float(np.median(times[3:]))


def read_bandwidth() -> float:
    """Bytes per second of summing what does not fit into the L2 cache."""
    import torch

    numbers = torch.empty(1 << 29, dtype=torch.float32, device="cuda").normal_()
    ms = milliseconds(lambda: [numbers.sum() for _ in range(4)], 7) / 4
    return numbers.nbytes / (1e-3 * ms)


class Layers:
    """The attention of all layers, and the products around it with weights of their own."""

    def __init__(self, lengths: Sequence[int], dtype: str) -> None:
        import torch

        batch = len(lengths)
        self.batch, self.lengths, self.dtype = batch, lengths, dtype
        self.cache = Cache(lengths, dtype)
        kind = getattr(torch, TORCH_NAMES[dtype])
        self._weights = torch.empty((LAYERS, 4 * WIDTH, WIDTH), dtype=kind, device="cuda").normal_()
        self._x = torch.empty((batch, WIDTH), device="cuda").normal_()
        self._q = torch.empty((batch, WIDTH), device="cuda").normal_() / 8
        self._out = torch.zeros((batch, WIDTH), device="cuda")
        self._partial = torch.zeros((batch, HEADS, 32, HEAD_SIZE + 2), device="cuda")
        self._arrived = torch.zeros((batch, HEADS), dtype=torch.int32, device="cuda")
        self._rows = structures([ops.Row(index, -1) for index in range(batch)])
        self._plan: Any = None

    def bytes_read(self) -> int:
        """Keys and values of a layer."""
        return sum(self.lengths) * WIDTH * 2 * (4 if self.dtype == "float32" else 2)

    def plan(self, library: ops.Library, planned: bool) -> None:
        """Makes the plan for the kernel that streams, or none."""
        import torch

        self._plan = None
        size = library.decode_plan_bytes(self.batch, self.cache.layout) if planned else 0
        if size > 0:
            self._plan = torch.zeros(size, dtype=torch.uint8, device="cuda")
            library.call("plan_decode_attention", self.attention(0, False))

    def attention(self, layer: int, overlap: bool) -> ops.DecodeAttentionArgs:
        """Arguments of a layer's attention."""
        return ops.DecodeAttentionArgs(
            q=self._q.data_ptr(),
            ldq=WIDTH,
            out=self._out.data_ptr(),
            ldo=WIDTH,
            row_list=self._rows.pointer,
            slots=self.cache.slots.pointer,
            rows=self.batch,
            cache=self.cache.layout,
            layer=layer,
            splits=min(8, -(-4 * 132 // (self.batch * HEADS))),  # DecodeSplits of an H100
            partial=self._partial.data_ptr(),
            arrived=self._arrived.data_ptr(),
            plan=None if self._plan is None else self._plan.data_ptr(),
            overlap=overlap,
        )

    def product(self, layer: int, after: bool) -> ops.LinearArgs:
        """Arguments of a layer's product before or after attention."""
        first = layer * 4 * WIDTH + (3 * WIDTH if after else 0)
        row_bytes = WIDTH * self._weights.itemsize
        return ops.LinearArgs(
            w=ops.Matrix(
                data=self._weights.data_ptr() + first * row_bytes,
                row_bytes=row_bytes,
                dtype=DTYPES[self.dtype],
                in_=WIDTH,
                out=WIDTH if after else 3 * WIDTH,
            ),
            x=(self._out if after else self._x).data_ptr(),
            ldx=WIDTH,
            rows=self.batch,
            y=(self._x if after else self._q).data_ptr(),
            ldy=WIDTH,
            epilogue=ops.STORE if after else ops.QKV,
            row_list=self._rows.pointer,
            slots=self.cache.slots.pointer,
            cache=self.cache.layout,
            layer=layer,
            overlap=True,
        )


def bench_decode(
    libraries: dict[str, ops.Library], batch: int, context: str, dtype: str, bandwidth: float
) -> None:
    """Lines for attention alone, one layer's after the other, and for what it adds to a layer."""
    if context == "ragged":  # of all lengths
        lengths = [1 + index * 1023 // max(1, batch - 1) for index in range(batch)]
    else:
        lengths = [int(context)] * batch
    layers = Layers(lengths, dtype)
    library = libraries["this"]
    read = layers.bytes_read()

    def products() -> None:
        for layer in range(LAYERS):
            library.launch("linear", layers.product(layer, after=False))
            library.launch("linear", layers.product(layer, after=True))

    without = milliseconds(products) / LAYERS * 1e3
    kinds = [("loads", library, False)]
    kinds += [(name, attending, True) for name, attending in libraries.items()]
    for name, attending, planned in kinds:
        layers.plan(attending, planned)

        def alone(attending: ops.Library = attending) -> None:
            for layer in range(LAYERS):
                attending.launch("decode_attention", layers.attention(layer, layer > 0))

        def between(attending: ops.Library = attending) -> None:
            for layer in range(LAYERS):
                library.launch("linear", layers.product(layer, after=False))
                attending.launch("decode_attention", layers.attention(layer, layer > 0))
                library.launch("linear", layers.product(layer, after=True))

        us = milliseconds(alone) / LAYERS * 1e3
        added = milliseconds(between) / LAYERS * 1e3 - without
        rate = read / (1e-6 * us)
        print(
            f"decode {dtype:8} batch {batch:3} context {context:>6} {name:9} {us:8.2f} us "
            f"{rate / 1e12:5.2f} TB/s {100 * rate / bandwidth:4.0f} %; between products "
            f"{added:8.2f} us {100 * read / (1e-6 * added) / bandwidth:4.0f} %",
            flush=True,
        )


def bench_prefill(library: ops.Library, batch: int, length: int, dtype: str) -> None:
    """One line."""
    import torch

    cache = Cache([length] * batch, dtype)
    rows = batch * length
    kind = getattr(torch, TORCH_NAMES[dtype])
    q = torch.empty((rows, WIDTH), dtype=kind, device="cuda").normal_() / 8
    out = torch.empty_like(q)
    runs = structures([ops.PrefillRun(i, i * length, 0, length) for i in range(batch)])

    def launch_all() -> None:
        for layer in range(LAYERS):
            library.launch(
                "prefill_attention",
                ops.PrefillAttentionArgs(
                    q=q.data_ptr(),
                    ldq=WIDTH,
                    out=out.data_ptr(),
                    ldo=WIDTH,
                    scale=1.0,
                    dtype=DTYPES[dtype],
                    runs=runs.pointer,
                    num_runs=batch,
                    longest_run=length,
                    slots=cache.slots.pointer,
                    cache=cache.layout,
                    layer=layer,
                ),
            )

    us = milliseconds(launch_all) / LAYERS * 1e3
    flops = 4.0 * WIDTH * batch * length * (length + 1) / 2
    print(
        f"prefill {dtype:8} batch {batch:3} length {length:4}: {us:8.2f} us, "
        f"{flops / us / 1e6:6.1f} TFLOP/s of what is not masked"
    )


def main() -> None:
    """Prints the tables."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--other", type=Path, action="append", default=[], help="libraries beside it"
    )
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--contexts", default="128,512,1024,ragged")
    parser.add_argument("--dtypes", default="float16")
    parser.add_argument("--no-prefill", action="store_true")
    options = parser.parse_args()
    libraries = {path.stem[:9]: ops.Library(path) for path in options.other}
    libraries["this"] = ops.Library()
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    for dtype in options.dtypes.split(","):
        for batch in options.batches.split(","):
            for context in options.contexts.split(","):
                bench_decode(libraries, int(batch), context, dtype, bandwidth)
    if options.no_prefill:
        return
    library = libraries["this"]
    for dtype in ("float16", "bfloat16", "float32"):
        for batch, length in ((1, 32), (1, 128), (1, 512), (8, 512), (8, 1024)):
            bench_prefill(library, batch, length, dtype)


if __name__ == "__main__":
    main()
