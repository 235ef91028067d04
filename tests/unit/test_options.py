"""GenerationOptions: defaults, spellings, and a sentence for every bad value."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fastgen import GenerationOptions
from fastgen.errors import InvalidArgumentError


def test_defaults_are_those_of_paddlenlp() -> None:
    options = GenerationOptions()
    assert options.decode_strategy == "greedy_search"
    assert (options.max_length, options.min_length) == (20, 0)
    assert (options.top_k, options.top_p, options.temperature) == (50, 1.0, 1.0)
    assert (options.repetition_penalty, options.no_repeat_ngram_size) == (1.0, 0)
    assert (options.num_return_sequences, options.seed) == (1, None)


def test_none_switches_filters_off() -> None:
    options = GenerationOptions(top_k=None, top_p=None, no_repeat_ngram_size=None)
    assert (options.top_k, options.top_p, options.no_repeat_ngram_size) == (0, 1.0, 0)


def test_numpy_numbers_are_numbers() -> None:
    options = GenerationOptions(
        top_k=np.int64(7), top_p=np.float32(0.5), max_length=np.int32(3), seed=np.uint64(2**64 - 1)
    )
    assert (options.top_k, options.top_p, options.max_length) == (7, 0.5, 3)
    assert options.seed == 2**64 - 1
    assert type(options.top_k) is int


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationOptions().top_k = 3  # type: ignore[misc]


def test_older_spellings() -> None:
    options = GenerationOptions.from_kwargs(
        decode_strategy="sample", topk=4, topp=0.5, max_out_len=7, eos_id=3, pad_id=2
    )
    assert options == GenerationOptions(
        decode_strategy="sampling",
        top_k=4,
        top_p=0.5,
        max_length=7,
        eos_token_id=3,
        pad_token_id=2,
    )
    newer = GenerationOptions.from_kwargs(max_new_tokens=9, min_new_tokens=2)
    assert (newer.max_length, newer.min_length) == (9, 2)


def test_keywords_go_over_given_options() -> None:
    base = GenerationOptions(max_length=5, temperature=2.0)
    assert GenerationOptions.from_kwargs(base, max_length=6) == GenerationOptions(
        max_length=6, temperature=2.0
    )
    assert base.max_length == 5


def test_a_list_of_seeds_becomes_a_tuple() -> None:
    assert GenerationOptions(seed=[1, 2]).seed == (1, 2)
    assert GenerationOptions(seed=np.array([3, 4])).seed == (3, 4)
    assert GenerationOptions(seed=np.array(3)).seed == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"decode_strategy": "beam_search"}, "decode_strategy is 'beam_search': it must be 'gr"),
        ({"max_length": 0}, "max_length is 0: it must be at least 1"),
        ({"max_length": 2**31}, "max_length is 2147483648: it must be at most 2147483647"),
        ({"max_length": 2.0}, "max_length is 2.0: it must be an integer"),
        ({"max_length": None}, "max_length is None: it must be an integer"),
        ({"max_length": True}, "max_length is True: it must be an integer"),
        ({"min_length": -1}, "min_length is -1: it must be at least 0"),
        ({"top_k": -1}, "top_k is -1: it must be at least 0; 0 switches it off"),
        ({"top_k": "4"}, "top_k is '4': it must be an integer"),
        ({"top_p": -0.1}, "top_p is -0.1: it must be between 0 and 1"),
        ({"top_p": 1.5}, "top_p is 1.5: it must be between 0 and 1"),
        ({"top_p": float("nan")}, "top_p is NaN: it must be a number"),
        ({"top_p": "half"}, "top_p is 'half': it must be a number"),
        ({"temperature": 0}, "temperature is 0: it must be greater than 0"),
        ({"temperature": -1.0}, "temperature is -1: it must be greater than 0"),
        ({"temperature": float("nan")}, "temperature is NaN: it must be a number"),
        ({"temperature": float("inf")}, "temperature is inf: it must be greater than 0"),
        ({"temperature": None}, "temperature is None: it must be a number"),
        ({"temperature": 1e-300}, "temperature is 1e-300: it must be greater than 0, and a finite"),
        ({"repetition_penalty": 1e300}, "repetition_penalty is 1e+300: it must be greater than 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0: it must be greater than 0"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size is -2: it must be at least 0"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0: it must be at least 1"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2: it must be 1 for greedy_search"),
        ({"eos_token_id": -2}, "eos_token_id is -2: it must be at least -1; -1 means none"),
        ({"pad_token_id": 0.5}, "pad_token_id is 0.5: it must be an integer"),
        ({"forced_bos_token_id": "a"}, "forced_bos_token_id is 'a': it must be an integer"),
        ({"forced_eos_token_id": -9}, "forced_eos_token_id is -9: it must be at least -1"),
        ({"seed": -1}, "seed is -1: it must be between 0 and 2^64 - 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616: it must be between 0 and 2^64 - 1"),
        ({"seed": 1.5}, "seed is 1.5: it must be an integer or a list"),
        ({"seed": "x"}, "seed is 'x': it must be an integer or a list"),
        ({"seed": [1, -1]}, "seed is -1: it must be between 0 and 2^64 - 1"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        GenerationOptions(**options)
    assert str(caught.value).startswith(sentence)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"^'num_beams' is not an option: the options are decode_"):
        GenerationOptions.from_kwargs(num_beams=4)


def test_one_option_under_two_names() -> None:
    with pytest.raises(ValueError, match=r"^top_k is given twice, once as topk$"):
        GenerationOptions.from_kwargs(top_k=3, topk=4)
