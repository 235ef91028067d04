"""Exported directories: `fastgen.json`, and the tensors of `gpt.pdiparams` that it describes.

`docs/export.md` has the format. No Paddle is needed here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen._json import read_json
from fastgen.errors import ModelFileError, NotFoundError

__all__ = [
    "CONFIG_NAMES",
    "MANIFEST",
    "PARAMETERS",
    "Record",
    "is_export",
    "read_manifest",
    "read_tensors",
    "scan_records",
    "special_tokens",
    "write_manifest",
    "write_records",
]

MANIFEST = "fastgen.json"
PARAMETERS = "gpt.pdiparams"
FORMAT = "fastgen-export"
FORMAT_VERSION = 1

#: Sizes of `config` in fastgen.json (`fastgen_config`'s names) -> PaddleNLP's.
CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

# uint32 version, uint64 levels of detail, uint32 version, int32 size of the TensorDesc.
_RECORD_HEADER = struct.Struct("<IQIi")
_MAX_DESC = 256
_VARTYPES = {5: "float32", 4: "float16", 22: "bfloat16"}
# bfloat16 as its bits: NumPy has no such type.
_STORED_TYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


@dataclass(frozen=True)
class Record:
    """A tensor inside `gpt.pdiparams`.

    Attributes:
        dtype: "float32", "float16" or "bfloat16".
        shape: sizes.
        offset: of its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        # Python's integers: sizes out of a damaged file must not wrap around.
        return math.prod(self.shape) * np.dtype(_STORED_TYPES[self.dtype]).itemsize


def is_export(directory: Path) -> bool:
    """Whether a directory was written by `fastgen export`."""
    return (directory / MANIFEST).is_file()


# ---- gpt.pdiparams -----------------------------------------------------------------------------


def scan_records(path: Path) -> list[Record]:
    """The records of a combined parameter file of Paddle, in the file's order.

    Raises:
        ModelFileError: it is not one, or is truncated.
    """
    records: list[Record] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at < size:
            file.seek(at)
            header = file.read(_RECORD_HEADER.size)
            if len(header) < _RECORD_HEADER.size:
                raise ModelFileError(f"{path} is truncated at byte {at}")
            version, levels, tensor_version, desc_size = _RECORD_HEADER.unpack(header)
            if version or levels or tensor_version or not 0 < desc_size <= _MAX_DESC:
                raise ModelFileError(f"{path} has no plain tensor at byte {at}")
            dtype, shape = _parse_desc(file.read(desc_size), f"{path}: the record at byte {at}")
            record = Record(dtype, shape, at + len(header) + desc_size)
            at = record.offset + record.num_bytes
            if at > size:
                raise ModelFileError(f"{path} is truncated: it has {size} bytes of at least {at}")
            records.append(record)
    return records


def write_records(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[int]:
    """Writes a combined parameter file of Paddle, a tensor at a time.

    Args:
        path: the file.
        tensors: names, which only errors tell, and arrays, in the file's order.

    Yields:
        The number of bytes of each tensor, once it is written.
    """
    vartypes = {name: vartype for vartype, name in _VARTYPES.items()}
    with path.open("wb") as file:
        for name, array in tensors:
            if str(array.dtype) not in vartypes:
                raise ModelFileError(f"tensor {name} is {array.dtype}, which {path} cannot hold")
            desc = _varint(1 << 3) + _varint(vartypes[str(array.dtype)])
            desc += b"".join(_varint(2 << 3) + _varint(size) for size in array.shape)
            file.write(_RECORD_HEADER.pack(0, 0, 0, len(desc)) + desc)
            file.write(np.ascontiguousarray(array).data)
            yield array.nbytes


def _varint(value: int) -> bytes:
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


def _parse_desc(data: bytes, where: str) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a TensorDesc message: field 1 is the type, field 2 the sizes."""
    dtype = None
    shape: list[int] = []
    values = _varints(data, where)
    for key in values:
        value = next(values, None)
        if value is None or key not in (1 << 3, 2 << 3):
            raise ModelFileError(f"{where} has no TensorDesc")
        if key == 1 << 3:
            dtype = _VARTYPES.get(value)
            if dtype is None:
                raise ModelFileError(f"{where} has Paddle's type {value}, which is no weight's")
        else:
            shape.append(value)
    if dtype is None:
        raise ModelFileError(f"{where} has no type")
    return dtype, tuple(shape)


def _varints(data: bytes, where: str) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            yield value
            value = shift = 0
    if shift:
        raise ModelFileError(f"{where} ends inside a number")


def stored_array(data: np.ndarray, record: Record) -> np.ndarray:
    """The tensor of a record, as a view; bfloat16 as uint16.

    Args:
        data: the whole file, uint8.
    """
    raw = data[record.offset : record.offset + record.num_bytes]
    return raw.view(_STORED_TYPES[record.dtype]).reshape(record.shape)


# ---- fastgen.json ------------------------------------------------------------------------------


def write_manifest(
    directory: Path,
    *,
    program: str,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    dtype: str,
    tensors: Mapping[str, Record],
    special_tokens: Sequence[str] | None,
    versions: Mapping[str, str],
) -> None:
    """Writes `fastgen.json`; `special_tokens` is None without a tokenizer."""
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": dict(versions),
        "program": program,
        "config": dict(config),
        "dtype": dtype,
        "generation": dict(generation),
        "inputs": list(inputs),
        "tokenizer": None
        if special_tokens is None
        else {"type": "byte-level-bpe", "special_tokens": list(special_tokens)},
        "tensors": [
            {
                "name": name,
                "dtype": record.dtype,
                "shape": list(record.shape),
                "offset": record.offset,
            }
            for name, record in sorted(tensors.items(), key=lambda item: item[1].offset)
        ],
    }
    (directory / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The object in `fastgen.json`, of a version that is known.

    Raises:
        NotFoundError: it cannot be read.
        ModelFileError: it is not the description of an export.
    """
    path = directory / MANIFEST
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise ModelFileError(f"{path} is no description of an export")
    if document.get("format_version") != FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: format_version is {document.get('format_version')!r}: it must be "
            f"{FORMAT_VERSION}"
        )
    return document


def special_tokens(directory: Path) -> list[str]:
    """The special tokens that `fastgen.json` names."""
    tokenizer = read_manifest(directory).get("tokenizer") or {}
    tokens = tokenizer.get("special_tokens") if isinstance(tokenizer, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ModelFileError(f"{directory / MANIFEST}: tokenizer has no list of special_tokens")
    return tokens


def read_tensors(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration (PaddleNLP's names) and tensors (PaddleNLP's names, mapped; bfloat16 as uint16)
    of an export.

    Raises:
        NotFoundError, ModelFileError: a file is missing, or not what it should be.
    """
    manifest = read_manifest(directory)
    where = directory / MANIFEST
    path = directory / PARAMETERS
    try:
        config = {theirs: manifest["config"][ours] for ours, theirs in CONFIG_NAMES.items()}
        config["_layer_norm_eps"] = float(manifest["config"]["layer_norm_eps"])
        for name in _SPECIAL:
            token = manifest["config"][name]
            config[name] = None if token == -1 else token
        claimed = {
            (record["dtype"], tuple(record["shape"]), record["offset"]): str(record["name"])
            for record in manifest["tensors"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    if not path.is_file():
        raise NotFoundError(f"{path} is not there")
    records = scan_records(path)
    if set(claimed) != {(r.dtype, r.shape, r.offset) for r in records}:
        raise ModelFileError(f"{path} does not hold the tensors that {where} describes")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    return config, {
        claimed[record.dtype, record.shape, record.offset]: stored_array(data, record)
        for record in records
    }
