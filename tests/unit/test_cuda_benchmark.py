"""What `python -m benchmarks.cuda` measures and writes, without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str) -> Any:
    """A module of benchmarks/, which is not installed."""
    if "benchmarks" not in sys.modules:
        path = ROOT / "benchmarks" / "__init__.py"
        spec = importlib.util.spec_from_file_location("benchmarks", path)
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["benchmarks"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"benchmarks.{name}")


cells_module = _load("cuda_cells")
cuda_report = _load("cuda_report")
cuda = _load("cuda")
make_model = _load("cuda_models").make_model
DTYPES, GOALS, PEERS = cells_module.DTYPES, cells_module.GOALS, cells_module.PEERS
MAX_POSITIONS, STEPS = cells_module.MAX_POSITIONS, cells_module.STEPS
WARM_STEPS, preset = cells_module.WARM_STEPS, cells_module.preset
PRESETS = ("quick", "goals", "full")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_every_goal(name: str) -> None:
    cells = {cell.key: cell for cell in preset(name)}
    assert len(cells) == len(preset(name))
    for goal in GOALS:
        assert goal.dtype in cells[goal.cell].dtypes
    shapes = [cell.shape for cell in cells.values()]
    assert shapes == sorted(shapes, key=shapes.index)  # no model is loaded twice


def test_the_full_preset_has_every_shape_batch_and_context() -> None:
    decode = [cell for cell in preset("full") if cell.kind == "decode"]
    assert len(decode) == 4 * 6 * 4
    assert all(cell.dtypes == DTYPES for cell in decode)


def test_steps_fit_and_lie_around_the_context() -> None:
    for cell in preset("full"):
        length = cell.prompt_length()
        if cell.kind == "prefill":
            assert length == cell.context
            continue
        assert length + 1 + WARM_STEPS + STEPS <= MAX_POSITIONS
        if cell.context > 2 * STEPS:
            assert length + 1 + WARM_STEPS + STEPS // 2 == cell.centre
            assert abs(cell.centre - cell.context) <= STEPS


def test_bytes_of_a_step() -> None:
    """Medium: 302 million weights in layers and 51 million in the head."""
    cell = next(c for c in preset("quick") if c.key == "decode:medium:b1:c128")
    weights = 12 * 24 * 1024**2 + 50257 * 1024
    assert cell.step_bytes("float16") == 2 * weights + 128 * 24 * 2 * 1024 * 2
    assert cell.step_bytes("int4") < cell.step_bytes("int8") < cell.step_bytes("float16")


def test_models_have_the_published_shapes() -> None:
    config, tensors = make_model("small")
    assert sum(t.size for t in tensors.values()) == 124_439_808
    assert tensors["wte.weight"].shape == (config["vocab_size"], 768)
    first, second = (tensors[f"h.{i}.mlp.c_fc.weight"] for i in (0, 1))
    assert not (first == second).all()
    assert abs(float(tensors["wte.weight"].std()) - 0.02) < 1e-4


def _run(name: str, ms: float) -> Any:
    run = cuda_report.Run({"machine": {"device": {"name": name}}, "command": "x"})
    run.bandwidths += [3e12, 4e12]
    run.matrix_rates.append(8e14)
    for cell in preset("goals"):
        for dtype in cell.dtypes:
            run.add(cell, cuda_report.FASTGEN, dtype, [ms, 2 * ms, 1.5 * ms])
        for peer in cell.peers:
            samples = [] if peer == "compiled" else [3 * ms]
            run.add(cell, peer, "float16", samples, "it took too long")
    return run


def test_files_can_be_joined(tmp_path: Path) -> None:
    first, second, joined = (tmp_path / f"{n}.json" for n in ("first", "second", "joined"))
    cuda_report.write(first, [_run("card A", 1.0)])
    cuda_report.write(second, [_run("card B", 0.1)])
    arguments = ["--merge", str(first), str(second), "--json", str(joined)]
    result = CliRunner().invoke(cuda.main, arguments)
    assert result.exit_code == 0, result.output
    assert "card A" in result.output
    assert "card B" in result.output
    (row,) = (line for line in result.output.splitlines() if line.startswith("small, batch 1"))
    # The newest figure, and the peers of its own run: 0.15 ms is more than 0.13.
    assert row.split()[5:] == [
        "0.13",
        "0.150",
        "NO",
        "42%",
        "2.00x",
        "2.00x",
        "-",
        "2.00x",
        "2.00x",
    ]
    assert [run.to_dict() for run in cuda_report.read(joined)] == [
        _run("card A", 1.0).to_dict(),
        _run("card B", 0.1).to_dict(),
    ]


def test_a_share_is_of_the_best_bandwidth() -> None:
    run = _run("card", 1.0)
    result = next(r for r in run.results if r["cell"] == "decode:medium:b1:c128")
    assert run.share(result) == pytest.approx(result["bytes"] / 1.5e-3 / 4e12)
    prefill = next(r for r in run.results if r["kind"] == "prefill")
    assert run.share(prefill) == pytest.approx(prefill["flops"] / 1.5e-3 / 8e14)


def test_cells_that_are_done_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    cuda_report.write(path, [_run("card", 1.0)])
    arguments = ["--preset", "full", "--list", "--without", str(path)]
    listed = CliRunner().invoke(cuda.main, arguments).output.splitlines()
    done = {cell.key for cell in preset("goals")}
    assert {line.split()[0] for line in listed} == {c.key for c in preset("full")} - done
    arguments = ["--list", "--only", "decode:medium:b[18]:*", "--dtypes", "int4", "--peers", ""]
    listed = CliRunner().invoke(cuda.main, arguments).output.splitlines()
    assert [line.split() for line in listed] == [["decode:medium:b1:c128", "int4"]]
    result = CliRunner().invoke(cuda.main, ["--list", "--peers", "nobody"])
    assert result.exit_code == 2
    assert all(peer in result.output for peer in PEERS)
