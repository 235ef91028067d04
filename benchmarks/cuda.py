"""Decoding on a GPU beside its peers and the device's own limits, all in one run.

python -m benchmarks.cuda --preset goals --json goals.json
python -m benchmarks.cuda --preset full --seconds 560 --json part1.json
python -m benchmarks.cuda --preset full --without part1.json --json part2.json
python -m benchmarks.cuda --merge part1.json part2.json --json full.json
"""

from __future__ import annotations

import fnmatch
import gc
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks import cuda_report as report
from benchmarks.cuda_cells import COMPILED, DTYPES, HF_STATIC, PEERS, STREAM, Cell, preset
from benchmarks.cuda_contestants import Contestant, fastgen_contestant, matrix_rate
from benchmarks.cuda_models import make_model
from fastgen import Generator
from fastgen.errors import FastgenError

_BANDWIDTH_BYTES = 2 << 30
_BANDWIDTH_PASSES = 3

# Who, with weights of which type, and how it is made ready.
Maker = tuple[str, str, Callable[[], Contestant]]


def names_of(known: tuple[str, ...]) -> Callable[..., tuple[str, ...]]:
    """Reads names with commas between them."""

    def parse(_: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(part for part in value.split(",") if part)
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r} is not one of: {', '.join(known)}")
        return names

    return parse


@dataclass
class Plan:
    """How cells are measured.

    Attributes:
        rounds: samples of every contestant of a cell, which take turns.
        compile_seconds: longest that a peer that compiles may take to be ready.
    """

    rounds: int
    compile_seconds: float


class Contest:
    """One shape: models are loaded once and stay for all its cells, as far as memory allows."""

    def __init__(self, shape: str, cells: list[Cell], plan: Plan, run: report.Run) -> None:
        self._plan, self._run = plan, run
        self._config, self._tensors = make_model(shape)
        self._generators: dict[str, Generator] = {}
        self._weights: Any = None
        if any(set(cell.peers) - {STREAM} for cell in cells):
            from benchmarks.cuda_peers import weights_on_device

            self._weights = weights_on_device(self._tensors)

    def close(self) -> None:
        """Gives the models back."""
        self._drop_generators()
        self._weights = None
        _give_memory_back()

    def measure(self, cell: Cell) -> None:
        """Lets the contestants of a cell take turns; where memory does not hold the caches of all,
        one after the other."""
        if cell.kind == "prefill":
            self._run.matrix_rates.append(matrix_rate())
        makers = self._makers(cell)
        if cell.cache_bytes() * len(makers) < 0.6 * _free_bytes():
            self._measure_bandwidth(cell)
            self._take_turns(cell, makers)
            self._measure_bandwidth(cell)
            return
        for maker in makers:
            self._drop_generators()  # a model keeps the memory of its cache for its next requests
            self._take_turns(cell, [maker])

    def _generator(self, dtype: str) -> Generator:
        if dtype not in self._generators:
            self._generators[dtype] = Generator.from_tensors(
                self._config, self._tensors, device="cuda", weight_dtype=dtype
            )
        return self._generators[dtype]

    def _drop_generators(self) -> None:
        for generator in self._generators.values():
            generator.close()
        self._generators.clear()

    def _measure_bandwidth(self, cell: Cell) -> None:
        if _free_bytes() > 2 * _BANDWIDTH_BYTES:
            generator = self._generator(cell.dtypes[0])
            self._run.bandwidths.append(
                generator.measure_read_bandwidth(_BANDWIDTH_BYTES, _BANDWIDTH_PASSES)
            )

    def _makers(self, cell: Cell) -> list[Maker]:
        def ours(dtype: str, stream: bool) -> Callable[[], Contestant]:
            return lambda: fastgen_contestant(self._generator(dtype), cell, stream)

        def peer(name: str) -> Callable[[], Contestant]:
            return lambda: self._make_peer(name, cell)

        makers = [(report.FASTGEN, dtype, ours(dtype, False)) for dtype in cell.dtypes]
        for name in cell.peers:
            if name == STREAM:
                makers.append((STREAM, cell.dtypes[0], ours(cell.dtypes[0], True)))
            else:
                makers.append((name, "float16", peer(name)))
        return makers

    def _make_peer(self, name: str, cell: Cell) -> Contestant:
        from benchmarks.cuda_peers import make_peer, time_limit

        if name not in (COMPILED, HF_STATIC):
            return make_peer(name, self._config, self._weights, cell)
        with time_limit(self._plan.compile_seconds):
            contestant = make_peer(name, self._config, self._weights, cell)
            contestant.sample()  # HuggingFace compiles while it generates
            return contestant

    def _take_turns(self, cell: Cell, makers: list[Maker]) -> None:
        from benchmarks.cuda_peers import TimeLimitError

        ready: list[tuple[str, str, Contestant, list[float]]] = []
        failures: dict[tuple[str, str], str] = {}
        for who, dtype, make in makers:
            begin = time.perf_counter()
            try:
                contestant = make()
                for _ in range(2):
                    contestant.sample()
                ready.append((who, dtype, contestant, []))
            except (FastgenError, RuntimeError, MemoryError, ImportError, TimeLimitError) as error:
                # A peer that has not the memory or the time must not take the others along.
                failures[who, dtype] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            seconds = time.perf_counter() - begin
            if seconds > 5:
                click.echo(f"{cell.key}: {who} {dtype} was ready after {seconds:.0f} s")
        for _ in range(self._plan.rounds):
            for _, _, contestant, samples in ready:
                samples.append(contestant.sample())
        for who, dtype, contestant, samples in ready:
            contestant.close()
            self._add(cell, who, dtype, samples, alone=len(makers) == 1)
        for (who, dtype), why in failures.items():
            self._add(cell, who, dtype, [], why)
        ready.clear()
        if any(who in (COMPILED, HF_STATIC) for who, _, _ in makers):
            from benchmarks.cuda_peers import forget_compiled

            forget_compiled()
        _give_memory_back()

    def _add(
        self,
        cell: Cell,
        who: str,
        dtype: str,
        samples: list[float],
        why: str = "",
        alone: bool = False,
    ) -> None:
        self._run.add(cell, who, dtype, samples, why, alone)
        click.echo(report.line(self._run, self._run.results[-1]))


def _free_bytes() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]


def _give_memory_back() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def choose_cells(
    preset_name: str,
    only: tuple[str, ...],
    dtypes: tuple[str, ...],
    peers: tuple[str, ...],
    done: set[str],
) -> list[Cell]:
    """Cells of a preset that match a pattern, with the contestants that are asked for, less those
    that are done."""
    chosen = []
    for cell in preset(preset_name):
        if cell.key in done:
            continue
        if only and not any(fnmatch.fnmatchcase(cell.key, pattern) for pattern in only):
            continue
        chosen.append(
            replace(
                cell,
                dtypes=tuple(d for d in cell.dtypes if d in dtypes),
                peers=tuple(p for p in cell.peers if p in peers),
            )
        )
    return [cell for cell in chosen if cell.dtypes]


@click.command(context_settings={"show_default": True})
@click.option(
    "--preset", "preset_name", type=click.Choice(("quick", "goals", "full")), default="quick"
)
@click.option(
    "--only", multiple=True, help="Cells that match, as 'decode:medium:b8:*'; repeatable."
)
@click.option("--dtypes", default=",".join(DTYPES), callback=names_of(DTYPES), help="Of fastgen.")
@click.option("--peers", default=",".join(PEERS), callback=names_of(PEERS), help="Empty: none.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, help="Samples of each contestant.")
@click.option("--compile-seconds", type=click.IntRange(min=1), default=120, help="A peer's limit.")
@click.option("--seconds", type=click.IntRange(min=1), help="Begin no cell after so many.")
@click.option(
    "--without",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Leave out the cells of this file; repeatable.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write this file.")
@click.option("--list", "list_only", is_flag=True, help="Name the cells and stop.")
@click.option("--merge", is_flag=True, help="Measure nothing: join FILES and print their table.")
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
def main(
    preset_name: str,
    only: tuple[str, ...],
    dtypes: tuple[str, ...],
    peers: tuple[str, ...],
    rounds: int,
    compile_seconds: int,
    seconds: int | None,
    without: tuple[Path, ...],
    json_path: Path | None,
    list_only: bool,
    merge: bool,
    files: tuple[Path, ...],
) -> None:
    """Times decode steps and prefill beside peers and the limits of the same run.

    The file is written after every cell, so that a run that is cut short loses none.
    """
    if merge:
        runs = [run for path in files for run in report.read(path)]
        if json_path is not None:
            report.write(json_path, runs)
        click.echo(report.table(runs))
        return
    if files:
        raise click.UsageError("FILES are for --merge")
    done = {r["cell"] for path in without for run in report.read(path) for r in run.results}
    cells = choose_cells(preset_name, only, dtypes, peers, done)
    if list_only:
        for cell in cells:
            click.echo(f"{cell.key:24} {','.join(cell.dtypes):34} {','.join(cell.peers)}")
        return
    left = measure(cells, Plan(rounds, compile_seconds), seconds, json_path)
    if left:
        click.echo(f"no time for: {' '.join(left)}")


def measure(
    cells: list[Cell], plan: Plan, seconds: int | None, json_path: Path | None
) -> list[str]:
    """Measures cells, writes and prints them; returns the keys of those that time did not allow."""
    begin = time.monotonic()
    run = report.Run(
        {
            "command": "python -m benchmarks.cuda " + shlex.join(sys.argv[1:]),
            "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "rounds": plan.rounds,
            "machine": report.machine(),
        }
    )
    left: list[str] = []
    contest: Contest | None = None
    shape = ""
    for at, cell in enumerate(cells):
        if seconds is not None and time.monotonic() - begin > seconds:
            left = [cell.key for cell in cells[at:]]
            break
        if cell.shape != shape:
            if contest is not None:
                contest.close()
            shape = cell.shape
            contest = Contest(shape, [c for c in cells if c.shape == shape], plan, run)
            click.echo(f"{shape}: begins {time.monotonic() - begin:.0f} s after the start")
        assert contest is not None
        contest.measure(cell)
        if json_path is not None:
            report.write(json_path, [run])
    if contest is not None:
        contest.close()
    click.echo(report.table([run]))
    return left


if __name__ == "__main__":
    main()
