"""fastgen as a contestant of `python -m benchmarks.cuda`, and the limits of the device."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

from benchmarks.cuda_cells import STEPS, WARM_STEPS, Cell
from fastgen import Generator
from fastgen.options import GenerationOptions


class Contestant(Protocol):
    """Something that decodes or prefills in a cell, made ready for it."""

    def sample(self) -> float:
        """Milliseconds of a decode step, the mean of STEPS, or of a prefill."""

    def close(self) -> None:
        """Gives back what it holds of the device beside the weights."""


class FastgenDecode:
    """Decode steps of a session; all rows share a prompt and have draws of their own.

    Args:
        generator: the model.
        cell: where it is measured.
        steps_at_once: steps of a call; 1 is what a caller does who streams.
    """

    def __init__(self, generator: Generator, cell: Cell, steps_at_once: int = STEPS) -> None:
        self._generator, self._cell, self._steps_at_once = generator, cell, steps_at_once
        rng = np.random.default_rng(cell.context)
        vocab = generator.info.vocab_size
        self._prompt = [int(token) for token in rng.integers(0, vocab, cell.prompt_length())]
        self._options = generator.native_options(
            GenerationOptions(
                max_length=1 + WARM_STEPS + STEPS,
                decode_strategy="sampling",
                top_k=4,
                eos_token_id=-1,
            )
        )

    def sample(self) -> float:
        """Milliseconds per step, from one result to another in the middle of a run."""
        with self._generator.open_session(self._cell.batch) as session:
            ids = []
            for row in range(self._cell.batch):
                self._options.first_sequence = row
                ids.append(session.submit(self._prompt, self._options))
            while not all(session.length(i) for i in ids):
                session.step(1)
            for _ in range(WARM_STEPS // 2):
                session.step(2)
            begin = time.perf_counter()
            for _ in range(STEPS // self._steps_at_once):
                session.step(self._steps_at_once)
            seconds = time.perf_counter() - begin
            done = session.length(ids[-1])
            if done != 1 + WARM_STEPS + STEPS:
                raise RuntimeError(f"the session did {done} steps in all")
            return 1e3 * seconds / STEPS

    def close(self) -> None:
        """Nothing is held between samples."""


class FastgenPrefill:
    """From the submission of different prompts to the first token of all."""

    def __init__(self, generator: Generator, cell: Cell) -> None:
        self._generator, self._cell = generator, cell
        rng = np.random.default_rng(cell.context)
        vocab = generator.info.vocab_size
        self._prompts = rng.integers(0, vocab, (cell.batch, cell.context)).tolist()
        self._options = generator.native_options(GenerationOptions(max_length=1, eos_token_id=-1))

    def sample(self) -> float:
        """Milliseconds."""
        with self._generator.open_session(self._cell.batch) as session:
            begin = time.perf_counter()
            for prompt in self._prompts:
                session.submit(prompt, self._options)
            while session.step(1):
                pass
            return 1e3 * (time.perf_counter() - begin)

    def close(self) -> None:
        """Nothing is held between samples."""


def fastgen_contestant(generator: Generator, cell: Cell, stream: bool = False) -> Any:
    """The contestant that a cell asks for."""
    if cell.kind == "prefill":
        return FastgenPrefill(generator, cell)
    return FastgenDecode(generator, cell, 1 if stream else STEPS)


def matrix_rate(size: int = 8192, passes: int = 6) -> float:
    """FLOP/s of a large bfloat16 product through PyTorch: the best of some passes."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(passes):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (1e-3 * begin.elapsed_time(end)))
    return best
