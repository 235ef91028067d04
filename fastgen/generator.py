"""Text generation without Paddle: a model in memory, and what can be asked of it."""

from __future__ import annotations

import ctypes
import operator
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen import _capi, models
from fastgen import tokenizer as tokenizers
from fastgen._checkpoint import is_paddlenlp_directory
from fastgen._engine import (
    Model,
    ModelInfo,
    Progress,
    ProgressBridge,
    Session,
    is_integer,
    model_options,
)
from fastgen.errors import InvalidArgumentError, ModelFileError
from fastgen.options import GenerationOptions
from fastgen.tokenizer import Tokenizer

__all__ = ["GenerationInterrupted", "GenerationResult", "Generator", "ModelInfo"]

Prompts = Any  # str, token ids, or a sequence (or array) of either; see Generator.generate


@dataclass(frozen=True)
class GenerationResult:
    """What was generated. Sequences go prompt by prompt: prompt i owns `sequences_of(i)`.

    Attributes:
        texts: the new text of each sequence, special tokens left out; None if the model has no
            tokenizer.
        token_ids: the new tokens of each sequence, eos included when it was generated.
        scores: mean over the new tokens of the log-probability before temperature and filters
            (sampling) or of the processed logit (greedy), as PaddleNLP reports it.
        finish_reasons: `"eos"`, `"length"` or `"cancelled"`.
        seed: the seed that gives the same again; one number, or one for each prompt if they were
            given so.
        prompt_ids: the tokens of each prompt.
        num_return_sequences: sequences of each prompt.
        pad_token_id: what :meth:`to_padded_array` pads with; None if nothing says.
    """

    texts: list[str] | None
    token_ids: list[list[int]]
    scores: list[float]
    finish_reasons: list[str]
    seed: int | tuple[int, ...]
    prompt_ids: list[list[int]]
    num_return_sequences: int = 1
    pad_token_id: int | None = None

    def sequences_of(self, prompt: int) -> range:
        """Indices of the sequences of a prompt."""
        if not 0 <= prompt < len(self.prompt_ids):
            raise IndexError(f"prompt {prompt} of {len(self.prompt_ids)}")
        return range(prompt * self.num_return_sequences, (prompt + 1) * self.num_return_sequences)

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(map(len, self.token_ids))

    def to_padded_array(self, pad: int | None = None) -> np.ndarray:
        """The new tokens as PaddleNLP returns them: eos is written, then padding.

        Args:
            pad: token to fill with; None: the request's `pad_token_id`, else the model's, else eos.

        Returns:
            [batch * num_return_sequences, longest] int64.
        """
        value = self.pad_token_id if pad is None else pad
        longest = max(map(len, self.token_ids), default=0)
        if value is None:
            if any(len(ids) < longest for ids in self.token_ids):
                raise InvalidArgumentError(
                    "pad is None and the model names no pad_token_id: give one"
                )
            value = 0
        array = np.full((len(self.token_ids), longest), value, dtype=np.int64)
        for row, ids in zip(array, self.token_ids):
            row[: len(ids)] = ids
        return array


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during :meth:`Generator.generate`. The model stays usable.

    Attributes:
        result: what had been generated; sequences that had not ended are `"cancelled"`.
    """

    def __init__(self, result: GenerationResult) -> None:
        super().__init__("generation was interrupted")
        self.result = result


class Generator:
    """A model in memory, made by :meth:`from_pretrained` or :meth:`from_tensors`.

    Any number of threads may use one; their requests take turns step by step. Use it as a context
    manager, or call :meth:`close`, to give its memory back at a certain time.
    """

    def __init__(
        self, model: Model, name: str, tokenizer: Tokenizer | None, directory: Path | None
    ) -> None:
        self._model = model
        self._name = name
        self._directory = directory
        self.tokenizer = tokenizer
        self.info: ModelInfo = model.info()

    @classmethod
    def from_pretrained(
        cls,
        directory_or_name: Any,
        *,
        num_threads: int | None = None,
        isa: str | None = None,
        device: str = "cpu",
        weight_dtype: str | None = None,
        cache_dtype: str | None = None,
        progress: Progress | bool | None = None,
    ) -> Generator:
        """Loads a model.

        Args:
            directory_or_name: a HuggingFace GPT-2 directory, one made by `fastgen convert` or
                `fastgen export`, or a name (see :func:`fastgen.models.resolve`).
            num_threads: None: `$FASTGEN_NUM_THREADS`, else the processors this process may use.
            isa: kernel set of the CPU, see `fastgen info`; None: `$FASTGEN_ISA`, else the best one.
            device: `"cpu"`, or `"cuda"` or `"cuda:<index>"` where `libfastgen_cuda` was built.
            weight_dtype: what the weights are kept as: `"float32"`, `"float16"`, `"bfloat16"`,
                `"int8"` or `"int4"`. Sums are float32 whatever it is. None: the type that
                `fastgen convert --weight_dtype` gave the files, else float32.
            cache_dtype: what keys and values are kept as: on the CPU `"float32"`, `"float16"`,
                `"bfloat16"` or `"int8"`; None: as the weights are, beside integers bfloat16 (on a
                GPU float16).
            progress: called with bytes packed and bytes in all; True: a bar on standard error.

        Raises:
            FileNotFoundError: the model is not there.
            ValueError: a file is not what it should be, or an option is wrong.
            RuntimeError: this machine or build cannot do it.
            MemoryError: the weights do not fit.
        """
        directory = models.resolve(directory_or_name)
        if is_paddlenlp_directory(directory):
            raise ModelFileError(
                f"{directory} is a checkpoint of PaddleNLP: convert it with "
                f"fastgen convert {directory} {directory}-fastgen and load {directory}-fastgen"
            )
        options = model_options(num_threads, isa, device, weight_dtype, cache_dtype)
        with ProgressBridge(options, progress):
            model = Model.load(directory, options)
        tokenizer = Tokenizer.from_directory(directory)
        return cls(model, str(directory_or_name), tokenizer, directory)

    @classmethod
    def from_tensors(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        *,
        num_threads: int | None = None,
        isa: str | None = None,
        device: str = "cpu",
        weight_dtype: str = "float32",
        cache_dtype: str | None = None,
        tokenizer: Tokenizer | None = None,
        progress: Progress | bool | None = None,
    ) -> Generator:
        """Makes a model of arrays in memory, which are read during the call only.

        Args:
            config: HuggingFace's configuration of a GPT-2 (`n_embd`, `n_head`, ...).
            tensors: float32 or float16 arrays under HuggingFace's or PaddleNLP's names.

        The others, and the errors, are those of :meth:`from_pretrained`.
        """
        options = model_options(num_threads, isa, device, weight_dtype, cache_dtype)
        with ProgressBridge(options, progress):
            model = Model.create(config, tensors, options)
        return cls(model, "tensors", tokenizer, None)

    # ---- Life ------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives the memory back, once requests that still run have ended. May be called twice."""
        self._model.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        info = self.info
        state = " closed" if self._model.closed else ""
        return (
            f"<fastgen.Generator {self._name!r} layers={info.num_layers} hidden={info.hidden_size} "
            f"heads={info.num_heads} vocab={info.vocab_size} {info.device}/{info.isa} "
            f"threads={info.num_threads}{state}>"
        )

    # ---- Requests --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        options: GenerationOptions | None = None,
        *,
        max_batch_size: int | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> GenerationResult:
        """Generates for one prompt or a batch of any lengths.

        A sequence depends on its own prompt, options and seed only, whatever runs beside it.

        Args:
            prompts: a text; a list of texts; token ids (list or 1-D array of integers); or a list
                (or 2-D array) of token ids, which may differ in length.
            options: the options; `kwargs` are put over them, see `GenerationOptions.from_kwargs`.
            max_batch_size: sequences decoded together at most; it changes speed and memory only.
            progress: called with new tokens so far and new tokens at most.

        Raises:
            ValueError: an option or a prompt is outside what is allowed.
            MemoryError: the KV cache does not fit.
            GenerationInterrupted: Ctrl-C; a KeyboardInterrupt that carries what there was.
        """
        options = GenerationOptions.from_kwargs(options, **kwargs)
        prompt_ids = self._encode_batch(prompts)
        seed, seeds = _spread_seeds(options, len(prompt_ids))
        session = self.open_session(max_batch_size)
        ids = self._submit(session, prompt_ids, options, seeds)
        limit = len(ids) * options.max_length
        interrupted = False
        try:
            for _ in session.run():
                if progress is not None:
                    progress(sum(session.length(i) for i in ids), limit)
        except KeyboardInterrupt:
            interrupted = True
        sequences = [session.get(i) for i in ids]
        session.close()
        token_ids = [tokens for tokens, _, _ in sequences]
        reasons = [reason for _, _, reason in sequences]
        result = GenerationResult(
            texts=self._decode(token_ids, reasons),
            token_ids=token_ids,
            scores=[score for _, score, _ in sequences],
            finish_reasons=reasons,
            seed=seed,
            prompt_ids=prompt_ids,
            num_return_sequences=options.num_return_sequences,
            pad_token_id=self._pad_token(options),
        )
        if interrupted:
            raise GenerationInterrupted(result)
        return result

    def stream(
        self, prompt: Prompts, options: GenerationOptions | None = None, **kwargs: Any
    ) -> Iterator[str]:
        """Generates for one prompt and gives the text piece by piece, as soon as it is certain.

        A piece never holds half a character, and the pieces joined are the text that
        :meth:`generate` gives for the same request. Stop iterating to end the request.

        Raises:
            ValueError: an option or the prompt is outside what is allowed, or the model has no
                tokenizer; raised by the call itself.
        """
        options = GenerationOptions.from_kwargs(options, **kwargs)
        tokenizer = self._require_tokenizer()
        prompt_ids = self._encode_batch(prompt)
        if len(prompt_ids) != 1 or options.num_return_sequences != 1:
            count = len(prompt_ids) * options.num_return_sequences
            raise InvalidArgumentError(f"stream() gives one sequence: the request asks for {count}")
        _, seeds = _spread_seeds(options, 1)
        session = self.open_session(None)
        (sequence,) = self._submit(session, prompt_ids, options, seeds)
        return _stream(session, sequence, tokenizer)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits of every position of one token sequence.

        Args:
            token_ids: [length], at least one and at most `info.max_positions`.

        Returns:
            [length, vocab] float32; row i is the distribution after the tokens up to index i.
        """
        (ids,) = self._encode_batch([_as_ids(token_ids, "token_ids")])
        return self._model.logits(ids, self.info.vocab_size)

    def measure_read_bandwidth(self, num_bytes: int = 1 << 30, passes: int = 1) -> float:
        """Bytes per second that the model's threads read from memory: the best of some passes over
        a buffer of `num_bytes`, which should exceed the caches."""
        return self._model.measure_read_bandwidth(num_bytes, passes)

    def open_session(self, max_rows: int | None = None) -> Session:
        """A session of the library, for those who step by themselves (see `fastgen.bench`).

        Args:
            max_rows: sequences decoded together at most; None: the library's default.
        """
        return self._model.session(max_rows)

    # ---- Inside ----------------------------------------------------------------------------

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None and self._directory is None:
            raise InvalidArgumentError("this model was made without a tokenizer: give token ids")
        return tokenizers.require(self.tokenizer, self._directory or Path())

    def _encode_batch(self, prompts: Prompts) -> list[list[int]]:
        batch = _split_prompts(prompts)
        many = len(batch) > 1
        result = []
        for i, prompt in enumerate(batch):
            name = f"prompt {i}" if many else "the prompt"
            is_text = isinstance(prompt, str)
            ids = self._require_tokenizer().encode(prompt) if is_text else _as_ids(prompt, name)
            if not ids:
                raise InvalidArgumentError(f"{name} is empty: it must have at least one token")
            for token in ids:
                if not 0 <= token < self.info.vocab_size:
                    raise InvalidArgumentError(
                        f"{name} has token id {token}: it must be between 0 and "
                        f"{self.info.vocab_size - 1}"
                    )
            result.append(ids)
        return result

    def _submit(
        self,
        session: Session,
        prompt_ids: list[list[int]],
        options: GenerationOptions,
        seeds: list[tuple[int, int]],
    ) -> list[int]:
        many = len(prompt_ids) > 1
        native = self.native_options(options)
        ids: list[int] = []
        for i, (prompt, (seed, first_sequence)) in enumerate(zip(prompt_ids, seeds)):
            native.seed = seed
            native.first_sequence = first_sequence
            first = session.submit(prompt, native, f"prompt {i}" if many else "")
            ids.extend(range(first, first + options.num_return_sequences))
        return ids

    def native_options(self, options: GenerationOptions) -> _capi.Options:
        """The library's form of `options`, with the model's eos where they say nothing. The seed is
        0: who submits sets it."""
        native = _capi.Options()
        _capi.library().fastgen_options_init(ctypes.byref(native))
        sampling = options.decode_strategy == "sampling"
        native.decode_strategy = _capi.SAMPLING if sampling else _capi.GREEDY_SEARCH
        for name in (
            "max_length", "min_length", "top_k", "top_p", "temperature", "repetition_penalty",
            "no_repeat_ngram_size", "num_return_sequences",
        ):  # fmt: skip
            setattr(native, name, getattr(options, name))
        eos = self.info.eos_token_id if options.eos_token_id is None else options.eos_token_id
        native.eos_token_id = -1 if eos is None else eos
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(options, name)
            setattr(native, name, -1 if value is None else value)
        native.has_seed = 1
        return native

    def _pad_token(self, options: GenerationOptions) -> int | None:
        candidates = (
            options.pad_token_id,
            self.info.pad_token_id,
            options.eos_token_id,
            self.info.eos_token_id,
        )
        return next((token for token in candidates if token is not None and token >= 0), None)

    def _decode(self, token_ids: list[list[int]], reasons: list[str]) -> list[str] | None:
        if self.tokenizer is None:
            return None
        # eos is left out even where the tokenizer does not mark it as special.
        bodies = [ids[:-1] if reason == "eos" else ids for ids, reason in zip(token_ids, reasons)]
        return [self.tokenizer.decode(ids) for ids in bodies]


def _stream(session: Session, sequence: int, tokenizer: Tokenizer) -> Iterator[str]:
    stream = tokenizer.stream()
    done = 0
    with session:
        for _ in session.run(max_steps=1):
            tokens, _, reason = session.get(sequence)
            end = len(tokens) - 1 if reason == "eos" else len(tokens)
            if end > done:
                piece = stream.push(tokens[done:end])
                done = end
                if piece:
                    yield piece
    rest = stream.flush()
    if rest:
        yield rest


# ---- Prompts and seeds ---------------------------------------------------------------------


def _split_prompts(prompts: Prompts) -> list[Any]:
    """A batch of prompts, each a text or a sequence of integers that has not been checked yet."""
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "numpy") and not isinstance(prompts, np.ndarray):
        prompts = prompts.numpy()  # a Paddle tensor
    if isinstance(prompts, np.ndarray):
        if prompts.ndim not in (1, 2):
            raise InvalidArgumentError(
                f"prompts is an array of {prompts.ndim} dimensions: it must have one ([length]) or "
                "two ([batch, length])"
            )
        prompts = list(prompts) if prompts.ndim == 2 or prompts.dtype == object else [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__iter__"):
        raise InvalidArgumentError(
            f"prompts is of type {type(prompts).__name__}: it must be a text, token ids, or a list "
            "of either"
        )
    batch = list(prompts)
    if not batch:
        raise InvalidArgumentError("prompts is empty: there must be at least one prompt")
    return [batch] if all(is_integer(value) for value in batch) else batch


def _as_ids(prompt: Any, name: str) -> list[int]:
    """A sequence of integers as a list."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind in "iu":
        return [int(token) for token in prompt]
    try:
        if isinstance(prompt, (str, bytes)):
            raise TypeError
        if any(isinstance(token, (bool, np.bool_)) for token in prompt):
            raise TypeError
        return [operator.index(token) for token in prompt]
    except TypeError:
        text = repr(prompt)
        text = text if len(text) <= 60 else text[:60] + "..."
        raise InvalidArgumentError(
            f"{name} is {text}: it must be a text or a sequence of integers"
        ) from None


def _spread_seeds(
    options: GenerationOptions, batch: int
) -> tuple[int | tuple[int, ...], list[tuple[int, int]]]:
    """The seed to report, and (seed, first sequence index) of each prompt."""
    seed = options.seed
    if seed is None:
        seed = secrets.randbits(53)  # every reader of JSON holds that many bits exactly
    if isinstance(seed, int):
        return seed, [(seed, row * options.num_return_sequences) for row in range(batch)]
    seeds = tuple(seed)
    if len(seeds) != batch:
        raise InvalidArgumentError(
            f"seed is a list of {len(seeds)}: there must be one for each of the {batch} prompts"
        )
    return seeds, [(value, 0) for value in seeds]
