"""The engine on tensors in memory, through the C API: what the parity tests put on trial."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgen import _capi
from fastgen.testing.models import GPTShape
from fastgen.testing.sampling import token_or_none

__all__ = [
    "EngineModel",
    "EngineSequence",
    "MemoryTensor",
    "Session",
    "checksum",
    "native_options",
    "native_tensors",
]

_REASONS = {
    _capi.RUNNING: "running",
    _capi.FINISH_EOS: "eos",
    _capi.FINISH_LENGTH: "length",
    _capi.FINISH_CANCELLED: "cancelled",
    _capi.FINISH_FAILED: "failed",
}


@dataclass
class EngineSequence:
    """What the engine generated for one returned sequence.

    Attributes:
        tokens: new tokens, up to and including eos.
        score: as the engine reports it.
        finish_reason: ``eos``, ``length``, ``cancelled``, ``failed`` or ``running``.
        logits: raw logits ``[length, vocab]`` if they were kept, else None.
    """

    tokens: list[int]
    score: float
    finish_reason: str
    logits: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor in memory that somebody else owns, of the host or of a device.

    Attributes:
        pointer: address of the first element.
        dtype: ``_capi.FLOAT32`` and so on.
        shape: sizes.
    """

    pointer: int
    dtype: int
    shape: tuple[int, ...]


def native_tensors(tensors: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Array of ``fastgen_tensor``, and what must live as long as it."""
    native = (_capi.Tensor * len(tensors))()
    kept: list[Any] = []
    for item, (name, values) in zip(native, tensors.items()):
        if not isinstance(values, MemoryTensor):
            array = np.ascontiguousarray(values, dtype=np.float32)
            kept.append(array)
            values = MemoryTensor(array.ctypes.data, _capi.FLOAT32, array.shape)
        item.name = name.encode()
        item.data = values.pointer
        item.dtype = values.dtype
        item.num_dims = len(values.shape)
        for axis, size in enumerate(values.shape[:4]):
            item.shape[axis] = size
    return native, kept


def _device_name(device: str | None) -> bytes | None:
    return None if device is None else device.encode()


def checksum(tensors: Mapping[str, Any], device: str | None = None, stream: int = 0) -> int:
    """Sum of the bytes of arrays or :class:`MemoryTensor`, see ``fastgen_checksum``."""
    native, _kept = native_tensors(tensors)
    result = ctypes.c_uint64()
    status = _capi.library().fastgen_checksum(
        native, len(tensors), _device_name(device), stream, ctypes.byref(result)
    )
    _capi.check(status)
    return result.value


def native_options(
    options: Any, seed: int = 0, first_sequence: int = 0, keep_logits: bool = False
) -> _capi.Options:
    """Options as the library has them, see :mod:`fastgen.testing.sampling`."""
    native = _capi.Options()
    _capi.library().fastgen_options_init(ctypes.byref(native))
    sampling = options.decode_strategy == "sampling"
    native.decode_strategy = _capi.SAMPLING if sampling else _capi.GREEDY_SEARCH
    for name in ("max_length", "min_length", "temperature", "repetition_penalty"):
        setattr(native, name, getattr(options, name))
    native.top_k = options.top_k or 0
    native.top_p = 1.0 if options.top_p is None else options.top_p
    native.no_repeat_ngram_size = options.no_repeat_ngram_size or 0
    native.num_return_sequences = options.num_return_sequences
    for name in ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        token = token_or_none(getattr(options, name))
        setattr(native, name, -1 if token is None else token)
    native.has_seed = 1
    native.seed = seed
    native.first_sequence = first_sequence
    native.keep_logits = int(keep_logits)
    return native


class Session:
    """Requests that run together. Made by :meth:`EngineModel.session`."""

    def __init__(self, vocab_size: int, handle: ctypes.c_void_p) -> None:
        self._vocab_size = vocab_size
        self._handle = handle

    def submit(
        self,
        prompt: Sequence[int],
        options: Any,
        seed: int = 0,
        first_sequence: int = 0,
        keep_logits: bool = False,
    ) -> list[int]:
        """Adds a request; returns the ids of its sequences."""
        lib = _capi.library()
        native = native_options(options, seed, first_sequence, keep_logits)
        tokens = (ctypes.c_int32 * len(prompt))(*prompt)
        first = ctypes.c_uint64()
        _capi.check(
            lib.fastgen_session_submit(
                self._handle, tokens, len(prompt), ctypes.byref(native), ctypes.byref(first)
            )
        )
        return [first.value + i for i in range(options.num_return_sequences)]

    def submit_batch(
        self,
        tokens: MemoryTensor,
        options: Sequence[Any],
        lengths: Sequence[int] | None = None,
        seed: int = 0,
        device: str | None = None,
        stream: int = 0,
    ) -> list[int]:
        """Adds the rows of a tensor ``[batch, length]``, one seed for all of them.

        Args:
            tokens: the prompts, padded on the right.
            options: one for all rows, or one for each.
            lengths: of the prompts; None: all are full.
            seed: of the draws; sequences are counted through.
            device: where the tokens lie.
            stream: of the device.

        Returns:
            The ids of all sequences.
        """
        rows, width = tokens.shape
        each = list(options) * rows if len(options) == 1 else list(options)
        native, first = [], 0
        for row in each:
            native.append(native_options(row, seed, first))
            first += row.num_return_sequences
        pointers = (ctypes.POINTER(_capi.Options) * rows)(*map(ctypes.pointer, native))
        batch = _capi.Batch()
        lib = _capi.library()
        lib.fastgen_batch_init(ctypes.byref(batch))
        batch.tokens = tokens.pointer
        batch.dtype = tokens.dtype
        batch.rows, batch.width = rows, width
        if lengths is not None:
            batch.lengths = (ctypes.c_int64 * rows)(*lengths)
        batch.options = pointers
        batch.device = _device_name(device)
        batch.stream = stream
        ids = (ctypes.c_uint64 * rows)()
        _capi.check(lib.fastgen_session_submit_batch(self._handle, ctypes.byref(batch), ids))
        return [start + i for start, row in zip(ids, each) for i in range(row.num_return_sequences)]

    def get_batch(
        self,
        ids: Sequence[int],
        tokens: MemoryTensor | None,
        pad_token_id: int = -1,
        scores: int = 0,
        device: str | None = None,
        stream: int = 0,
    ) -> None:
        """Writes sequences into a tensor ``[len(ids), width]`` and their scores to an address."""
        output = _capi.BatchOutput()
        lib = _capi.library()
        lib.fastgen_batch_output_init(ctypes.byref(output))
        if tokens is not None:
            output.tokens = tokens.pointer
            output.dtype = tokens.dtype
            output.width = tokens.shape[1]
        output.pad_token_id = pad_token_id
        output.scores = ctypes.cast(scores, ctypes.POINTER(ctypes.c_float))
        output.device = _device_name(device)
        output.stream = stream
        native = (ctypes.c_uint64 * len(ids))(*ids)
        _capi.check(
            lib.fastgen_session_get_batch(self._handle, native, len(ids), ctypes.byref(output))
        )

    def step(self, max_steps: int = 1) -> int:
        """Runs up to ``max_steps`` steps; returns how many sequences are unfinished."""
        unfinished = ctypes.c_size_t()
        status = _capi.library().fastgen_session_step(
            self._handle, max_steps, ctypes.byref(unfinished)
        )
        _capi.check(status)
        return unfinished.value

    def run(self) -> None:
        """Runs until every sequence has finished."""
        while self.step(64):
            pass

    def cancel(self, sequence_id: int) -> None:
        """Ends a sequence that waits or runs; it keeps the tokens that it has."""
        _capi.check(_capi.library().fastgen_session_cancel(self._handle, sequence_id))

    def get(self, sequence_id: int) -> EngineSequence:
        """A copy of what a sequence has so far."""
        native = _capi.Sequence()
        native.struct_size = ctypes.sizeof(native)
        _capi.check(
            _capi.library().fastgen_session_get(self._handle, sequence_id, ctypes.byref(native))
        )
        length = native.length
        logits = None
        if native.logits and length:
            shape = (length, self._vocab_size)
            logits = np.ctypeslib.as_array(native.logits, shape=shape).copy()
        return EngineSequence(
            tokens=native.tokens[:length] if length else [],
            score=native.score,
            finish_reason=_REASONS[native.finish_reason],
            logits=logits,
        )


class EngineModel:
    """A model made of tensors in memory. Use it in a ``with`` statement.

    Args:
        shape: of the network.
        tensors: its weights, with PaddleNLP's names: arrays, or :class:`MemoryTensor` objects.
        isa: kernel set; the best one when None.
        num_threads: of the model.
        device: ``cpu`` or ``cuda``.
        weight_dtype: the type that the weights are kept in.
        tensor_device: where the tensors lie; the host when None.
        stream: of that device.
        cache_dtype: the type that keys and values are kept in; the device's own when None.
    """

    def __init__(
        self,
        shape: GPTShape,
        tensors: Mapping[str, Any],
        isa: str | None = None,
        num_threads: int = 1,
        device: str = "cpu",
        weight_dtype: str = "float32",
        tensor_device: str | None = None,
        stream: int = 0,
        cache_dtype: str | None = None,
    ) -> None:
        lib = _capi.library()
        self.shape = shape
        self._handle = ctypes.c_void_p()
        config = _capi.Config()
        lib.fastgen_config_init(ctypes.byref(config))
        config.vocab_size = shape.vocab_size
        config.max_positions = shape.max_position_embeddings
        config.hidden_size = shape.hidden_size
        config.num_layers = shape.num_hidden_layers
        config.num_heads = shape.num_attention_heads
        config.intermediate_size = shape.intermediate_size
        native, kept = native_tensors(tensors)
        options = _capi.ModelOptions()
        lib.fastgen_model_options_init(ctypes.byref(options))
        options.isa = isa.encode() if isa is not None else None
        options.num_threads = num_threads
        options.device = device.encode()
        options.weight_dtype = weight_dtype.encode()
        options.tensor_device = _device_name(tensor_device)
        options.stream = stream
        options.cache_dtype = None if cache_dtype is None else cache_dtype.encode()
        _capi.check(
            lib.fastgen_model_create(
                ctypes.byref(config),
                native,
                len(tensors),
                ctypes.byref(options),
                ctypes.byref(self._handle),
            )
        )
        del kept  # read during the call only

    def __enter__(self) -> EngineModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the model back; may be called twice."""
        if self._handle:
            _capi.library().fastgen_model_free(self._handle)
            self._handle = ctypes.c_void_p()

    @contextmanager
    def session(self, max_rows: int = 0) -> Iterator[Session]:
        """A session that ends with the ``with`` block. ``max_rows`` 0 is the library's default."""
        lib = _capi.library()
        options = _capi.SessionOptions()
        lib.fastgen_session_options_init(ctypes.byref(options))
        options.max_rows = max_rows
        handle = ctypes.c_void_p()
        _capi.check(
            lib.fastgen_session_create(self._handle, ctypes.byref(options), ctypes.byref(handle))
        )
        try:
            yield Session(self.shape.vocab_size, handle)
        finally:
            lib.fastgen_session_free(handle)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: Any,
        seed: int = 0,
        first_sequence: int = 0,
        keep_logits: bool = False,
        max_rows: int = 0,
    ) -> list[EngineSequence]:
        """Runs all prompts as one batch under one seed.

        Args:
            prompts: token ids, of any lengths.
            options: see :mod:`fastgen.testing.sampling`.
            seed: of the draws.
            first_sequence: index of the first returned sequence; all are counted through.
            keep_logits: report raw logits.
            max_rows: rows decoded together; 0 is the library's default.

        Returns:
            ``num_return_sequences`` sequences for every prompt, in the order of the prompts.
        """
        with self.session(max_rows) as session:
            ids: list[int] = []
            for prompt in prompts:
                first = first_sequence + len(ids)
                ids += session.submit(prompt, options, seed, first, keep_logits)
            session.run()
            return [session.get(sequence_id) for sequence_id in ids]

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Raw logits after every token, ``[length, vocab]``."""
        native = (ctypes.c_int32 * len(tokens))(*tokens)
        result = np.empty((len(tokens), self.shape.vocab_size), dtype=np.float32)
        pointer = result.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        _capi.check(
            _capi.library().fastgen_model_logits(self._handle, native, len(tokens), pointer)
        )
        return result
