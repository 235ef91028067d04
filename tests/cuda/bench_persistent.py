"""Times decode steps as one kernel on random weights, and says where their time goes.

python tests/cuda/bench_persistent.py [--shape medium] [--rows 1,2,4] [--contexts 16] [--profile]
                                      [--choice none,step,apart] [--dtype float16,int8,int4]
                                      [--stamps FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from tests.cuda import ops

# layers, hidden, heads
SHAPES = {
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}
VOCAB = 50257
PHASES = ("qkv", "attention", "out", "ff in", "ff out")
STAMPS = ("begin", "weights", "inputs", "products", "sums", "end")
CHOICES = ("none", "step", "apart")
STEPS_AHEAD = 64  # that sequences have room for
DTYPES = {"float16": (ops.FLOAT16, 16), "int8": (ops.INT8, 8), "int4": (ops.INT4, 4)}  # and bits
GROUP = 32  # columns that share a scale


class Weights:
    """How a matrix of a type lies in memory.

    Args:
        dtype: of DTYPES.
        inputs: columns.
        outputs: rows.
    """

    def __init__(self, dtype: str, inputs: int, outputs: int) -> None:
        self.dtype, self.bits = DTYPES[dtype]
        self.inputs, self.outputs = inputs, outputs
        self.row_bytes = inputs * self.bits // 8
        # Rows of scales begin at multiples of 16 bytes.
        self.scale_stride = (inputs // GROUP + 7) // 8 * 8 if self.bits <= 8 else 0
        self.bytes = outputs * self.row_bytes
        self.scale_bytes = outputs * self.scale_stride * 2

    def fill(self, data: torch.Tensor, scales: torch.Tensor, deviation: float) -> torch.Tensor:
        """Random numbers of about that deviation; returns the sums of rows, [outputs] float32."""
        if self.bits == 16:
            numbers = data.view(torch.float16)
            numbers.normal_(0.0, deviation)
            return numbers.view(self.outputs, self.inputs).float().sum(1)
        data.copy_(torch.randint(0, 256, data.shape, dtype=torch.uint8))
        # Equally frequent integers deviate by 2 ** bits / sqrt(12).
        scale = torch.tensor(deviation * 12**0.5 / 2**self.bits, dtype=torch.float16)
        scales.view(torch.float16).fill_(scale.item())
        rows = data.view(self.outputs, self.row_bytes)
        if self.bits == 8:
            sums = rows.view(torch.int8).sum(1, dtype=torch.int32)
        else:
            sums = ((rows & 15).int() + (rows >> 4).int() - 16).sum(1, dtype=torch.int32)
        return sums.float() * scale.float().item()


class Steps:
    """A network of random weights, and sequences in the middle of their generation.

    Args:
        library: the kernels' launchers.
        shape: of SHAPES.
        rows: sequences.
        context: tokens of each.
        choice: ``none``, steps end with logits and all are the same one; ``step``, they choose
            tokens; ``apart``, the sampling kernel does.
        dtype: of weights, of DTYPES.
    """

    def __init__(
        self,
        library: ops.Library,
        shape: str,
        rows: int,
        context: int,
        choice: str = "none",
        dtype: str = "float16",
    ) -> None:
        self.library, self.choice = library, choice
        layers, hidden, heads = SHAPES[shape]
        wide, size = 4 * hidden, hidden // heads
        self.keep: list[torch.Tensor] = []
        sizes = {"qkv": (hidden, 3 * hidden), "attention_out": (hidden, hidden)}
        sizes |= {"feed_forward_in": (hidden, wide), "feed_forward_out": (wide, hidden)}
        weights = {name: Weights(dtype, *size_of) for name, size_of in sizes.items()}
        offsets: dict[tuple[str, str], int] = {}
        layer_bytes = 0

        def take(key: tuple[str, str], count: int) -> None:
            nonlocal layer_bytes
            offsets[key] = layer_bytes
            layer_bytes += (count + 255) // 256 * 256

        for name, (inputs, outputs) in sizes.items():
            take((name, "weights"), weights[name].bytes)
            if weights[name].scale_bytes:
                take((name, "scales"), weights[name].scale_bytes)
            take((name, "bias"), 4 * outputs)
            if name in ("qkv", "feed_forward_in"):
                take((name, "norm_weight"), 4 * inputs)
                take((name, "sums"), 4 * outputs)
        of_head = Weights(dtype, hidden, VOCAB)
        self.weight_bytes = layers * layer_bytes + of_head.bytes + of_head.scale_bytes
        memory = self.tensor(torch.empty(layers * layer_bytes, dtype=torch.uint8))

        def at(layer: int, name: str, what: str, size_of: int) -> torch.Tensor:
            begin = layer * layer_bytes + offsets.get((name, what), 0)
            return memory[begin : begin + size_of]

        for layer in range(layers):
            for name, w in weights.items():
                sums = w.fill(
                    at(layer, name, "weights", w.bytes),
                    at(layer, name, "scales", w.scale_bytes),
                    w.inputs**-0.5,
                )
                at(layer, name, "bias", 4 * w.outputs).view(torch.float32).fill_(0.0)
                if (name, "sums") in offsets:
                    at(layer, name, "norm_weight", 4 * w.inputs).view(torch.float32).fill_(1.0)
                    at(layer, name, "sums", 4 * w.outputs).view(torch.float32).copy_(sums)
        head = self.tensor(torch.empty(of_head.bytes, dtype=torch.uint8))
        head_scales = self.tensor(torch.empty(of_head.scale_bytes, dtype=torch.uint8))
        vectors = self.tensor(torch.zeros(2 * VOCAB))
        vectors[:VOCAB] = of_head.fill(head, head_scales, 0.02)
        positions = self.tensor(torch.zeros(2048, hidden)).normal_(0.0, 0.02)
        ones = self.tensor(torch.ones(hidden))

        cache = ops.CacheLayout(ops.FLOAT16, layers, heads, size, size)
        pages = (context + STEPS_AHEAD + ops.PAGE - 1) // ops.PAGE
        page_items = 2 * layers * heads * ops.PAGE * size
        slots = (ops.Slot * rows)()
        for row in range(rows):
            memory_of_row = self.tensor(torch.empty(pages, page_items, dtype=torch.float16))
            memory_of_row.normal_()
            tokens = self.tensor(
                torch.randint(0, VOCAB, (context + STEPS_AHEAD,), dtype=torch.int32)
            )
            first = memory_of_row.data_ptr()
            table = self.tensor(
                torch.tensor([first + 2 * page_items * i for i in range(pages)], dtype=torch.int64)
            )
            slots[row].length = slots[row].prompt_length = context
            slots[row].sampling = ops.SamplingParams(
                sample=1,
                max_length=STEPS_AHEAD,
                top_k=4,
                top_p=1.0,
                temperature=1.0,
                repetition_penalty=1.0,
                eos_token_id=-1,
                forced_bos_token_id=-1,
                forced_eos_token_id=-1,
                sequence=row,
            )
            slots[row].tokens = tokens.data_ptr()
            slots[row].pages = table.data_ptr()
        row_list = (ops.Row * rows)(*[ops.Row(row, -1) for row in range(rows)])
        self.logits = self.tensor(torch.empty(rows, VOCAB + 15))

        def product(name: str) -> ops.PersistentProduct:
            fields = {
                what: memory.data_ptr() + offset
                for (whose, what), offset in offsets.items()
                if whose == name
            }
            return ops.PersistentProduct(**fields)

        self.layers = layers
        self.args = ops.PersistentArgs(
            dtype=of_head.dtype,
            hidden=hidden,
            intermediate=wide,
            vocab=VOCAB,
            layers=layers,
            heads=heads,
            eps=1e-5,
            layer_bytes=layer_bytes,
            head=ops.PersistentProduct(
                weights=head.data_ptr(),
                scales=head_scales.data_ptr(),
                bias=vectors[VOCAB:].data_ptr(),
                norm_weight=ones.data_ptr(),
                sums=vectors.data_ptr(),
            ),
            embedding=ops.Matrix(
                data=head.data_ptr(),
                row_bytes=of_head.row_bytes,
                dtype=of_head.dtype,
                in_=hidden,
                out=VOCAB,
                scales=head_scales.data_ptr(),
                scale_stride=of_head.scale_stride,
            ),
            positions=positions.data_ptr(),
            position_stride=hidden,
            cache=cache,
            row_list=self.structures(row_list),
            slots=self.structures(slots),
            rows=rows,
            logits=self.logits.data_ptr(),
            ld=VOCAB + 15,
            **{name: product(name) for name in sizes},
        )
        exchange = self.tensor(
            torch.zeros(library.persistent_exchange(self.args), dtype=torch.uint8)
        )
        self.args.exchange = exchange.data_ptr()
        self._slots = next(t for t in self.keep if t.data_ptr() == self.args.slots)
        self._first_slots = self._slots.clone()
        self._count = self.tensor(torch.zeros(1, dtype=torch.int32))
        workspace = self.tensor(
            torch.zeros(library.sample_workspace(rows, VOCAB), dtype=torch.uint8)
        )
        self._results = torch.zeros(8, rows, 4, dtype=torch.int32).pin_memory()
        self._sample = ops.SampleArgs(
            logits=self.args.logits,
            ld=self.args.ld,
            vocab=VOCAB,
            row_list=self.args.row_list,
            slots=self.args.slots,
            rows=rows,
            results=self._results.data_ptr(),
            result_steps=8,
            result_rows=rows,
            step=self._count.data_ptr(),
            workspace=workspace.data_ptr(),
            overlap=True,
        )
        self.args.overlap = True
        if choice == "step":
            self.args.choice = ctypes.pointer(self._sample)
        self.blocks = library.persistent_blocks(self.args)
        self.cache_bytes = rows * context * 4 * layers * hidden

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """On the device, for as long as this object lives."""
        self.keep.append(value.cuda())
        return self.keep[-1]

    def structures(self, array: Any) -> int:
        """Address of structures on the device."""
        raw = np.frombuffer(bytes(array), dtype=np.uint8).copy()
        return self.tensor(torch.from_numpy(raw)).data_ptr()

    def step(self) -> None:
        """Launches one."""
        self.library.launch("persistent_step", self.args)
        if self.choice == "apart":
            self.library.launch("sample", self._sample)

    def begin(self) -> None:
        """Sequences are as they were at first."""
        self._slots.copy_(self._first_slots)

    def microseconds(self, steps: int = 20, rounds: int = 7) -> float:
        """Per step: the median of rounds."""
        times = []
        for _ in range(rounds + 1):
            self.begin()
            for _ in range(5):
                self.step()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(steps):
                self.step()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / steps)
        assert bool(torch.isfinite(self.logits[:, :VOCAB]).all())
        return statistics.median(times[1:])

    def timeline(self, t: np.ndarray) -> None:
        """When the moments of a layer come: the chain of its phases."""
        print("  cycles from the inputs of q, k and v on: median over blocks and layers")
        print(f"  {'phase':10}" + "".join(f"{name:>10}" for name in STAMPS))
        for i, name in enumerate((*PHASES, "next qkv")):
            cells = []
            for stamp in range(len(STAMPS)):
                layers = np.arange(1, self.layers - 1)
                since = t[:, 5 * layers, 2]
                moment = t[:, 5 * layers + i, stamp]
                gap = (moment - since)[(moment > 0) & (since > 0)]
                cells.append(f"{np.median(gap):.0f}" if len(gap) else "")
            print(f"  {name:10}" + "".join(f"{cell:>10}" for cell in cells))

    def profile(self, save: str | None = None) -> None:
        """Clock cycles of the moments of every phase, over layers and blocks; `save` gets them all.

        The library has to be built with -DFASTGEN_CUDA_STAMPS=ON.
        """
        phases = 5 * self.layers + 1
        stamps = self.tensor(torch.zeros(self.blocks, phases, len(STAMPS), dtype=torch.int64))
        for _ in range(3):
            self.step()
        self.args.stamps = stamps.data_ptr()
        self.step()
        torch.cuda.synchronize()
        self.args.stamps = None
        t = stamps.cpu().numpy().astype(np.float64)
        if save:
            np.save(save, stamps.cpu().numpy())
        print("  cycles from one moment to the next: min / median / max over blocks and layers")
        print(f"  {'phase':10}" + "".join(f"{name:>24}" for name in STAMPS[1:]) + f"{'blocks':>8}")
        middle = range(1, self.layers)  # the first layer waits for memory
        for i, name in enumerate((*PHASES, "head")):
            which = [5 * self.layers] if name == "head" else [5 * layer + i for layer in middle]
            part = t[:, which, :].reshape(-1, len(STAMPS))
            part = part[part[:, -1] > 0]
            if len(part) == 0:
                continue
            gaps = np.diff(part, axis=1)
            cells = [
                f"{gaps[:, k].min():.0f}/{np.median(gaps[:, k]):.0f}/{gaps[:, k].max():.0f}"
                for k in range(gaps.shape[1])
            ]
            blocks = len(part) // len(which)
            print(f"  {name:10}" + "".join(f"{cell:>24}" for cell in cells) + f"{blocks:8}")
        self.timeline(t)
        begins = t[:, 0 : 5 * self.layers : 5, 0]
        begins = begins[(begins > 0).all(axis=1)]
        if self.layers > 2 and len(begins):
            layer = np.diff(begins[:, 1:], axis=1)
            print(f"  cycles per layer: {np.median(layer):.0f} (median), {layer.max():.0f} (max)")
        outputs = t[:, -1, -1]
        busy = outputs[outputs > 0] - t[outputs > 0, -1, 0]
        print(f"  cycles of the head: {np.median(busy):.0f} (median)")


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """What makes a list with commas a list of known names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return names

    return parse


def main() -> None:
    """Prints a line for each number of rows and context."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="medium", choices=list(SHAPES))
    parser.add_argument("--rows", default="1,2,4")
    parser.add_argument("--contexts", default="16,128,512,1024")
    parser.add_argument(
        "--choice",
        type=names_of(CHOICES),
        default=["none"],
        help="who chooses tokens: " + ", ".join(CHOICES),
    )
    parser.add_argument(
        "--dtype",
        type=names_of(DTYPES),
        default=["float16"],
        help="of weights: " + ", ".join(DTYPES),
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument(
        "--stamps", help="write the last profile's [block, phase, stamp] here, .npy"
    )
    options = parser.parse_args()
    library = ops.Library()
    for rows in map(int, options.rows.split(",")):
        cells = [
            (int(context), choice, dtype)
            for context in options.contexts.split(",")
            for dtype in options.dtype
            for choice in options.choice
        ]
        for context, choice, dtype in cells:
            torch.manual_seed(0)
            steps = Steps(library, options.shape, rows, context, choice, dtype)
            if steps.blocks == 0:
                print(f"{options.shape} rows {rows}: this device has no such steps")
                continue
            us = steps.microseconds()
            total = steps.weight_bytes + steps.cache_bytes
            print(
                f"{options.shape} {dtype} rows {rows} context {context} choice {choice}: "
                f"{us:.1f} us per step, "
                f"{us / steps.layers:.2f} per layer with the head's share, "
                f"{total / us * 1e-6:.2f} TB/s"
            )
            if options.profile:
                steps.profile(options.stamps)


if __name__ == "__main__":
    main()
