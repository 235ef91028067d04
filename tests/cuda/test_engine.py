"""The engine on the CUDA device against the same engine on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings

from fastgen.errors import FastgenError
from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel, EngineSequence
from fastgen.testing.margins import ParityLog, compare
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from fastgen.testing.sampling import filter_probs, probabilities, process_logits
from fastgen.testing.strategies import Case, cases
from tests.cuda.step_policy import (
    kernels_only,
    steps_as_one_kernel,
    steps_with_joined_attention,
)

TYPES = ("float32", "float16", "bfloat16", "int8", "int4")
# Normalised mean squared error of logits, of the design.
BOUNDS = {"float32": 1e-10, "float16": 1e-5, "bfloat16": 1e-4, "int8": 1e-3, "int4": 5e-2}

SHAPES = [
    GPTShape(97, 64, 32, 2, 4, 128),
    GPTShape(1000, 300, 64, 3, 1, 200),  # one wide head, a context of several pages
    GPTShape(515, 96, 60, 2, 5, 121),  # nothing is a multiple of anything
    GPTShape(50257, 1024, 768, 2, 12, 3072),
    GPTShape(300, 128, 256, 1, 1, 512),  # head size 256
    GPTShape(300, 128, 1600, 1, 25, 6400),
]
LOG = ParityLog()


def nmse(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Normalised mean squared error."""
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    return float(((a - e) ** 2).sum() / (e**2).sum())


def logits_of(sequence: EngineSequence) -> npt.NDArray[np.float32]:
    """What was kept of a sequence's logits."""
    assert sequence.logits is not None
    return sequence.logits


def prompt(shape: GPTShape, length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(0, shape.vocab_size, length)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"h{s.hidden_size}v{s.vocab_size}")
def test_logits(shape: GPTShape, dtype: str) -> None:
    """Prefill of few rows, of many, and decode steps give the CPU's logits."""
    tensors = make_tensors(shape, WeightRecipe(1))
    lengths = sorted({3, 40, min(shape.max_position_embeddings - 8, 200)})
    options = GenerationOptions(max_length=6, eos_token_id=-1)
    # In a network this narrow the errors of few weights do not even out.
    bound = BOUNDS[dtype] * (2 if dtype == "int4" and shape.hidden_size < 100 else 1)
    with (
        EngineModel(shape, tensors, num_threads=0) as cpu,
        EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as cuda,
    ):
        for length in lengths:
            tokens = prompt(shape, length)
            error = nmse(cuda.logits(tokens), cpu.logits(tokens))
            assert error < bound, length
            (ours,) = cuda.generate([tokens], options, keep_logits=True)
            assert ours.logits is not None
            whole = cpu.logits(tokens + ours.tokens)[length - 1 : -1]
            error = nmse(ours.logits, whole)
            assert error < bound, length


def test_wider_heads_are_refused() -> None:
    """When the model is made, by a sentence that says what the limit is."""
    shape = GPTShape(97, 64, 640, 1, 2, 128)
    with pytest.raises(FastgenError, match="heads of up to 256"):
        EngineModel(shape, make_tensors(shape, WeightRecipe(1)), device="cuda")


class CpuSequence:
    """What the CPU generated, as :func:`fastgen.testing.margins.compare` wants its reference."""

    def __init__(self, case: Case, row: int, sequence: object) -> None:
        self.prompt = case.prompts[row // case.options.num_return_sequences]
        self.tokens = sequence.tokens
        self.score = sequence.score
        self.finish_reason = sequence.finish_reason
        self.sequence = case.first_sequence + row
        self.logits, self.kept = [], []
        history = list(self.prompt)
        for step, token in enumerate(self.tokens):
            raw = sequence.logits[step]
            processed = process_logits(raw, history, len(self.prompt), case.options)
            self.logits.append(processed)
            if case.options.decode_strategy == "sampling":
                probs = probabilities(processed, case.options.temperature)
                self.kept.append(filter_probs(probs, case.options.top_k, case.options.top_p))
            history.append(token)


@settings(
    max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(cases(first_sequence=True))
def test_tokens_are_the_cpus(case: Case) -> None:
    """float32: the same tokens, or the step was undecided."""
    tensors = case.tensors()
    case = replace(case, eos_choice="drawn", p_choice=None)
    with EngineModel(case.shape, tensors) as cpu:
        expected = cpu.generate(
            case.prompts, case.options, case.seed, case.first_sequence, keep_logits=True
        )
    with EngineModel(case.shape, tensors, device="cuda") as cuda:
        actual = cuda.generate(case.prompts, case.options, case.seed, case.first_sequence)
        alone = cuda.generate(case.prompts[:1], case.options, case.seed, case.first_sequence)
    for row, (theirs, ours) in enumerate(zip(expected, actual)):
        reference = CpuSequence(case, row, theirs)
        compare(
            LOG,
            "cuda",
            reference,
            ours.tokens,
            case.options,
            case.seed,
            score=ours.score,
            finish_reason=ours.finish_reason,
        )
    assert [s.tokens for s in alone] == [s.tokens for s in actual[: len(alone)]]


def test_few_tokens_were_undecided() -> None:
    """Runs after the test above."""
    assert LOG.total().sequences > 0
    print(LOG.summary())
    assert not LOG.too_many_margin_uses


@pytest.mark.parametrize("dtype", ["float32", "float16", "int4"])
def test_rows_do_not_depend_on_each_other(dtype: str) -> None:
    """A batch of 70 ragged prompts, each as it is alone, joined by others on the way."""
    shape = GPTShape(1003, 128, 64, 2, 4, 256)
    tensors = make_tensors(shape, WeightRecipe(5))
    options = GenerationOptions(
        max_length=20, decode_strategy="sampling", top_k=40, top_p=0.9, eos_token_id=7
    )
    prompts = [prompt(shape, 1 + 11 * i % 60, i) for i in range(70)]
    with EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as cuda:
        with kernels_only():
            together = cuda.generate(prompts, options, seed=11, keep_logits=True)
            few = cuda.generate(prompts, options, seed=11, max_rows=5)
        assert [s.tokens for s in few] == [s.tokens for s in together]
        for i in range(0, 70, 3):
            only = prompts[i : i + 1]
            with kernels_only():
                (alone,) = cuda.generate(only, options, 11, first_sequence=i, keep_logits=True)
            assert alone.tokens == together[i].tokens
            assert (logits_of(alone) == logits_of(together[i])).all()
            # Steps of few rows as one kernel round otherwise: tokens may part where that decides,
            # and there the logits are still the same but for the rounding.
            (alone,) = cuda.generate(only, options, 11, first_sequence=i, keep_logits=True)
            steps = 1
            while steps < 20 and alone.tokens[:steps] == together[i].tokens[:steps]:
                steps += 1
            steps = min(steps, len(alone.tokens), len(together[i].tokens))
            error = nmse(logits_of(alone)[:steps], logits_of(together[i])[:steps])
            assert error < (1e-30 if dtype == "float32" else 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_joined_attention_gives_the_same(dtype: str) -> None:
    """Steps of up to 8 rows, where up to 1,024 tokens attention is one kernel with its input."""
    import torch

    shape = GPTShape(503, 1100, 512, 2, 8, 2048)
    tensors = make_tensors(shape, WeightRecipe(7))
    options = GenerationOptions(max_length=12, eos_token_id=-1)
    prompts = [prompt(shape, length, length) for length in (1015, 3, 64, 1018, 130, 1016)]
    others = [prompt(shape, 20 + i, i) for i in range(6)]
    with EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as cuda, kernels_only():
        together = cuda.generate(prompts + others, options, keep_logits=True)
        few = cuda.generate(prompts, options, keep_logits=True)
        before = steps_with_joined_attention()
        quiet = cuda.generate(prompts, options)  # from graphs
        joined = steps_with_joined_attention() - before
    if torch.cuda.get_device_capability() == (9, 0):
        assert 0 < joined < options.max_length - 1
    else:
        assert joined == 0
    for one, other, third in zip(few, together, quiet):
        assert one.tokens == other.tokens == third.tokens
        assert (logits_of(one) == logits_of(other)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "shorter", "longer"),
    [
        (GPTShape(503, 1100, 1024, 2, 16, 4096), 580, 810),
        (GPTShape(503, 1100, 1280, 2, 20, 5120), 580, None),
    ],
    ids=["h1024", "h1280"],
)
def test_three_and_four_rows_of_a_wide_network(
    shape: GPTShape, shorter: int, longer: int | None, dtype: str
) -> None:
    """Short ones run as more rows do, with the same bits; long ones, and two, as one kernel."""
    options = GenerationOptions(max_length=12, eos_token_id=-1)
    tensors = make_tensors(shape, WeightRecipe(7))
    with EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as cuda:

        def steps_of(prompts: list[list[int]]) -> tuple[list[EngineSequence], int]:
            before = steps_as_one_kernel()
            return cuda.generate(prompts, options), steps_as_one_kernel() - before

        if steps_of([prompt(shape, 3)])[1] == 0:
            pytest.skip("steps are not one kernel here")
        for rows in (2, 3, 4):
            for longest, short in ((shorter, True), (longer, False)):
                if longest is None:
                    continue
                prompts = [prompt(shape, longest - 5 * i, i) for i in range(rows)]
                ours, as_one_kernel = steps_of(prompts)
                assert (as_one_kernel == 0) == (rows > 2 and short), (rows, longest)
                if as_one_kernel == 0:
                    with kernels_only():
                        theirs = cuda.generate(prompts, options)
                    assert [s.tokens for s in ours] == [s.tokens for s in theirs]
                    assert [s.score for s in ours] == [s.score for s in theirs]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int4"])
@pytest.mark.parametrize(
    "shape",
    [GPTShape(503, 512, 64, 2, 4, 256), GPTShape(503, 512, 1024, 1, 16, 4096)],
    ids=lambda s: f"h{s.hidden_size}",
)
def test_long_prompts_do_not_depend_on_each_other(shape: GPTShape, dtype: str) -> None:
    """Prompts that go through cuBLASLt, alone and beside so many others that other algorithms may
    serve them; with all of them a pass ends within a prompt."""
    tensors = make_tensors(shape, WeightRecipe(6))
    options = GenerationOptions(max_length=2, eos_token_id=-1)
    prompts = [prompt(shape, 65 + 97 * i % 440, i) for i in range(40)]
    with (
        EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as cuda,
        kernels_only(),
    ):
        together = cuda.generate(prompts, options, keep_logits=True)
        for few in (1, 4):
            for i in range(0, 40 - few, 9):
                part = cuda.generate(prompts[i : i + few], options, keep_logits=True)
                for ours, theirs in zip(part, together[i:]):
                    assert ours.tokens == theirs.tokens
                    assert (logits_of(ours) == logits_of(theirs)).all()
        for i in range(0, 40, 13):
            assert (logits_of(together[i])[0] == cuda.logits(prompts[i])[-1]).all()


@pytest.mark.parametrize("length", [65, 96, 97, 128, 129, 200])
def test_copies_of_a_long_prompt(length: int) -> None:
    """All begin from what its only prefill left, also those that come when others are under way."""
    shape = GPTShape(503, 256, 64, 2, 4, 256)
    options = GenerationOptions(
        max_length=12, decode_strategy="sampling", top_k=20, eos_token_id=-1
    )
    many = replace(options, num_return_sequences=7)
    tokens = prompt(shape, length)
    with (
        EngineModel(shape, make_tensors(shape, WeightRecipe(7)), device="cuda") as cuda,
        kernels_only(),
    ):
        alone = [cuda.generate([tokens], options, 3, first_sequence=i)[0] for i in range(7)]
        copies = cuda.generate([tokens], many, 3, keep_logits=True)
        assert [s.tokens for s in copies] == [s.tokens for s in alone]
        assert all((logits_of(s)[0] == logits_of(copies[0])[0]).all() for s in copies)
        assert nmse(logits_of(copies[0])[:1], cuda.logits(tokens)[-1:]) == 0
        with cuda.session() as session:
            ids = session.submit(tokens, options, 3, 0)
            session.step(5)
            ids += session.submit(tokens, options, 3, 1) + session.submit(tokens, options, 3, 2)
            while session.step(1):
                pass
            assert [session.get(i).tokens for i in ids] == [s.tokens for s in alone[:3]]


def test_large_activations_do_not_overflow() -> None:
    shape = GPTShape(200, 64, 64, 2, 4, 256)
    tensors = make_tensors(shape, WeightRecipe(3))
    for name in tensors:
        if name.endswith(("out_proj.weight", "linear2.weight", "word_embeddings.weight")):
            tensors[name] = tensors[name] * np.float32(1e4)
    tokens = prompt(shape, 50)
    with EngineModel(shape, tensors) as cpu:
        expected = cpu.logits(tokens)
    for dtype in ("float16", "bfloat16"):
        with EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as cuda:
            actual = cuda.logits(tokens)
        assert np.isfinite(actual).all()
        assert nmse(actual, expected) < 10 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("part", ["k_proj", "v_proj", "linear1"])
def test_large_numbers_of_long_prompts_saturate(dtype: str, part: str) -> None:
    """What exceeds float16 in products of many rows, through cuBLASLt, as in those of few."""
    shape = GPTShape(200, 128, 64, 2, 4, 256)
    tensors = make_tensors(shape, WeightRecipe(3))
    reader = {"v_proj": "out_proj.weight", "linear1": "linear2.weight"}.get(part, "-")
    for name in tensors:
        tensors[name] = tensors[name].copy()
        if name.endswith(f"{part}.bias"):
            tensors[name][0] = 6e4
        if name.endswith(f"{part}.weight"):
            tensors[name][:, 0] *= np.float32(1e4)
        if name.endswith(reader):
            tensors[name][0] *= np.float32(1e-5)
    tokens = prompt(shape, 100)
    with EngineModel(shape, tensors, device="cuda", weight_dtype=dtype) as cuda:
        few, many = cuda.logits(tokens[:64]), cuda.logits(tokens)
    assert np.isfinite(many).all()
    # Inner activations of few rows saturate later; with large keys attention's weights depend on
    # the last bit of a query.
    if part == "v_proj":
        assert nmse(many[:64], few) < 10 * BOUNDS[dtype]


def test_errors_name_what_is_wrong() -> None:
    shape = GPTShape(50, 64, 32, 1, 2, 64)
    tensors = make_tensors(shape, WeightRecipe(0))
    with pytest.raises(FastgenError, match="device=cuda:99"):
        EngineModel(shape, tensors, device="cuda:99")
    with pytest.raises(FastgenError, match="device=cuda:x"):
        EngineModel(shape, tensors, device="cuda:x")
    with pytest.raises(FastgenError, match="weight_dtype=float64"):
        EngineModel(shape, tensors, device="cuda", weight_dtype="float64")
