"""JSON files of model directories, which come from strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastgen.errors import ModelFileError, NotFoundError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        NotFoundError: it cannot be read.
        ModelFileError: it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} is not a JSON object")
    return value
