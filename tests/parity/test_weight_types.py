"""16-bit weights: the tokens are PaddleNLP's on the same, rounded, weights.

By default keys and values are kept in that type too, and where the processor multiplies pairs of
bfloat16 the engine rounds activations; the reference does neither. What counts as undecided is then
as much wider as such a number is coarser than float32, and widened further by a temperature below
1, which divides logits and their errors.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given

pytest.importorskip("paddlenlp", reason="PaddleNLP is not installed")

from fastgen import _capi
from fastgen.options import GenerationOptions
from fastgen.testing import strategies as fg
from fastgen.testing.engine import EngineModel
from fastgen.testing.margins import MARGIN, ParityLog, compare, timed_example
from fastgen.testing.models import GPTShape, Tensors, WeightRecipe
from fastgen.testing.paddlenlp import PaddleNLPReference
from fastgen.testing.parity import resolve
from fastgen.testing.profiles import share
from fastgen.testing.reference import to_bfloat16

ISAS = [name for name, supported in _capi.isas() if supported]
PAIRS = "avx512_bf16"  # the kernel set that multiplies pairs of bfloat16
FLOATS = [isa for isa in ISAS if isa != PAIRS][-1]
WIDE_MARGIN = 0.03  # of bfloat16; float16 has three bits more
WIDE_MARGIN_USES_ALLOWED = 0.05

# Two logits that are closer than such a rounding, whose probabilities the temperature moves apart.
COLD = fg.Case(
    shape=GPTShape(61, 18, 14, 3, 1, 17),
    recipe=WeightRecipe(seed=214790953, logit_std=1.0, kind="paired"),
    prompts=[[21, 3, 0, 21, 3]],
    options=GenerationOptions(
        decode_strategy="sampling",
        max_length=2,
        top_k=1,
        temperature=0.05,
        repetition_penalty=2.0,
        num_return_sequences=2,
        eos_token_id=-1,
    ),
    seed=0,
    eos_choice="drawn",
)

# A draw that keys and values of bfloat16 move from one token to the next.
ROUNDED_KEYS = fg.Case(
    shape=GPTShape(63, 8, 42, 1, 3, 44),
    recipe=WeightRecipe(seed=2630, logit_std=2.0, kind="random"),
    prompts=[[17, 50, 6, 25, 1, 27]],
    options=GenerationOptions(
        decode_strategy="sampling", max_length=1, top_k=0, top_p=1.0, eos_token_id=-1
    ),
    seed=7,
    eos_choice="drawn",
)


def wide_margin(options: GenerationOptions, margin: float = WIDE_MARGIN) -> float:
    """Below which a step is undecided: ``margin`` of logits, as a share of a probability that a
    temperature below 1 makes of it."""
    if options.decode_strategy != "sampling" or options.temperature >= 1.0:
        return margin
    return 1.0 - math.exp(-margin / options.temperature)


def rounded(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    """To the nearest number of the type, ties to even."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    return to_bfloat16(values)


def rounded_matrices(tensors: Tensors, dtype: str) -> Tensors:
    """What the engine keeps in the type: matrices and the embedding of words."""
    return {
        name: rounded(values, dtype) if values.ndim == 2 and "position" not in name else values
        for name, values in tensors.items()
    }


def check(
    log: ParityLog,
    case: fg.Case,
    dtype: str,
    isa: str,
    margin: float = MARGIN,
    cache_dtype: str | None = None,
) -> None:
    with timed_example(log, dtype):
        tensors = rounded_matrices(case.tensors(), dtype)
        reference = PaddleNLPReference.cached(case.shape, tensors)
        case = resolve(case, reference)
        expected = reference.generate(case.prompts, case.options, case.seed, case.first_sequence)
        with EngineModel(
            case.shape, tensors, isa=isa, weight_dtype=dtype, cache_dtype=cache_dtype
        ) as model:
            actual = model.generate(case.prompts, case.options, case.seed, case.first_sequence)
        assert len(actual) == len(expected)
        for theirs, ours in zip(expected, actual):
            compare(
                log,
                dtype,
                theirs,
                ours.tokens,
                case.options,
                case.seed,
                finish_reason=ours.finish_reason,
                allowed=margin,
            )


@share(0.03)
@given(case=fg.cases(max_new_tokens=8))
def test_float16(parity_log: ParityLog, case: fg.Case) -> None:
    check(parity_log, case, "float16", ISAS[-1], cache_dtype="float32")


@share(0.03)
@given(case=fg.cases(max_new_tokens=8))
def test_bfloat16(parity_log: ParityLog, case: fg.Case) -> None:
    check(parity_log, case, "bfloat16", FLOATS, cache_dtype="float32")


@pytest.mark.parametrize(
    ("dtype", "margin"), [("float16", WIDE_MARGIN / 8), ("bfloat16", WIDE_MARGIN)]
)
def test_keys_and_values_of_that_type(dtype: str, margin: float) -> None:
    log = ParityLog()

    @share(0.03, least=400)  # as below
    @given(case=fg.cases(max_new_tokens=8))
    @example(case=ROUNDED_KEYS)
    def run(case: fg.Case) -> None:
        check(log, case, dtype, FLOATS, wide_margin(case.options, margin))

    run()
    assert log.margin_share < WIDE_MARGIN_USES_ALLOWED, log.summary()


@pytest.mark.skipif(PAIRS not in ISAS, reason="this machine does not multiply pairs of bfloat16")
def test_pairs_of_bfloat16() -> None:
    log = ParityLog()  # a count of its own: many more steps are that close

    # One case alone may have several, and cases drawn one after another are alike: a share says
    # nothing of a few hundred sequences.
    @share(0.03, least=400)
    @given(case=fg.cases(max_new_tokens=8))
    @example(case=COLD)
    def run(case: fg.Case) -> None:
        check(log, case, "bfloat16", PAIRS, wide_margin(case.options))

    run()
    assert log.margin_share < WIDE_MARGIN_USES_ALLOWED, log.summary()
