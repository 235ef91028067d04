"""Decoding on a GPU beside its peers and the device's own limit, all in one run.

python -m benchmarks.cuda --help
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import fastgen
from fastgen.bench import SHAPES, random_model
from fastgen.options import GenerationOptions

STEPS = 32


def _numbers(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


def _names(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    return [part for part in value.split(",") if part]


def fastgen_step(generator: fastgen.Generator, batch: int, context: int) -> float:
    """Milliseconds per decode step of ``batch`` sequences around ``context`` positions."""
    options = GenerationOptions(
        max_length=STEPS + 1, decode_strategy="sampling", top_k=4, eos_token_id=-1, seed=1
    )
    rng = np.random.default_rng(context)
    length = max(1, context - STEPS // 2)
    with generator.open_session(batch) as session:
        native = generator.native_options(options)
        ids = []
        for _ in range(batch):
            prompt = [int(t) for t in rng.integers(0, generator.info.vocab_size, length)]
            ids.append(session.submit(prompt, native))
        while not all(session.length(i) for i in ids):
            session.step(1)
        done = session.length(ids[0])
        begin = time.perf_counter()
        session.step(STEPS)
        seconds = time.perf_counter() - begin
        return 1e3 * seconds / (session.length(ids[0]) - done)


def fastgen_prefill(generator: fastgen.Generator, batch: int, length: int) -> float:
    """Seconds from submission to the first token of ``batch`` different prompts."""
    options = GenerationOptions(max_length=1, eos_token_id=-1)
    rng = np.random.default_rng(length)
    with generator.open_session(batch) as session:
        native = generator.native_options(options)
        prompts = rng.integers(0, generator.info.vocab_size, (batch, length)).tolist()
        begin = time.perf_counter()
        for prompt in prompts:
            session.submit(prompt, native)
        while session.step(1):
            pass
        return time.perf_counter() - begin


def matrix_rate(dtype: str) -> float:
    """FLOP/s of a large product of random matrices through PyTorch."""
    import torch

    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, torch.float16)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=kind) for _ in range(2))
    best = 0.0
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 4 * 2 * 8192**3 / (1e-3 * begin.elapsed_time(end)))
    return best


def torch_steps(
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    batch: int,
    contexts: list[int],
    dtype: str,
    compiled: bool,
    rounds: int,
) -> dict[int, float]:
    """Milliseconds per step of the PyTorch peer at every context."""
    import torch

    from benchmarks.torch_gpt2 import TorchGPT2, milliseconds

    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, torch.float16)
    result = {}
    for context in contexts:
        # As long a cache as the context asks for: attention runs over all of it.
        model = TorchGPT2(config, tensors, batch, min(1024, context + STEPS), kind)
        replay = model.capture(compiled)
        milliseconds(replay, model, context)
        result[context] = statistics.median(
            milliseconds(replay, model, context) for _ in range(rounds)
        )
        del model, replay
        gc.collect()
        torch.cuda.empty_cache()
    return result


@click.command()
@click.option("--shapes", default="medium", callback=_names, show_default=True)
@click.option("--batches", default="1,8", callback=_numbers, show_default=True)
@click.option("--contexts", default="128,1000", callback=_numbers, show_default=True)
@click.option("--dtypes", default="float16", callback=_names, show_default=True)
@click.option(
    "--peers", default="graph", callback=_names, show_default=True, help="graph, compiled"
)
@click.option("--prefill", default="8x512", show_default=True, help="batch x length; empty: none")
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write this file.")
def main(
    shapes: list[str],
    batches: list[int],
    contexts: list[int],
    dtypes: list[str],
    peers: list[str],
    prefill: str,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Times decode steps and prefill, with the limits of the same run."""
    results: list[dict[str, Any]] = []
    for shape in shapes:
        if shape not in SHAPES:
            raise click.UsageError(f"--shapes {shape} is not one of: {', '.join(SHAPES)}")
        config, tensors = random_model(shape)
        for dtype in dtypes:
            with fastgen.Generator.from_tensors(
                config, tensors, device="cuda", weight_dtype=dtype
            ) as generator:
                results += _measure(generator, shape, dtype, batches, contexts, prefill, rounds)
            gc.collect()
            if dtype not in ("float32", "float16", "bfloat16"):
                continue
            for peer in peers:
                for batch in batches:
                    times = torch_steps(
                        config, tensors, batch, contexts, dtype, peer == "compiled", rounds
                    )
                    for context, ms in times.items():
                        _record(results, f"torch {peer}", shape, dtype, batch, context, ms)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _record(
    results: list[dict[str, Any]],
    who: str,
    shape: str,
    dtype: str,
    batch: int,
    context: int,
    ms: float,
    **more: float,
) -> None:
    results.append(
        {"who": who, "shape": shape, "dtype": dtype, "batch": batch, "context": context, "ms": ms}
        | more
    )
    extra = "".join(f"  {name} {value:.3g}" for name, value in more.items())
    click.echo(f"{who:14} {shape:7} {dtype:9} B{batch:<4} ctx {context:<5} {ms:8.4f} ms{extra}")


def _measure(
    generator: fastgen.Generator,
    shape: str,
    dtype: str,
    batches: list[int],
    contexts: list[int],
    prefill: str,
    rounds: int,
) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    info = generator.info
    bandwidth = generator.measure_read_bandwidth(4 << 30, 5)
    click.echo(f"{info.device} {info.isa}: reads {bandwidth / 1e12:.2f} TB/s")
    for batch in batches:
        for context in contexts:
            fastgen_step(generator, batch, context)
            ms = statistics.median(fastgen_step(generator, batch, context) for _ in range(rounds))
            size = info.step_bytes + batch * context * info.cache_bytes_per_token
            _record(
                results,
                "fastgen",
                shape,
                dtype,
                batch,
                context,
                ms,
                tokens_per_s=1e3 * batch / ms,
                bandwidth_share=size / (1e-3 * ms) / bandwidth,
            )
    if prefill:
        batch, length = (int(part) for part in prefill.split("x"))
        fastgen_prefill(generator, batch, length)
        seconds = statistics.median(
            fastgen_prefill(generator, batch, length) for _ in range(rounds)
        )
        rate = matrix_rate(dtype)
        # Two operations for every weight of the blocks and every prompt token.
        layers, hidden, _ = SHAPES[shape]
        flops = 2.0 * batch * length * 12 * layers * hidden**2
        _record(
            results,
            "fastgen prefill",
            shape,
            dtype,
            batch,
            length,
            1e3 * seconds,
            tokens_per_s=batch * length / seconds,
            matrix_share=flops / seconds / rate,
        )
    return results


if __name__ == "__main__":
    main()
