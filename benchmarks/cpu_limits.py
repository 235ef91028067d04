"""The machine's own limits for `python -m benchmarks.cpu`, measured between the contestants."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from fastgen import Generator, models

_SOURCE = Path(__file__).with_name("cpu_peaks.cc")
_BANDWIDTH_BYTES = 1 << 30
_BANDWIDTH_PASSES = 3


class Limits:
    """Measures with as many threads as the contestants have.

    Args:
        threads: of every measurement.
        directory: where the program for the peaks is compiled.
    """

    def __init__(self, threads: int, directory: Path) -> None:
        self._threads = threads
        self._program = _compiled(directory)
        # Any model lends its threads; no contestant should be disturbed for it.
        self._generator = Generator.from_pretrained(models.DEFAULT_MODEL, num_threads=threads)

    def close(self) -> None:
        """Ends the threads."""
        self._generator.close()

    def bandwidth(self) -> float:
        """Bytes/s read: the best of some passes over a gigabyte."""
        return self._generator.measure_read_bandwidth(_BANDWIDTH_BYTES, _BANDWIDTH_PASSES)

    def peaks(self) -> dict[str, Any]:
        """Operations/s by type, with the instruction; None where the processor has none."""
        command = [str(self._program), str(self._threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found: dict[str, Any] = json.loads(output)
        return found


def _compiled(directory: Path) -> Path:
    """The program of cpu_peaks.cc, compiled unless it is newer than its source."""
    program = directory / "cpu_peaks"
    if program.exists() and program.stat().st_mtime >= _SOURCE.stat().st_mtime:
        return program
    directory.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C++ compiler: {compiler}")
    options = ["-O2", "-std=c++17", "-pthread"]
    subprocess.run([compiler, *options, str(_SOURCE), "-o", str(program)], check=True)
    return program


def machine() -> dict[str, Any]:
    """What the run is on: processor, memory, system; how busy it was when the run began."""
    name = platform.processor()
    flags: list[str] = []
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags" and not flags:
            wanted = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16")
            flags = [flag for flag in value.split() if flag in (*wanted, "amx_bf16", "amx_int8")]
    return {
        "processor": name,
        "flags": sorted(flags),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
