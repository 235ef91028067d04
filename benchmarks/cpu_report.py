"""What `python -m benchmarks.cpu` writes: a run as JSON, its tables, what must hold, what moved."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu_cells import (
    CONTESTANTS,
    FASTGEN,
    GOAL_SHAPE,
    GOALS,
    PEAKS,
    PRECISIONS,
    Cell,
    Contestant,
    Goal,
    goal_cells,
)
from benchmarks.files import read_json, write_json

COLUMNS = {"b1": "batch 1 decode", "b8": "batch 8 decode", "prefill": "prefill of 512"}


def summary(samples: list[float]) -> dict[str, Any]:
    """Median, extremes and all of the samples."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": samples,
    }


@dataclass
class Run:
    """One run on one machine.

    Attributes:
        about: machine, command, options; ``contestants`` says of each by its key what it told of
            itself, or ``why`` it does not run.
        bandwidths: bytes/s read, by threads: all that were measured.
        peaks: operations/s by threads and type: all that were measured.
        results: a dictionary for each contestant of each cell; without ``tokens_per_s`` where there
            was none, and then ``why``.
    """

    about: dict[str, Any]
    bandwidths: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        cell: Cell,
        contestant: Contestant,
        seconds: list[float],
        limits: list[float | None],
        work: float,
        why: str = "",
        alone: bool = False,
    ) -> None:
        """Records what a contestant took, or why it did not run.

        Args:
            seconds: of a step, or of the prefill, for each sample.
            limits: of the machine beside each sample: bytes/s, or operations/s; None: unknown.
            work: bytes of a step, or operations of the prefill.
            alone: not in turn with others, for want of memory.
        """
        result: dict[str, Any] = {
            "cell": cell.key,
            "kind": cell.kind,
            "shape": cell.shape,
            "batch": cell.batch,
            "context": cell.context,
            "threads": cell.threads,
            "who": contestant.who,
            "dtype": contestant.dtype,
            "variant": contestant.variant,
        }
        if seconds:
            result["alone"] = alone
            result["tokens_per_s"] = summary([cell.tokens / s for s in seconds])
            result["bytes" if cell.kind == "decode" else "operations"] = work
            shares = [work / s / limit for s, limit in zip(seconds, limits) if limit]
            result["share"] = summary(shares) if shares else None
        else:
            result["why"] = why
        self.results.append(result)

    def find(self, cell: str, key: str) -> dict[str, Any] | None:
        """The newest result of a contestant that ran."""
        for result in reversed(self.results):
            name = f"{result['who']}:{result['dtype']}"
            if (result["cell"], name) == (cell, key) and "tokens_per_s" in result:
                return result
        return None

    def best_peer(self, cell: str, dtype: str) -> dict[str, Any] | None:
        """The fastest of the others with weights of this type."""
        peers = [c.key for c in CONTESTANTS if c.who != FASTGEN and c.dtype == dtype]
        found = [r for r in (self.find(cell, key) for key in peers) if r is not None]
        return max(found, key=lambda r: float(r["tokens_per_s"]["median"]), default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.about,
            "read_bandwidth": self.bandwidths,
            "peaks": self.peaks,
            "results": self.results,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Reads what :meth:`to_dict` made."""
        about = dict(values)
        return cls(
            bandwidths=about.pop("read_bandwidth"),
            peaks=about.pop("peaks"),
            results=about.pop("results"),
            about=about,
        )


def write(path: Path, run: Run) -> None:
    """Writes a run, whole or not at all."""
    write_json(path, run.to_dict())


def read(path: Path) -> Run:
    """A run of a file."""
    return Run.from_dict(read_json(path))


# ---- Tables ------------------------------------------------------------------------------------


def line(result: dict[str, Any]) -> str:
    """A result for a person."""
    who = f"{result['cell']:26} {result['who']:11} {result['dtype']:9}"
    if "tokens_per_s" not in result:
        return f"{who} none: {result['why']}"
    speed, share = result["tokens_per_s"], result["share"]
    shown = "    -" if share is None else f"{100 * share['median']:4.0f}%"
    alone = " alone" if result["alone"] else ""
    spread = f"[{speed['min']:.1f} .. {speed['max']:.1f}]"
    return f"{who} {speed['median']:9.1f} tokens/s {spread:22} {shown}{alone}"


def limits_table(run: Run) -> str:
    """What the machine reached, by threads."""
    lines = []
    for threads, values in run.bandwidths.items():
        text = f"{min(values) / 1e9:.1f} to {max(values) / 1e9:.1f} GB/s read"
        for dtype, rates in run.peaks.get(threads, {}).items():
            text += f", {dtype} {max(rates) / 1e9:.0f} G operations/s"
        lines.append(f"{threads} threads: {text}")
    return "\n".join(lines)


def cells_table(run: Run) -> str:
    """Every cell with its contestants by precision, the fastest first."""
    lines = []
    for cell in dict.fromkeys(result["cell"] for result in run.results):
        lines.append(cell)
        for dtype in PRECISIONS:
            results = [r for r in run.results if (r["cell"], r["dtype"]) == (cell, dtype)]
            results.sort(key=lambda r: -r.get("tokens_per_s", {"median": 0.0})["median"])
            lines += ["  " + line(result)[27:] for result in results]
    return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """A goal beside what was measured; ``figure`` is None where something was not."""

    goal: Goal
    figure: float | None
    against: str

    @property
    def holds(self) -> bool | None:
        """Whether the goal is met; None: not measured."""
        wanted = self.goal.share if self.goal.share is not None else self.goal.ratio
        return None if self.figure is None or wanted is None else self.figure >= wanted


def verdicts(run: Run, shape: str, threads: int) -> list[Verdict]:
    """All goals, for the cells of a shape."""
    cells = goal_cells(shape, threads)
    return [_verdict(run, goal, cells[goal.column]) for goal in GOALS]


def _verdict(run: Run, goal: Goal, cell: str) -> Verdict:
    ours = run.find(cell, f"{FASTGEN}:{goal.dtype}")
    if goal.share is not None:
        limit = "read bandwidth" if goal.column != "prefill" else f"{PEAKS[goal.dtype]} peak"
        share = None if ours is None or ours["share"] is None else ours["share"]["median"]
        return Verdict(goal, share, limit)
    theirs = (
        run.best_peer(cell, goal.dtype) if goal.against == "best" else run.find(cell, goal.against)
    )
    if theirs is None:
        return Verdict(goal, None, goal.against)
    name = f"{theirs['who']} {theirs['variant']}{_absent(run, goal, cell)}"
    if ours is None:
        return Verdict(goal, None, name)
    ratio = ours["tokens_per_s"]["median"] / theirs["tokens_per_s"]["median"]
    return Verdict(goal, ratio, name)


def _absent(run: Run, goal: Goal, cell: str) -> str:
    """Which peers the best was chosen without."""
    if goal.against != "best":
        return ""
    missing = [
        contestant.who
        for contestant in CONTESTANTS
        if contestant.who != FASTGEN
        and contestant.dtype == goal.dtype
        and run.find(cell, contestant.key) is None
    ]
    return f" (without {', '.join(missing)})" if missing else ""


def goals_table(run: Run, shape: str, threads: int) -> str:
    """What must hold, and whether it does."""
    lines = [f"{'GPT-2 ' + shape:25} {'goal':>8} {'is':>8}        of"]
    for verdict in verdicts(run, shape, threads):
        goal = verdict.goal
        name = f"{goal.dtype:9} {COLUMNS[goal.column]}"
        wanted = _shown(goal, goal.share if goal.share is not None else goal.ratio)
        word = {True: "met", False: "MISSED", None: "not measured"}[verdict.holds]
        found = _shown(goal, verdict.figure)
        lines.append(f"{name:25} {wanted:>8} {found:>8} {word:6} {verdict.against}")
    if shape != GOAL_SHAPE:
        lines.append(f"(the goals are about {GOAL_SHAPE})")
    return "\n".join(lines)


def _shown(goal: Goal, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if goal.share is not None else f"{value:.2f}x"


def goal_places(run: Run) -> list[tuple[str, int]]:
    """Shapes and threads of which the run has every cell that the goals are about."""
    places = dict.fromkeys((r["shape"], r["threads"]) for r in run.results)
    cells = {r["cell"] for r in run.results}
    return [place for place in places if set(goal_cells(*place).values()) <= cells]


def disagreements(run: Run) -> list[str]:
    """Of float32 contestants that choose other tokens than fastgen after the same prompts: then one
    of them runs another model."""
    lines = []
    for result in run.results:
        ours = run.find(result["cell"], f"{FASTGEN}:float32")
        if result["dtype"] != "float32" or ours is None or "first_tokens" not in result:
            continue
        if result["first_tokens"] != ours["first_tokens"]:
            lines.append(f"{result['cell']}: {result['who']} chooses other tokens than fastgen")
    return lines


# ---- Comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """A result that lies outside what the samples of two runs have in common."""

    cell: str
    who: str
    dtype: str
    before: float
    now: float
    share_before: float | None
    share_now: float | None


def moves(before: Run, now: Run) -> list[Move]:
    """Results of both runs whose medians lie outside the range of each other's samples."""
    found = []
    for result in now.results:
        known = before.find(result["cell"], f"{result['who']}:{result['dtype']}")
        if known is None or "tokens_per_s" not in result:
            continue
        old, new = known["tokens_per_s"], result["tokens_per_s"]
        inside_new = new["min"] <= old["median"] <= new["max"]
        inside_old = old["min"] <= new["median"] <= old["max"]
        if inside_new or inside_old:
            continue
        shares = [r["share"]["median"] if r["share"] else None for r in (known, result)]
        who = (result["cell"], result["who"], result["dtype"])
        found.append(Move(*who, old["median"], new["median"], *shares))
    return found


def comparison(before: Run, now: Run, name: str) -> str:
    """What moved since an earlier run, and how the machine itself did."""
    lines = [f"beside {name}, of {before.about['machine']['time']}:"]
    processors = [run.about["machine"]["processor"] for run in (before, now)]
    if processors[0] != processors[1]:
        lines.append(f"  another machine: {processors[0]}, now {processors[1]}")
    for threads in now.bandwidths:
        if threads in before.bandwidths:
            old, new = (max(run.bandwidths[threads]) / 1e9 for run in (before, now))
            lines.append(f"  {threads} threads read {old:.1f} GB/s, now {new:.1f} GB/s")
    moved = moves(before, now)
    for move in moved:
        shares = ""
        if move.share_before is not None and move.share_now is not None:
            shares = f"; share {100 * move.share_before:.0f}%, now {100 * move.share_now:.0f}%"
        lines.append(
            f"  {move.cell:26} {move.who:11} {move.dtype:9} {move.before:9.1f} tokens/s, now "
            f"{move.now:9.1f} ({100 * (move.now / move.before - 1):+.0f}%){shares}"
        )
    if not moved:
        lines.append("  nothing moved by more than the spread")
    return "\n".join(lines)
