"""Generation on a CPU beside its peers and the machine's own limits, all in one run.

ci/bench.sh --preset goals --output benchmarks/results/cpu-goals.json
python -m benchmarks.cpu --preset quick --contestants 'fastgen:*' --contestants '*:int8'
"""

from __future__ import annotations

import fnmatch
import itertools
import shlex
import sys
import time
from pathlib import Path

import click
from tqdm import tqdm

from benchmarks import cpu_report as report
from benchmarks.cpu_cells import ALL, CONTESTANTS, PADDLENLP, PRESETS, Cell, preset
from benchmarks.cpu_process import ROOT
from fastgen.bench import SHAPES

_RESULTS = ROOT / "benchmarks" / "results"
_MODELS = ROOT / "build" / "benchmark-models"
_PADDLE_PYTHON = ROOT / ".venv" / "paddle26" / "bin" / "python"


def choose_contestants(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Keys that match one of the patterns; all without any.

    Raises:
        click.BadParameter: a pattern matches nobody.
    """
    for pattern in patterns:
        if not fnmatch.filter(ALL, pattern):
            raise click.BadParameter(f"{pattern!r} is none of: {', '.join(ALL)}")
    if not patterns:
        return ALL
    return tuple(key for key in ALL if any(fnmatch.fnmatchcase(key, p) for p in patterns))


def interpreters(values: tuple[str, ...]) -> dict[str, Path]:
    """Interpreter of each program: this one, but PaddleNLP's own; ``values`` are WHO=PATH."""
    found = {contestant.who: Path(sys.executable) for contestant in CONTESTANTS}
    found[PADDLENLP] = _PADDLE_PYTHON
    for value in values:
        who, _, path = value.partition("=")
        if who not in found or not path:
            raise click.BadParameter(f"{value!r} must be WHO=PATH, with one of {', '.join(found)}")
        found[who] = Path(path).absolute()
    return found


def baseline(name: str, chosen: Path | None) -> Path | None:
    """The file to compare with: the one that was asked for, else the committed one."""
    if chosen is not None:
        return chosen
    path = _RESULTS / f"cpu-{name}.json"
    return path if path.exists() else None


def _without_root(text: str) -> str:
    """Paths as from the checkout: files that are committed tell nobody where it was."""
    return text.replace(f"{ROOT}/", "")


@click.command(context_settings={"show_default": True})
@click.option(
    "--preset",
    "name",
    type=click.Choice(tuple(PRESETS)),
    default="quick",
    help="; ".join(f"{name}: {words}" for name, words in PRESETS.items()) + ".",
)
@click.option("--shape", type=click.Choice(tuple(SHAPES)), help="Another size than the preset's.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Of each contestant, at most.  [default: as many as there are processors]",
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Samples of each contestant.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1),
    default=10.0,
    help="A decode sample of someone slow ends after so many.",
)
@click.option("--contestants", multiple=True, help="As 'fastgen:*', 'openvino:int8'; repeatable.")
@click.option("--only", multiple=True, help="Cells that match, as 'decode:*:b8:*'; repeatable.")
@click.option("--python", "pythons", multiple=True, help="WHO=PATH of its interpreter; repeatable.")
@click.option(
    "--models",
    type=click.Path(file_okay=False, path_type=Path),
    default=_MODELS,
    show_default="build/benchmark-models",
    help="Directory of the model files, which are made once and kept.",
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write this JSON.")
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Draw into it.")
@click.option(
    "--compare",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="An earlier JSON.  [default: benchmarks/results/cpu-<preset>.json]",
)
@click.option("--list", "list_only", is_flag=True, help="Name cells and contestants and stop.")
@click.option(
    "--show",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: print the tables of this JSON.",
)
def main(
    name: str,
    shape: str | None,
    threads: int | None,
    rounds: int,
    seconds: float,
    contestants: tuple[str, ...],
    only: tuple[str, ...],
    pythons: tuple[str, ...],
    models: Path,
    output: Path | None,
    plots: Path | None,
    compare: Path | None,
    list_only: bool,
    show: Path | None,
) -> None:
    """Times decoding and prefill of GPT-2 shapes with random weights: fastgen in every weight type
    beside PaddleNLP, HuggingFace on PyTorch, CTranslate2, llama.cpp and OpenVINO.

    Contestants of a precision take turns, each in a process that stands still meanwhile. OUTPUT is
    written after every cell, so that a run that is cut short loses none.
    """
    if show is not None:
        finish(report.read(show), compare, plots)
        return
    keys = choose_contestants(contestants)
    cells = [
        cell
        for cell in preset(name, shape, threads)
        if not only or any(fnmatch.fnmatchcase(cell.key, pattern) for pattern in only)
    ]
    if list_only:
        for cell in cells:
            click.echo(f"{cell.key:28} {' '.join(k for k in cell.contestants if k in keys)}")
        return
    # Read before it is written again.
    found = baseline(name, compare)
    before = None if found is None else report.read(found)
    run = report.Run(
        {
            "command": "python -m benchmarks.cpu " + _without_root(shlex.join(sys.argv[1:])),
            "preset": name,
            "rounds": rounds,
            "machine": {},
            "contestants": {},
        }
    )
    begin = time.monotonic()
    measure(run, cells, keys, interpreters(pythons), rounds, seconds, models, output)
    run.about["seconds"] = time.monotonic() - begin
    if output is not None:
        report.write(output, run)
    finish(run, None, plots)
    if before is None or found is None:
        click.echo(f"\nnothing to compare with: there is no benchmarks/results/cpu-{name}.json")
    else:
        click.echo("\n" + report.comparison(before, run, found.name))


def measure(
    run: report.Run,
    cells: list[Cell],
    keys: tuple[str, ...],
    pythons: dict[str, Path],
    rounds: int,
    seconds: float,
    models: Path,
    output: Path | None,
) -> None:
    """Measures cells into a run."""
    from benchmarks.cpu_contest import Contest, Plan
    from benchmarks.cpu_limits import Limits, machine

    run.about["machine"] = machine()
    with tqdm(desc="samples", disable=not sys.stderr.isatty()) as bar:

        def say(text: str) -> None:
            with bar.external_write_mode():
                click.echo(text)

        def save() -> None:
            if output is not None:
                report.write(output, run)

        plan = Plan(rounds, seconds, models.absolute(), pythons, keys, say, bar.update)
        bar.total = plan.samples(cells)
        for (shape, threads), group in itertools.groupby(cells, lambda c: (c.shape, c.threads)):
            limits = Limits(threads, models.absolute())
            try:
                Contest(shape, threads, plan, run, limits).measure(list(group), save)
            finally:
                limits.close()


def finish(run: report.Run, compare: Path | None, plots: Path | None) -> None:
    """Prints the tables of a run and draws it."""
    click.echo("\n" + report.cells_table(run))
    click.echo("\n" + report.limits_table(run))
    for words in report.disagreements(run):
        click.echo(words)
    for shape, threads in report.goal_places(run):
        click.echo("\n" + report.goals_table(run, shape, threads))
    if compare is not None:
        click.echo("\n" + report.comparison(report.read(compare), run, compare.name))
    if plots is not None:
        from benchmarks.plot_cpu import draw

        for path in draw(run, plots):
            click.echo(path)


if __name__ == "__main__":
    main()
