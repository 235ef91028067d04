"""Drives PaddleNLP's own ``generate`` with the engine's draws.

Everything is PaddleNLP's: the network, the logits processors, the filters, the stopping rule. One
call is replaced, the final ``paddle.multinomial``: instead of Paddle's hidden generator it takes
the inverse CDF with the Philox draw of (seed, sequence, step), so that tokens can be compared one
by one. What PaddleNLP saw at every step is recorded beside the tokens.

The reference is PaddleNLP 2.8, whose greedy search takes the largest logit and averages the logits
that it took. Up to 2.7, the last that has a GPT for Paddle 2.5, it goes by the logarithms of
probabilities, where rounding separates equal logits. There a second call is replaced, greedy
search's ``paddle.argmax``, by the largest logit that PaddleNLP saw, and only within that rounding;
scores of greedy search are worked out.
"""

from __future__ import annotations

import zlib  # noqa: F401  Paddle's bundled zlib breaks later imports of the real one.
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import numpy.typing as npt
import paddle
import paddlenlp
from paddlenlp.generation import GenerationConfig
from paddlenlp.transformers import GPTConfig, GPTLMHeadModel

from fastgen.testing.models import GPTShape, Tensors
from fastgen.testing.philox import uniform
from fastgen.testing.sampling import inverse_cdf, token_or_none

__all__ = [
    "GREEDY_BY_LOGITS",
    "PaddleNLPReference",
    "ReferenceSequence",
    "generate",
    "group_by_length",
]

_VERSION = tuple(int(part) for part in paddlenlp.__version__.split(".")[:2])
#: Whether this PaddleNLP's greedy search goes by logits, and its scores are theirs.
GREEDY_BY_LOGITS = _VERSION >= (2, 8)
_MIN_LENGTH = "min_new_tokens" if _VERSION >= (2, 8) else "min_new_token"


@dataclass
class ReferenceSequence:
    """What PaddleNLP generated for one returned sequence, without padding.

    Attributes:
        prompt: its prompt.
        tokens: new tokens, up to and including eos.
        score: as PaddleNLP reports it.
        finish_reason: ``eos`` or ``length``.
        sequence: index of the sequence under the seed.
        logits: per new token, the processed logits ``[vocab]`` that PaddleNLP chose from.
        kept: per new token, the filtered probabilities ``[vocab]`` given to the draw; empty in
            greedy search.
    """

    prompt: list[int]
    tokens: list[int]
    score: float
    finish_reason: str
    sequence: int
    logits: list[npt.NDArray[np.float32]] = field(repr=False)
    kept: list[npt.NDArray[np.float32]] = field(repr=False)


class _Recorder:
    """A last logits processor: notes what it sees and changes nothing."""

    def __init__(self) -> None:
        self.logits: list[npt.NDArray[np.float32]] = []

    def __call__(self, input_ids: Any, logits: Any) -> Any:
        self.logits.append(np.array(logits.numpy(), copy=True))
        return logits


class _Draws:
    """Stands for ``paddle.multinomial``: one call is one step of every row."""

    def __init__(self, seed: int, sequences: npt.NDArray[np.int64]) -> None:
        self.seed = seed
        self.sequences = sequences
        self.kept: list[npt.NDArray[np.float32]] = []

    def __call__(self, probs: Any) -> Any:
        kept = np.array(probs.numpy(), copy=True)
        draws = uniform(self.seed, self.sequences, len(self.kept))
        self.kept.append(kept)
        return paddle.to_tensor(inverse_cdf(kept, draws)[:, None], dtype="int64")


class _LargestLogit:
    """Stands for the ``paddle.argmax`` of a greedy search that goes by log-probabilities."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __call__(self, values: Any, axis: int) -> Any:
        logits = self.recorder.logits[-1]
        largest = logits.argmax(axis=axis)
        theirs, rows = values.numpy(), np.arange(len(logits))
        # A log-probability has the rounding of numbers as large as itself, and of 1.
        behind = theirs.max(axis=axis) - theirs[rows, largest]
        assert (behind <= 1e-6 * np.maximum(1.0, np.abs(theirs.max(axis=axis)))).all(), (
            f"PaddleNLP takes {theirs.argmax(axis=axis)}, the largest logits are those of {largest}"
        )
        return paddle.to_tensor(largest, dtype="int64")


def group_by_length(prompts: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Indices of the prompts of every length: PaddleNLP attends to padding, so it gets none."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(index)
    return groups


@contextmanager
def _driven(model: Any, recorder: _Recorder, draws: _Draws) -> Iterator[None]:
    """Replaces the draw, and lets the recorder look on behind the model's own processors."""
    own = model.get_logits_processor

    def with_recorder(*args: Any, **kwargs: Any) -> Any:
        # generate(logits_processors=...) would be the way, but PaddleNLP 2.8.1 iterates over a
        # list class of its own that cannot be iterated.
        processors = own(*args, **kwargs)
        processors.append(recorder)
        return processors

    def contiguous(logits: Any) -> Any:
        # The logits are a strided view of all positions' logits. Assigning to some elements of such
        # a view, as the n-gram processor does, corrupts the heap in Paddle 3.3.1.
        return logits.clone()

    argmax = paddle.argmax if GREEDY_BY_LOGITS else _LargestLogit(recorder)
    with (
        mock.patch.object(paddle, "multinomial", draws),
        mock.patch.object(paddle, "argmax", argmax),
        mock.patch.object(model, "get_logits_processor", with_recorder),
        mock.patch.object(model, "adjust_logits_during_generation", contiguous),
    ):
        yield


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    options: Any,
    seed: int = 0,
    first_sequence: int = 0,
) -> list[ReferenceSequence]:
    """Runs ``model.generate`` on ragged prompts, each length as a batch of its own.

    Args:
        model: a PaddleNLP model with ``generate``, in eval mode.
        prompts: token ids; none may be empty.
        options: anything with the attributes of :class:`fastgen.GenerationOptions`.
        seed: of the draws.
        first_sequence: index of the first returned sequence. Returned sequences of all prompts
            are counted through, in order.

    Returns:
        ``num_return_sequences`` sequences for every prompt, in the order of the prompts.
    """
    sampling = options.decode_strategy == "sampling"
    returned = options.num_return_sequences
    results: list[ReferenceSequence | None] = [None] * (len(prompts) * returned)
    for length, members in group_by_length(prompts).items():
        rows = [index * returned + copy for index in members for copy in range(returned)]
        recorder = _Recorder()
        draws = _Draws(seed, np.asarray(rows, dtype=np.int64) + first_sequence)
        with _driven(model, recorder, draws):
            ids, scores = model.generate(
                paddle.to_tensor([list(prompts[i]) for i in members], dtype="int64"),
                generation_config=_generation_config(options),
            )
        tokens = ids.numpy()
        values = scores.numpy().reshape(-1)
        for position, row in enumerate(rows):
            prompt = list(prompts[row // returned])
            new, reason = _trim(tokens[position].tolist(), options)
            logits = [step[position] for step in recorder.logits[: len(new)]]
            score = float(values[position])
            if not sampling and not GREEDY_BY_LOGITS:
                score = float(
                    np.mean([step[token] for step, token in zip(logits, new)], dtype=float)
                )
            results[row] = ReferenceSequence(
                prompt=prompt,
                tokens=new,
                score=score,
                finish_reason=reason,
                sequence=first_sequence + row,
                logits=logits,
                kept=[step[position] for step in draws.kept[: len(new)]] if sampling else [],
            )
        assert all(len(prompts[i]) == length for i in members)
    return [result for result in results if result is not None]


def _trim(tokens: list[int], options: Any) -> tuple[list[int], str]:
    """Cuts the padding after eos; PaddleNLP pads a finished row until the last one is done."""
    eos = token_or_none(options.eos_token_id)
    if eos is not None and eos in tokens:
        return tokens[: tokens.index(eos) + 1], "eos"
    return tokens, "length"


def _generation_config(options: Any) -> GenerationConfig:
    sampling = options.decode_strategy == "sampling"
    pad = token_or_none(options.pad_token_id)
    return GenerationConfig(
        decode_strategy=options.decode_strategy,
        max_new_tokens=options.max_length,
        **{_MIN_LENGTH: options.min_length},
        top_k=options.top_k or 0,
        # PaddleNLP has no "off" below 1; greedy search warns about what it does not use.
        top_p=float(options.top_p) if sampling and options.top_p else 1.0,
        temperature=float(options.temperature) if sampling else 1.0,
        repetition_penalty=float(options.repetition_penalty),
        no_repeat_ngram_size=options.no_repeat_ngram_size or None,
        num_return_sequences=options.num_return_sequences,
        eos_token_id=token_or_none(options.eos_token_id),
        pad_token_id=pad if pad is not None else 0,
        forced_bos_token_id=token_or_none(options.forced_bos_token_id),
        forced_eos_token_id=token_or_none(options.forced_eos_token_id),
    )


class PaddleNLPReference:
    """A ``GPTLMHeadModel`` of one shape whose weights can be replaced.

    Args:
        shape: of the network.
        tensors: its weights, with PaddleNLP's names; PaddleNLP's own random ones when None.
    """

    _cache: ClassVar[OrderedDict[GPTShape, PaddleNLPReference]] = OrderedDict()
    _cache_size: ClassVar[int] = 16

    def __init__(self, shape: GPTShape, tensors: Tensors | None = None) -> None:
        self.shape = shape
        # No special token by default: the options name them, and PaddleNLP would otherwise take
        # the configuration's (eos 7) when an option is None.
        config = GPTConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=shape.max_position_embeddings,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = GPTLMHeadModel(config)
        self.model.eval()
        self._parameters = dict(self.model.named_parameters())
        if tensors is not None:
            self.load(tensors)

    @classmethod
    def cached(cls, shape: GPTShape, tensors: Tensors) -> PaddleNLPReference:
        """A reference of ``shape`` out of a small cache, with these weights."""
        reference = cls._cache.pop(shape, None)
        if reference is None:
            reference = cls(shape)
            while len(cls._cache) >= cls._cache_size:
                cls._cache.popitem(last=False)
        cls._cache[shape] = reference
        reference.load(tensors)
        return reference

    def load(self, tensors: Tensors) -> None:
        """Replaces the weights.

        Raises:
            ValueError: a tensor is missing or is one that the network does not have.
        """
        missing = self._parameters.keys() - tensors.keys()
        foreign = tensors.keys() - self._parameters.keys()
        if missing or foreign:
            raise ValueError(
                f"tensors must be exactly the network's; missing: {sorted(missing)}, "
                f"foreign: {sorted(foreign)}"
            )
        for name, parameter in self._parameters.items():
            parameter.set_value(tensors[name])

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Raw logits after every token, ``[length, vocab]``."""
        with paddle.no_grad():
            result = self.model(paddle.to_tensor([list(tokens)], dtype="int64"))
        output = result[0] if isinstance(result, (tuple, list)) else result
        return np.array(output.numpy().reshape(len(tokens), -1), copy=True)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: Any,
        seed: int = 0,
        first_sequence: int = 0,
    ) -> list[ReferenceSequence]:
        """See :func:`generate`."""
        return generate(self.model, prompts, options, seed, first_sequence)
