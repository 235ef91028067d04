"""`fastgen export`: a directory that Paddle Inference and libfastgen both run.

`docs/export.md` has the format of what is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from fastgen import _config, _export, models
from fastgen._checkpoint import (
    check_destination,
    import_paddle,
    load_directory,
    new_directory,
)
from fastgen._cli_options import model_option, option, sampling_options
from fastgen._paddlenlp import build_paddlenlp
from fastgen._safetensors import drop_pages
from fastgen.errors import InvalidArgumentError, ModelFileError
from fastgen.options import GenerationOptions
from fastgen.tokenizer import Tokenizer, missing_tokenizer_message

__all__ = ["export"]

PROGRAM_FORMATS = ("pdmodel", "json")
_KIND = "an export"


def export(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: GenerationOptions | None = None,
    *,
    runtime_options: bool = False,
    use_fp16_decoding: bool = False,
    decoding_lib: str | None = None,
    program_format: str | None = None,
    tokenizer: bool = True,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Exports a model for Paddle Inference and libfastgen.

    The directory is written aside and renamed: it is there whole or not at all.

    Args:
        source: a model directory or name, see :func:`fastgen.models.resolve`.
        destination: the directory to write.
        options: what the program does with a prompt; None: FasterGPT's defaults. `eos_token_id` and
            `pad_token_id` None: the model's. A seed makes every run give the same tokens; without
            one every run draws its own.
        runtime_options: make top_k, top_p, temperature, seed and max_length inputs of the program,
            each [batch]; `options` are then what `fastgen.json` recommends.
        use_fp16_decoding: store the weights as float16. The CPU computes in float32 from them.
        decoding_lib: a built op library; None: it is built on first use.
        program_format: "pdmodel", "json", or None for what this Paddle saves.
        tokenizer: write `vocab.txt` and `merges.txt`.
        force: replace `destination` if it is an export.
        progress: show bars on standard error.

    Returns:
        `destination`.

    Raises:
        ValueError: an option is wrong, `destination` exists, or a file is not what it should be.
        FileNotFoundError: the model or its tokenizer is not there.
        RuntimeError: Paddle or PaddleNLP is missing, or the op library cannot be built.
    """
    destination = Path(destination)
    directory = models.resolve(source)
    if destination.exists() and directory.resolve() == destination.resolve():
        raise InvalidArgumentError(f"{destination} cannot be exported into itself")
    check_destination(destination, force, _export.MANIFEST, _KIND)
    texts = None
    if tokenizer:
        texts = Tokenizer.from_directory(directory)
        if texts is None:
            raise InvalidArgumentError(
                f"{missing_tokenizer_message(directory)}, or export without one (--no_tokenizer)"
            )
    paddle = import_paddle()
    from fastgen._program import INPUTS, RUNTIME_INPUTS, program_file, save_program

    program_file(program_format)
    config, tensors = load_directory(directory)
    options = _complete(options or GenerationOptions(decode_strategy="sampling", top_k=4), config)
    if use_fp16_decoding:
        _check_float16(tensors)
    with new_directory(destination, force, _export.MANIFEST, _KIND) as new:
        special_tokens = None
        if texts is not None:
            special_tokens = texts.write_vocabulary(new, config["vocab_size"])
        model = build_paddlenlp(config, tensors)
        tensors.clear()
        if use_fp16_decoding:
            model.to(dtype="float16")
        name, order = save_program(
            model,
            options,
            new,
            runtime_options=runtime_options,
            program_format=program_format,
            decoding_lib=decoding_lib,
        )
        parameters = _in_order(dict(model.named_parameters()), order)
        _write_parameters(new / _export.PARAMETERS, parameters, progress)
        records = _locate(new / _export.PARAMETERS, parameters)
        inputs = INPUTS + RUNTIME_INPUTS if runtime_options else INPUTS
        _export.write_manifest(
            new,
            program=name,
            config=_native_config(config),
            generation=_generation(options),
            inputs=[
                {"name": feed, "dtype": dtype, "shape": list(shape)}
                for feed, dtype, shape in inputs
            ],
            dtype="float16" if use_fp16_decoding else "float32",
            tensors=records,
            special_tokens=special_tokens,
            versions={"fastgen": _version(), "paddle": str(paddle.__version__)},
        )
    return destination


def _version() -> str:
    import fastgen

    return fastgen.__version__


def _complete(options: GenerationOptions, config: Mapping[str, Any]) -> GenerationOptions:
    """Options with the model's special tokens, checked against its sizes."""
    eos, pad = options.eos_token_id, options.pad_token_id
    if eos is None:
        eos = -1 if config.get("eos_token_id") is None else config["eos_token_id"]
    if pad is None:
        pad = eos if config.get("pad_token_id") is None else config["pad_token_id"]
    options = dataclasses.replace(options, eos_token_id=eos, pad_token_id=pad)
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(options, name) >= config["vocab_size"]:
            raise InvalidArgumentError(
                f"{name} is {getattr(options, name)}: it must be less than the model's vocab_size, "
                f"{config['vocab_size']}"
            )
    if options.max_length >= config["n_positions"]:
        raise InvalidArgumentError(
            f"max_length is {options.max_length}: with a prompt of one token it must be less than "
            f"the model's {config['n_positions']} positions"
        )
    if options.seed is not None and not isinstance(options.seed, int):
        raise InvalidArgumentError("seed is a list: an export takes one integer")
    return options


def _check_float16(tensors: Mapping[str, np.ndarray]) -> None:
    for name, array in tensors.items():
        with np.errstate(over="ignore"):
            if not np.isfinite(array.astype(np.float16)).all():
                raise ModelFileError(
                    f"tensor {name} has values that float16 cannot hold: leave use_fp16_decoding "
                    "out"
                )
        drop_pages(array)


def _native_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """HuggingFace's configuration under the names of `fastgen_config`."""
    parsed = _config.parse(config)
    names = (*_config.NAMES.values(), *_config.SPECIAL_TOKENS)
    native: dict[str, Any] = {name: getattr(parsed, name) for name in names}
    # Not as float32: the manifest says it as the configuration does.
    native["layer_norm_eps"] = config.get("layer_norm_epsilon", 1e-5)
    return native


def _generation(options: GenerationOptions) -> dict[str, Any]:
    """The options as `fastgen.json` has them: what the program does, or may be fed."""
    names = (
        "decode_strategy", "max_length", "min_length", "top_k", "top_p", "temperature",
        "repetition_penalty", "no_repeat_ngram_size", "num_return_sequences", "eos_token_id",
        "pad_token_id", "forced_bos_token_id", "forced_eos_token_id",
    )  # fmt: skip
    document = {name: getattr(options, name) for name in names}
    # A text, because few readers of JSON hold 64 bits.
    document["seed"] = None if options.seed is None else str(options.seed)
    return document


# ---- gpt.pdiparams -----------------------------------------------------------------------------


def _num_bytes(parameter: Any) -> int:
    return int(np.prod(parameter.shape)) * (2 if "16" in str(parameter.dtype) else 4)


def _in_order(parameters: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """Parameters in the order in which the program loads them.

    Args:
        parameters: by PaddleNLP's names.
        order: Paddle's own names.
    """
    by_name = {parameter.name: name for name, parameter in parameters.items()}
    if sorted(by_name) != sorted(order):
        different = sorted(set(by_name) ^ set(order))
        raise ModelFileError(
            f"the program loads {len(order)} tensors, the model has {len(by_name)}; they differ in "
            f"{', '.join(different[:3])}: this release of Paddle saves in a way that is not known"
        )
    return {by_name[name]: parameters[by_name[name]] for name in order}


def _write_parameters(path: Path, parameters: Mapping[str, Any], progress: bool) -> None:
    """Writes `gpt.pdiparams`, a tensor at a time."""
    total = sum(_num_bytes(parameter) for parameter in parameters.values())
    arrays = ((name, parameter.numpy()) for name, parameter in parameters.items())
    with tqdm(
        desc="export",
        total=total,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        leave=False,
        disable=not (progress and sys.stderr.isatty()),
    ) as bar:
        for num_bytes in _export.write_records(path, arrays):
            bar.update(num_bytes)


def _locate(path: Path, parameters: Mapping[str, Any]) -> dict[str, _export.Record]:
    """Which tensor lies where, out of the file as it lies on the disk.

    The file has no names, so the bytes of every tensor are compared with the parameter's.

    Raises:
        ModelFileError: the file does not hold these parameters.
    """
    records = _export.scan_records(path)
    if len(records) != len(parameters):
        raise ModelFileError(f"{path} has {len(records)} tensors, the model {len(parameters)}")
    located: dict[str, _export.Record] = {}
    with path.open("rb") as file:
        for (name, parameter), record in zip(parameters.items(), records):
            values = parameter.numpy()
            file.seek(record.offset)
            data = np.fromfile(file, dtype=np.uint8, count=record.num_bytes)
            same = (
                record.shape == values.shape
                and record.dtype == str(values.dtype)
                and np.array_equal(data, values.view(np.uint8).reshape(-1))
            )
            if not same:
                raise ModelFileError(f"{path} does not have tensor {name} where it should")
            located[name] = record
    return located


# ---- Command -----------------------------------------------------------------------------------


@click.command("export", context_settings={"show_default": True})
@model_option
@option(
    "inference_model_dir",
    type=click.Path(path_type=Path),
    default="infer_model",
    help="Directory to write.",
)
@sampling_options
@option(
    "seed", type=int, help="Makes every run give the same tokens.  [default: each draws its own]"
)
@option(
    "eos_token_id", type=int, help="Token that ends a sequence; -1: none.  [default: the model's]"
)
@option("pad_token_id", type=int, help="Token after the end.  [default: the model's, else eos]")
@option("runtime_options", is_flag=True, help="Make the options inputs of the program, per row.")
@option("use_fp16_decoding", is_flag=True, help="Store the weights as float16.")
@option("decoding_lib", help="Built op library.  [default: built on first use]")
@option(
    "program_format",
    type=click.Choice(PROGRAM_FORMATS),
    help="Form of the program.  [default: what this Paddle saves]",
)
@option("no_tokenizer", is_flag=True, help="Leave vocab.txt and merges.txt out.")
@option("force", is_flag=True, help="Replace the directory if it is an export.")
def command(
    model_name_or_path: str,
    inference_model_dir: Path,
    eos_token_id: int | None,
    pad_token_id: int | None,
    runtime_options: bool,
    use_fp16_decoding: bool,
    decoding_lib: str | None,
    program_format: str | None,
    no_tokenizer: bool,
    force: bool,
    **options: Any,
) -> None:
    """Export a model for Paddle Inference and libfastgen.

    Writes Paddle's program and parameters (gpt.*), vocab.txt, merges.txt and fastgen.json.
    """
    # Paddle reports to standard output and, at its own level, to standard error.
    os.environ.setdefault("GLOG_minloglevel", "2")
    with contextlib.redirect_stdout(sys.stderr):
        export(
            model_name_or_path,
            inference_model_dir,
            GenerationOptions.from_kwargs(
                eos_token_id=eos_token_id, pad_token_id=pad_token_id, **options
            ),
            runtime_options=runtime_options,
            use_fp16_decoding=use_fp16_decoding,
            decoding_lib=decoding_lib,
            program_format=program_format,
            tokenizer=not no_tokenizer,
            force=force,
            progress=True,
        )
    size = (inference_model_dir / _export.PARAMETERS).stat().st_size
    click.echo(f"{inference_model_dir}: {size / 1e6:.1f} MB of weights", err=True)


if __name__ == "__main__":
    from fastgen._exit import run

    sys.exit(run(command, None, "fastgen export"))
