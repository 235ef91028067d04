"""Options of a generation request."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.errors import InvalidArgumentError

__all__ = ["DECODE_STRATEGIES", "GenerationOptions"]

DECODE_STRATEGIES = ("greedy_search", "sampling")

_INT32_MAX = 2**31 - 1
_SEED_MAX = 2**64 - 1

#: Older and newer spellings -> ours. `topk`, `topp` and `max_out_len` are those of FasterGPT.
_SPELLINGS = {
    "topk": "top_k",
    "topp": "top_p",
    "max_out_len": "max_length",
    "max_new_tokens": "max_length",
    "min_new_tokens": "min_length",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
}


@dataclass(frozen=True)
class GenerationOptions:
    """What to generate, with PaddleNLP's names, meanings and defaults.

    Every member is checked; a bad one raises :class:`ValueError` with the option, the value and
    what is allowed.

    Attributes:
        decode_strategy: `"greedy_search"` (the largest logit, ties to the smallest id) or
            `"sampling"` (a draw from the filtered distribution).
        max_length: new tokens at most, not counting the prompt.
        min_length: no eos among the first `min_length` new tokens.
        top_k: keep the k most probable tokens and their ties; 0 or None: off.
        top_p: keep the smallest set whose mass exceeds p, in [0, 1]; 0, 1 or None: off.
        temperature: divides the logits before the softmax; > 0.
        repetition_penalty: makes tokens of the prompt and the text so far less likely (> 1) or more
            likely (< 1); 1: off.
        no_repeat_ngram_size: no n-gram of this size appears twice; 0 or None: off.
        num_return_sequences: sequences per prompt; 1 for greedy search.
        eos_token_id: a sequence ends with it; None: the model's; -1: none.
        pad_token_id: fills :meth:`GenerationResult.to_padded_array`; None: the model's, else eos.
        forced_bos_token_id: the first new token if the prompt is one token long; None: off.
        forced_eos_token_id: the token at `max_length`; None: off.
        seed: the same seed, prompt and options give the same tokens. One number for a batch is
            spread over its rows, so that equal prompts give different samples; a list has one
            number for each prompt, and each prompt's samples are then those it gets alone; None:
            drawn from the operating system and reported in the result.
    """

    decode_strategy: str = "greedy_search"
    max_length: int = 20
    min_length: int = 0
    top_k: int | None = 50
    top_p: float | None = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int | None = 0
    num_return_sequences: int = 1
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.decode_strategy not in DECODE_STRATEGIES:
            raise InvalidArgumentError(
                f"decode_strategy is {self.decode_strategy!r}: it must be 'greedy_search' or "
                "'sampling'"
            )
        self._set("max_length", _integer("max_length", self.max_length, 1))
        self._set("min_length", _integer("min_length", self.min_length, 0))
        for name in ("top_k", "no_repeat_ngram_size"):
            value = getattr(self, name)
            self._set(name, _integer(name, 0 if value is None else value, 0, "; 0 switches it off"))
        sequences = _integer("num_return_sequences", self.num_return_sequences, 1)
        self._set("num_return_sequences", sequences)
        if self.decode_strategy == "greedy_search" and self.num_return_sequences != 1:
            raise InvalidArgumentError(
                f"num_return_sequences is {self.num_return_sequences}: it must be 1 for "
                "greedy_search, whose sequences would all be equal"
            )
        top_p = 1.0 if self.top_p is None else _number("top_p", self.top_p)
        if not 0.0 <= top_p <= 1.0:
            raise InvalidArgumentError(f"top_p is {top_p:g}: it must be between 0 and 1")
        self._set("top_p", top_p)
        for name in ("temperature", "repetition_penalty"):
            value = _number(name, getattr(self, name))
            as_float = ctypes.c_float(value).value  # what the library gets
            if not (as_float > 0.0 and math.isfinite(as_float)):
                raise InvalidArgumentError(
                    f"{name} is {value:g}: it must be greater than 0, and a finite float32"
                )
            self._set(name, value)
        for name in ("eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, _integer(name, value, -1, "; -1 means none"))
        if self.seed is not None:
            self._set("seed", _check_seed(self.seed))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_kwargs(
        cls, options: GenerationOptions | None = None, **kwargs: Any
    ) -> GenerationOptions:
        """`options` (or the defaults) with `kwargs` put over them.

        Besides the members of this class, `kwargs` may use the spellings `topk`, `topp`,
        `max_out_len`, `max_new_tokens`, `min_new_tokens`, `eos_id` and `pad_id`, and
        `decode_strategy="sample"`.

        Raises:
            ValueError: an unknown name, one option under two names, or a value out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        changes: dict[str, Any] = {}
        for given, value in kwargs.items():
            name = _SPELLINGS.get(given, given)
            if name not in names:
                raise InvalidArgumentError(
                    f"{given!r} is not an option: the options are {', '.join(names)}"
                )
            if name in changes:
                raise InvalidArgumentError(f"{name} is given twice, once as {given}")
            changes[name] = value
        if changes.get("decode_strategy") == "sample":
            changes["decode_strategy"] = "sampling"
        return dataclasses.replace(options if options is not None else cls(), **changes)


def _integer(name: str, value: Any, low: int, note: str = "") -> int:
    """`value` as an int in [low, int32 max]; a bool or a float is not one."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InvalidArgumentError(f"{name} is {value!r}: it must be an integer") from None
    if number < low:
        raise InvalidArgumentError(f"{name} is {number}: it must be at least {low}{note}")
    if number > _INT32_MAX:
        raise InvalidArgumentError(f"{name} is {number}: it must be at most {_INT32_MAX}")
    return number


def _number(name: str, value: Any) -> float:
    """`value` as a float that is not NaN."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgumentError(f"{name} is {value!r}: it must be a number") from None
    if math.isnan(number):
        raise InvalidArgumentError(f"{name} is NaN: it must be a number")
    return number


def _one_seed(value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InvalidArgumentError(
            f"seed is {value!r}: it must be an integer or a list of one integer for each prompt"
        ) from None
    if not 0 <= number <= _SEED_MAX:
        raise InvalidArgumentError(f"seed is {number}: it must be between 0 and 2^64 - 1")
    return number


def _check_seed(seed: Any) -> int | tuple[int, ...]:
    # An array of NumPy without dimensions can be iterated over only in name.
    is_one = isinstance(seed, (str, bytes)) or not hasattr(seed, "__iter__")
    if is_one or getattr(seed, "ndim", 1) == 0:
        return _one_seed(seed)
    return tuple(_one_seed(value) for value in seed)
