"""What `python -m benchmarks.cpu` measures: contestants, cells, presets, and what must hold."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastgen.bench import SHAPES

GOAL_SHAPE = "medium"
STEPS = 32  # of a decode sample, after each sequence's first new token
MAX_POSITIONS = 1024
VOCAB_SIZE = 50257
SEED = 0  # of the prompts; the weights have their own, see cuda_models.py

FASTGEN, PADDLENLP, TORCH = "fastgen", "paddlenlp", "torch"
CTRANSLATE2, LLAMA_CPP, OPENVINO = "ctranslate2", "llama.cpp", "openvino"
PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")

# Bytes of a weight, with its share of a 16-bit scale of 32.
_WEIGHT_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0625, "int4": 0.5625}
# The dot products that bound a prefill: weights of 16 bits are fed to those of bfloat16, narrower
# ones to those of int8, by whoever gets the most out of the processor.
PEAKS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
    "int8": "int8",
    "int4": "int8",
}


@dataclass(frozen=True)
class Contestant:
    """Who, with weights of how many bits.

    Attributes:
        who: the program.
        dtype: of PRECISIONS; the ones it is compared with have the same.
        variant: what its own makers call it.
    """

    who: str
    dtype: str
    variant: str

    @property
    def key(self) -> str:
        """Names it, as llama.cpp:int8."""
        return f"{self.who}:{self.dtype}"


CONTESTANTS = (
    *(Contestant(FASTGEN, dtype, dtype) for dtype in PRECISIONS),
    Contestant(LLAMA_CPP, "float32", "f32"),
    Contestant(LLAMA_CPP, "bfloat16", "bf16"),
    Contestant(LLAMA_CPP, "int8", "q8_0"),
    Contestant(LLAMA_CPP, "int4", "q4_0"),
    Contestant(OPENVINO, "float32", "f32"),
    Contestant(OPENVINO, "bfloat16", "f32 weights, bf16 arithmetic"),
    Contestant(OPENVINO, "int8", "int8 weights, a scale per channel"),
    Contestant(OPENVINO, "int4", "int4 weights, groups of 32"),
    Contestant(CTRANSLATE2, "float32", "float32"),
    Contestant(CTRANSLATE2, "bfloat16", "bfloat16"),
    Contestant(CTRANSLATE2, "int8", "int8"),
    Contestant(TORCH, "float32", "float32"),
    Contestant(TORCH, "bfloat16", "bfloat16"),
    Contestant(PADDLENLP, "float32", "float32"),
)
# Those of the curves: who leads somewhere. The others are slower everywhere and take most time.
LEADERS = tuple(c.key for c in CONTESTANTS if c.who not in (TORCH, PADDLENLP))
ALL = tuple(c.key for c in CONTESTANTS)


@dataclass(frozen=True)
class Cell:
    """One place of the table: contestants of one precision take turns in it.

    Attributes:
        kind: ``decode`` or ``prefill``.
        shape: of GPT-2.
        batch: sequences, of different prompts.
        context: tokens of each prompt.
        threads: of each contestant.
        contestants: keys of CONTESTANTS.
    """

    kind: str
    shape: str
    batch: int
    context: int
    threads: int
    contestants: tuple[str, ...] = ALL

    @property
    def key(self) -> str:
        """Names the cell, as decode:medium:b8:c16:t2."""
        return f"{self.kind}:{self.shape}:b{self.batch}:c{self.context}:t{self.threads}"

    @property
    def positions(self) -> int:
        """Of each sequence, at the end."""
        return self.context + 1 + (STEPS if self.kind == "decode" else 0)

    @property
    def tokens(self) -> int:
        """That a step, or the prefill, works through."""
        return self.batch * (self.context if self.kind == "prefill" else 1)

    def prefill_flops(self) -> float:
        """Two operations for every weight of the layers and every prompt token; attention's own and
        the head's are left out."""
        return 2.0 * self.batch * self.context * 12 * layer_weights(self.shape)

    def step_bytes(self, dtype: str) -> float:
        """Bytes that a decode step of a peer cannot do without: every weight of the layers and the
        head once, and every key and value, of 16 bits where weights have no more."""
        layers, hidden, _ = SHAPES[self.shape]
        weights = 12 * layer_weights(self.shape) + VOCAB_SIZE * hidden
        cache = self.mean_length() * layers * 2 * hidden * (4 if dtype == "float32" else 2)
        return weights * _WEIGHT_BYTES[dtype] + cache

    def mean_length(self) -> float:
        """Positions of all sequences in the middle of the steps."""
        return self.batch * (self.context + 1 + STEPS / 2)


def layer_weights(shape: str) -> int:
    """Layers times the square of the hidden size: a twelfth of the weights in the layers."""
    layers, hidden, _ = SHAPES[shape]
    return layers * hidden**2


def _table(shape: str, threads: int, contestants: tuple[str, ...] = ALL) -> list[Cell]:
    return [
        Cell("decode", shape, 1, 16, threads, contestants),
        Cell("decode", shape, 8, 16, threads, contestants),
        Cell("prefill", shape, 1, 512, threads, contestants),
    ]


def _contexts(shape: str, threads: int) -> list[Cell]:
    longest = MAX_POSITIONS - STEPS - 1
    lengths = (16, 64, 256, 512, longest)
    return [Cell("decode", shape, 1, length, threads, LEADERS) for length in lengths]


def _batches(shape: str, threads: int) -> list[Cell]:
    return [Cell("decode", shape, batch, 16, threads, LEADERS) for batch in (1, 2, 4, 8, 16, 32)]


def _threads(shape: str, threads: int) -> list[Cell]:
    counts = sorted({1 << i for i in range(threads.bit_length())} | {threads})
    return [cell for count in counts for cell in _table(shape, count, LEADERS)]


def _shapes(threads: int) -> list[Cell]:
    return [cell for shape in SHAPES for cell in _table(shape, threads, LEADERS)]


PRESETS = {
    "quick": "decode and prefill of the small shape",
    "goals": "what must hold: the medium shape, every peer",
    "contexts": "decode against the length of the prompt",
    "batches": "decode against the batch",
    "threads": "decode and prefill against threads",
    "shapes": "decode and prefill against the size of the model",
    "full": "goals and all curves",
}


def preset(name: str, shape: str | None = None, threads: int | None = None) -> list[Cell]:
    """Cells of a preset, those that the same processes can do together.

    Args:
        shape: another than the preset's; ``shapes`` has all of them whatever it is.
        threads: most of a contestant; None: as many as there are processors for this process.
    """
    count = len(os.sched_getaffinity(0)) if threads is None else threads
    medium = shape or GOAL_SHAPE
    if name == "full":
        parts = ("goals", "contexts", "batches", "threads", "shapes")
        cells = [cell for part in parts for cell in preset(part, shape, count)]
    else:
        cells = {
            "quick": lambda: _table(shape or "small", count),
            "goals": lambda: _table(medium, count),
            "contexts": lambda: _contexts(medium, count),
            "batches": lambda: _batches(medium, count),
            "threads": lambda: _threads(medium, count),
            "shapes": lambda: _shapes(count),
        }[name]()
    order = list(SHAPES)
    cells.sort(key=lambda cell: (order.index(cell.shape), -cell.threads))
    return list(_once(cells))


def _once(cells: Iterable[Cell]) -> Iterable[Cell]:
    """Every place once, with the contestants that any of its cells has."""
    found: dict[str, Cell] = {}
    for cell in cells:
        known = found.get(cell.key, replace(cell, contestants=()))
        wanted = {*known.contestants, *cell.contestants}
        found[cell.key] = replace(cell, contestants=tuple(k for k in ALL if k in wanted))
    return found.values()


@dataclass(frozen=True)
class Goal:
    """What fastgen must reach in a cell of ``goals``.

    Attributes:
        column: ``b1``, ``b8`` or ``prefill``.
        dtype: its weights.
        share: of the limit; None: nothing is asked.
        ratio: of its tokens/s to those of ``against``.
        against: a contestant's key; ``best``: the best peer of the precision.
    """

    column: str
    dtype: str
    share: float | None = None
    ratio: float | None = None
    against: str = "best"


_LIKE_BFLOAT16 = {"ratio": 0.9, "against": f"{FASTGEN}:bfloat16"}
GOALS = (
    Goal("b1", "float32", share=0.92),
    Goal("b1", "float32", ratio=1.0),
    Goal("b8", "float32", ratio=1.25),
    Goal("prefill", "float32", share=0.75),
    Goal("b1", "bfloat16", share=0.90),
    Goal("b1", "bfloat16", ratio=1.1),
    Goal("b8", "bfloat16", ratio=1.6),
    Goal("prefill", "bfloat16", share=0.75),
    *(Goal(column, "float16", **_LIKE_BFLOAT16) for column in ("b1", "b8", "prefill")),
    Goal("b1", "int8", share=0.88),
    Goal("b1", "int8", ratio=1.05, against=f"{LLAMA_CPP}:int8"),
    Goal("b8", "int8", ratio=1.6),
    Goal("prefill", "int8", ratio=1.5),
    Goal("b1", "int4", share=0.80),
    Goal("b1", "int4", ratio=1.1, against=f"{LLAMA_CPP}:int4"),
    Goal("b8", "int4", ratio=1.4),
    Goal("prefill", "int4", ratio=1.5),
)


def goal_cells(shape: str, threads: int) -> dict[str, str]:
    """Keys of the cells that the columns of the goals mean."""
    cells = _table(shape, threads)
    return dict(zip(("b1", "b8", "prefill"), (cell.key for cell in cells)))
