"""How a command ends: exit statuses, and one sentence instead of a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

import click


def run(command: click.Command, arguments: Sequence[str] | None, name: str) -> int:
    """Runs a command and returns its exit status: 0, 2 for bad usage, 130 after Ctrl-C, else 1 with
    one sentence on standard error."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed: Python has none then, and all that prints fails
            setattr(sys, stream, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        result: Any = command.main(
            args=None if arguments is None else list(arguments),
            prog_name=name,
            standalone_mode=False,
        )
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"{name}: interrupted", err=True)
        return 130
    except OSError as error:
        if error.errno == errno.EPIPE:
            # The reader went away, as `head` does. Python would complain when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return _fail(name, error)
    except (ValueError, RuntimeError, MemoryError) as error:
        return _fail(name, error)


def _fail(name: str, error: BaseException) -> int:
    click.echo(f"{name}: {error or type(error).__name__}", err=True)
    return 1
