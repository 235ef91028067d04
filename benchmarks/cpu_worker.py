"""The far side of `python -m benchmarks.cpu`: one contestant in a process of its own.

python -m benchmarks.cpu_worker <who>     # reads commands, a JSON object a line, and answers so

Commands, by their key ``do``:

- ``convert``: makes of the model what this contestant loads, unless it is there already.
- ``load``: loads it; answers what there is to know of it.
- ``sample``: decodes or prefills once; answers steps and seconds.

An answer with ``error`` says in a line what went wrong.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.cpu_cells import (
    CTRANSLATE2,
    FASTGEN,
    LLAMA_CPP,
    OPENVINO,
    PADDLENLP,
    SEED,
    TORCH,
    VOCAB_SIZE,
)

_MODULES = {
    FASTGEN: "fastgen",
    LLAMA_CPP: "llama_cpp",
    OPENVINO: "openvino",
    CTRANSLATE2: "ctranslate2",
    TORCH: "torch",
    PADDLENLP: "paddlenlp",
}
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Load:
    """What to load.

    Attributes:
        source: directory of the model as HuggingFace writes it.
        converted: directory of what contestants make of it.
        dtype: of cpu_cells.PRECISIONS.
        threads: that compute.
    """

    source: Path
    converted: Path
    dtype: str
    threads: int

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """The path of a converted file or directory, made now if it never was, whole or not."""
        path = self.converted / name
        if not path.exists():
            partial = path.with_name(f".partial-{path.name}")
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
            self.converted.mkdir(parents=True, exist_ok=True)
            make(partial)
            partial.replace(path)
        return path


class Clock:
    """Times decode steps: from the moment when every sequence has its first new token.

    Attributes:
        done: no further step is wanted.
    """

    def __init__(self, steps: int, seconds: float) -> None:
        self._wanted, self._seconds = steps, seconds
        self._steps, self._begin, self._end = -1, 0.0, 0.0
        self.done = False

    def tick(self) -> bool:
        """Every sequence has one token more; returns :attr:`done`. One that is slow ends early,
        after two steps at least."""
        now = time.perf_counter()
        if self.done:
            return True
        self._steps += 1
        if self._steps == 0:
            self._begin = now
        self._end = now
        late = self._steps >= 2 and now - self._begin > self._seconds
        self.done = self._steps == self._wanted or late
        return self.done

    def result(self) -> dict[str, Any]:
        """Steps, and their seconds."""
        if not self.done:
            raise RuntimeError(f"decoding ended after {self._steps} of {self._wanted} steps")
        return {"steps": self._steps, "seconds": self._end - self._begin}


class Peer(Protocol):
    """What a module cpu_worker_<who> has: a class Contestant like this.

    ``prompts`` are [batch, context] int64.
    """

    def __init__(self, load: Load) -> None:
        """Loads the model, which was converted before."""

    @staticmethod
    def convert(load: Load) -> None:
        """Makes what the constructor loads. Raises what it raises where that cannot be."""

    def about(self) -> dict[str, Any]:
        """``version``, and what else there is to know."""

    def make_room(self, rows: int, positions: int) -> None:
        """Of so many sequences of so many positions, before the clock starts."""

    def decode(self, prompts: np.ndarray, steps: int, clock: Clock) -> None:
        """Prefills, then decodes greedily past any end token until the clock is done."""

    def prefill(self, prompts: np.ndarray) -> list[int]:
        """From the prompts to each one's first new token, which it returns."""


class Worker:
    """Answers commands."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._peer: Peer | None = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Does as it is told."""
        values = dict(command)
        do = values.pop("do")
        if do == "sample":
            return self._sample(**values)
        for name in ("source", "converted"):
            values[name] = Path(values[name])
        load = Load(**values)
        made = importlib.import_module(f"benchmarks.cpu_worker_{_MODULES[self._who]}").Contestant
        if do == "convert":
            made.convert(load)
            return {}
        self._peer = made(load)
        return dict(self._peer.about())

    def _sample(
        self, kind: str, batch: int, context: int, steps: int, seconds: float
    ) -> dict[str, Any]:
        assert self._peer is not None
        # Each row has a prompt of its own: nothing is to be gained from what rows share.
        rng = np.random.default_rng([SEED, batch, context])
        prompts = rng.integers(0, VOCAB_SIZE, (batch, context))
        self._peer.make_room(batch, context + 1 + steps)
        if kind == "prefill":
            begin = time.perf_counter()
            tokens = self._peer.prefill(prompts)
            return {"steps": 1, "seconds": time.perf_counter() - begin, "tokens": tokens}
        clock = Clock(steps, seconds)
        self._peer.decode(prompts, steps, clock)
        return clock.result()


def main() -> None:
    """Answers until there are no more commands."""
    # A stopped process would outlive the one that stopped it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries print; their words go to the log and leave the answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            import traceback

            traceback.print_exc()
            words = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {words[:300]}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
