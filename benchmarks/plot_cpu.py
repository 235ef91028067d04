"""Plots of what `python -m benchmarks.cpu --output FILE` measured.

python -m benchmarks.plot_cpu benchmarks/results/cpu-full.json --out docs/plots
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import cpu_report as report
from benchmarks.cpu_cells import CONTESTANTS, FASTGEN, PRECISIONS, Contestant
from fastgen.bench import SHAPES

_PANELS = (("float32",), ("bfloat16", "float16"), ("int8",), ("int4",))
_PROGRAMS = list(dict.fromkeys(contestant.who for contestant in CONTESTANTS))
_COLOURS = {who: f"C{i}" for i, who in enumerate(_PROGRAMS)}
# A curve joins results that agree in everything but one of these.
_PLACE = ("kind", "shape", "batch", "context", "threads")

Curve = dict[Any, str]  # cells by what changes


def curves(run: report.Run, along: str, least: int = 3) -> Iterator[tuple[dict[str, Any], Curve]]:
    """What stays the same, and the cells of each curve of at least so many points."""
    found: dict[tuple[Any, ...], Curve] = {}
    for result in run.results:
        same = tuple(result[name] for name in _PLACE if name != along)
        found.setdefault(same, {})[result[along]] = result["cell"]
    for same, curve in found.items():
        if len(curve) >= least:
            yield dict(zip((name for name in _PLACE if name != along), same)), curve


def _label(contestant: Contestant) -> str:
    return f"{contestant.who} {contestant.variant}"


def _points(
    run: report.Run, curve: Curve, contestant: Contestant
) -> tuple[list[Any], list[float], list[tuple[float, float]]]:
    """Where there is a result, its median, and how far its samples lie below and above."""
    xs, ys, spread = [], [], []
    for x, cell in curve.items():
        result = run.find(cell, contestant.key)
        if result is not None:
            speed = result["tokens_per_s"]
            xs.append(x)
            ys.append(speed["median"])
            spread.append((speed["median"] - speed["min"], speed["max"] - speed["median"]))
    return xs, ys, spread


def draw_curve(run: report.Run, along: str, same: dict[str, Any], curve: Curve) -> Any:
    """Tokens/s against one thing, a panel for each precision."""
    places = {x: i for i, x in enumerate(sorted(curve, key=_order))}
    figure, panels = plt.subplots(1, len(_PANELS), figsize=(13, 3.8), sharey=True)
    for axes, precisions in zip(panels, _PANELS):
        for contestant in CONTESTANTS:
            if contestant.dtype not in precisions:
                continue
            xs, ys, spread = _points(run, curve, contestant)
            if ys:
                axes.errorbar(
                    [places[x] for x in xs],
                    ys,
                    yerr=list(zip(*spread)),
                    fmt="s--" if contestant.who != FASTGEN else "o-",
                    color=_COLOURS[contestant.who],
                    alpha=0.5 if contestant.dtype == "float16" else 1.0,
                    label=_label(contestant),
                    markersize=4,
                    capsize=2,
                )
        axes.set_xticks(list(places.values()), [str(x) for x in places])
        axes.set_xlabel(along)
        axes.set_yscale("log")
        axes.set_title(", ".join(precisions), fontsize=9)
        axes.grid(visible=True, which="both", alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=6)
    panels[0].set_ylabel("tokens/s")
    words = ", ".join(f"{name} {value}" for name, value in same.items() if name != "kind")
    figure.suptitle(f"{same['kind']}, {words}", fontsize=10)
    return figure


def _order(x: Any) -> int:
    return list(SHAPES).index(x) if x in SHAPES else int(x)


def draw_goals(run: report.Run, shape: str, threads: int) -> Any:
    """Everybody in the cells of the goals."""
    cells = report.goal_cells(shape, threads)
    figure, panels = plt.subplots(1, len(cells), figsize=(13, 4.8))
    order = [c for dtype in PRECISIONS for c in CONTESTANTS if c.dtype == dtype]
    for axes, (column, cell) in zip(panels, cells.items()):
        results = [(c, run.find(cell, c.key)) for c in order]
        shown = [(c, r["tokens_per_s"]["median"]) for c, r in results if r is not None]
        names = [f"{c.who} {c.dtype}" for c, _ in shown]
        colours = [_COLOURS[c.who] for c, _ in shown]
        bars = axes.barh(names, [speed for _, speed in shown], color=colours)
        axes.bar_label(bars, [f"{speed:.0f}" for _, speed in shown], fontsize=6, padding=2)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=6)
        axes.margins(x=0.15)
        axes.set_xlabel("tokens/s")
        axes.set_title(report.COLUMNS[column], fontsize=9)
    figure.suptitle(f"GPT-2 {shape}, {threads} threads", fontsize=10)
    return figure


def figures(run: report.Run) -> Iterator[tuple[str, Any]]:
    """Names and figures of what the run has."""
    for shape, threads in report.goal_places(run):
        yield f"cpu_goals_{shape}_t{threads}", draw_goals(run, shape, threads)
    for along in ("context", "batch", "threads", "shape"):
        # Two processors make two points.
        for same, curve in curves(run, along, least=2 if along == "threads" else 3):
            place = "_".join(
                value if name == "shape" else f"{name[0]}{value}"
                for name, value in same.items()
                if name != "kind"
            )
            yield f"cpu_{along}_{same['kind']}_{place}", draw_curve(run, along, same, curve)


def draw(run: report.Run, directory: Path) -> list[Path]:
    """Writes all plots as PNGs; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(run):
        machine = run.about["machine"]
        figure.text(0.99, 0.01, f"{machine['processor']}, {machine['time']}", ha="right", size=6)
        figure.tight_layout()
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Directory of the PNGs."
)
def main(path: Path, out: Path) -> None:
    """Draws PATH, a file of `python -m benchmarks.cpu --output`."""
    for drawn in draw(report.read(path), out):
        click.echo(drawn)


if __name__ == "__main__":
    main()
