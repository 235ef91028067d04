"""`fastgen infer`: prompts in, text and tokens per second out, through any of the three engines."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastgen import convert, models
from fastgen._cli_options import model_option, option, sampling_options
from fastgen.errors import InvalidArgumentError, NotFoundError
from fastgen.generator import GenerationInterrupted, GenerationResult, Generator
from fastgen.options import GenerationOptions
from fastgen.tokenizer import Tokenizer, require

ENGINES = ("fastgen", "paddle-op", "paddlenlp")


@dataclass(frozen=True)
class Settings:
    """What the command was asked for, besides the generation options."""

    model: str
    engine: str
    batch_size: int | None
    prompts: tuple[str, ...]
    start_token: str | None
    end_token: str | None
    threads: int | None
    isa: str | None
    decoding_lib: str | None
    use_fp16_decoding: bool
    device: str = "cpu"
    weight_dtype: str | None = None
    cache_dtype: str | None = None

    @property
    def weights(self) -> str | None:
        """The type of the weights that is asked for; None: that of the files."""
        if self.weight_dtype is not None:
            return self.weight_dtype
        return "float16" if self.use_fp16_decoding else None


@dataclass(frozen=True)
class Outcome:
    """A finished (or interrupted) request."""

    result: GenerationResult
    prompts: list[str | None]
    seconds: float
    interrupted: bool = False

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences per second, prefill included."""
        return self.result.num_tokens / self.seconds if self.seconds > 0 else 0.0


# ---- The three engines -----------------------------------------------------------------------


def run_request(settings: Settings, options: GenerationOptions) -> Outcome:
    """Loads the model into the engine that is asked for and runs the request.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: with one sentence each.
    """
    _check(settings)
    if options.seed is None:
        options = replace(options, seed=secrets.randbits(53))
    if settings.engine == "fastgen":
        return _run_fastgen(settings, options)
    with paddle_environment(settings):
        return _run_paddle(settings, options)


def _rows(settings: Settings, options: GenerationOptions) -> int | None:
    if settings.batch_size is None:
        return None
    return settings.batch_size * options.num_return_sequences


def _check(settings: Settings) -> None:
    weights = settings.weights or "float32"
    if settings.engine != "fastgen" and (settings.device, weights) != ("cpu", "float32"):
        raise InvalidArgumentError(
            f"device is {settings.device!r} and the weights are {weights}: "
            f"--engine {settings.engine} runs on the CPU in float32"
        )
    if settings.engine != "fastgen" and settings.cache_dtype not in (None, "float32"):
        raise InvalidArgumentError(
            f"cache_dtype is {settings.cache_dtype!r}: --engine {settings.engine} has float32 only"
        )
    if settings.use_fp16_decoding and settings.weight_dtype not in (None, "float16"):
        raise InvalidArgumentError(
            f"use_fp16_decoding is on and weight_dtype is {settings.weight_dtype!r}: only one of "
            "them can be meant"
        )
    if settings.decoding_lib is not None and settings.engine != "paddle-op":
        raise InvalidArgumentError(
            f"decoding_lib is {settings.decoding_lib!r}: it belongs to --engine paddle-op, not to "
            f"--engine {settings.engine}"
        )
    if settings.isa is not None and settings.engine == "paddlenlp":
        raise InvalidArgumentError(
            f"isa is {settings.isa!r}: --engine paddlenlp uses Paddle's own kernels, so it must be "
            "left out"
        )


def _run_fastgen(settings: Settings, options: GenerationOptions) -> Outcome:
    from tqdm import tqdm

    with Generator.from_pretrained(
        settings.model,
        num_threads=settings.threads,
        isa=settings.isa,
        device=settings.device,
        weight_dtype=settings.weights,
        cache_dtype=settings.cache_dtype,
        progress=True,
    ) as generator:
        directory = models.resolve(settings.model)
        options = _with_end_token(options, settings, generator.tokenizer, directory)
        config_bos = generator.info.bos_token_id
        start = generator.info.eos_token_id if config_bos is None else config_bos
        prompts, prompt_ids = _prompts(settings, generator.tokenizer, directory, start)
        with tqdm(
            desc="generate",
            unit="token",
            leave=False,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        ) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            begin = time.perf_counter()
            try:
                result = generator.generate(
                    prompt_ids,
                    options,
                    # Prompts beyond batch_size wait their turn; their tokens do not change.
                    max_batch_size=_rows(settings, options),
                    progress=None if bar.disable else report,
                )
                interrupted = False
            except GenerationInterrupted as error:
                result = error.result
                interrupted = True
            seconds = time.perf_counter() - begin
    return Outcome(result, prompts, seconds, interrupted)


@contextlib.contextmanager
def paddle_environment(settings: Settings) -> Iterator[None]:
    """Paddle and PaddleNLP report to standard output, which belongs to the results; threads and
    instruction set reach them, and the op, through the environment only."""
    if settings.threads is not None:
        for name in ("FASTGEN_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(settings.threads)
    if settings.isa is not None:
        os.environ["FASTGEN_ISA"] = settings.isa
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _run_paddle(settings: Settings, options: GenerationOptions) -> Outcome:
    directory = models.resolve(settings.model)
    convert.import_paddlenlp()
    from paddlenlp.utils.log import logger

    logger.set_level("ERROR")
    tokenizer = Tokenizer.from_directory(directory)
    model, config = convert.to_paddlenlp(directory)
    options = _with_end_token(options, settings, tokenizer, directory)
    if options.eos_token_id is None:
        eos = config.get("eos_token_id")
        options = replace(options, eos_token_id=-1 if eos is None else eos)
    if options.pad_token_id is None:
        pad = config.get("pad_token_id")
        options = replace(options, pad_token_id=options.eos_token_id if pad is None else pad)
    start = config.get("bos_token_id")
    start = config.get("eos_token_id") if start is None else start
    prompts, prompt_ids = _prompts(settings, tokenizer, directory, start)
    _check_prompts(prompt_ids, options.max_length, config)
    if settings.engine == "paddle-op":
        rows, scores, seconds = _generate_op(model, settings, prompt_ids, options)
    else:
        rows, scores, seconds = generate_paddlenlp(
            model, prompt_ids, options, batch_size=settings.batch_size or len(prompt_ids)
        )
    reasons = ["eos" if row and row[-1] == options.eos_token_id else "length" for row in rows]
    texts = None
    if tokenizer is not None:
        texts = [
            tokenizer.decode(row[:-1] if reason == "eos" else row)
            for row, reason in zip(rows, reasons)
        ]
    assert isinstance(options.seed, int)
    result = GenerationResult(
        texts=texts,
        token_ids=rows,
        scores=scores,
        finish_reasons=reasons,
        seed=options.seed,
        prompt_ids=prompt_ids,
        num_return_sequences=options.num_return_sequences,
        pad_token_id=options.pad_token_id,
    )
    return Outcome(result, prompts, seconds)


def generate_paddlenlp(
    model: Any, prompt_ids: list[list[int]], options: GenerationOptions, batch_size: int
) -> tuple[list[list[int]], list[float], float]:
    """PaddleNLP's own `model.generate` under the same options.

    Its batches attend padding, so only neighbours of one length go together.

    Returns:
        New tokens of each sequence up to eos, scores, and seconds.
    """
    paddle = convert.import_paddle()
    assert isinstance(options.seed, int)
    paddle.seed(options.seed % 2**63)
    top_p = options.top_p or 1.0
    rows: list[list[int]] = []
    scores: list[float] = []
    seconds = 0.0
    # PaddleNLP up to 2.7 has the last one, 2.8 the second.
    names = ("min_length", "min_new_tokens", "min_new_token")
    min_names = [name for name in names if hasattr(model.generation_config, name)]
    for batch in _equal_lengths(prompt_ids, batch_size):
        begin = time.perf_counter()
        with paddle.no_grad():
            ids, batch_scores = model.generate(
                paddle.to_tensor(np.asarray(batch, dtype=np.int64)),
                decode_strategy=options.decode_strategy,
                # All spellings: with one, PaddleNLP takes the others from its defaults.
                max_length=options.max_length,
                max_new_tokens=options.max_length,
                **dict.fromkeys(min_names, options.min_length),
                top_k=options.top_k,
                top_p=top_p,
                temperature=options.temperature,
                repetition_penalty=options.repetition_penalty,
                no_repeat_ngram_size=options.no_repeat_ngram_size or None,
                num_return_sequences=options.num_return_sequences,
                eos_token_id=options.eos_token_id,
                pad_token_id=options.pad_token_id,
                forced_bos_token_id=options.forced_bos_token_id,
                forced_eos_token_id=options.forced_eos_token_id,
            )
        seconds += time.perf_counter() - begin
        rows.extend(_until_eos(ids.numpy(), options.eos_token_id))
        scores.extend(float(score) for score in batch_scores.numpy().reshape(-1))
    return rows, scores, seconds


def _generate_op(
    model: Any, settings: Settings, prompt_ids: list[list[int]], options: GenerationOptions
) -> tuple[list[list[int]], list[float], float]:
    """The custom op, through `fastgen.FasterGPT`."""
    from fastgen import FasterGPT

    paddle = convert.import_paddle()
    layer = FasterGPT(model, decoding_lib=settings.decoding_lib)
    arguments: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            "decode_strategy", "max_length", "min_length", "top_k", "top_p", "temperature",
            "repetition_penalty", "no_repeat_ngram_size", "eos_token_id",
            "pad_token_id", "forced_bos_token_id", "forced_eos_token_id",
        )
    }  # fmt: skip
    # The first call packs the weights, which is loading and not generating.
    layer(paddle.to_tensor([prompt_ids[0][:1]]), **{**arguments, "max_length": 1})
    lengths = [len(ids) for ids in prompt_ids]
    padded = np.zeros((len(prompt_ids), max(lengths)), dtype=np.int64)
    for row, ids in zip(padded, prompt_ids):
        row[: len(ids)] = ids
    begin = time.perf_counter()
    ids, scores = layer(
        paddle.to_tensor(padded),
        seq_len=paddle.to_tensor(lengths, dtype="int64"),
        num_return_sequences=options.num_return_sequences,
        seed=options.seed,
        **arguments,
    )
    rows = _until_eos(ids.numpy(), options.eos_token_id)
    seconds = time.perf_counter() - begin
    return rows, [float(score) for score in scores.numpy().reshape(-1)], seconds


def _equal_lengths(prompt_ids: list[list[int]], batch_size: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for ids in prompt_ids:
        if batch and (len(batch) == batch_size or len(batch[0]) != len(ids)):
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def _until_eos(ids: np.ndarray, eos_token_id: int | None) -> list[list[int]]:
    """Rows of a padded [batch, length] array, each up to and including its eos."""
    rows: list[list[int]] = []
    for row in ids.tolist():
        end = row.index(eos_token_id) + 1 if eos_token_id in row else len(row)
        rows.append(row[:end])
    return rows


# ---- Prompts ---------------------------------------------------------------------------------


def _token_id(option: str, token: str, tokenizer: Tokenizer | None, directory: Path) -> int:
    if tokenizer is None and token.isdecimal():
        return int(token)
    token_id = require(tokenizer, directory).token_to_id(token)
    if token_id is None:
        raise InvalidArgumentError(f"{option} is {token!r}: it must be a token of the vocabulary")
    return token_id


def _with_end_token(
    options: GenerationOptions,
    settings: Settings,
    tokenizer: Tokenizer | None,
    directory: Path,
) -> GenerationOptions:
    if settings.end_token is None:
        return options
    end = _token_id("end_token", settings.end_token, tokenizer, directory)
    return replace(options, eos_token_id=end)


def _prompts(
    settings: Settings, tokenizer: Tokenizer | None, directory: Path, default_start: int | None
) -> tuple[list[str | None], list[list[int]]]:
    """The prompts as text (None: the start token) and as token ids."""
    if settings.prompts:
        encoder = require(tokenizer, directory)
        prompts: list[str | None] = list(settings.prompts)
        prompt_ids = [encoder.encode(text) for text in settings.prompts]
        for text, ids in zip(settings.prompts, prompt_ids):
            if not ids:
                raise InvalidArgumentError(f"prompt is {text!r}: it must have at least one token")
        return prompts, prompt_ids
    if settings.start_token is not None:
        start = _token_id("start_token", settings.start_token, tokenizer, directory)
    elif default_start is not None:
        start = default_start
    else:
        raise InvalidArgumentError(
            "the model names no bos or eos token to start with: give --prompt or --start_token"
        )
    count = settings.batch_size or 1
    return [None] * count, [[start] for _ in range(count)]


def _check_prompts(
    prompt_ids: Sequence[Sequence[int]], max_length: int, config: Mapping[str, Any]
) -> None:
    """What the engine checks itself, for Paddle, which would read beyond its tables."""
    positions, vocab = config["n_positions"], config["vocab_size"]
    for ids in prompt_ids:
        if len(ids) + max_length > positions:
            raise InvalidArgumentError(
                f"a prompt has {len(ids)} tokens and max_length is {max_length}, which is more "
                f"than the model's {positions} positions"
            )
        if ids and max(ids) >= vocab:
            raise InvalidArgumentError(
                f"a prompt has the token {max(ids)}: it must be less than the model's vocab_size, "
                f"{vocab}"
            )


def _read_standard_input() -> bytes:
    if sys.stdin is None:  # closed
        raise OSError(errno.EBADF, "standard input is closed")
    return sys.stdin.buffer.read()


def read_prompt_file(path: str) -> list[str]:
    """The lines of a file, or of standard input for "-", that are not blank.

    Raises:
        NotFoundError: it cannot be read.
        InvalidArgumentError: it is not UTF-8 or holds no prompt.
    """
    try:
        data = _read_standard_input() if path == "-" else Path(path).read_bytes()
        # Not splitlines(), which also splits at characters that prompts may have. Some editors
        # begin a file with a mark that is no part of its text.
        lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
        lines = [line for line in lines if line.strip()]
    except OSError as error:
        raise NotFoundError(f"prompt_file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"prompt_file {path} is not UTF-8: {error}") from error
    if not lines:
        raise InvalidArgumentError(f"prompt_file {path} holds no prompt")
    return lines


# ---- Output ----------------------------------------------------------------------------------


def _write_text(outcome: Outcome) -> None:
    result = outcome.result
    many = len(result.token_ids) > 1
    for i, ids in enumerate(result.token_ids):
        prompt = i // result.num_return_sequences
        if many:
            sequence = i % result.num_return_sequences
            click.echo(f"==> prompt {prompt}, sequence {sequence} ({result.finish_reasons[i]})")
        if result.texts is None:
            click.echo(" ".join(map(str, ids)))
        else:
            click.echo((outcome.prompts[prompt] or "") + result.texts[i])
        if many:
            click.echo()


def _write_json(outcome: Outcome, settings: Settings) -> None:
    result = outcome.result
    document = {
        "engine": settings.engine,
        "model": settings.model,
        "prompts": outcome.prompts,
        "prompt_ids": result.prompt_ids,
        "num_return_sequences": result.num_return_sequences,
        "texts": result.texts,
        "token_ids": result.token_ids,
        "scores": result.scores,
        "finish_reasons": result.finish_reasons,
        "seed": result.seed,
        "num_tokens": result.num_tokens,
        "seconds": outcome.seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "interrupted": outcome.interrupted,
        "versions": versions(),
    }
    click.echo(json.dumps(document, ensure_ascii=False))


def versions() -> dict[str, str | None]:
    """Versions of what is installed, without importing it; None: it is not."""
    import fastgen

    result: dict[str, str | None] = {"fastgen": fastgen.__version__}
    for name in ("paddlepaddle", "paddlenlp", "tokenizers", "numpy"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = None
    if result["paddlepaddle"] is None:
        with contextlib.suppress(metadata.PackageNotFoundError):
            result["paddlepaddle"] = metadata.version("paddlepaddle-gpu")
    return result


# ---- Command ---------------------------------------------------------------------------------


@click.command("infer", context_settings={"show_default": True})
@model_option
@option("prompt", multiple=True, help="Text to continue; may be given more than once.")
@option("prompt_file", help="File with one prompt a line; - is standard input.")
@option(
    "batch_size",
    type=click.IntRange(min=1),
    help="Prompts decoded together; without a prompt, the start token is one so many times.  "
    "[default: all; 1 without a prompt]",
)
@sampling_options
@option("min_length", type=int, default=0, help="New tokens before the end token may come.")
@option("start_token", help="Token to start from without a prompt.  [default: the model's]")
@option("end_token", help="Token that ends a sequence.  [default: the model's]")
@option("repetition_penalty", type=float, default=1.0, help="> 1 repeats less; 1: off.")
@option("num_return_sequences", type=int, default=1, help="Sequences for each prompt.")
@option("seed", type=int, help="The same seed gives the same text.  [default: drawn, reported]")
@option("engine", type=click.Choice(ENGINES), default="fastgen", help="What runs the request.")
@option("device", default="cpu", help="cpu, cuda or cuda:<index>.")
@option(
    "weight_dtype",
    help="float32, float16, bfloat16, int8 or int4.  [default: that of the files, else float32]",
)
@option(
    "cache_dtype",
    help="Type of keys and values: float32, float16, bfloat16, int8.  [default: as the weights, "
    "beside integers bfloat16, on cuda float16]",
)
@option("threads", type=click.IntRange(min=1), help="Threads.  [default: all processors]")
@option("isa", help="Kernel set, see fastgen info.  [default: the best]")
@option("use_fp16_decoding", is_flag=True, help="The same as --weight_dtype float16.")
@option("decoding_lib", help="Built op library for --engine paddle-op.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(
    model_name_or_path: str,
    prompt: tuple[str, ...],
    prompt_file: str | None,
    engine: str,
    batch_size: int | None,
    start_token: str | None,
    end_token: str | None,
    device: str,
    weight_dtype: str | None,
    cache_dtype: str | None,
    threads: int | None,
    isa: str | None,
    use_fp16_decoding: bool,
    decoding_lib: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Generate text.

    Text goes to standard output, a line with tokens per second and the seed to standard error.
    """
    lines = () if prompt_file is None else tuple(read_prompt_file(prompt_file))
    settings = Settings(
        model=model_name_or_path,
        engine=engine,
        batch_size=batch_size,
        prompts=prompt + lines,
        start_token=start_token,
        end_token=end_token,
        threads=threads,
        isa=isa,
        decoding_lib=decoding_lib,
        use_fp16_decoding=use_fp16_decoding,
        device=device,
        weight_dtype=weight_dtype,
        cache_dtype=cache_dtype,
    )
    outcome = run_request(settings, GenerationOptions.from_kwargs(**options))
    if as_json:
        _write_json(outcome, settings)
    else:
        _write_text(outcome)
    sys.stdout.flush()
    click.echo(
        f"{outcome.result.num_tokens} tokens in {outcome.seconds:.3f} s, "
        f"{outcome.tokens_per_second:.1f} tokens/s, seed {outcome.result.seed}, engine {engine}",
        err=True,
    )
    if outcome.interrupted:
        raise KeyboardInterrupt
    return 0


if __name__ == "__main__":
    from fastgen._exit import run

    sys.exit(run(command, None, "fastgen infer"))
