"""Times the products of a GPT-2 decode step: python -m tests.cuda.bench_linear

Each product is replayed from a graph over copies of its weights that do not fit in the second-level
cache together. Beside the time: bytes of the weights over the bandwidth that reading reaches here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np

from tests.cuda import ops
from tests.cuda.arrays import Array, Cache, NormWeights, Weights, reference, row_list, rows_of

HIDDEN = {"small": 768, "medium": 1024, "large": 1280, "xl": 1600}
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4}
CACHE_BYTES = 200e6  # of copies, at least


def time_graph(launch: Callable[[], None], launches: int, repeats: int = 15) -> float:
    """Microseconds per launch, the median over replays of a graph of all of them."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            launch()
        times = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times[3:])


def read_bandwidth() -> float:
    """Bytes per second of reading 4 GB."""
    import torch

    data = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    return data.nbytes / (time_graph(lambda: data.sum(), 1) * 1e-6)


def product(
    library: ops.Library, name: str, hidden: int, dtype: int, rows: int, overlap: bool, cluster: int
) -> tuple[float, int]:
    """Microseconds, and bytes of the weights."""
    rng = np.random.default_rng(0)
    in_, out, epilogue, normed = {
        "qkv": (hidden, 3 * hidden, ops.QKV, True),
        "out": (hidden, hidden, ops.RESIDUAL, False),
        "fc1": (hidden, 4 * hidden, ops.GELU, True),
        "fc2": (4 * hidden, hidden, ops.RESIDUAL, False),
        "head": (hidden, 50257, ops.STORE, True),
    }[name]
    first = Weights(rng, out, in_, dtype, bias=name != "head")
    copies = [first]
    # The same numbers in other places: enough for timing, and quick to make.
    while len(copies) < 24 and sum(w.bytes for w in copies) < CACHE_BYTES:
        copy = object.__new__(Weights)
        copy.__dict__.update(first.__dict__)
        copy._held = [Array(array.get()) for array in first._held]
        pointers = [array.ptr for array in copy._held]
        m = first.matrix
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
        copies.append(copy)
    norm = NormWeights(rng, in_)
    x = Array(rows_of(rng.standard_normal((rows, in_)).astype(np.float32)))
    y = Array(np.zeros((rows, out + 8 - out % 8), np.float32))
    cache = Cache(ops.FLOAT16, 1, hidden // 64, 64, [20] * rows)
    places = row_list([(row, -1) for row in range(rows)])
    arguments = [
        ops.LinearArgs(
            w.matrix,
            x.ptr,
            in_,
            reference(norm.struct) if normed else None,
            rows,
            y.ptr,
            y.shape[1],
            epilogue,
            places.ptr,
            cache.slots.ptr,
            cache.layout,
            0,
            overlap,
            cluster,
        )
        for w in copies
    ]

    def launch() -> None:
        for args in arguments:
            library.launch("linear", args)

    return time_graph(launch, len(arguments)), first.bytes


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=HIDDEN, default="medium")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--cluster", type=int, nargs="+", default=[0], help="0: chosen")
    options = parser.parse_args()
    library = ops.Library()
    bandwidth = read_bandwidth()
    print(f"GPT-2 {options.model}; reading reaches {bandwidth / 1e12:.2f} TB/s")
    print("dtype    rows cluster product      us  overlapped   limit  share")
    for dtype in options.dtype:
        for rows in options.rows:
            for cluster in options.cluster:
                for name in ("qkv", "out", "fc1", "fc2", "head"):
                    case = (name, HIDDEN[options.model], DTYPES[dtype], rows)
                    plain, size = product(library, *case, False, cluster)
                    overlapped, _ = product(library, *case, True, cluster)
                    limit = size / bandwidth * 1e6
                    print(
                        f"{dtype:8} {rows:4} {cluster:7} {name:7} {plain:7.2f} {overlapped:11.2f}"
                        f" {limit:7.2f} {limit / overlapped:6.0%}"
                    )


if __name__ == "__main__":
    main()
