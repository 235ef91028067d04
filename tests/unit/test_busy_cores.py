"""Threads that wait for each other at every region must not collapse when cores are taken away."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors

# Twice is what two threads on one core cannot avoid. Spinning without giving up the core would be
# some hundred times: every region would wait for the end of a time slice.
MOST = 10.0


def test_a_busy_core_slows_down_in_proportion() -> None:
    shape = GPTShape(2000, 128, 256, 6, 4, 1024)
    threads = len(os.sched_getaffinity(0))
    options = GenerationOptions(max_length=64, eos_token_id=-1)
    with EngineModel(
        shape, make_tensors(shape, WeightRecipe(seed=1)), num_threads=threads
    ) as model:

        def best() -> float:
            times = []
            for _ in range(7):
                begin = time.perf_counter()
                model.generate([[1, 2, 3]], options)
                times.append(time.perf_counter() - begin)
            return min(times)

        idle = best()
        busy = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _ in range(max(1, threads // 2))
        ]
        try:
            time.sleep(0.5)
            loaded = best()
        finally:
            for process in busy:
                process.kill()
                process.wait()
    print(f"{1e3 * idle:.1f} ms idle, {1e3 * loaded:.1f} ms beside {len(busy)} busy processes")
    assert loaded < MOST * idle
