"""fastgen as a contestant of `python -m benchmarks.cpu`, and its meter of read bandwidth."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastgen
from benchmarks.cpu_worker import Clock, Load
from fastgen import Generator
from fastgen._engine import Session
from fastgen.options import GenerationOptions

_SPARE = 64  # tokens that a sequence may have beyond the timed steps, so that none ends in them


class Contestant:
    """A session that is stepped one token at a time, as who streams does."""

    def __init__(self, load: Load) -> None:
        self._generator = Generator.from_pretrained(
            load.source, num_threads=load.threads, weight_dtype=load.dtype
        )

    @staticmethod
    def convert(load: Load) -> None:
        """Nothing: the engine packs the model when it loads it."""

    def about(self) -> dict[str, Any]:
        """Version, and the bytes of a step."""
        info = self._generator.info
        return {
            "version": fastgen.__version__,
            "isa": info.isa,
            "step_bytes": info.step_bytes,
            "cache_bytes_per_token": info.cache_bytes_per_token,
        }

    def make_room(self, rows: int, positions: int) -> None:
        """Nothing: it makes its cache while it runs."""

    def decode(self, prompts: np.ndarray, steps: int, clock: Clock) -> None:
        """See cpu_worker.Peer."""
        room = self._generator.info.max_positions - prompts.shape[1]
        with self._generator.open_session(len(prompts)) as session:
            ids = self._submit(session, prompts, min(1 + steps + _SPARE, room))
            while not all(session.length(i) for i in ids):
                session.step(1)
            before = [session.length(i) for i in ids]
            done = 0
            while not clock.tick():
                session.step(1)
                done += 1
            grown = {session.length(i) - length for i, length in zip(ids, before)}
            if grown != {done}:
                raise RuntimeError(f"sequences grew by {grown} tokens in {done} steps")

    def prefill(self, prompts: np.ndarray) -> list[int]:
        """See cpu_worker.Peer."""
        with self._generator.open_session(len(prompts)) as session:
            ids = self._submit(session, prompts, 1)
            while session.step(1):
                pass
            return [session.get(i)[0][0] for i in ids]

    def _submit(self, session: Session, prompts: np.ndarray, length: int) -> list[int]:
        options = self._generator.native_options(
            GenerationOptions(max_length=length, eos_token_id=-1)
        )
        return [session.submit(prompt, options) for prompt in prompts.tolist()]
