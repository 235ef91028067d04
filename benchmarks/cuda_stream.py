"""A caller that takes every token as it comes, beside one that asks for many steps at once.

python -m benchmarks.cuda_stream --shape medium --batches 1,8
"""

from __future__ import annotations

import statistics
import time

import click
import numpy as np

from benchmarks.cuda_models import make_model
from fastgen import Generator
from fastgen.bench import SHAPES
from fastgen.options import GenerationOptions

STEPS = 96


def milliseconds(generator: Generator, batch: int, steps: int, work: float) -> float:
    """Per decode step, of a caller who asks for ``steps`` at a time and works for ``work`` seconds
    after each call, as decoding and sending tokens does."""
    options = generator.native_options(
        GenerationOptions(
            max_length=STEPS + 8, decode_strategy="sampling", top_k=4, eos_token_id=-1
        )
    )
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, generator.info.vocab_size, 80)]
    with generator.open_session(batch) as session:
        for row in range(batch):
            options.first_sequence = row
            last = session.submit(prompt, options)
        while not session.length(last):
            session.step(1)
        session.step(4)
        begin = time.perf_counter()
        for _ in range(STEPS // steps):
            session.step(steps)
            until = time.perf_counter() + work
            while time.perf_counter() < until:
                pass
        return 1e3 * (time.perf_counter() - begin) / STEPS


@click.command(context_settings={"show_default": True})
@click.option("--shape", type=click.Choice(tuple(SHAPES)), default="medium")
@click.option("--batches", default="1,8", help="With commas between them.")
@click.option("--dtype", default="float16")
@click.option("--work-us", default=100, help="Microseconds that a caller works after each call.")
@click.option("--rounds", default=9)
def main(shape: str, batches: str, dtype: str, work_us: int, rounds: int) -> None:
    """Prints the medians; callers take turns."""
    config, tensors = make_model(shape)
    callers = [(32, 0.0), (1, 0.0), (1, 1e-6 * work_us)]
    with Generator.from_tensors(config, tensors, device="cuda", weight_dtype=dtype) as generator:
        for batch in map(int, batches.split(",")):
            samples: list[list[float]] = [[] for _ in callers]
            for turn in range(rounds + 1):
                for caller, mine in zip(callers, samples):
                    ms = milliseconds(generator, batch, *caller)
                    if turn > 0:  # one warms up
                        mine.append(ms)
            for (steps, work), mine in zip(callers, samples):
                click.echo(
                    f"{shape} {dtype} batch {batch}: {steps:2} steps a call, {1e6 * work:3.0f} us "
                    f"of work: {statistics.median(mine):.4f} ms a step"
                )


if __name__ == "__main__":
    main()
