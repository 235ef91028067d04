"""Exceptions of the package.

Each is also the built-in exception that callers expect (`ValueError` for a bad option, ...), and
its message is one sentence that names the option or file, the value, and what is allowed.
"""

from __future__ import annotations

__all__ = [
    "FastgenError",
    "InternalError",
    "InvalidArgumentError",
    "LibraryError",
    "ModelFileError",
    "NotFoundError",
    "OutOfMemoryError",
    "UnsupportedError",
]


class FastgenError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidArgumentError(FastgenError, ValueError):
    """An option or an input is outside what is allowed."""


class NotFoundError(FastgenError, FileNotFoundError):
    """A file, a directory or a named model is not there or cannot be read."""


class ModelFileError(FastgenError, ValueError):
    """A model file is truncated, foreign or contradicts itself."""


class OutOfMemoryError(FastgenError, MemoryError):
    """Memory could not be had; the message says how much."""


class UnsupportedError(FastgenError, RuntimeError):
    """This machine or this build cannot do that."""


class InternalError(FastgenError, RuntimeError):
    """A defect of the library."""


class LibraryError(FastgenError, RuntimeError):
    """The native library is missing or does not belong to this package."""
