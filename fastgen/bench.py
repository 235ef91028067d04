"""`fastgen bench`: decode and prefill speed beside the machine's measured read bandwidth."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from fastgen import convert, infer, models
from fastgen._checkpoint import tensor_shapes
from fastgen._engine import Session
from fastgen._quantize import stored_weight_dtype
from fastgen.errors import InvalidArgumentError
from fastgen.generator import Generator
from fastgen.options import GenerationOptions

#: GPT-2's published sizes: layers, hidden size, heads.
SHAPES = {
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}
_PROMPT_LENGTH = 16  # of decode runs
_BANDWIDTH_PASSES = 3  # the best of them counts


@dataclass
class Series:
    """Repeated measurements of one quantity, where larger is better."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def best(self) -> float:
        return max(self.values)

    def summary(self) -> dict[str, Any]:
        """Median, best, and all values."""
        return {"median": self.median, "best": self.best, "values": self.values}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        batch_sizes: decode runs, sequences each.
        steps: decode steps of a run.
        prefill: prompt length of the prefill run; 0: none.
        rounds: how often everything is run, in turn.
        bandwidth_bytes: buffer of a bandwidth pass.
        peer: also run PaddleNLP's `generate` on the same weights.
    """

    batch_sizes: tuple[int, ...]
    steps: int
    prefill: int
    rounds: int
    bandwidth_bytes: int
    peer: bool


def gpt2_config(shape: str) -> dict[str, Any]:
    """Configuration of a GPT-2 of a published size, in HuggingFace's form."""
    layers, hidden, heads = SHAPES[shape]
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": 4 * hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
    }


def layer_tensors(
    shape: str, matrix: Callable[[int, int], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 tensors of a GPT-2 of a published size, without its embeddings: what
    `matrix` gives for rows and columns, biases of zeros, norms that change nothing."""
    for name, size in tensor_shapes(gpt2_config(shape)).items():
        if name in ("wte.weight", "wpe.weight"):
            continue
        if len(size) == 2:
            yield name, matrix(*size)
        else:
            fill = np.zeros if name.endswith(".bias") else np.ones
            yield name, fill(size, dtype=np.float32)


def random_model(shape: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and float32 tensors of a GPT-2 of a published size with random weights, in
    HuggingFace's form."""
    config = gpt2_config(shape)
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int) -> np.ndarray:
        array = rng.standard_normal((rows, columns), dtype=np.float32)
        array *= np.float32(0.02)
        return array

    hidden = config["n_embd"]
    tensors = {
        "wte.weight": normal(config["vocab_size"], hidden),
        "wpe.weight": normal(config["n_positions"], hidden),
    }
    tensors.update(layer_tensors(shape, normal))
    return config, tensors


# ---- Measurements ----------------------------------------------------------------------------


def _prompt(generator: Generator, length: int, row: int) -> list[int]:
    rng = np.random.default_rng(row)
    return [int(token) for token in rng.integers(0, generator.info.vocab_size, size=length)]


def _options(max_length: int) -> GenerationOptions:
    return GenerationOptions(max_length=max_length, eos_token_id=-1, seed=0)


def decode_steps_per_second(generator: Generator, batch: int, steps: int) -> float:
    """Decode steps per second of `batch` greedy sequences, each step timed by itself, prefill left
    out: the median of the run."""
    seconds: list[float] = []
    with generator.open_session(batch) as session:
        native = generator.native_options(_options(steps + 1))
        ids = [
            session.submit(_prompt(generator, _PROMPT_LENGTH, row), native) for row in range(batch)
        ]
        while not all(session.length(i) for i in ids):
            session.step(1)
        for _ in range(steps):
            begin = time.perf_counter()
            session.step(1)
            seconds.append(time.perf_counter() - begin)
    return 1.0 / statistics.median(seconds)


def prefill_tokens_per_second(generator: Generator, length: int) -> float:
    """Prompt tokens per second from submission to the first new token of one sequence."""
    with generator.open_session(1) as session:
        native = generator.native_options(_options(1))
        prompt = _prompt(generator, length, 0)
        begin = time.perf_counter()
        session.submit(prompt, native)
        _finish(session)
        return length / (time.perf_counter() - begin)


def _finish(session: Session) -> None:
    while session.step(1):
        pass


def _request_tokens_per_second(run: Callable[[], int]) -> float:
    begin = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - begin)


def _bandwidth(generator: Generator, plan: Plan) -> float:
    return generator.measure_read_bandwidth(plan.bandwidth_bytes, _BANDWIDTH_PASSES)


def measure(generator: Generator, peer: Any, plan: Plan, *, quiet: bool = True) -> dict[str, Any]:
    """Runs the plan, measurements and bandwidth passes in turn, so that a machine that slows down
    slows all of them. A decode run is held against the better of the two bandwidth measurements
    beside it: on a shared machine bandwidth swings by a factor of two within seconds.

    Args:
        peer: a PaddleNLP model of the same weights, or None.

    Returns:
        What `--json` prints.
    """
    info = generator.info
    decode = {batch: Series() for batch in plan.batch_sizes}
    shares = {batch: Series() for batch in plan.batch_sizes}
    prefill, bandwidth = Series(), Series()
    ours = {batch: Series() for batch in plan.batch_sizes}
    theirs = {batch: Series() for batch in plan.batch_sizes}
    per_round = len(plan.batch_sizes) * (4 if peer is not None else 2) + 1 + bool(plan.prefill)
    with tqdm(total=plan.rounds * per_round, desc="bench", leave=False, disable=quiet) as bar:

        def record(series: Series, value: float) -> None:
            series.values.append(value)
            bar.update()

        for _ in range(plan.rounds):
            record(bandwidth, _bandwidth(generator, plan))
            for batch in plan.batch_sizes:
                before = bandwidth.values[-1]
                record(decode[batch], decode_steps_per_second(generator, batch, plan.steps))
                record(bandwidth, _bandwidth(generator, plan))
                limit = max(before, bandwidth.values[-1]) / info.step_bytes
                shares[batch].values.append(decode[batch].values[-1] / limit)
                if peer is None:
                    continue
                prompts = [_prompt(generator, _PROMPT_LENGTH, row) for row in range(batch)]
                options = _options(plan.steps)

                def run_ours(p: Any = prompts, o: Any = options) -> int:
                    return generator.generate(p, o).num_tokens

                def run_theirs(p: Any = prompts, o: Any = options) -> int:
                    rows, _, _ = infer.generate_paddlenlp(peer, p, o, batch_size=len(p))
                    return sum(map(len, rows))

                record(ours[batch], _request_tokens_per_second(run_ours))
                record(theirs[batch], _request_tokens_per_second(run_theirs))
            if plan.prefill:
                record(prefill, prefill_tokens_per_second(generator, plan.prefill))
    document: dict[str, Any] = {
        "model": asdict(info),
        "read_bandwidth": bandwidth.summary(),
        "decode": [],
        "prefill": None,
    }
    for batch, series in decode.items():
        entry: dict[str, Any] = {
            "batch_size": batch,
            "steps_per_second": series.summary(),
            "tokens_per_second": {
                "median": batch * series.median,
                "best": batch * series.best,
            },
            "bytes_per_step": info.step_bytes,
            "bandwidth_share": shares[batch].summary(),
        }
        if peer is not None:
            entry["request_tokens_per_second"] = ours[batch].summary()
            entry["peer"] = {
                "name": "paddlenlp",
                "request_tokens_per_second": theirs[batch].summary(),
                "ratio": ours[batch].median / theirs[batch].median,
            }
        document["decode"].append(entry)
    if plan.prefill:
        document["prefill"] = {"length": plan.prefill, "tokens_per_second": prefill.summary()}
    return document


# ---- Command ---------------------------------------------------------------------------------


def _load(name: str, shape: str | None, want_peer: bool, **options: Any) -> tuple[Generator, Any]:
    """The engine's model, and PaddleNLP's of the same weights if wanted."""
    if shape is None and not want_peer:
        return Generator.from_pretrained(name, progress=True, **options), None
    if shape is None:
        config, tensors = convert.load_directory(models.resolve(name))
        if options["weight_dtype"] is None:
            options["weight_dtype"] = stored_weight_dtype(config, models.resolve(name))
    else:
        config, tensors = random_model(shape)
    generator = Generator.from_tensors(config, tensors, progress=True, **options)
    peer = convert.build_paddlenlp(config, tensors) if want_peer else None
    return generator, peer


def _parse_sizes(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in value.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"{value!r} must be positive integers with commas between them")
    return sizes


@click.command("bench", context_settings={"show_default": True})
@click.argument("model", default=models.DEFAULT_MODEL)
@click.option(
    "--shape", type=click.Choice(tuple(SHAPES)), help="Random weights of this GPT-2 size."
)
@click.option(
    "--batch-sizes",
    "--batch_sizes",
    default="1",
    callback=_parse_sizes,
    help="Decode runs, as 1,4,16.",
)
@click.option("--steps", type=click.IntRange(min=1), default=32, help="Decode steps of a run.")
@click.option("--prefill", type=click.IntRange(min=0), default=0, help="Prompt length; 0: skip.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Times all is run, in turn.")
@click.option(
    "--bandwidth-mib", type=click.IntRange(min=1), default=1024, help="Buffer of a bandwidth pass."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: all processors]")
@click.option("--isa", help="Kernel set.  [default: the best]")
@click.option(
    "--weight_dtype",
    "--weight-dtype",
    help="Type of the weights: float32, float16, bfloat16, int8, int4.  [default: that of the "
    "files, else float32]",
)
@click.option(
    "--cache_dtype",
    "--cache-dtype",
    help="Type of keys and values: float32, float16, bfloat16, int8.  [default: as the "
    "weights, beside integers bfloat16]",
)
@click.option("--peer", type=click.Choice(("paddlenlp",)), help="Run this on the same weights too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(
    model: str,
    shape: str | None,
    batch_sizes: tuple[int, ...],
    steps: int,
    prefill: int,
    rounds: int,
    bandwidth_mib: int,
    threads: int | None,
    isa: str | None,
    weight_dtype: str | None,
    cache_dtype: str | None,
    peer: str | None,
    as_json: bool,
) -> int:
    """Measure MODEL (a directory or name): tokens/s, bytes per step, share of read bandwidth.

    Runs and bandwidth passes take turns. The share of a run is bytes per step x steps/s over the
    better of the two measurements of bandwidth beside it.
    """
    plan = Plan(
        batch_sizes=batch_sizes,
        steps=steps,
        prefill=prefill,
        rounds=rounds,
        bandwidth_bytes=bandwidth_mib << 20,
        peer=peer is not None,
    )
    settings = infer.Settings(
        model=model, engine="paddlenlp" if plan.peer else "fastgen", batch_size=1, prompts=(),
        start_token=None, end_token=None, threads=threads, isa=None, decoding_lib=None,
        use_fp16_decoding=False,
    )  # fmt: skip
    with infer.paddle_environment(settings):
        generator, peer_model = _load(
            model,
            shape,
            plan.peer,
            num_threads=threads,
            isa=isa,
            weight_dtype=weight_dtype,
            cache_dtype=cache_dtype,
        )
    # The arrays of --shape are out of reach now: only the packed copy should be in memory.
    gc.collect()
    with generator:
        positions = generator.info.max_positions
        needed = max(_PROMPT_LENGTH + steps + 1, prefill + 1)
        if needed > positions:
            raise InvalidArgumentError(
                f"steps is {steps} and prefill is {prefill}: they need {needed} positions and the "
                f"model has {positions}"
            )
        document = measure(generator, peer_model, plan, quiet=not sys.stderr.isatty())
    document["name"] = shape or model
    document["versions"] = infer.versions()
    if as_json:
        click.echo(json.dumps(document))
    else:
        _write_table(document)
    return 0


def _write_table(document: dict[str, Any]) -> None:
    info = document["model"]
    bandwidth = document["read_bandwidth"]
    click.echo(
        f"{document['name']}: {info['num_layers']} layers, hidden {info['hidden_size']}, "
        f"{info['weight_dtype']}, cache {info['cache_dtype']}, {info['device']}/{info['isa']}, "
        f"{info['num_threads']} threads"
    )
    click.echo(
        f"weights {info['weight_bytes'] / 1e6:.1f} MB, {info['step_bytes'] / 1e6:.1f} MB per step; "
        f"cache {info['cache_bytes_per_token'] / 1e3:.1f} kB per position; "
        f"read bandwidth {bandwidth['best'] / 1e9:.2f} GB/s best, "
        f"{bandwidth['median'] / 1e9:.2f} GB/s median"
    )
    for entry in document["decode"]:
        speed, share = entry["tokens_per_second"], entry["bandwidth_share"]
        line = (
            f"decode, batch {entry['batch_size']}: {speed['median']:.2f} tokens/s median, "
            f"{speed['best']:.2f} best; {share['median']:.1%} of read bandwidth, "
            f"{share['best']:.1%} best"
        )
        if share["median"] > 1.0:
            line += " (the weights stay in the caches)"
        if "peer" in entry:
            theirs = entry["peer"]["request_tokens_per_second"]["median"]
            line += (
                f"; whole request {entry['request_tokens_per_second']['median']:.2f} tokens/s, "
                f"PaddleNLP {theirs:.2f}: {entry['peer']['ratio']:.2f}x"
            )
        click.echo(line)
    if document["prefill"]:
        speed = document["prefill"]["tokens_per_second"]
        click.echo(
            f"prefill, {document['prefill']['length']} tokens: {speed['median']:.1f} tokens/s "
            f"median, {speed['best']:.1f} best"
        )
