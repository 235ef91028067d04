"""The `fastgen` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from fastgen import bench, convert, export_model, infer, info
from fastgen._exit import run

__all__ = ["group", "main"]


def _print_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        import fastgen

        click.echo(f"fastgen {fastgen.__version__}")
        context.exit()


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def group() -> None:
    """GPT-2-family text generation on the CPU."""


for _command in (
    infer.command,
    convert.command,
    export_model.command,
    info.command,
    bench.command,
):
    group.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `fastgen` command; ends the process."""
    sys.exit(run(group, arguments, "fastgen"))
