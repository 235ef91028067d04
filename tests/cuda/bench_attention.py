"""Times of the attention kernels for GPT-2 medium: python -m tests.cuda.bench_attention

Decode goes through 24 layers of a cache of its own, so that nothing but what fits is found in the
L2 cache, as in a real step. Times are per layer, medians of graph replays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.cuda import ops
from tests.cuda.attention_case import DTYPES, structures
from tests.cuda.memory import Buffer

LAYERS, HEADS, HEAD_SIZE = 24, 16, 64
WIDTH = HEADS * HEAD_SIZE
TORCH_NAMES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


class Cache:
    """Random pages of `batch` sequences."""

    def __init__(self, batch: int, length: int, dtype: str) -> None:
        import torch

        size = 4 if dtype == "float32" else 2
        self.layout = ops.CacheLayout(DTYPES[dtype], LAYERS, HEADS, HEAD_SIZE, HEAD_SIZE)
        pages = -(-length // ops.PAGE)
        shape = (batch * pages, LAYERS * 2 * HEADS * ops.PAGE * HEAD_SIZE)
        kind = getattr(torch, TORCH_NAMES[dtype])
        self.pool = torch.empty(shape, dtype=kind, device="cuda").normal_()
        order = np.random.default_rng(0).permutation(batch * pages).astype(np.uint64)
        page_bytes = np.uint64(shape[1] * size)
        self.table = Buffer(order * page_bytes + np.uint64(self.pool.data_ptr()))
        slots = []
        for index in range(batch):
            slot = ops.Slot()
            slot.length = length
            slot.pages = self.table.pointer + 8 * pages * index
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


def bench_decode(library: ops.Library, batch: int, length: int, dtype: str) -> None:
    """One line per number of splits."""
    cache = Cache(batch, length, dtype)
    rng = np.random.default_rng(1)
    q = Buffer(rng.standard_normal((batch, WIDTH)).astype(np.float32) / 8)
    out = Buffer(np.zeros((batch, WIDTH), np.float32))
    partial = Buffer(np.zeros((batch, HEADS, 32, HEAD_SIZE + 2), np.float32))
    arrived = Buffer(np.zeros((batch, HEADS), np.int32))
    rows = structures([ops.Row(index, -1) for index in range(batch)])
    read = batch * length * WIDTH * 2 * (4 if dtype == "float32" else 2)
    for splits in (1, 2, 4, 8):

        def launch_all(splits: int = splits) -> None:
            for layer in range(LAYERS):
                library.launch(
                    "decode_attention",
                    ops.DecodeAttentionArgs(
                        q=q.pointer,
                        ldq=WIDTH,
                        out=out.pointer,
                        ldo=WIDTH,
                        row_list=rows.pointer,
                        slots=cache.slots.pointer,
                        rows=batch,
                        cache=cache.layout,
                        layer=layer,
                        splits=splits,
                        partial=partial.pointer,
                        arrived=arrived.pointer,
                    ),
                )

        us = milliseconds(launch_all) / LAYERS * 1e3
        print(
            f"decode  {dtype:8} batch {batch:3} length {length:4} splits {splits}: "
            f"{us:8.2f} us, {read / us / 1e6:6.2f} TB/s"
        )


def bench_prefill(library: ops.Library, batch: int, length: int, dtype: str) -> None:
    """One line."""
    import torch

    cache = Cache(batch, length, dtype)
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
    """Prints the table."""
    library = ops.Library()
    for batch, length in ((1, 128), (1, 512), (1, 1024), (8, 512), (64, 512)):
        bench_decode(library, batch, length, "float16")
    bench_decode(library, 8, 512, "float32")
    bench_decode(library, 8, 512, "bfloat16")
    for dtype in ("float16", "bfloat16", "float32"):
        for batch, length in ((1, 32), (1, 128), (1, 512), (8, 512), (8, 1024)):
            bench_prefill(library, batch, length, dtype)


if __name__ == "__main__":
    main()
