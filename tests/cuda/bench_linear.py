"""Times the products of a GPT-2 decode step: python -m tests.cuda.bench_linear

Each product is replayed from a graph over copies of its weights that do not fit in the second-level
cache together: of rows of float32 (linear), and of rows that travel as 16 bits (packed). Beside the
time: bytes of the weights over the bandwidth that reading reaches here.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from tests.cuda import ops
from tests.cuda.arrays import (
    Array,
    Cache,
    NormWeights,
    Weights,
    fold,
    reference,
    row_list,
    rows_of,
)
from tests.cuda.rows_case import Packed, pack

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


PRODUCTS = {
    "qkv": (1, 3, ops.QKV, True),
    "out": (1, 1, ops.RESIDUAL, False),
    "fc1": (1, 4, ops.GELU, True),
    "fc2": (4, 1, ops.RESIDUAL, False),
}
VOCAB = 50257


PATHS = {"linear": "linear", "packed": "linear_rows"}
Arguments = Sequence["ops.LinearArgs | ops.LinearRowsArgs"]


class Case:
    """A product over copies of its weights, with arguments for each copy."""

    def __init__(self, library: ops.Library, name: str, hidden: int, dtype: int, rows: int) -> None:
        rng = np.random.default_rng(0)
        if name == "head":
            in_, out, epilogue, normed = hidden, VOCAB, ops.STORE, True
        else:
            columns, outputs, epilogue, normed = PRODUCTS[name]
            in_, out = columns * hidden, outputs * hidden
        first = Weights(rng, out, in_, dtype, bias=name != "head")
        copies = [first]
        # The same numbers in other places: enough for timing, and quick to make.
        while len(copies) < 24 and sum(w.bytes for w in copies) < CACHE_BYTES:
            copies.append(first.copy())
        norm = NormWeights(rng, in_)
        sums, bias = fold(library, first, norm)
        x = Array(rows_of(rng.standard_normal((rows, in_)).astype(np.float32)))
        y = Array(np.zeros((rows, out + 8 - out % 8), np.float32))
        cache = Cache(ops.FLOAT16, 1, hidden // 64, 64, [20] * rows)
        places = row_list([(row, -1) for row in range(rows)])
        self._held = [copies, norm, sums, bias, x, y, cache, places]
        self.bytes = first.bytes
        self.arguments: dict[str, Arguments] = {}
        if dtype in (ops.FLOAT16, ops.BFLOAT16):
            packed = pack(library, x.get(), dtype, norm if normed else None)
            result = Packed(rows, out, dtype) if epilogue in (ops.GELU, ops.RESIDUAL) else None
            later = NormWeights(rng, out) if epilogue == ops.RESIDUAL else None
            self._held += [packed, result, later]
            self.arguments["packed"] = [
                ops.LinearRowsArgs(
                    w=w.matrix,
                    x=packed.struct,
                    norm_sums=sums.ptr if normed else None,
                    norm_bias=bias.ptr if normed else None,
                    eps=1e-5,
                    rows=rows,
                    epilogue=epilogue,
                    y=y.ptr,
                    ldy=y.shape[1],
                    out=ops.PackedRows() if result is None else result.struct,
                    out_weight=None if later is None else later.struct.weight,
                    row_list=places.ptr,
                    slots=cache.slots.ptr,
                    cache=cache.layout,
                )
                for w in copies
            ]
        self.arguments["linear"] = [
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
                norm_sums=sums.ptr if normed else None,
                norm_bias=bias.ptr if normed else None,
            )
            for w in copies
        ]

    def set(self, overlap: bool, cluster: int) -> None:
        """How the products are launched."""
        for arguments in self.arguments.values():
            for args in arguments:
                args.overlap, args.cluster = overlap, cluster


def time_products(library: ops.Library, path: str, arguments: Arguments) -> float:
    """Microseconds of each."""

    def launch() -> None:
        for args in arguments:
            library.launch(PATHS[path], args)

    return time_graph(launch, len(arguments))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=HIDDEN, default="medium")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--paths", choices=PATHS, nargs="+", default=list(PATHS))
    parser.add_argument(
        "--cluster",
        type=int,
        nargs="+",
        default=[0],
        help="blocks that share outputs; linear has them in its kernel of two parts; 0: chosen",
    )
    options = parser.parse_args()
    library = ops.Library()
    bandwidth = read_bandwidth()
    hidden = HIDDEN[options.model]
    print(f"GPT-2 {options.model}; reading reaches {bandwidth / 1e12:.2f} TB/s")
    print("dtype    rows path   cluster product      us  overlapped   limit  share")
    for dtype in options.dtype:
        for rows in options.rows:
            names = (*PRODUCTS, "head")
            cases = {name: Case(library, name, hidden, DTYPES[dtype], rows) for name in names}
            for path, cluster in itertools.product(options.paths, options.cluster):
                if path not in cases["head"].arguments:
                    continue
                start = f"{dtype:8} {rows:4} {path} {cluster:7}"
                for name, case in cases.items():
                    case.set(False, cluster)
                    plain = time_products(library, path, case.arguments[path])
                    case.set(True, cluster)
                    overlapped = time_products(library, path, case.arguments[path])
                    limit = case.bytes / bandwidth * 1e6
                    print(
                        f"{start} {name:7} {plain:7.2f} {overlapped:11.2f}"
                        f" {limit:7.2f} {limit / overlapped:6.0%}"
                    )
                layers = [
                    args
                    for each in zip(*(cases[n].arguments[path] for n in PRODUCTS))
                    for args in each
                ]
                us = len(PRODUCTS) * time_products(library, path, layers)
                limit = sum(cases[name].bytes for name in PRODUCTS) / bandwidth * 1e6
                share = limit / us
                print(f"{start} layer   {'':7} {us:11.2f} {limit:7.2f} {share:6.0%}", flush=True)


if __name__ == "__main__":
    main()
