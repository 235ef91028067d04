"""Decode steps as one kernel against the same steps as a graph of kernels, through the engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel, EngineSequence
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from tests.cuda.step_policy import kernels_only, one_kernel, steps_as_one_kernel

# Normalised mean squared error of logits. Both ways round a weight of 4 bits times its scale to
# float16, but one norms its input before the product and the other after it.
BOUNDS = {"float16": 2e-6, "bfloat16": 4e-5, "int8": 1e-5, "int4": 1e-4}

SHAPES = [
    GPTShape(97, 64, 32, 1, 4, 32),  # fewer tiles than multiprocessors
    GPTShape(515, 200, 64, 3, 1, 224),
    GPTShape(203, 300, 160, 2, 2, 640),  # head size 80; columns that no warp count divides
    GPTShape(1003, 700, 128, 2, 1, 512),  # head size 128
    GPTShape(50257, 1024, 768, 2, 12, 3072),
    GPTShape(50257, 1024, 1024, 3, 16, 4096),
    GPTShape(300, 1024, 1280, 2, 20, 5120),
    GPTShape(300, 1024, 1600, 2, 25, 6400),  # more units of attention than multiprocessors
]


@pytest.fixture(autouse=True)
def _one_kernel() -> Iterator[None]:
    """Also where other kernels are sooner."""
    with one_kernel():
        yield


def prompt(shape: GPTShape, length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(0, shape.vocab_size, length)]


def nmse(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Normalised mean squared error; infinite where something is not a number."""
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(a).all():
        return float("inf")
    return float(((a - e) ** 2).sum() / (e**2).sum())


def logits_of(sequence: EngineSequence) -> npt.NDArray[np.float32]:
    assert sequence.logits is not None
    return sequence.logits


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"h{s.hidden_size}d{s.head_size}")
def test_logits_are_those_of_the_kernels(shape: GPTShape, dtype: str) -> None:
    """1 to 4 ragged rows, short and as long as the model allows; one row of many lengths."""
    tensors = make_tensors(shape, WeightRecipe(1))
    most = shape.max_position_embeddings
    options = GenerationOptions(max_length=4, eos_token_id=-1)
    with EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as model:
        for rows in (1, 2, 3, 4):
            lengths = [1, 31, 33, most - 4][:rows] if rows > 1 else [most - 4]
            cases = [lengths, [most // 2 + 1 - i for i in range(rows)]]
            # One row's attention is cut into parts: steps from page to page, and from form to form.
            edges = (1, 30, 62, 94, 127, 254, 510) if rows == 1 else ()
            cases += [[n] for n in edges if n < most - 4]
            for longest in cases:
                prompts = [prompt(shape, n, i) for i, n in enumerate(longest)]
                before = steps_as_one_kernel()
                ours = model.generate(prompts, options, keep_logits=True)
                assert steps_as_one_kernel() > before
                # The same tokens, so that every step has the same input.
                with kernels_only():
                    theirs = model.generate(prompts, options, keep_logits=True)
                for one, other in zip(ours, theirs):
                    same = 1
                    while same < 4 and one.tokens[:same] == other.tokens[:same]:
                        same += 1
                    error = nmse(logits_of(one)[:same], logits_of(other)[:same])
                    assert error < BOUNDS[dtype], (rows, longest)
                again = model.generate(prompts, options, keep_logits=True)
                for one, other in zip(ours, again):
                    assert (logits_of(one) == logits_of(other)).all()


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_a_step_gives_the_same_bits_every_time(dtype: str) -> None:
    """Hundreds of times the same few steps: what comes too early now and then, as weights that are
    copied over others which are still to be read, is seldom seen in one run."""
    shape = GPTShape(1000, 1024, 1024, 3, 16, 4096)
    options = GenerationOptions(max_length=4, eos_token_id=-1)
    repetitions = {
        (1020,): 50,
        (126,): 200,
        (513, 512): 50,
        (1, 31, 33, 1020): 50,
        (513, 512, 511, 510): 1000,
    }
    with EngineModel(
        shape, make_tensors(shape, WeightRecipe(1)), device="cuda", weight_dtype=dtype
    ) as model:
        for lengths, times in repetitions.items():
            prompts = [prompt(shape, n, i) for i, n in enumerate(lengths)]
            expected = model.generate(prompts, options, keep_logits=True)
            for again in range(times):
                found = model.generate(prompts, options, keep_logits=True)
                for row, (one, other) in enumerate(zip(expected, found)):
                    differ = logits_of(one) != logits_of(other)
                    steps = np.flatnonzero(differ.any(axis=1))
                    # The first step of a long prompt is of other kernels; tiles are 8 wide.
                    assert len(steps) == 0, (
                        f"prompts of {lengths}, repetition {again}, row {row}, steps {steps}, "
                        f"{differ[steps[0]].sum()} logits from "
                        f"{np.flatnonzero(differ[steps[0]])[:16]} on, tokens {one.tokens} and "
                        f"{other.tokens}, error {nmse(logits_of(other), logits_of(one)):.1e}"
                    )


def test_many_steps_in_sequence() -> None:
    """Thousands of steps, rows that end at different times, and what the cache holds in the end."""
    shape = GPTShape(301, 1000, 128, 2, 4, 512)
    tensors = make_tensors(shape, WeightRecipe(4))
    long = GenerationOptions(
        max_length=900, decode_strategy="sampling", top_k=20, top_p=0.95, eos_token_id=-1
    )
    short = GenerationOptions(
        max_length=60, decode_strategy="sampling", top_k=20, top_p=0.95, eos_token_id=7
    )
    with EngineModel(shape, tensors, device="cuda", weight_dtype="float16") as model:
        (one,) = model.generate([prompt(shape, 5)], long, seed=3)
        with kernels_only():
            expected = model.logits(prompt(shape, 5) + one.tokens)[-1]
        last = GenerationOptions(max_length=1, eos_token_id=-1)
        (end,) = model.generate([prompt(shape, 5) + one.tokens], last, keep_logits=True)
        assert nmse(logits_of(end)[0], expected) < BOUNDS["float16"]
        prompts = [prompt(shape, 1 + 3 * i, i) for i in range(4)]
        for seed in range(20):
            together = model.generate(prompts, short, seed=seed)
            assert [s.tokens for s in model.generate(prompts, short, seed=seed)] == [
                s.tokens for s in together
            ]


def test_models_side_by_side() -> None:
    """Several models alive, used by turns and by threads at the same time."""
    shapes = [GPTShape(301, 200, 128, 2, 4, 512), GPTShape(203, 200, 256, 3, 4, 1024)]
    options = GenerationOptions(
        max_length=40, decode_strategy="sampling", top_k=20, top_p=0.9, eos_token_id=-1
    )
    models = [
        EngineModel(s, make_tensors(s, WeightRecipe(i)), device="cuda", weight_dtype="float16")
        for i, s in enumerate(shapes)
    ]
    try:
        expected = [m.generate([prompt(m.shape, 9)], options, seed=1)[0].tokens for m in models]
        for _ in range(5):
            for model, tokens in zip(models, expected):
                assert model.generate([prompt(model.shape, 9)], options, seed=1)[0].tokens == tokens

        def work(i: int) -> bool:
            request = [prompt(shapes[i], 9)]
            return all(
                models[i].generate(request, options, seed=1)[0].tokens == expected[i]
                for _ in range(20)
            )

        with ThreadPoolExecutor(2) as threads:
            assert all(threads.map(work, (0, 1)))
    finally:
        for model in models:
            model.close()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (GPTShape(97, 64, 60, 1, 5, 121), "float16"),
        (GPTShape(97, 64, 256, 1, 1, 512), "float16"),
        (GPTShape(97, 64, 64, 1, 2, 128), "float32"),
    ],
    ids=["odd", "wide head", "float32"],
)
def test_other_networks_run_as_kernels(shape: GPTShape, dtype: str) -> None:
    """What the one kernel has no code for."""
    options = GenerationOptions(max_length=3, eos_token_id=-1)
    with EngineModel(
        shape, make_tensors(shape, WeightRecipe(1)), device="cuda", weight_dtype=dtype
    ) as model:
        before = steps_as_one_kernel()
        model.generate([prompt(shape, 4)], options)
        assert steps_as_one_kernel() == before


def test_large_activations_do_not_overflow() -> None:
    shape = GPTShape(200, 64, 64, 2, 4, 256)
    tensors = make_tensors(shape, WeightRecipe(3))
    for name in tensors:
        if name.endswith(("out_proj.weight", "linear2.weight", "word_embeddings.weight")):
            tensors[name] = tensors[name] * np.float32(1e4)
    options = GenerationOptions(max_length=3, eos_token_id=-1)
    for dtype, bound in BOUNDS.items():
        with EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as model:
            (ours,) = model.generate([prompt(shape, 50)], options, keep_logits=True)
            with kernels_only():
                (theirs,) = model.generate([prompt(shape, 50)], options, keep_logits=True)
        assert nmse(logits_of(ours)[0], logits_of(theirs)[0]) < 10 * bound
