"""`ctypes` declarations of `fastgen.h`, the one door into the native library.

Names, members and parameter types follow the header one to one; `tests/unit/test_capi.py` parses
the header and compares. Calls release the interpreter lock.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
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

from fastgen.errors import (
    FastgenError,
    InternalError,
    InvalidArgumentError,
    LibraryError,
    ModelFileError,
    NotFoundError,
    OutOfMemoryError,
    UnsupportedError,
)

# fastgen_status
OK = 0
INVALID_ARGUMENT = 1
NOT_FOUND = 2
BAD_FILE = 3
OUT_OF_MEMORY = 4
UNSUPPORTED = 5
INTERNAL = 6

# fastgen_dtype
FLOAT32 = 0
FLOAT16 = 1
BFLOAT16 = 2
INT32 = 3
INT64 = 4

# fastgen_decode_strategy
GREEDY_SEARCH = 0
SAMPLING = 1

# fastgen_finish_reason
RUNNING = 0
FINISH_EOS = 1
FINISH_LENGTH = 2
FINISH_CANCELLED = 3
FINISH_FAILED = 4

_EXCEPTIONS: dict[int, type[FastgenError]] = {
    INVALID_ARGUMENT: InvalidArgumentError,
    NOT_FOUND: NotFoundError,
    BAD_FILE: ModelFileError,
    OUT_OF_MEMORY: OutOfMemoryError,
    UNSUPPORTED: UnsupportedError,
    INTERNAL: InternalError,
}

ProgressFunction = CFUNCTYPE(None, c_uint64, c_uint64, c_void_p)


class Config(Structure):
    """`fastgen_config`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("vocab_size", c_int32),
        ("max_positions", c_int32),
        ("hidden_size", c_int32),
        ("num_layers", c_int32),
        ("num_heads", c_int32),
        ("intermediate_size", c_int32),
        ("layer_norm_eps", c_float),
        ("bos_token_id", c_int32),
        ("eos_token_id", c_int32),
        ("pad_token_id", c_int32),
    ]


class ModelOptions(Structure):
    """`fastgen_model_options`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("device", c_char_p),
        ("isa", c_char_p),
        ("weight_dtype", c_char_p),
        ("num_threads", c_int32),
        ("progress", ProgressFunction),
        ("progress_user_data", c_void_p),
        ("tensor_device", c_char_p),
        ("stream", c_void_p),
        ("cache_dtype", c_char_p),
    ]


class Tensor(Structure):
    """`fastgen_tensor`."""

    _fields_ = [
        ("name", c_char_p),
        ("data", c_void_p),
        ("dtype", c_int),
        ("num_dims", c_int32),
        ("shape", c_int64 * 4),
    ]


class ModelInfo(Structure):
    """`fastgen_model_info`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("device", c_char_p),
        ("isa", c_char_p),
        ("weight_dtype", c_char_p),
        ("num_threads", c_int32),
        ("weight_bytes", c_uint64),
        ("step_bytes", c_uint64),
        ("cache_bytes_per_token", c_uint64),
        ("cache_dtype", c_char_p),
    ]


class Options(Structure):
    """`fastgen_options`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("decode_strategy", c_int32),
        ("max_length", c_int32),
        ("min_length", c_int32),
        ("top_k", c_int32),
        ("top_p", c_float),
        ("temperature", c_float),
        ("repetition_penalty", c_float),
        ("no_repeat_ngram_size", c_int32),
        ("num_return_sequences", c_int32),
        ("eos_token_id", c_int32),
        ("forced_bos_token_id", c_int32),
        ("forced_eos_token_id", c_int32),
        ("has_seed", c_int32),
        ("seed", c_uint64),
        ("first_sequence", c_uint32),
        ("keep_logits", c_int32),
    ]


class SessionOptions(Structure):
    """`fastgen_session_options`."""

    _fields_ = [("struct_size", c_size_t), ("max_rows", c_int32)]


class Batch(Structure):
    """`fastgen_batch`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("tokens", c_void_p),
        ("dtype", c_int),
        ("rows", c_size_t),
        ("width", c_size_t),
        ("lengths", POINTER(c_int64)),
        ("options", POINTER(POINTER(Options))),
        ("device", c_char_p),
        ("stream", c_void_p),
    ]


class BatchOutput(Structure):
    """`fastgen_batch_output`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("tokens", c_void_p),
        ("dtype", c_int),
        ("width", c_size_t),
        ("pad_token_id", c_int32),
        ("scores", POINTER(c_float)),
        ("device", c_char_p),
        ("stream", c_void_p),
    ]


class Sequence(Structure):
    """`fastgen_sequence`."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("tokens", POINTER(c_int32)),
        ("length", c_size_t),
        ("finish_reason", c_int32),
        ("score", c_float),
        ("seed", c_uint64),
        ("sequence", c_uint32),
        ("logits", POINTER(c_float)),
    ]


#: Structure of the header -> its declaration here.
STRUCTURES: dict[str, type[Structure]] = {
    "fastgen_config": Config,
    "fastgen_model_options": ModelOptions,
    "fastgen_tensor": Tensor,
    "fastgen_model_info": ModelInfo,
    "fastgen_options": Options,
    "fastgen_session_options": SessionOptions,
    "fastgen_batch": Batch,
    "fastgen_batch_output": BatchOutput,
    "fastgen_sequence": Sequence,
}

#: Function of the header -> result type and parameter types. Handles (models, sessions, tokenizers,
#: text streams) are `c_void_p`; text, which may hold NULs, is `c_char_p` with its size.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "fastgen_version": (c_char_p, []),
    "fastgen_build_info": (c_char_p, []),
    "fastgen_last_error": (c_char_p, []),
    "fastgen_isa_count": (c_size_t, []),
    "fastgen_isa_name": (c_char_p, [c_size_t]),
    "fastgen_isa_supported": (c_int, [c_size_t]),
    "fastgen_config_init": (None, [POINTER(Config)]),
    "fastgen_config_parse": (c_int, [c_char_p, c_size_t, c_char_p, POINTER(Config)]),
    "fastgen_model_options_init": (None, [POINTER(ModelOptions)]),
    "fastgen_model_load": (c_int, [c_char_p, POINTER(ModelOptions), POINTER(c_void_p)]),
    "fastgen_model_create": (
        c_int,
        [POINTER(Config), POINTER(Tensor), c_size_t, POINTER(ModelOptions), POINTER(c_void_p)],
    ),
    "fastgen_checksum": (
        c_int,
        [POINTER(Tensor), c_size_t, c_char_p, c_void_p, POINTER(c_uint64)],
    ),
    "fastgen_quantize": (c_int, [POINTER(Tensor), c_int32, c_char_p, c_void_p, c_void_p]),
    "fastgen_model_get_config": (c_int, [c_void_p, POINTER(Config)]),
    "fastgen_model_get_info": (c_int, [c_void_p, POINTER(ModelInfo)]),
    "fastgen_model_free": (None, [c_void_p]),
    "fastgen_model_logits": (c_int, [c_void_p, POINTER(c_int32), c_size_t, POINTER(c_float)]),
    "fastgen_options_init": (None, [POINTER(Options)]),
    "fastgen_session_options_init": (None, [POINTER(SessionOptions)]),
    "fastgen_session_create": (c_int, [c_void_p, POINTER(SessionOptions), POINTER(c_void_p)]),
    "fastgen_session_free": (None, [c_void_p]),
    "fastgen_session_submit": (
        c_int,
        [c_void_p, POINTER(c_int32), c_size_t, POINTER(Options), POINTER(c_uint64)],
    ),
    "fastgen_batch_init": (None, [POINTER(Batch)]),
    "fastgen_session_submit_batch": (c_int, [c_void_p, POINTER(Batch), POINTER(c_uint64)]),
    "fastgen_session_step": (c_int, [c_void_p, c_int32, POINTER(c_size_t)]),
    "fastgen_session_get": (c_int, [c_void_p, c_uint64, POINTER(Sequence)]),
    "fastgen_batch_output_init": (None, [POINTER(BatchOutput)]),
    "fastgen_session_get_batch": (
        c_int,
        [c_void_p, POINTER(c_uint64), c_size_t, POINTER(BatchOutput)],
    ),
    "fastgen_session_cancel": (c_int, [c_void_p, c_uint64]),
    "fastgen_session_release": (c_int, [c_void_p, c_uint64]),
    "fastgen_tokenizer_load": (c_int, [c_char_p, POINTER(c_void_p)]),
    "fastgen_tokenizer_free": (None, [c_void_p]),
    "fastgen_tokenizer_vocab_size": (c_size_t, [c_void_p]),
    "fastgen_tokenizer_token_id": (c_int, [c_void_p, c_char_p, POINTER(c_int32)]),
    "fastgen_tokenizer_encode": (
        c_int,
        [c_void_p, c_char_p, c_size_t, POINTER(c_int32), c_size_t, POINTER(c_size_t)],
    ),
    "fastgen_tokenizer_decode": (
        c_int,
        [c_void_p, POINTER(c_int32), c_size_t, c_int32, c_char_p, c_size_t, POINTER(c_size_t)],
    ),
    "fastgen_text_stream_create": (c_int, [c_void_p, c_int32, POINTER(c_void_p)]),
    "fastgen_text_stream_push": (
        c_int,
        [c_void_p, POINTER(c_int32), c_size_t, POINTER(c_char_p), POINTER(c_size_t)],
    ),
    "fastgen_text_stream_flush": (c_int, [c_void_p, POINTER(c_char_p), POINTER(c_size_t)]),
    "fastgen_text_stream_free": (None, [c_void_p]),
    "fastgen_measure_read_bandwidth": (
        c_int,
        [c_void_p, c_uint64, c_int32, POINTER(c_double)],
    ),
}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_library_path: Path | None = None


def find_library() -> Path:
    """Path of the native library: `$FASTGEN_LIBRARY`, else the one inside the package.

    Raises:
        LibraryError: there is none.
    """
    forced = os.environ.get("FASTGEN_LIBRARY")
    if forced:
        path = Path(forced)
        if not path.is_file():
            raise LibraryError(
                f"FASTGEN_LIBRARY is {forced!r}, which is not a file: it must be the path of "
                "libfastgen.so"
            )
        return path.resolve()
    import fastgen

    # An editable install has more than one entry: the sources, and where the library was built to.
    folders = [Path(entry) / "lib" for entry in fastgen.__path__]
    for folder in folders:
        for path in sorted(folder.glob("libfastgen.so*")):
            return path.resolve()
    raise LibraryError(
        f"libfastgen.so was not found in {' or '.join(map(str, folders))}: install the package "
        "with pip, or set FASTGEN_LIBRARY to the library of a build directory"
    )


def library() -> ctypes.CDLL:
    """The native library with every function declared, loaded on the first call.

    Raises:
        LibraryError: it is missing, cannot be loaded, or lacks a function.
    """
    global _library, _library_path
    if _library is not None:
        return _library
    with _lock:
        if _library is None:
            path = find_library()
            try:
                loaded = ctypes.CDLL(str(path))
            except OSError as error:
                raise LibraryError(f"{path} cannot be loaded: {error}") from error
            for name, (result, parameters) in FUNCTIONS.items():
                try:
                    function = getattr(loaded, name)
                except AttributeError:
                    raise LibraryError(
                        f"{path} has no function {name}: it is not the libfastgen of this package"
                    ) from None
                function.restype = result
                function.argtypes = parameters
            _library_path = path
            _library = loaded
    return _library


def library_path() -> Path:
    """Where the loaded library came from."""
    library()
    assert _library_path is not None
    return _library_path


def library_version() -> str:
    """Version of the native library, `major.minor.patch`."""
    return bytes(library().fastgen_version()).decode()


def build_info() -> dict[str, Any]:
    """What the native library was built from; see `fastgen_build_info`."""
    document: dict[str, Any] = json.loads(library().fastgen_build_info())
    return document


def last_error() -> str:
    """What the last failed call of this thread had to say."""
    return bytes(library().fastgen_last_error() or b"").decode("utf-8", "replace")


def check(status: int, where: str = "") -> None:
    """Raises the exception that belongs to a status other than OK.

    Args:
        status: what a function of the library returned.
        where: put before the library's sentence, e.g. the prompt it is about.
    """
    if status == OK:
        return
    message = last_error()
    if not message:
        message = f"libfastgen failed with status {status} and said nothing about it"
    raise _EXCEPTIONS.get(status, InternalError)(f"{where}: {message}" if where else message)


def isas() -> list[tuple[str, bool]]:
    """Kernel sets compiled into the library, slowest first, and whether this machine runs them."""
    lib = library()
    return [
        (lib.fastgen_isa_name(i).decode(), bool(lib.fastgen_isa_supported(i)))
        for i in range(lib.fastgen_isa_count())
    ]
