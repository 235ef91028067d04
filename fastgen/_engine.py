"""The library's objects behind `Generator`: models and sessions whose lifetime Python manages."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen import _capi, _config
from fastgen.errors import InvalidArgumentError, UnsupportedError

Progress = Callable[[int, int], None]

_REASONS = {
    _capi.RUNNING: "cancelled",
    _capi.FINISH_EOS: "eos",
    _capi.FINISH_LENGTH: "length",
    _capi.FINISH_CANCELLED: "cancelled",
    _capi.FINISH_FAILED: "failed",
}
# A call into the library should last about this long: rare enough to cost nothing, and Ctrl-C
# waits for no more than one of them.
_SLICE_SECONDS = (0.02, 0.1)
_SLICE_STEPS = 64
# The library's own limits (kMaxThreads, kMaxRows), for messages that name Python's arguments.
_MOST_THREADS = 1024
_MOST_ROWS = 4096


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is and what it costs.

    Attributes:
        max_positions: prompt + new tokens may not exceed it.
        bos_token_id, eos_token_id, pad_token_id: None where the model names none.
        num_threads: threads that compute.
        weight_bytes: packed weights in memory.
        step_bytes: weights that a decode step of one row reads.
        cache_bytes_per_token: KV cache for one position of one sequence.
        cache_dtype: what its keys and values are kept as.
    """

    vocab_size: int
    max_positions: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    layer_norm_eps: float
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    device: str
    isa: str
    weight_dtype: str
    num_threads: int
    weight_bytes: int
    step_bytes: int
    cache_bytes_per_token: int
    cache_dtype: str


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy; a bool is not one."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def model_options(
    num_threads: int | None,
    isa: str | None,
    device: str,
    weight_dtype: str | None,
    cache_dtype: str | None,
) -> _capi.ModelOptions:
    options = _capi.ModelOptions()
    _capi.library().fastgen_model_options_init(ctypes.byref(options))
    if num_threads is not None:
        if not is_integer(num_threads) or not 1 <= num_threads <= _MOST_THREADS:
            raise InvalidArgumentError(
                f"num_threads is {num_threads!r}: it must be from 1 to {_MOST_THREADS}"
            )
        options.num_threads = int(num_threads)
    words = {"device": device, "weight_dtype": weight_dtype, "isa": isa, "cache_dtype": cache_dtype}
    for name, word in words.items():
        if word is None and name != "device":
            continue
        if not isinstance(word, str):
            raise InvalidArgumentError(f"{name} is {word!r}: it must be a string")
        setattr(options, name, word.encode())
    return options


class ProgressBridge:
    """Passes the library's progress on, and exceptions (Ctrl-C too) back to the caller: one that
    left a callback would be printed and lost."""

    def __init__(self, options: _capi.ModelOptions, progress: Progress | bool | None) -> None:
        self._error: BaseException | None = None
        self._bar: Any = None
        if progress is None or progress is False:
            return
        if progress is True:
            from tqdm import tqdm

            bar = tqdm(
                desc="load",
                unit="B",
                unit_scale=True,
                leave=False,
                file=sys.stderr,
                disable=not sys.stderr.isatty(),
            )

            def draw(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            self._bar = bar
            report: Progress = draw
        else:
            report = progress

        def call(done: int, total: int, _: Any) -> None:
            if self._error is None:
                try:
                    report(done, total)
                except BaseException as error:
                    self._error = error

        options.progress = _capi.ProgressFunction(call)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._error is not None:
            raise self._error


class Model:
    """A `fastgen_model*` that is freed once, when nobody uses it."""

    def __init__(self) -> None:
        self.pointer = ctypes.c_void_p()
        self.closed = False
        self._users = 0
        self._lock = threading.Lock()
        free = _capi.library().fastgen_model_free
        self._free = weakref.finalize(self, free, self.pointer)
        self._free.atexit = False  # the process gives the memory back faster

    @classmethod
    def load(cls, directory: Path, options: _capi.ModelOptions) -> Model:
        model = cls()
        path = str(directory).encode("utf-8", "surrogateescape")
        status = _capi.library().fastgen_model_load(
            path, ctypes.byref(options), ctypes.byref(model.pointer)
        )
        _capi.check(status)
        return model

    @classmethod
    def create(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        options: _capi.ModelOptions,
    ) -> Model:
        model = cls()
        native_config = _config.parse(config)
        _config.check_head(config, tensors, "config")
        arrays, native_tensors = _native_tensors(tensors)
        status = _capi.library().fastgen_model_create(
            ctypes.byref(native_config),
            native_tensors,
            len(native_tensors),
            ctypes.byref(options),
            ctypes.byref(model.pointer),
        )
        del arrays  # they had to outlive the call
        _capi.check(status)
        return model

    def close(self) -> None:
        with self._lock:
            self.closed = True
            if self._users == 0:
                self._free()

    def __enter__(self) -> Model:
        with self._lock:
            if self.closed:
                raise InvalidArgumentError("the Generator is closed: load the model again")
            self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self.closed and self._users == 0:
                self._free()

    def info(self) -> ModelInfo:
        native = _capi.ModelInfo()
        native.struct_size = ctypes.sizeof(native)
        config = _capi.Config()
        config.struct_size = ctypes.sizeof(config)
        library = _capi.library()
        with self:
            _capi.check(library.fastgen_model_get_info(self.pointer, ctypes.byref(native)))
            _capi.check(library.fastgen_model_get_config(self.pointer, ctypes.byref(config)))
        values: dict[str, Any] = {}
        for field in dataclasses.fields(ModelInfo):
            owner = native if hasattr(native, field.name) else config
            value = getattr(owner, field.name)
            if isinstance(value, bytes):
                value = value.decode()
            elif field.name.endswith("_token_id") and value < 0:
                value = None
            values[field.name] = value
        return ModelInfo(**values)

    def logits(self, token_ids: list[int], vocab_size: int) -> np.ndarray:
        tokens = np.asarray(token_ids, dtype=np.int32)
        result = np.empty((len(tokens), vocab_size), dtype=np.float32)
        with self:
            _capi.check(
                _capi.library().fastgen_model_logits(
                    self.pointer,
                    tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
                    len(tokens),
                    result.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
                )
            )
        return result

    def measure_read_bandwidth(self, num_bytes: int, passes: int) -> float:
        result = ctypes.c_double()
        with self:
            _capi.check(
                _capi.library().fastgen_measure_read_bandwidth(
                    self.pointer, num_bytes, passes, ctypes.byref(result)
                )
            )
        return result.value

    def session(self, max_rows: int | None) -> Session:
        options = _capi.SessionOptions()
        lib = _capi.library()
        lib.fastgen_session_options_init(ctypes.byref(options))
        if max_rows is not None:
            if not is_integer(max_rows) or not 1 <= max_rows <= _MOST_ROWS:
                raise InvalidArgumentError(
                    f"max_batch_size is {max_rows!r}: it must be from 1 to {_MOST_ROWS}"
                )
            options.max_rows = int(max_rows)
        session = Session()
        with self:
            _capi.check(
                lib.fastgen_session_create(
                    self.pointer, ctypes.byref(options), ctypes.byref(session.pointer)
                )
            )
        return session


class Session:
    """A `fastgen_session*`, for one thread at a time. It keeps its model alive."""

    def __init__(self) -> None:
        # The library writes into `pointer` itself, so that no interrupt can lose a session.
        self.pointer = ctypes.c_void_p()
        self._free = weakref.finalize(self, _capi.library().fastgen_session_free, self.pointer)
        self._free.atexit = False

    def close(self) -> None:
        self._free()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, prompt: list[int], options: _capi.Options, where: str = "") -> int:
        """Adds a request; returns the id of its first sequence. `where` begins error messages."""
        first = ctypes.c_uint64()
        # An array takes a list several times as fast as ctypes does.
        tokens = (ctypes.c_int32 * len(prompt)).from_buffer(array("i", prompt))
        status = _capi.library().fastgen_session_submit(
            self.pointer, tokens, len(prompt), ctypes.byref(options), ctypes.byref(first)
        )
        _capi.check(status, where)
        return first.value

    def step(self, max_steps: int) -> int:
        """Runs up to `max_steps` steps; returns how many sequences are unfinished."""
        unfinished = ctypes.c_size_t()
        _capi.check(
            _capi.library().fastgen_session_step(self.pointer, max_steps, ctypes.byref(unfinished))
        )
        return unfinished.value

    def run(self, max_steps: int = _SLICE_STEPS) -> Iterator[int]:
        """Steps until every sequence has ended; gives the number unfinished after each slice."""
        unfinished = 1
        steps = 1
        while unfinished:
            begin = time.perf_counter()
            unfinished = self.step(steps)
            seconds = time.perf_counter() - begin
            if seconds < _SLICE_SECONDS[0]:
                steps = min(steps * 2, max_steps)
            elif seconds > _SLICE_SECONDS[1]:
                steps = max(steps // 2, 1)
            yield unfinished

    def get(self, sequence: int) -> tuple[list[int], float, str]:
        """New tokens, score and finish reason of a sequence."""
        native = self._get(sequence)
        tokens = native.tokens[: native.length] if native.length else []
        return list(tokens), native.score, _REASONS[native.finish_reason]

    def length(self, sequence: int) -> int:
        return int(self._get(sequence).length)

    def _get(self, sequence: int) -> _capi.Sequence:
        native = _capi.Sequence()
        native.struct_size = ctypes.sizeof(native)
        _capi.check(
            _capi.library().fastgen_session_get(self.pointer, sequence, ctypes.byref(native))
        )
        return native


def _native_tensors(tensors: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], Any]:
    """Arrays to keep alive, and the descriptions that point into them."""
    types = {np.dtype(np.float32): _capi.FLOAT32, np.dtype(np.float16): _capi.FLOAT16}
    arrays: list[np.ndarray] = []
    native = (_capi.Tensor * len(tensors))()
    for entry, (name, value) in zip(native, tensors.items()):
        array = np.ascontiguousarray(value)
        if array.dtype not in types:
            raise UnsupportedError(f"tensor {name} is {array.dtype}: it must be float32 or float16")
        arrays.append(array)
        entry.name = name.encode()
        entry.data = array.ctypes.data
        entry.dtype = types[array.dtype]
        entry.num_dims = array.ndim
        entry.shape[: array.ndim] = array.shape
    return arrays, native
