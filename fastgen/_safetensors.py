"""Files of safetensors: read by mapping them, written a tensor at a time."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.errors import ModelFileError, NotFoundError

Tensors = dict[str, np.ndarray]

_TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
#: Bytes of an element of a type that is written.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}


# ---- Reading -----------------------------------------------------------------------------------


def read_safetensors(path: Path) -> Tensors:
    """Every tensor of a safetensors file, mapped; bfloat16 becomes float32, in memory.

    Raises:
        NotFoundError: the file cannot be read.
        ModelFileError: it is not a safetensors file, or holds another type.
    """
    import safetensors

    tensors: Tensors = {}
    try:
        with path.open("rb") as file:
            # What stands in the header is checked here, against the size of the file too.
            with safetensors.safe_open(str(path), framework="numpy"):
                pass
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # SafetensorError is not part of its documented interface
        raise ModelFileError(f"{path} is not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    file_data = np.memmap(path, dtype=np.uint8, mode="r")[8 + size :]
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = file_data[begin:end]
        if entry["dtype"] == "BF16":
            bits = data.view("<u2").astype("<u4") << np.uint32(16)
            array: np.ndarray = bits.view(np.float32)
        elif entry["dtype"] in _TYPES:
            array = data.view(_TYPES[entry["dtype"]])
        elif is_buffer(name):
            continue
        else:
            raise ModelFileError(
                f"{path}: tensor {name} is {entry['dtype']}: it must be F32, F16, BF16 or F64"
            )
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def is_buffer(name: str) -> bool:
    """Causal masks that old checkpoints of HuggingFace carry."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def drop_pages(array: np.ndarray) -> None:
    """The caller is done with a tensor for now: if it is mapped, none of its file needs to stay in
    this process's memory. What is read again comes back."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


# ---- Writing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        dtype: the format's word, "F32", ...; arrays of "BF16" have its bits as uint16.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * _SIZES[self.dtype]


@dataclass(frozen=True)
class Source:
    """What one or more tensors of a file are made of, when their turn comes.

    Attributes:
        make: gives their arrays, in order.
    """

    entries: Sequence[Entry]
    make: Callable[[], Sequence[np.ndarray]]


def array_source(name: str, array: np.ndarray) -> Source:
    """An array as it is.

    Raises:
        ModelFileError: it is not a float.
    """
    for word, kind in _TYPES.items():
        if array.dtype == kind:
            return Source([Entry(name, word, array.shape)], lambda: [array])
    raise ModelFileError(f"tensor {name} is {array.dtype}, which is not written to a model")


def write_safetensors(
    path: Path, sources: Sequence[Source], report: Callable[[int, int], None] | None = None
) -> None:
    """Writes a safetensors file, of which no more than a source is in memory.

    Args:
        report: called with sources written and sources in all.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        for entry in source.entries:
            begin, end = end, end + entry.num_bytes
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for done, source in enumerate(sources, 1):
            for entry, array in zip(source.entries, source.make()):
                if array.nbytes != entry.num_bytes:
                    raise AssertionError(f"{entry} became {array.nbytes} bytes")
                file.write(np.ascontiguousarray(array).data)
                drop_pages(array)
            if report is not None:
                report(done, len(sources))
