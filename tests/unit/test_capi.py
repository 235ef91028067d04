"""The ctypes declarations against the header, so that they cannot drift."""

from __future__ import annotations

import ctypes
import re
from ctypes import (
    POINTER,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

import pytest

import fastgen
from fastgen import Generator, _capi
from fastgen.errors import (
    InternalError,
    InvalidArgumentError,
    LibraryError,
    ModelFileError,
    NotFoundError,
    OutOfMemoryError,
    UnsupportedError,
)
from fastgen.models import DEFAULT_MODEL

SCALARS = {
    "int": c_int,
    "int32_t": c_int32,
    "int64_t": c_int64,
    "uint32_t": c_uint32,
    "uint64_t": c_uint64,
    "size_t": c_size_t,
    "float": c_float,
    "double": c_double,
}
HANDLES = ("fastgen_model", "fastgen_session", "fastgen_tokenizer", "fastgen_text_stream")


def header() -> str:
    """The header without comments and preprocessor lines."""
    candidates = [Path(entry) / "include/fastgen/fastgen.h" for entry in fastgen.__path__]
    candidates += [
        parent / "csrc/include/fastgen/fastgen.h" for parent in Path(__file__).resolve().parents
    ]
    text = next(path for path in candidates if path.is_file()).read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return re.sub(r"^#.*$", "", text, flags=re.M)


def enums() -> dict[str, dict[str, int]]:
    result = {}
    for body, name in re.findall(r"typedef enum \w+ \{(.*?)\} (\w+);", header(), flags=re.S):
        members = re.findall(r"FASTGEN_(\w+) = (\d+)", body)
        result[name] = {member: int(value) for member, value in members}
    return result


def native_type(declaration: str) -> Any:
    """The ctypes type of a C type, e.g. `const fastgen_options*`."""
    words = declaration.replace("*", " * ").split()
    stars = words.count("*")
    (base,) = [word for word in words if word not in ("const", "*", "struct")]
    if base == "void":
        return c_void_p if stars else None
    if base == "char":
        return c_char_p if stars == 1 else POINTER(c_char_p)
    if base == "fastgen_progress_fn":
        return _capi.ProgressFunction
    if base in HANDLES:
        result: Any = c_void_p
        stars -= 1
    elif base in _capi.STRUCTURES:
        result = _capi.STRUCTURES[base]
    else:
        result = c_int if base in enums() else SCALARS[base]
    for _ in range(stars):
        result = POINTER(result)
    return result


def functions() -> dict[str, tuple[Any, list[Any]]]:
    result = {}
    pattern = r"FASTGEN_API ([\w\s]+?\*?)\s*(fastgen_\w+)\(([^)]*)\);"
    for kind, name, parameters in re.findall(pattern, header()):
        types = []
        for parameter in parameters.split(","):
            if parameter.strip() not in ("", "void"):
                types.append(native_type(re.sub(r"\w+$", "", parameter.strip())))
        result[name] = (native_type(kind), types)
    return result


def test_functions_follow_the_header() -> None:
    declared = functions()
    assert len(declared) == header().count("FASTGEN_API ")
    assert declared == _capi.FUNCTIONS


def test_structures_follow_the_header() -> None:
    found = re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", header(), flags=re.S)
    assert sorted(name for name, _ in found) == sorted(_capi.STRUCTURES)
    for name, body in found:
        members = []
        for member in filter(None, map(str.strip, body.split(";"))):
            match = re.fullmatch(r"(.*?)(\w+)(?:\[(\d+)\])?", member, flags=re.S)
            assert match is not None
            kind = native_type(match[1])
            members.append((match[2], kind * int(match[3]) if match[3] else kind))
        assert members == list(_capi.STRUCTURES[name]._fields_), name


def test_constants_follow_the_header() -> None:
    found = enums()
    assert sorted(found) == [
        "fastgen_decode_strategy",
        "fastgen_dtype",
        "fastgen_finish_reason",
        "fastgen_status",
    ]
    for members in found.values():
        for name, value in members.items():
            assert getattr(_capi, name) == value


@pytest.mark.parametrize(
    ("init", "structure"),
    [
        ("fastgen_config_init", _capi.Config),
        ("fastgen_model_options_init", _capi.ModelOptions),
        ("fastgen_options_init", _capi.Options),
        ("fastgen_session_options_init", _capi.SessionOptions),
        ("fastgen_batch_init", _capi.Batch),
        ("fastgen_batch_output_init", _capi.BatchOutput),
    ],
)
def test_the_library_agrees_on_sizes(init: str, structure: type[ctypes.Structure]) -> None:
    native = structure()
    getattr(_capi.library(), init)(ctypes.byref(native))
    assert native.struct_size == ctypes.sizeof(structure)


@pytest.mark.parametrize(
    ("get", "structure", "kept"),
    [
        ("fastgen_model_get_config", _capi.Config, "hidden_size"),
        ("fastgen_model_get_info", _capi.ModelInfo, "weight_bytes"),
    ],
)
def test_a_program_of_an_older_header_gets_the_members_it_has(
    get: str, structure: type[ctypes.Structure], kept: str
) -> None:
    """Structures may grow at their end: each is filled as far as `struct_size` says."""
    full, short, unset = structure(), structure(), structure()
    full.struct_size = ctypes.sizeof(structure)
    short.struct_size = getattr(structure, kept).offset
    with Generator.from_pretrained(DEFAULT_MODEL) as generator:
        pointer = generator._model.pointer
        for filled in (full, short):
            _capi.check(getattr(_capi.library(), get)(pointer, ctypes.byref(filled)))
        status = getattr(_capi.library(), get)(pointer, ctypes.byref(unset))
    assert status == _capi.INVALID_ARGUMENT
    assert "struct_size is 0" in _capi.last_error()
    assert getattr(full, kept) > 0
    assert getattr(short, kept) == 0
    assert bytes(short)[8 : short.struct_size] == bytes(full)[8 : short.struct_size]


def test_status_becomes_an_exception_with_the_librarys_sentence() -> None:
    pointer = c_void_p()
    status = _capi.library().fastgen_model_load(b"/no/such/place", None, ctypes.byref(pointer))
    assert status == _capi.NOT_FOUND
    assert not pointer.value
    with pytest.raises(NotFoundError, match=r"/no/such/place"):
        _capi.check(status)
    with pytest.raises(NotFoundError, match=r"^prompt 3: .*/no/such/place"):
        _capi.check(status, "prompt 3")
    _capi.check(_capi.OK)


@pytest.mark.parametrize(
    ("status", "kind", "builtin"),
    [
        (_capi.INVALID_ARGUMENT, InvalidArgumentError, ValueError),
        (_capi.NOT_FOUND, NotFoundError, FileNotFoundError),
        (_capi.BAD_FILE, ModelFileError, ValueError),
        (_capi.OUT_OF_MEMORY, OutOfMemoryError, MemoryError),
        (_capi.UNSUPPORTED, UnsupportedError, RuntimeError),
        (_capi.INTERNAL, InternalError, RuntimeError),
        (99, InternalError, RuntimeError),
    ],
)
def test_every_status_has_its_exception(
    status: int, kind: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(kind, builtin)
    with pytest.raises(kind):
        _capi.check(status)


def test_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTGEN_LIBRARY", str(tmp_path / "absent.so"))
    with pytest.raises(
        LibraryError, match=r"FASTGEN_LIBRARY is '.*absent.so', which is not a file"
    ):
        _capi.find_library()


def test_isas_begin_with_the_generic_one() -> None:
    names = [name for name, _ in _capi.isas()]
    assert names[0] == "generic"
    assert dict(_capi.isas())["generic"]
    assert set(names) <= {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16"}
    assert _capi.library().fastgen_isa_name(len(names)) is None


def test_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", _capi.library_version())
    assert fastgen.__version__ == _capi.library_version()
