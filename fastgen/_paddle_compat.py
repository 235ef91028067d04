"""What Paddle has in another place in each release: the package of its core.

Paddle 2.6 and newer have it as `paddle.base`. Up to 2.5 it was `paddle.fluid`, with the same
modules and the same names in them as far as they are used here.
"""

from __future__ import annotations

import importlib.util
import zlib  # noqa: F401  Paddle's bundled zlib breaks later imports unless Python's comes first.
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = [
    "PACKAGE",
    "LayerHelper",
    "OpProtoHolder",
    "convert_into_variable",
    "core",
    "core_library",
]

#: Name of the package. Looked for, not tried: what is wrong inside of it is to be seen.
PACKAGE = "paddle.base" if importlib.util.find_spec("paddle.base") else "paddle.fluid"

core: Any = import_module(f"{PACKAGE}.core")
OpProtoHolder: Any = import_module(f"{PACKAGE}.framework").OpProtoHolder
LayerHelper: Any = import_module(f"{PACKAGE}.layer_helper").LayerHelper


def convert_into_variable(parameter: Any) -> Any:
    """The variable of the program being made that stands for a parameter."""
    return import_module(f"{PACKAGE}.dygraph.base")._convert_into_variable(parameter)


def core_library() -> Path:
    """Where Paddle's own shared library should be."""
    return Path(str(core.__file__)).parent / "libpaddle.so"
