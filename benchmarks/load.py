"""How long a model takes from its directory to the first token, beside reading its file.

python -m benchmarks.load <directory>    prints a round per line and the medians
"""

from __future__ import annotations

import json
import mmap
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

# A process of its own for every round, so that its peak memory is that of one load.
CHILD = """
import json, resource, sys, time
import numpy, fastgen
begin = time.perf_counter()
generator = fastgen.Generator.from_pretrained(sys.argv[1], num_threads=int(sys.argv[2]))
loaded = time.perf_counter()
prompt = [i % generator.info.vocab_size for i in range(int(sys.argv[3]))]
generator.generate([prompt], max_length=1, decode_strategy="greedy_search")
end = time.perf_counter()
print(json.dumps({
    "load": loaded - begin,
    "first_token": end - begin,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "weights": generator.info.weight_bytes,
}))
"""


def weight_files(directory: Path) -> list[Path]:
    """Files that hold the weights of a model directory or an export."""
    files = sorted(directory.glob("*.pdiparams")) or sorted(directory.glob("*.safetensors"))
    if not files:
        raise click.UsageError(f"{directory}: there is no gpt.pdiparams and no model.safetensors")
    return files


def read_seconds(files: list[Path]) -> float:
    """Seconds to read the files from the page cache into memory that was never used before."""
    size = sum(path.stat().st_size for path in files)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    done = 0
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while (count := file.readinto(view[done:])) > 0:
                done += count
    seconds = time.perf_counter() - begin
    view.release()
    memory.close()
    return seconds


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=7, show_default=True, help="Rounds after one that warms up.")
@click.option("--threads", default=0, help="0: as many as the process may use.")
@click.option("--prompt_tokens", default=4, show_default=True, help="Length of the prompt.")
def main(directory: Path, rounds: int, threads: int, prompt_tokens: int) -> None:
    """Times loading DIRECTORY up to its first token, beside reading its weight file."""
    files = weight_files(directory)
    results = []
    click.echo(
        f"{'read s':>8} {'load s':>8} {'first token s':>14} {'ratio':>6} {'peak/weights':>13}"
    )
    for index in range(rounds + 1):
        before = read_seconds(files)
        command = [sys.executable, "-c", CHILD, directory, str(threads), str(prompt_tokens)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(output)
        # The machine's speed drifts: the reads on both sides of a load stand for it.
        result["read"] = statistics.mean([before, read_seconds(files)])
        result["ratio"] = result["first_token"] / result["read"]
        result["memory"] = result["peak"] / result["weights"]
        if index > 0:
            results.append(result)
            echo(result)
    click.echo("median")
    echo({key: statistics.median(r[key] for r in results) for key in results[0]})


def echo(result: dict[str, float]) -> None:
    """One line of the table."""
    click.echo(
        f"{result['read']:8.3f} {result['load']:8.3f} {result['first_token']:14.3f} "
        f"{result['ratio']:6.2f} {result['memory']:13.3f}"
    )


if __name__ == "__main__":
    main()
