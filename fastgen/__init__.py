"""GPT-2-family text generation on the CPU, with the words of PaddleNLP.

`Generator` needs no Paddle. `FasterGPT` is the layer for PaddleNLP's models; Paddle is imported
when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgen.errors import FastgenError
from fastgen.generator import GenerationInterrupted, GenerationResult, Generator
from fastgen.options import GenerationOptions

if TYPE_CHECKING:
    from fastgen.faster_gpt import FasterGPT

    __version__: str

__all__ = [
    "FasterGPT",
    "FastgenError",
    "GenerationInterrupted",
    "GenerationOptions",
    "GenerationResult",
    "Generator",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "FasterGPT":
        from fastgen.faster_gpt import FasterGPT

        return FasterGPT
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("fastgen")
    except metadata.PackageNotFoundError:  # used from the sources: the library knows
        from fastgen import _capi

        return _capi.library_version()
