"""Options that several commands have: one declaration, one set of spellings, one help text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from fastgen import models
from fastgen.options import DECODE_STRATEGIES

Command = TypeVar("Command", bound=Callable[..., Any])


def option(*spellings: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option under its spellings and the same with dashes."""
    names = [f"--{spelling}" for spelling in spellings]
    dashed = [name for s in spellings if (name := "--" + s.replace("_", "-")) not in names]
    return click.option(*names, *dashed, spellings[0], **settings)


def model_option(command: Command) -> Command:
    """What to load."""
    return option(
        "model_name_or_path",
        default=models.DEFAULT_MODEL,
        help="A model directory, the model that comes with the package, or one PaddleNLP knows.",
    )(command)


def sampling_options(command: Command) -> Command:
    """How tokens are chosen, and how many."""
    for decorate in reversed(
        (
            option(
                "topk",
                "top_k",
                type=int,
                default=4,
                help="Keep the k most probable tokens; 0: off.",
            ),
            option(
                "topp",
                "top_p",
                type=float,
                default=0.0,
                help="Keep the most probable mass p; 0 or 1: off.",
            ),
            option("max_length", "max_out_len", type=int, default=32, help="New tokens at most."),
            option("temperature", type=float, default=1.0, help="Divides the logits; > 0."),
            option(
                "decode_strategy",
                type=click.Choice(DECODE_STRATEGIES),
                default="sampling",
                help="How tokens are chosen.",
            ),
        )
    ):
        command = decorate(command)
    return command
