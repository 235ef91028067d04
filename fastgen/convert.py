"""Checkpoints of PaddleNLP to directories that the engine maps, and back into PaddleNLP models.

The target layout is that of a HuggingFace GPT-2: `config.json`, `model.safetensors` and the
tokenizer's files.
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
    read_safetensors,
    write_directory,
)
from fastgen._export import is_export
from fastgen._paddlenlp import build_paddlenlp, from_paddlenlp, to_paddlenlp
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
    source: str, destination: Path, *, force: bool = False, progress: Progress | None = None
) -> Path:
    """Converts a checkpoint directory of PaddleNLP, or a model known to PaddleNLP by name, to a
    directory that the engine loads. A HuggingFace directory is copied.

    Args:
        source: the directory or name.
        destination: the directory to write.
        force: replace `destination` if it is a model directory.
        progress: called with steps done and steps in all.

    Returns:
        `destination`.

    Raises:
        InvalidArgumentError: `destination` exists, or is `source`.
        NotFoundError, ModelFileError: see :func:`load_directory`.
    """
    destination = Path(destination)
    report = progress or (lambda done, total: None)
    directory = models.resolve(source)
    if directory.resolve() == destination.resolve():
        raise InvalidArgumentError(f"{source} cannot be converted into itself")
    if is_export(directory):
        raise InvalidArgumentError(
            f"{source} is an export, which the engine loads as it is: convert what it was made of"
        )
    check_destination(destination, force)
    report(1, 3)
    config, tensors = load_directory(directory)
    report(2, 3)
    write_directory(destination, config, tensors, directory, force=force)
    report(3, 3)
    return destination


@click.command("convert")
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace DESTINATION if it is a model directory.")
def command(source: str, destination: Path, force: bool) -> None:
    """Convert a PaddleNLP checkpoint directory, or a PaddleNLP model name, to DESTINATION.

    DESTINATION becomes a HuggingFace GPT-2 directory: config.json, model.safetensors and the
    tokenizer's files. It is written aside and renamed, so it is there whole or not at all.
    """
    from tqdm import tqdm

    with tqdm(total=3, desc="convert", unit="step", disable=not sys.stderr.isatty()) as bar:

        def report(done: int, _: int) -> None:
            bar.update(done - bar.n)

        convert(source, destination, force=force, progress=report)
    size = (destination / "model.safetensors").stat().st_size
    click.echo(f"{destination}: {size / 1e6:.1f} MB of weights", err=True)
