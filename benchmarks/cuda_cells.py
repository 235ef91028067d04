"""What `python -m benchmarks.cuda` measures: cells, presets, and what must hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastgen.bench import SHAPES

STEPS = 32  # of one sample
WARM_STEPS = 4  # before the clock starts, so that it starts in the middle of a steady run
MAX_POSITIONS = 1024
VOCAB_SIZE = 50257

SIXTEEN_BIT = ("float16", "bfloat16")
DTYPES = (*SIXTEEN_BIT, "int8", "int4")
# fastgen called token by token; benchmarks/torch_gpt2.py as a CUDA graph, and compiled; HuggingFace
# generate as it is, and with a static cache, which it compiles.
STREAM, GRAPH, COMPILED, HF_EAGER, HF_STATIC = (
    "stream",
    "graph",
    "compiled",
    "hf-eager",
    "hf-static",
)
PEERS = (STREAM, GRAPH, COMPILED, HF_EAGER, HF_STATIC)

# Bytes of a weight, with its share of the scale of 32.
_WEIGHT_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0625, "int4": 0.5625}


@dataclass(frozen=True)
class Cell:
    """One place of the table: contestants take turns in it.

    Attributes:
        kind: ``decode`` or ``prefill``.
        shape: of GPT-2.
        batch: sequences.
        context: positions around which is decoded, or tokens of each prompt.
        dtypes: weight types of fastgen.
        peers: which of PEERS run beside it, with float16 weights.
    """

    kind: str
    shape: str
    batch: int
    context: int
    dtypes: tuple[str, ...]
    peers: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names the cell, as decode:medium:b8:c128."""
        return f"{self.kind}:{self.shape}:b{self.batch}:c{self.context}"

    @property
    def centre(self) -> int:
        """Positions around which is decoded: all steps must fit into the model's."""
        return min(self.context, MAX_POSITIONS - 1 - STEPS // 2)

    def prompt_length(self) -> int:
        """Tokens of a prompt whose timed steps lie around the centre."""
        if self.kind == "prefill":
            return self.context
        return max(1, self.centre - STEPS // 2 - WARM_STEPS - 1)

    def cache_bytes(self) -> int:
        """KV cache of 16-bit numbers at the end of a sample."""
        layers, hidden, _ = SHAPES[self.shape]
        positions = min(MAX_POSITIONS, self.context + STEPS)
        return self.batch * positions * layers * 2 * hidden * 2

    def step_bytes(self, dtype: str) -> float:
        """Bytes that a decode step cannot do without: every weight of the layers and the head once,
        and every key and value."""
        layers, hidden, _ = SHAPES[self.shape]
        weights = 12 * layers * hidden**2 + VOCAB_SIZE * hidden
        cache = self.batch * self.centre * layers * 2 * hidden * (4 if dtype == "float32" else 2)
        return weights * _WEIGHT_BYTES[dtype] + cache

    def prefill_flops(self) -> float:
        """Two operations for every weight of the layers and every prompt token; attention's own are
        left out."""
        layers, hidden, _ = SHAPES[self.shape]
        return 2.0 * self.batch * self.context * 12 * layers * hidden**2


@dataclass(frozen=True)
class Goal:
    """What a cell must reach: milliseconds of a decode step, or a share of the matrix rate."""

    name: str
    cell: str  # Cell.key
    dtype: str
    milliseconds: float | None = None
    matrix_share: float | None = None


GOALS = (
    Goal("small, batch 1, context 128", "decode:small:b1:c128", "float16", 0.13),
    Goal("medium, batch 1, context 128", "decode:medium:b1:c128", "float16", 0.26),
    Goal("the same, second goal", "decode:medium:b1:c128", "float16", 0.20),
    Goal("medium, batch 1, context 1024", "decode:medium:b1:c1024", "float16", 0.30),
    Goal("medium, batch 8, context 128", "decode:medium:b8:c128", "float16", 0.32),
    Goal("medium, batch 32, context 128", "decode:medium:b32:c128", "float16", 0.42),
    Goal("medium, batch 64, context 512", "decode:medium:b64:c512", "float16", 1.2),
    Goal("XL, batch 1, context 128", "decode:xl:b1:c128", "float16", 0.88),
    Goal("medium int8, batch 1", "decode:medium:b1:c128", "int8", 0.19),
    Goal("medium int4, batch 1", "decode:medium:b1:c128", "int4", 0.15),
    Goal("prefill, medium, 8 x 512", "prefill:medium:b8:c512", "float16", None, 0.45),
    Goal("the same, bfloat16", "prefill:medium:b8:c512", "bfloat16", None, 0.45),
)


def _goal_cells(peers: tuple[str, ...]) -> list[Cell]:
    cells: dict[str, Cell] = {}
    for goal in GOALS:
        kind, shape, batch, context = goal.cell.split(":")
        dtypes = cells[goal.cell].dtypes if goal.cell in cells else ()
        cells[goal.cell] = Cell(
            kind,
            shape,
            int(batch[1:]),
            int(context[1:]),
            dtypes if goal.dtype in dtypes else (*dtypes, goal.dtype),
            tuple(p for p in peers if kind == "decode" or p == HF_EAGER),
        )
    one = Cell("prefill", "medium", 1, 512, SIXTEEN_BIT, (HF_EAGER,) if HF_EAGER in peers else ())
    return [*cells.values(), one]


def _full() -> list[Cell]:
    cells = {}
    for shape in SHAPES:
        for batch in (1, 4, 8, 32, 64, 256):
            for context in (16, 128, 512, 1024):
                # HuggingFace's loop takes the same time whatever it feeds: once a batch will do.
                peers = (GRAPH, HF_EAGER) if context == 128 else (GRAPH,)
                cell = Cell("decode", shape, batch, context, DTYPES, peers)
                cells[cell.key] = cell
    for cell in _goal_cells(PEERS):
        known = cells.get(cell.key, cell)
        dtypes = DTYPES if cell.kind == "prefill" else known.dtypes
        cells[cell.key] = replace(known, dtypes=dtypes, peers=cell.peers)
    return list(cells.values())


def preset(name: str) -> list[Cell]:
    """Cells of a preset, those of a shape together and those with the largest caches last.

    Args:
        name: ``quick``: what must hold, beside the graph. ``goals``: beside every peer. ``full``:
            every shape, batch, context and weight type, and what ``goals`` has.
    """
    cells = {
        "quick": lambda: _goal_cells((STREAM, GRAPH)),
        "goals": lambda: _goal_cells(PEERS),
        "full": _full,
    }[name]()
    order = list(SHAPES)
    return sorted(cells, key=lambda cell: (order.index(cell.shape), cell.cache_bytes()))
