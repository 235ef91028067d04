"""The engine on tensors in memory, through the C API: what the parity tests put on trial."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgen import _capi
from fastgen.testing.models import GPTShape, Tensors
from fastgen.testing.sampling import token_or_none

__all__ = ["EngineModel", "EngineSequence", "Session"]

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
        native = _capi.Options()
        lib.fastgen_options_init(ctypes.byref(native))
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
        tokens = (ctypes.c_int32 * len(prompt))(*prompt)
        first = ctypes.c_uint64()
        _capi.check(
            lib.fastgen_session_submit(
                self._handle, tokens, len(prompt), ctypes.byref(native), ctypes.byref(first)
            )
        )
        return [first.value + i for i in range(options.num_return_sequences)]

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
        tensors: its weights, with PaddleNLP's names.
        isa: kernel set; the best one when None.
        num_threads: of the model.
        device: ``cpu`` or ``cuda``.
        weight_dtype: the type that the weights are kept in.
    """

    def __init__(
        self,
        shape: GPTShape,
        tensors: Tensors,
        isa: str | None = None,
        num_threads: int = 1,
        device: str = "cpu",
        weight_dtype: str = "float32",
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
        native = (_capi.Tensor * len(tensors))()
        arrays = []
        for item, (name, values) in zip(native, tensors.items()):
            array = np.ascontiguousarray(values, dtype=np.float32)
            arrays.append(array)
            item.name = name.encode()
            item.data = array.ctypes.data
            item.dtype = _capi.FLOAT32
            item.num_dims = array.ndim
            for axis, size in enumerate(array.shape):
                item.shape[axis] = size
        options = _capi.ModelOptions()
        lib.fastgen_model_options_init(ctypes.byref(options))
        options.isa = isa.encode() if isa is not None else None
        options.num_threads = num_threads
        options.device = device.encode()
        options.weight_dtype = weight_dtype.encode()
        _capi.check(
            lib.fastgen_model_create(
                ctypes.byref(config),
                native,
                len(tensors),
                ctypes.byref(options),
                ctypes.byref(self._handle),
            )
        )
        del arrays  # read during the call only

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
