"""Times the sampling kernel: `python -m tests.cuda.bench_sample [vocab]`, microseconds per step.

Steps are replayed from a CUDA graph with results in pinned host memory, as in generation; the
logits are in the L2 cache, where a decode step leaves them. FASTGEN_CUDA_OPS_OLD names a second
library, whose figures are put before.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.options import GenerationOptions
from tests.cuda import ops
from tests.cuda.memory import Array
from tests.cuda.sample_case import Case, Rows, sampling

STEPS = 50
REPEATS = 20


def model_like(rng: np.random.Generator, vocab: int) -> Array:
    """Logits whose probabilities fall off as a language model's do."""
    return (-1.3 * np.log1p(rng.permutation(vocab)) + rng.normal(size=vocab)).astype(np.float32)


def random_weights(rng: np.random.Generator, vocab: int) -> Array:
    """Logits of a model that learnt nothing: thousands of tokens matter."""
    return rng.normal(size=vocab).astype(np.float32)


def microseconds(library: ops.Library, rows: Rows, overlap: bool) -> float:
    """Median time of a step; with `overlap` each may start before the one before it has ended."""
    arguments = rows.arguments(library)
    arguments.overlap = overlap
    results = torch.zeros((STEPS, rows.count, 4), dtype=torch.int32).pin_memory()
    arguments.results = results.data_ptr()
    arguments.result_steps = STEPS
    slots, step = rows.slots._tensor, rows.step._tensor
    first_slots, first_step = slots.clone(), step.clone()

    def steps() -> None:
        slots.copy_(first_slots)
        step.copy_(first_step)
        for _ in range(STEPS):
            library.launch("sample", arguments)

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # what was made above was made on another stream
    with torch.cuda.stream(stream):
        steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        steps()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / STEPS)
    # For the next measurement: the sequences have room for so many steps.
    slots.copy_(first_slots)
    step.copy_(first_step)
    assert bool((results[..., 3] == torch.arange(1, STEPS + 1)[:, None]).all())
    return float(np.median(times))


def bench(vocab: int = 50257) -> None:
    """Prints the table."""
    libraries = {"new": ops.Library()}
    old = os.environ.get("FASTGEN_CUDA_OPS_OLD")
    if old:
        libraries = {"old": ops.Library(Path(old)), **libraries}
    greedy = GenerationOptions(decode_strategy="greedy_search", eos_token_id=-1, max_length=1000)
    chosen: dict[str, tuple[Any, int]] = {"greedy": (greedy, 8)}
    for name, options in {
        "no filter": {},
        "temperature 0.8": {"temperature": 0.8},
        "top_k 4": {"top_k": 4},
        "top_k 50": {"top_k": 50},
        "top_k 1000": {"top_k": 1000},
        "top_p 0.9": {"top_p": 0.9},
        "top_k 4, top_p 0.9": {"top_k": 4, "top_p": 0.9},
        "top_k 50, top_p 0.9, 0.8": {"top_k": 50, "top_p": 0.9, "temperature": 0.8},
    }.items():
        chosen[name] = (sampling(max_length=1000, **options), 8)
    chosen["the same, all processors"] = (
        sampling(
            top_k=50,
            top_p=0.9,
            temperature=0.8,
            repetition_penalty=1.2,
            no_repeat_ngram_size=3,
            min_length=900,
            eos_token_id=0,
            max_length=1000,
        ),
        900,
    )
    batches = (1, 8, 64)
    print(
        f"us per step, vocabulary {vocab}; rows: {batches}; each one after the other, overlapping"
    )
    for kind in (model_like, random_weights):
        for name, (options, length) in chosen.items():
            cells: dict[str, list[str]] = {which: [] for which in libraries}
            for batch in batches:
                rng = np.random.default_rng(batch)
                history = rng.integers(vocab, size=length).tolist()
                cases = [
                    Case(kind(rng, vocab), options, history, length, 1, row) for row in range(batch)
                ]
                rows = Rows(cases, STEPS)
                for which, library in libraries.items():
                    alone, overlapping = (microseconds(library, rows, on) for on in (False, True))
                    cells[which].append(f"{alone:6.2f} {overlapping:6.2f}")
            for which in libraries:
                print(
                    f"{kind.__name__:15} {name:26} {which}  {'   '.join(cells[which])}", flush=True
                )


if __name__ == "__main__":
    bench(*(int(argument) for argument in sys.argv[1:]))
