"""What `python -m benchmarks.cuda` writes: runs as JSON, and the table of what must hold."""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cuda_cells import COMPILED, GOALS, GRAPH, HF_EAGER, HF_STATIC, STREAM, Cell, Goal
from benchmarks.files import read_json, write_json

FASTGEN = "fastgen"


def machine() -> dict[str, Any]:
    """The device, its driver, and the versions of what runs on it."""
    import numpy
    import torch

    import fastgen

    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        device = dict(zip(fields, map(str.strip, line.splitlines()[0].split(","))))
    except (OSError, subprocess.CalledProcessError):
        device = {"name": torch.cuda.get_device_name()}
    versions = {
        "fastgen": fastgen.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
    }
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["transformers"] = metadata.version("transformers")
    return {"device": device, "host": platform.platform(), "versions": versions}


@dataclass
class Run:
    """One run on one machine.

    Attributes:
        about: machine, driver, versions, command, time.
        bandwidths: bytes/s read, measured between the cells; the best counts.
        matrix_rates: FLOP/s of a large bfloat16 product.
        results: a dictionary for each contestant of each cell; without ``ms`` where there was none,
            and then ``why``.
    """

    about: dict[str, Any]
    bandwidths: list[float] = field(default_factory=list)
    matrix_rates: list[float] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        cell: Cell,
        who: str,
        dtype: str,
        samples: list[float],
        why: str = "",
        alone: bool = False,
    ) -> None:
        """Records what a contestant took, or why it did not run. ``alone``: not in turn with others
        for want of memory."""
        result: dict[str, Any] = {
            "cell": cell.key,
            "kind": cell.kind,
            "shape": cell.shape,
            "batch": cell.batch,
            "context": cell.context,
            "centre": cell.centre,
            "who": who,
            "dtype": dtype,
        }
        if samples:
            median = statistics.median(samples)
            result["ms"] = {
                "median": median,
                "min": min(samples),
                "max": max(samples),
                "samples": samples,
            }
            result["alone"] = alone
            tokens = cell.batch * (cell.context if cell.kind == "prefill" else 1)
            result["tokens_per_s"] = 1e3 * tokens / median
            if cell.kind == "prefill":
                result["flops"] = cell.prefill_flops()
            else:
                result["bytes"] = cell.step_bytes(dtype)
        else:
            result["why"] = why
        self.results.append(result)

    def share(self, result: dict[str, Any]) -> float | None:
        """Share of the best bandwidth, or of the matrix rate, that a result reached."""
        if "ms" not in result:
            return None
        seconds = 1e-3 * result["ms"]["median"]
        if "bytes" in result and self.bandwidths:
            return result["bytes"] / seconds / max(self.bandwidths)
        if "flops" in result and self.matrix_rates:
            return result["flops"] / seconds / max(self.matrix_rates)
        return None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.about,
            "read_bandwidth": self.bandwidths,
            "matrix_rate": self.matrix_rates,
            "results": [{**r, "share": self.share(r)} for r in self.results],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Reads what :meth:`to_dict` made."""
        about = dict(values)
        return cls(
            bandwidths=about.pop("read_bandwidth"),
            matrix_rates=about.pop("matrix_rate"),
            results=about.pop("results"),
            about=about,
        )


def write(path: Path, runs: list[Run]) -> None:
    """Writes runs as one file, whole or not at all."""
    write_json(path, {"runs": [run.to_dict() for run in runs]})


def read(path: Path) -> list[Run]:
    """Runs of a file."""
    return [Run.from_dict(run) for run in read_json(path)["runs"]]


def line(run: Run, result: dict[str, Any]) -> str:
    """A result for a person."""
    who = f"{result['cell']:24} {result['who']:9} {result['dtype']:9}"
    if "ms" not in result:
        return f"{who} none: {result['why']}"
    ms, share = result["ms"], run.share(result)
    shown = "     " if share is None else f"{100 * share:4.0f}%"
    return (
        f"{who} {ms['median']:9.4f} ms [{ms['min']:.4f} .. {ms['max']:.4f}]  {shown} "
        f"{result['tokens_per_s']:10.0f} tokens/s"
    )


def find(
    runs: list[Run], cell: str, who: str, dtype: str
) -> tuple[Run | None, dict[str, Any] | None]:
    """The newest result of a contestant, with its run."""
    for run in reversed(runs):
        for result in run.results:
            name = (result["cell"], result["who"], result["dtype"])
            if name == (cell, who, dtype) and "ms" in result:
                return run, result
    return None, None


def _goal_row(runs: list[Run], goal: Goal) -> str:
    run, ours = find(runs, goal.cell, FASTGEN, goal.dtype)
    columns = [f"{goal.name:30}"]
    if run is None or ours is None:
        return columns[0] + "  not measured"
    ms, share = ours["ms"]["median"], run.share(ours) or 0.0
    if goal.milliseconds is not None:
        columns += [f"{goal.milliseconds:8.2f}", f"{ms:8.3f}"]
        held = ms <= goal.milliseconds
    else:
        columns += [f"{100 * (goal.matrix_share or 0):7.0f}%", f"{100 * share:7.1f}%"]
        held = share >= (goal.matrix_share or 0)
    columns += ["yes" if held else "NO ", f"{100 * share:5.0f}%"]
    for peer in (STREAM, GRAPH, COMPILED, HF_STATIC, HF_EAGER):
        ratio = _ratio(runs, goal, peer)
        columns.append(f"{'-':>9}" if ratio is None else f"{ratio:8.2f}x")
    return " ".join(columns)


def _ratio(runs: list[Run], goal: Goal, peer: str) -> float | None:
    """How many times as long a peer takes, in the newest run that has both: nothing is compared
    with another card or another hour."""
    for run in reversed(runs):
        _, ours = find([run], goal.cell, FASTGEN, goal.dtype)
        _, theirs = find([run], goal.cell, peer, "float16")
        if ours and theirs:
            return float(theirs["ms"]["median"] / ours["ms"]["median"])
    return None


def table(runs: list[Run]) -> str:
    """What must hold: goal, figure, share of the limit, and how many times as long peers take."""
    lines = []
    for run in runs:
        if run.bandwidths:
            rates = f", {max(run.matrix_rates) / 1e12:.0f} TFLOP/s" if run.matrix_rates else ""
            name = run.about["machine"]["device"]["name"]
            lines.append(f"{name}: reads {max(run.bandwidths) / 1e12:.2f} TB/s{rates}")
    peers = "".join(f" {p:>9}" for p in (STREAM, GRAPH, COMPILED, HF_STATIC, HF_EAGER))
    lines.append(f"{'ms per step, float16':30} {'goal':>8} {'is':>8} holds share{peers}")
    lines += [_goal_row(runs, goal) for goal in GOALS]
    lines.append(
        "context 1024: around position 1007, so that the timed steps fit into the model's 1024"
    )
    return "\n".join(lines)
