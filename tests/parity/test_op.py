"""The custom op: the tokens of ``fastgen.FasterGPT`` are those of the model's own ``generate``."""

from __future__ import annotations

import zlib  # noqa: F401  before Paddle
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from hypothesis import given

pytest.importorskip("paddlenlp", reason="PaddleNLP is not installed")

import paddle

from fastgen import FasterGPT, jit
from fastgen.errors import LibraryError
from fastgen.testing import strategies as fg
from fastgen.testing.margins import ParityLog
from fastgen.testing.paddlenlp import PaddleNLPReference
from fastgen.testing.parity import Decoded, check
from fastgen.testing.profiles import share
from fastgen.testing.sampling import token_or_none

_layers: WeakKeyDictionary[PaddleNLPReference, FasterGPT] = WeakKeyDictionary()


def has_compiler() -> bool:
    try:
        jit.find_compiler()
    except LibraryError:
        return False
    return True


def op(case: fg.Case, reference: PaddleNLPReference) -> Sequence[Decoded]:
    """One call of ``FasterGPT``: prompts padded on the right, with their lengths.

    The layer of a model is kept, so that it must notice new weights.
    """
    layer = _layers.get(reference)
    if layer is None:
        layer = _layers[reference] = FasterGPT(reference.model)
    options = case.options
    lengths = [len(prompt) for prompt in case.prompts]
    padded = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for row, prompt in zip(padded, case.prompts):
        row[: len(prompt)] = prompt
    ids, scores = layer(
        paddle.to_tensor(padded),
        seq_len=paddle.to_tensor(lengths, dtype="int64"),
        decode_strategy=options.decode_strategy,
        top_k=options.top_k,
        top_p=options.top_p,
        temperature=options.temperature,
        max_length=options.max_length,
        min_length=options.min_length,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        num_return_sequences=options.num_return_sequences,
        eos_token_id=options.eos_token_id,
        pad_token_id=options.pad_token_id,
        forced_bos_token_id=options.forced_bos_token_id,
        forced_eos_token_id=options.forced_eos_token_id,
        seed=case.seed,
    )
    eos = token_or_none(options.eos_token_id)
    results = []
    for row, score in zip(ids.numpy().tolist(), scores.numpy().reshape(-1).tolist()):
        end = row.index(eos) + 1 if eos in row else len(row)
        assert set(row[end:]) <= {options.pad_token_id}, f"{row} is not padded with pad_token_id"
        results.append(Decoded(row[:end], score))
    return results


@pytest.mark.skipif(not has_compiler(), reason="the op cannot be built: there is no C++ compiler")
@share(0.08)
@given(case=fg.cases())
def test_op(parity_log: ParityLog, case: fg.Case) -> None:
    check(parity_log, "op", case, op)
