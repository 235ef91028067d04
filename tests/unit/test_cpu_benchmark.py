"""What `python -m benchmarks.cpu` measures, judges and writes, without its peers."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
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


cells = _load("cpu_cells")
report = _load("cpu_report")
worker = _load("cpu_worker")
process = _load("cpu_process")
cpu = _load("cpu")
BY_KEY = {contestant.key: contestant for contestant in cells.CONTESTANTS}


@pytest.mark.parametrize("name", list(cells.PRESETS))
def test_presets_have_every_place_once(name: str) -> None:
    found = cells.preset(name, threads=2)
    keys = [cell.key for cell in found]
    assert len(set(keys)) == len(keys)
    places = [(cell.shape, cell.threads) for cell in found]
    assert places == sorted(places, key=places.index)  # no contestant is loaded twice
    for cell in found:
        assert cell.positions <= cells.MAX_POSITIONS
        assert set(cell.contestants) <= set(cells.ALL)
        assert cell.contestants


def test_goals_are_those_of_everybody() -> None:
    found = {cell.key: cell for cell in cells.preset("goals", threads=2)}
    assert set(cells.goal_cells("medium", 2).values()) == set(found)
    assert all(cell.contestants == cells.ALL for cell in found.values())
    full = {cell.key: cell for cell in cells.preset("full", threads=2)}
    assert set(found) <= set(full)
    assert all(full[key].contestants == cells.ALL for key in found)
    for goal in cells.GOALS:
        assert (goal.share is None) != (goal.ratio is None)
        assert goal.against == "best" or goal.against in BY_KEY


def test_threads_reach_the_processors() -> None:
    assert [c.threads for c in cells.preset("threads", threads=6)[::3]] == [6, 4, 2, 1]


def test_bytes_and_operations() -> None:
    """Medium: 302 million weights in layers and 51 million in the head."""
    cell = cells.Cell("decode", "medium", 1, 16, 2)
    weights = 12 * 24 * 1024**2 + 50257 * 1024
    cache = (16 + 1 + 16) * 24 * 2 * 1024
    assert cell.step_bytes("float32") == 4 * weights + 4 * cache
    assert cell.step_bytes("int4") == 0.5625 * weights + 2 * cache
    prefill = cells.Cell("prefill", "medium", 1, 512, 2)
    assert prefill.prefill_flops() == 2 * 512 * 12 * 24 * 1024**2
    assert (cell.tokens, prefill.tokens) == (1, 512)


def test_a_clock_counts_steps_after_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    clock = worker.Clock(steps=3, seconds=100.0)
    now[0] = 5.0  # the prompt
    ticks = []
    for _ in range(5):
        ticks.append(clock.tick())
        now[0] += 2.0
    assert ticks == [False, False, False, True, True]
    assert clock.result() == {"steps": 3, "seconds": 6.0}


def test_a_clock_lets_slow_ones_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    clock = worker.Clock(steps=32, seconds=1.0)
    clock.tick()
    with pytest.raises(RuntimeError, match="after 0 of 32"):
        clock.result()
    while not clock.done:
        now[0] += 7.0
        clock.tick()
    assert clock.result() == {"steps": 2, "seconds": 14.0}


def _run(speeds: dict[str, float], machine: str = "one", absent: tuple[str, ...] = ()) -> Any:
    """A run of the goals in which contestants by key, or programs, have these tokens/s."""
    about = {"processor": machine, "time": "today"}
    run = report.Run({"machine": about, "command": "x", "contestants": {}})
    run.bandwidths["2"] = [30e9, 40e9]
    run.peaks["2"] = {"float32": [2e11], "bfloat16": [4e11], "int8": [8e11]}
    for cell in cells.preset("goals", threads=2):
        for key in cell.contestants:
            contestant = BY_KEY[key]
            if key in absent:
                run.add(cell, contestant, [], [], 0.0, "it is not there")
                continue
            speed = speeds.get(key, speeds.get(contestant.who, 10.0))
            seconds = [cell.tokens / (speed * factor) for factor in (0.9, 1.0, 1.1)]
            work = 1e9 if cell.kind == "decode" else cell.prefill_flops()
            limit = 40e9 if cell.kind == "decode" else 2e11
            run.add(cell, contestant, seconds, [limit] * 3, work)
    return run


def _verdicts(run: Any) -> dict[tuple[str, str, str], Any]:
    found = report.verdicts(run, "medium", 2)
    return {(v.goal.dtype, v.goal.column, "share" if v.goal.share else "ratio"): v for v in found}


def test_goals_are_judged_by_the_best_peer() -> None:
    run = _run({"fastgen": 33.0, "llama.cpp:float32": 25.0, "openvino:float32": 30.0})
    found = _verdicts(run)
    assert len(found) == len(cells.GOALS)
    ratio = found["float32", "b1", "ratio"]
    assert ratio.figure == pytest.approx(33.0 / 30.0)
    assert ratio.holds is True
    assert ratio.against == "openvino f32"
    assert found["float32", "b8", "ratio"].holds is False  # 1.1 where 1.25 is asked for
    share = found["float32", "b1", "share"]
    assert share.figure == pytest.approx(33.0 * 1e9 / 40e9)
    assert share.holds is False
    # Not the best peer but llama.cpp, where the goal says so.
    assert found["int8", "b1", "ratio"].against == "llama.cpp q8_0"
    assert found["float16", "prefill", "ratio"].figure == pytest.approx(1.0)


def test_who_does_not_run_is_named() -> None:
    run = _run({}, absent=("llama.cpp:int8", "openvino:int4", "fastgen:bfloat16"))
    found = _verdicts(run)
    assert found["int8", "b1", "ratio"].holds is None
    assert found["bfloat16", "b1", "share"].holds is None
    assert found["float16", "b1", "ratio"].figure is None
    assert found["int4", "b8", "ratio"].against == "llama.cpp q4_0 (without openvino)"
    table = report.goals_table(run, "medium", 2)
    assert table.count("not measured") >= 3
    assert "none: it is not there" in report.cells_table(run)


def test_a_share_needs_a_limit() -> None:
    run = report.Run({"machine": {}, "contestants": {}})
    cell = cells.Cell("prefill", "small", 1, 512, 2)
    run.add(cell, BY_KEY["fastgen:int8"], [1.0, 2.0], [None, None], 1e12)
    assert run.results[0]["share"] is None
    assert "-" in report.line(run.results[0])
    run.add(cell, BY_KEY["fastgen:int4"], [1.0, 2.0], [4e12, None], 1e12)
    assert run.results[1]["share"]["samples"] == [0.25]


def test_files_keep_everything(tmp_path: Path) -> None:
    run = _run({"fastgen": 20.0}, absent=("torch:bfloat16",))
    report.write(tmp_path / "run.json", run)
    assert report.read(tmp_path / "run.json").to_dict() == run.to_dict()
    result = CliRunner().invoke(cpu.main, ["--show", str(tmp_path / "run.json")])
    assert result.exit_code == 0, result.output
    assert "GPT-2 medium" in result.output
    assert "30.0 to 40.0 GB/s read" in result.output


def test_only_what_left_the_spread_has_moved() -> None:
    before = _run({"fastgen:int8": 20.0, "fastgen:int4": 30.0, "openvino": 10.0})
    # Samples lie 10 % around the median: 5 % is inside, 50 % is not.
    now = _run({"fastgen:int8": 21.0, "fastgen:int4": 45.0, "openvino": 10.0}, machine="other")
    moved = report.moves(before, now)
    assert {(move.who, move.dtype) for move in moved} == {("fastgen", "int4")}
    assert len(moved) == 3
    assert (moved[0].before, moved[0].now) == (pytest.approx(30.0), pytest.approx(45.0))
    text = report.comparison(before, now, "cpu-goals.json")
    assert "another machine" in text
    assert "(+50%)" in text
    assert "nothing moved" in report.comparison(now, now, "cpu-goals.json")


def test_other_tokens_are_told() -> None:
    run = _run({})
    for result in run.results:
        if result["kind"] == "prefill":
            result["first_tokens"] = [8 if result["who"] == "openvino" else 7]
    (words,) = report.disagreements(run)
    assert "openvino" in words


def test_options_are_read() -> None:
    listed = CliRunner().invoke(
        cpu.main,
        [
            "--list",
            "--preset",
            "goals",
            "--threads",
            "2",
            "--contestants",
            "*:int4",
            "--only",
            "decode:*",
        ],
    )
    lines = [line.split() for line in listed.output.splitlines()]
    assert [line[0] for line in lines] == ["decode:medium:b1:c16:t2", "decode:medium:b8:c16:t2"]
    assert lines[0][1:] == ["fastgen:int4", "llama.cpp:int4", "openvino:int4"]
    for wrong in (["--contestants", "nobody"], ["--python", "torch"], ["--python", "nobody=x"]):
        result = CliRunner().invoke(cpu.main, [*wrong])
        assert result.exit_code == 2, wrong
        assert "llama.cpp" in result.output


def test_a_worker_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(process.WorkerError, match=r"there is no python: see ci/bench\.sh"):
        process.WorkerProcess(tmp_path / "python", "torch", 1, tmp_path / "log")
    one = process.WorkerProcess(Path(sys.executable), "fastgen", 1, tmp_path / "log")
    try:
        with pytest.raises(process.WorkerError, match="TypeError"):
            one.ask("load", source="x", converted="y")
        with pytest.raises(process.WorkerError):
            one.ask("load", source=str(tmp_path), converted="y", dtype="int3", threads=1)
    finally:
        one.close()


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    one = process.WorkerProcess(Path(sys.executable), "nobody", 1, tmp_path / "log")
    try:
        with pytest.raises(process.WorkerError, match="KeyError"):
            one.ask("load", source="x", converted="y", dtype="int8", threads=1)
    finally:
        one.close()


def test_fastgen_answers_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The far side, with a small model that is written as the others are."""
    from fastgen.bench import SHAPES

    monkeypatch.setitem(SHAPES, "tiny", (1, 16, 2))
    source = _load("cpu_models").write_model(tmp_path, "tiny")
    assert source == _load("cpu_models").write_model(tmp_path, "tiny")
    one = process.WorkerProcess(Path(sys.executable), "fastgen", 1, tmp_path / "log")
    try:
        load = {"source": str(source), "converted": str(tmp_path), "dtype": "int8", "threads": 1}
        assert one.ask("convert", **load) == {}
        assert one.ask("load", **load)["step_bytes"] > 0
        sample = {"batch": 2, "context": 5, "steps": 3, "seconds": 60.0}
        decoded = one.ask("sample", kind="decode", **sample)
        assert decoded["steps"] == 3
        assert decoded["seconds"] > 0
        first = one.ask("sample", kind="prefill", **sample)["tokens"]
        assert len(first) == 2
        assert first == one.ask("sample", kind="prefill", **sample)["tokens"]
    finally:
        one.close()


@pytest.mark.skipif(shutil.which("g++") is None, reason="the peaks are compiled")
@pytest.mark.parametrize("together", [True, False])
def test_a_run_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Two weight types of fastgen, and a peer whose environment is missing."""
    from fastgen.bench import SHAPES

    contest, limits = _load("cpu_contest"), _load("cpu_limits")
    monkeypatch.setitem(SHAPES, "tiny", (1, 16, 2))
    monkeypatch.setattr(limits, "_BANDWIDTH_BYTES", 1 << 22)
    if not together:
        monkeypatch.setattr(contest, "_PROCESS_BYTES", 1e18)
    keys = ("fastgen:float32", "fastgen:float16", "paddlenlp:float32")
    places = [("decode", 2, 4), ("prefill", 1, 9)]
    wanted = [cells.Cell(kind, "tiny", rows, n, 1, keys) for kind, rows, n in places]
    run = report.Run({"machine": {}, "contestants": {}})
    pythons = cpu.interpreters((f"paddlenlp={tmp_path / 'nowhere'}",))
    output = tmp_path / "run.json"
    cpu.measure(run, wanted, keys, pythons, 2, 60.0, tmp_path / "models", output)
    assert report.read(output).to_dict() == run.to_dict()
    for cell in wanted:
        for key in keys[:2]:
            result = run.find(cell.key, key)
            assert len(result["tokens_per_s"]["samples"]) == 2
            assert result["alone"] is not together
            if cell.kind == "decode":
                assert len(result["share"]["samples"]) == 2
    missing = [r for r in run.results if r["who"] == "paddlenlp"]
    assert [r["why"] for r in missing] == ["there is no nowhere: see ci/bench.sh"] * 2
    assert run.about["contestants"]["paddlenlp:float32"] == {"why": missing[0]["why"]}
    assert run.about["contestants"]["fastgen:float16"]["step_bytes"] > 0
