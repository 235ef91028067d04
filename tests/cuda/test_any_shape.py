"""Networks, types, batches and lengths as they come, against the CPU: odd sizes have their code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from tests.cuda.step_policy import kernels_only, one_kernel
from tests.cuda.test_engine import BOUNDS, TYPES, logits_of, nmse

STEPS = 3
MOST_TOKENS = 2500  # of the prompts of a batch: the CPU has to go through them
WIDEST = 1100

POLICIES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "automatic": nullcontext,
    "kernels": kernels_only,
    "one kernel": one_kernel,
}


@dataclass(frozen=True)
class AnyCase:
    """What a batch is generated with."""

    shape: GPTShape
    dtype: str
    rows: int
    policy: str
    seed: int

    def prompts(self) -> list[list[int]]:
        """One as long as may be, the others of lengths up to what is left for each."""
        rng = np.random.default_rng(self.seed)
        longest = self.shape.max_position_embeddings - STEPS
        others = max(1, min(longest, (MOST_TOKENS - longest) // self.rows))
        lengths = [longest, *rng.integers(1, others + 1, self.rows - 1)]
        rng.shuffle(lengths)
        return [[int(t) for t in rng.integers(0, self.shape.vocab_size, n)] for n in lengths]


@st.composite
def any_cases(draw: st.DrawFn) -> AnyCase:
    """Heads of 8 to 256, up to WIDEST columns in all, and up to 100 rows."""
    edges = st.sampled_from(
        [8, 16, 24, 32, 57, 63, 64, 65, 72, 80, 96, 127, 128, 129, 160, 255, 256]
    )
    head_size = draw(st.one_of(st.integers(8, 256), edges))
    heads = draw(st.integers(1, min(16, WIDEST // head_size)))
    hidden = heads * head_size
    shape = GPTShape(
        vocab_size=draw(st.one_of(st.integers(8, 3000), st.sampled_from([64, 1024, 5000]))),
        max_position_embeddings=draw(st.one_of(st.integers(8, 150), st.integers(8, 700))),
        hidden_size=hidden,
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        intermediate_size=draw(st.one_of(st.integers(1, 4 * hidden), st.just(4 * hidden))),
    )
    return AnyCase(
        shape,
        dtype=draw(st.sampled_from(TYPES)),
        rows=draw(st.one_of(st.integers(1, 9), st.integers(1, 100))),
        policy=draw(st.sampled_from(list(POLICIES))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def errors_of(model: EngineModel, case: AnyCase, cpu: EngineModel) -> npt.NDArray[np.float64]:
    """Of the longest prompt's prefill, and of the steps after each prompt, against the CPU."""
    prompts = case.prompts()
    longest = max(prompts, key=len)
    errors = [nmse(model.logits(longest), cpu.logits(longest))]
    options = GenerationOptions(max_length=STEPS, eos_token_id=-1)
    for tokens, ours in zip(prompts, model.generate(prompts, options, keep_logits=True)):
        expected = cpu.logits(tokens + ours.tokens)[len(tokens) - 1 : -1]
        errors.append(nmse(logits_of(ours), expected))
    return np.array(errors)


def check(case: AnyCase) -> None:
    """Every error is within the type's bound, or a few times what the type costs on the CPU."""
    tensors = make_tensors(case.shape, WeightRecipe(case.seed))
    with EngineModel(case.shape, tensors, num_threads=0) as cpu:
        with (
            POLICIES[case.policy](),
            EngineModel(case.shape, tensors, device="cuda", weight_dtype=case.dtype) as cuda,
        ):
            errors = errors_of(cuda, case, cpu)
        bound = BOUNDS[case.dtype]
        if (errors < bound).all():
            return
        # In narrow networks, of few outputs, the errors of weights do not even out.
        with EngineModel(case.shape, tensors, num_threads=0, weight_dtype=case.dtype) as same:
            worst = errors_of(same, case, cpu).max()
        assert errors.max() < max(bound, 8 * worst), errors


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(any_cases())
def test_any_shape(case: AnyCase) -> None:
    check(case)
