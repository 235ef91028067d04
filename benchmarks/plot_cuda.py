"""Plots of what `python -m benchmarks.cuda --json FILE` measured.

python -m benchmarks.plot_cuda full.json --out docs/plots
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import cuda_report as report
from benchmarks.cuda_cells import COMPILED, DTYPES, GRAPH, HF_EAGER, HF_STATIC, Cell
from fastgen.bench import SHAPES

# Names for a reader, in the order of the legends.
SERIES = {
    (HF_EAGER, "float16"): "HuggingFace generate",
    (HF_STATIC, "float16"): "HuggingFace, static cache, compiled",
    (GRAPH, "float16"): "PyTorch, CUDA graph",
    (COMPILED, "float16"): "PyTorch, compiled, CUDA graph",
    **{(report.FASTGEN, dtype): f"fastgen {dtype}" for dtype in DTYPES},
}


class Results:
    """Results of some runs, by place and contestant; the newest counts."""

    def __init__(self, runs: list[report.Run]) -> None:
        self.runs = runs
        self._found = {
            (r["cell"], r["who"], r["dtype"]): (run, r)
            for run in runs
            for r in run.results
            if "ms" in r
        }

    def ms(self, cell: str, who: str, dtype: str) -> float | None:
        """Median milliseconds, or None."""
        found = self._found.get((cell, who, dtype))
        return found[1]["ms"]["median"] if found else None

    def share(self, cell: str, who: str, dtype: str) -> float | None:
        """Share of bandwidth, or None."""
        found = self._found.get((cell, who, dtype))
        return found[0].share(found[1]) if found else None

    def series(self, cells: dict[int, str], who: str, dtype: str) -> tuple[list[int], list[float]]:
        """What there is of a contestant in some cells."""
        points = {x: self.ms(cell, who, dtype) for x, cell in cells.items()}
        xs = [x for x, y in points.items() if y is not None]
        return xs, [y for y in points.values() if y is not None]

    def limit(self, cell: Cell) -> float:
        """Milliseconds that reading what a float16 step must read takes."""
        best = max(bandwidth for run in self.runs for bandwidth in run.bandwidths)
        return 1e3 * cell.step_bytes("float16") / best


def _cell(shape: str, batch: int, context: int) -> Cell:
    return Cell("decode", shape, batch, context, DTYPES, ())


def _lines(results: Results, cells: dict[int, Cell], label: str, title: str) -> Any:
    figure, axes = plt.subplots(figsize=(8.5, 4.5))
    keys = {x: cell.key for x, cell in cells.items()}
    for (who, dtype), name in SERIES.items():
        xs, ys = results.series(keys, who, dtype)
        if len(xs) > 1:
            style = "o-" if who == report.FASTGEN else "s--"
            axes.plot(xs, ys, style, label=name, markersize=4)
    axes.plot(list(cells), [results.limit(c) for c in cells.values()], "k:", label="limit, float16")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(cells), [str(x) for x in cells])
    axes.set_xlabel(label)
    axes.set_ylabel("ms per decode step")
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def by_batch(results: Results) -> Any:
    """Step time against batch."""
    cells = {batch: _cell("medium", batch, 128) for batch in (1, 4, 8, 32, 64, 256)}
    return _lines(results, cells, "batch", "GPT-2 medium, context 128")


def by_context(results: Results) -> Any:
    """Step time against context."""
    cells = {context: _cell("medium", 1, context) for context in (16, 128, 512, 1024)}
    return _lines(results, cells, "context", "GPT-2 medium, batch 1")


def bandwidth_shares(results: Results) -> Any:
    """Share of the read bandwidth, for each shape."""
    figure, axes = plt.subplots(figsize=(8.5, 4))
    series = [*((report.FASTGEN, dtype) for dtype in DTYPES), (GRAPH, "float16")]
    width = 0.8 / len(series)
    for at, (who, dtype) in enumerate(series):
        shares = [results.share(_cell(shape, 1, 128).key, who, dtype) for shape in SHAPES]
        places = [i + (at - (len(series) - 1) / 2) * width for i in range(len(SHAPES))]
        axes.bar(places, [100 * (s or 0) for s in shares], width, label=SERIES[who, dtype])
    axes.set_xticks(range(len(SHAPES)), list(SHAPES))
    axes.set_ylabel("% of the read bandwidth measured")
    axes.set_title("Batch 1, context 128")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.grid(visible=True, axis="y", alpha=0.3)
    return figure


def ladder(results: Results) -> Any:
    """Everybody's step of medium, batch 1, and what bandwidth allows."""
    cell = _cell("medium", 1, 128)
    bars = [(name, results.ms(cell.key, *who)) for who, name in SERIES.items()]
    shown = [(name, ms) for name, ms in bars if ms is not None]
    shown.append(("reads at full bandwidth, float16", results.limit(cell)))
    shown.sort(key=lambda bar: -bar[1])
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(shown) + 1.2))
    drawn = axes.barh([name for name, _ in shown], [ms for _, ms in shown])
    axes.bar_label(drawn, [f"{ms:.3f}" for _, ms in shown], fontsize=7, padding=2)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("ms per decode step")
    axes.set_title("GPT-2 medium, batch 1, context 128")
    axes.invert_yaxis()
    return figure


PLOTS = {
    "cuda_batch": by_batch,
    "cuda_context": by_context,
    "cuda_bandwidth": bandwidth_shares,
    "cuda_ladder": ladder,
}


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Directory of the PNGs."
)
def main(path: Path, out: Path) -> None:
    """Draws PATH, a file of `python -m benchmarks.cuda --json`."""
    results = Results(report.read(path))
    out.mkdir(parents=True, exist_ok=True)
    devices = sorted({run.about["machine"]["device"]["name"] for run in results.runs})
    for name, draw in PLOTS.items():
        figure = draw(results)
        figure.text(0.99, 0.01, ", ".join(devices), ha="right", fontsize=6)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=130)
        plt.close(figure)
        click.echo(out / f"{name}.png")


if __name__ == "__main__":
    main()
