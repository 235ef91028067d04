"""A request's logits depend on nothing else, bit for bit: not on the rows beside it, the number of
threads, the order of requests, when it joined, or how many rows may run together.

No reference takes part, and no Paddle is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.options import GenerationOptions
from fastgen.testing import strategies as fg
from fastgen.testing.engine import EngineModel, EngineSequence
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from fastgen.testing.profiles import share

THREADS = (1, 2, 3)


def assert_same(actual: EngineSequence, expected: EngineSequence, what: str) -> None:
    assert actual.tokens == expected.tokens, what
    assert actual.logits is not None
    assert expected.logits is not None
    np.testing.assert_array_equal(
        actual.logits.view(np.uint32), expected.logits.view(np.uint32), err_msg=what
    )
    assert actual.score == expected.score, what
    assert actual.finish_reason == expected.finish_reason, what


def alone(
    model: EngineModel, prompts: Sequence[Sequence[int]], options: Any, seed: int
) -> list[EngineSequence]:
    """Every prompt in a session of its own, with the sequence indices that it has in the batch."""
    results: list[EngineSequence] = []
    for prompt in prompts:
        results += model.generate([prompt], options, seed, len(results), keep_logits=True)
    return results


@share(0.05)
@given(case=fg.cases(max_prompts=6), data=st.data())
def test_company_does_not_matter(case: fg.Case, data: st.DataObject) -> None:
    tensors = case.tensors()
    options, seed, prompts = case.options, case.seed, case.prompts
    returned = options.num_return_sequences
    order = data.draw(st.permutations(range(len(prompts))))
    steps = data.draw(st.lists(st.integers(0, 3), min_size=len(order), max_size=len(order)))
    max_rows = data.draw(st.sampled_from([0, 1, 2, 3]))
    with EngineModel(case.shape, tensors, num_threads=1) as model:
        expected = alone(model, prompts, options, seed)
    for threads in THREADS:
        with EngineModel(case.shape, tensors, num_threads=threads) as model:
            for rows in {0, max_rows}:
                batch = model.generate(prompts, options, seed, keep_logits=True, max_rows=rows)
                for index, (actual, single) in enumerate(zip(batch, expected)):
                    assert_same(actual, single, f"{threads} threads, {rows} rows, row {index}")
            with model.session(max_rows) as session:
                ids: dict[int, list[int]] = {}
                for index, pause in zip(order, steps):
                    first = index * returned
                    ids[index] = session.submit(prompts[index], options, seed, first, True)
                    if pause:
                        session.step(pause)
                session.run()
                for index, members in ids.items():
                    for copy, member in enumerate(members):
                        single = expected[index * returned + copy]
                        what = f"{threads} threads, order {order}, pauses {steps}, prompt {index}"
                        assert_same(session.get(member), single, what)


@share(0.03)
@given(case=fg.cases(max_prompts=1), cut=st.integers(1, 128))
def test_prefill_length_does_not_matter(case: fg.Case, cut: int) -> None:
    """What follows a token does not change its logits, nor does it matter where decoding begins."""
    prompt = case.prompts[0]
    options = GenerationOptions(max_length=case.options.max_length, eos_token_id=-1)
    tensors = case.tensors()
    whole: list[np.ndarray] = []
    for threads in THREADS:
        with EngineModel(case.shape, tensors, num_threads=threads) as model:
            generated = model.generate([prompt], options, keep_logits=True)[0]
            sequence = prompt + generated.tokens
            logits = model.logits(sequence)
            whole.append(logits)
            cut = min(cut, len(sequence))
            np.testing.assert_array_equal(model.logits(sequence[:cut]), logits[:cut])
            assert generated.logits is not None
            np.testing.assert_array_equal(generated.logits, logits[len(prompt) - 1 : -1])
    for other in whole[1:]:
        np.testing.assert_array_equal(other, whole[0])


@pytest.mark.parametrize("cache", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("threads", THREADS)
def test_a_wide_model_in_a_batch_of_many(threads: int, cache: str) -> None:
    """Wide enough that rows and columns are split among threads, more rows than one block holds."""
    shape = GPTShape(515, 48, 4 * 40, 2, 4, 333)
    tensors = make_tensors(shape, WeightRecipe(seed=11))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, shape.vocab_size, rng.integers(1, 40)).tolist() for _ in range(37)]
    options = GenerationOptions(decode_strategy="sampling", top_k=40, max_length=8, eos_token_id=-1)
    with EngineModel(shape, tensors, num_threads=1, cache_dtype=cache) as model:
        expected = alone(model, prompts, options, seed=9)
    with EngineModel(shape, tensors, num_threads=threads, cache_dtype=cache) as model:
        for rows in (0, 5):
            batch = model.generate(prompts, options, 9, keep_logits=True, max_rows=rows)
            for index, (actual, single) in enumerate(zip(batch, expected)):
                assert_same(actual, single, f"{threads} threads, {rows} rows, row {index}")
