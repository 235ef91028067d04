"""The near side of `cpu_worker.py`: processes that stand still until it is their turn."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from fastgen._capi import find_library

ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 1800.0  # the longest that an answer may take: an XL model is converted in it


class WorkerError(Exception):
    """A contestant cannot do what it was told; a line that says why."""


class WorkerProcess:
    """A contestant in a process of its own. Between commands it is stopped: threads that spin while
    they wait for work would take the others' cores.

    Args:
        python: interpreter of its environment.
        who: the program.
        threads: what libraries that read the environment are told.
        log: file that gets what it prints.
    """

    def __init__(self, python: Path, who: str, threads: int, log: Path) -> None:
        if not python.exists():
            raise WorkerError(f"there is no {_short(python)}: see ci/bench.sh")
        log.parent.mkdir(parents=True, exist_ok=True)
        count = str(threads)
        environment = {
            **os.environ,
            # Modules of this checkout, with the library that this process uses, wherever it runs.
            "PYTHONPATH": str(ROOT),
            "FASTGEN_LIBRARY": str(find_library()),
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [str(python), "-W", "ignore", "-m", "benchmarks.cpu_worker", who],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Its answer to a command.

        Raises:
            WorkerError: it cannot, it died, or it took too long.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        if not select.select([self._process.stdout], [], [], _SECONDS)[0]:
            raise WorkerError(f"no answer to {do} in {_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"it ended with status {status}: {lines[-1][:200] if lines else 'no words'}"


def _short(path: Path) -> str:
    """Without the directory of this checkout."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
