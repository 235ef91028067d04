"""Contestants of `python -m benchmarks.cpu` take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cpu_cells import CONTESTANTS, OPENVINO, PEAKS, STEPS, Cell, Contestant
from benchmarks.cpu_limits import Limits
from benchmarks.cpu_models import write_model
from benchmarks.cpu_process import WorkerError, WorkerProcess
from benchmarks.cpu_report import Run, line

# Those compared with each other are in memory together.
TOGETHER = (("float32",), ("bfloat16", "float16"), ("int8",), ("int4",))
_WARM_STEPS = 2
_PROCESS_BYTES = 0.4e9  # of Python and its libraries
_COPIES = {OPENVINO: 2.0}  # of the weights: the file's and its own; others hold little beside one


@dataclass
class Plan:
    """How cells are measured.

    Attributes:
        rounds: samples of every contestant of a cell.
        seconds: a decode sample ends early after so many.
        models: directory of model files, which are kept.
        pythons: interpreter of each program's environment.
        contestants: keys of those that take part.
        say: gets every line for a person.
        advance: called after every sample.
    """

    rounds: int
    seconds: float
    models: Path
    pythons: dict[str, Path]
    contestants: tuple[str, ...]
    say: Callable[[str], None]
    advance: Callable[[int], None]

    def taking_part(self, cell: Cell) -> list[Contestant]:
        """Who runs in a cell."""
        return [c for c in CONTESTANTS if c.key in cell.contestants and c.key in self.contestants]

    def samples(self, cells: Iterable[Cell]) -> int:
        """How many there will be at most."""
        return self.rounds * sum(len(self.taking_part(cell)) for cell in cells)


@dataclass
class Seat:
    """A contestant with its process, and what it has shown.

    Attributes:
        about: what it told of itself.
        why: it does not run, for this reason.
        seconds, limits: of the cell's samples.
        tokens: the first new ones of the cell's prompts.
    """

    contestant: Contestant
    process: WorkerProcess | None = None
    about: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    seconds: list[float] = field(default_factory=list)
    limits: list[float | None] = field(default_factory=list)
    tokens: list[int] | None = None

    def fail(self, why: str) -> None:
        """It runs no more."""
        self.why = why
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.close()
            self.process = None


class Contest:
    """Cells of one shape and number of threads."""

    def __init__(self, shape: str, threads: int, plan: Plan, run: Run, limits: Limits) -> None:
        self._shape, self._threads = shape, threads
        self._plan, self._run, self._limits = plan, run, limits
        self._bandwidths = run.bandwidths.setdefault(str(threads), [])
        self._peaks = run.peaks.setdefault(str(threads), {})
        self._source = write_model(plan.models, shape)

    def measure(self, cells: list[Cell], saved: Callable[[], None]) -> None:
        """Measures all cells, one precision after the other; ``saved`` is called after each."""
        for precisions in TOGETHER:
            seats = [
                Seat(contestant)
                for contestant in CONTESTANTS
                if contestant.dtype in precisions
                and any(contestant in self._plan.taking_part(cell) for cell in cells)
            ]
            try:
                self._measure_group(seats, cells, saved)
            finally:
                for seat in seats:
                    seat.close()

    def _measure_group(
        self, seats: list[Seat], cells: list[Cell], saved: Callable[[], None]
    ) -> None:
        for seat in seats:
            self._convert(seat)
        able = [seat for seat in seats if not seat.why]
        free = 0.8 * psutil.virtual_memory().available
        together = sum(map(self._bytes, able)) < free
        if not together:
            names = ", ".join(seat.contestant.key for seat in able)
            self._plan.say(f"one after the other, for want of memory: {names}")
        for group in [seats] if together else [[seat] for seat in seats]:
            self._sit_down(group)
            for cell in cells:
                taking_part = self._plan.taking_part(cell)
                turns = [seat for seat in group if seat.contestant in taking_part]
                self._take_turns(cell, turns, not together)
                saved()
            for seat in group:
                seat.close()

    def _bytes(self, seat: Seat) -> float:
        contestant = seat.contestant
        weights = Cell("decode", self._shape, 0, 0, 1).step_bytes(contestant.dtype)
        return _PROCESS_BYTES + _COPIES.get(contestant.who, 1.2) * weights

    def _start(self, seat: Seat, do: str) -> dict[str, Any]:
        contestant = seat.contestant
        name = contestant.key.replace(":", "-")
        log = self._plan.models / "logs" / f"{name}-{self._shape}-{do}.log"
        python = self._plan.pythons[contestant.who]
        seat.process = WorkerProcess(python, contestant.who, self._threads, log)
        return seat.process.ask(
            do,
            source=str(self._source),
            converted=str(self._plan.models / self._shape),
            dtype=contestant.dtype,
            threads=self._threads,
        )

    def _convert(self, seat: Seat) -> None:
        """In a process that ends then, because it needs memory that it would keep."""
        try:
            self._start(seat, "convert")
        except WorkerError as error:
            seat.fail(str(error))
        seat.close()

    def _sit_down(self, seats: list[Seat]) -> None:
        told = self._run.about["contestants"]
        for seat in seats:
            key = seat.contestant.key
            if not seat.why:
                try:
                    seat.about = self._start(seat, "load")
                except WorkerError as error:
                    seat.fail(str(error))
            told[key] = {"why": seat.why} if seat.why else seat.about
            if seat.why:
                self._plan.say(f"{key} does not run: {seat.why}")

    def _take_turns(self, cell: Cell, seats: list[Seat], alone: bool) -> None:
        for seat in seats:
            seat.seconds, seat.limits, seat.tokens = [], [], None
            self._sample(cell, seat, warm=True)
        rounds = self._plan.rounds
        for at in range(rounds):
            begin = at % max(1, len(seats))
            order = [*seats[begin:], *seats[:begin]]  # who follows whom changes
            if cell.kind == "decode":
                self._decode_round(cell, order)
            else:
                self._prefill_round(cell, order)
            self._plan.advance(len(seats))
        for seat in seats:
            contestant = seat.contestant
            why = seat.why if len(seat.seconds) < rounds else ""
            work = cell.prefill_flops() if cell.kind == "prefill" else self._step_bytes(cell, seat)
            seconds = [] if why else seat.seconds
            self._run.add(cell, contestant, seconds, seat.limits, work, why, alone)
            if seat.tokens is not None:
                self._run.results[-1]["first_tokens"] = seat.tokens
            self._plan.say(line(self._run.results[-1]))

    def _decode_round(self, cell: Cell, seats: list[Seat]) -> None:
        before = self._bandwidth()
        for seat in seats:
            if self._sample(cell, seat):
                after = self._bandwidth()
                seat.limits.append(max(before, after))
                before = after

    def _prefill_round(self, cell: Cell, seats: list[Seat]) -> None:
        before = self._measure_peaks()
        ran = [seat for seat in seats if self._sample(cell, seat)]
        after = self._measure_peaks()
        for seat in ran:
            dtype = PEAKS[seat.contestant.dtype]
            both = [peaks[dtype] for peaks in (before, after) if dtype in peaks]
            seat.limits.append(max(both, default=None))

    def _sample(self, cell: Cell, seat: Seat, warm: bool = False) -> bool:
        """Lets a contestant have its turn; whether it did what it should."""
        if seat.process is None:
            return False
        try:
            answer = seat.process.ask(
                "sample",
                kind=cell.kind,
                batch=cell.batch,
                context=cell.context,
                steps=_WARM_STEPS if warm else STEPS,
                seconds=self._plan.seconds,
            )
        except WorkerError as error:
            seat.fail(str(error))
            return False
        if not warm:
            seat.seconds.append(answer["seconds"] / answer["steps"])
            seat.tokens = answer.get("tokens")
        return True

    def _bandwidth(self) -> float:
        self._bandwidths.append(self._limits.bandwidth())
        return self._bandwidths[-1]

    def _measure_peaks(self) -> dict[str, float]:
        found = {k: v["per_second"] for k, v in self._limits.peaks().items() if v is not None}
        for dtype, rate in found.items():
            self._peaks.setdefault(dtype, []).append(rate)
        return found

    @staticmethod
    def _step_bytes(cell: Cell, seat: Seat) -> float:
        """What the engine says that it reads; of peers, what they cannot do without."""
        if "step_bytes" not in seat.about:
            return cell.step_bytes(seat.contestant.dtype)
        cache = cell.mean_length() * seat.about["cache_bytes_per_token"]
        return float(seat.about["step_bytes"] + cache)
