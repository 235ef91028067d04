"""Checkpoints of PaddleNLP to directories that the engine maps, and back into PaddleNLP models.

The target layout is that of a HuggingFace GPT-2: `config.json`, `model.safetensors` and the
tokenizer's files. The weights may be rounded to fewer bits on the way, see docs/weights.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from fastgen import models
from fastgen._checkpoint import (
    check_destination,
    import_paddle,
    import_paddlenlp,
    is_paddlenlp_directory,
    load_directory,
    write_directory,
)
from fastgen._cli_options import option
from fastgen._export import is_export
from fastgen._paddlenlp import build_paddlenlp, from_paddlenlp, to_paddlenlp
from fastgen._quantize import WEIGHT_DTYPES, check_weight_dtype, stored_weight_dtype
from fastgen._safetensors import read_safetensors
from fastgen.errors import InvalidArgumentError

__all__ = [
    "build_paddlenlp",
    "convert",
    "from_paddlenlp",
    "import_paddle",
    "import_paddlenlp",
    "is_paddlenlp_directory",
    "load_directory",
    "read_safetensors",
    "to_paddlenlp",
    "write_directory",
]

Progress = Callable[[int, int], None]


def convert(
    source: str,
    destination: Path,
    *,
    weight_dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Converts a checkpoint directory of PaddleNLP, or a model known to PaddleNLP by name, to a
    directory that the engine loads. A HuggingFace directory is copied.

    With a `weight_dtype` the engine loads the directory as that type unless it is told otherwise,
    and has the very weights that it would have made of the source.

    Args:
        source: the directory or name.
        destination: the directory to write.
        weight_dtype: `"float32"`, `"float16"`, `"bfloat16"`, `"int8"` or `"int4"`: what embedding,
            head and the matrices of the layers are rounded to; all else is float32. Only the engine
            reads the integers. None: every tensor stays as it is.
        force: replace `destination` if it is a model directory.
        progress: called with tensors written and tensors in all.

    Returns:
        `destination`.

    Raises:
        InvalidArgumentError: `destination` exists, or is `source`; or there is no such type.
        NotFoundError, ModelFileError: see :func:`load_directory`.
    """
    destination = Path(destination)
    if weight_dtype is not None:
        check_weight_dtype(weight_dtype)
    directory = models.resolve(source)
    if directory.resolve() == destination.resolve():
        raise InvalidArgumentError(f"{source} cannot be converted into itself")
    if is_export(directory):
        raise InvalidArgumentError(
            f"{source} is an export, which the engine loads as it is: convert what it was made of"
        )
    check_destination(destination, force)
    config, tensors = load_directory(directory)
    write_directory(
        destination,
        config,
        tensors,
        directory,
        weight_dtype=weight_dtype or stored_weight_dtype(config, directory),
        force=force,
        progress=progress,
    )
    return destination


@click.command("convert")
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@option(
    "weight_dtype",
    type=click.Choice(WEIGHT_DTYPES),
    help="Round the matrices to this type, which is then what the engine loads them as.  "
    "[default: every tensor stays as it is]",
)
@click.option("--force", is_flag=True, help="Replace DESTINATION if it is a model directory.")
def command(source: str, destination: Path, weight_dtype: str | None, force: bool) -> None:
    """Convert a PaddleNLP checkpoint directory, or a PaddleNLP model name, to DESTINATION.

    DESTINATION becomes a HuggingFace GPT-2 directory: config.json, model.safetensors and the
    tokenizer's files. It is written aside and renamed, so it is there whole or not at all. With
    int8 and int4 nothing but fastgen reads its weights.
    """
    from tqdm import tqdm

    with tqdm(desc="convert", unit="tensor", disable=not sys.stderr.isatty()) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        convert(source, destination, weight_dtype=weight_dtype, force=force, progress=report)
    size = (destination / "model.safetensors").stat().st_size
    kind = "" if weight_dtype is None else f", {weight_dtype}"
    click.echo(f"{destination}: {size / 1e6:.1f} MB of weights{kind}", err=True)
