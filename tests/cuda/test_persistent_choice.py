"""Tokens chosen inside the step of one kernel: what the sampling kernel makes of the same logits,
bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from tests.cuda import ops
from tests.cuda.memory import Array, Buffer
from tests.cuda.sample_case import Case, Rows, draw_logits, sampling
from tests.cuda.step_policy import choice_apart, one_kernel, steps_that_chose

GREEDY = GenerationOptions(decode_strategy="greedy_search", eos_token_id=-1, max_length=64)
HIDDEN = 64
POSITIONS = 256
TOP_K = 8  # kPersistentTopK


@pytest.fixture(autouse=True)
def _one_kernel() -> Iterator[None]:
    """Also where other kernels are sooner."""
    with one_kernel():
        yield


class GivenLogits:
    """A network whose logits are the same for every row: all weights are zero, and the head's bias
    is what they shall be.

    Args:
        library: the kernels' launchers.
        logits: of all rows.
    """

    def __init__(self, library: ops.Library, logits: Array) -> None:
        self._library, self._logits = library, logits
        vocab = logits.size
        largest = max(3 * HIDDEN, vocab)
        self._zeros = Buffer(np.zeros((largest, HIDDEN), np.float16))
        self._vectors = Buffer(np.zeros(largest, np.float32))
        self._bias = Buffer(logits.astype(np.float32))
        self._positions = Buffer(np.zeros((POSITIONS, HIDDEN), np.float32))
        page = Buffer(np.zeros((2, ops.PAGE, HIDDEN), np.float16))
        self._page = page
        self.pages = Buffer(np.full(POSITIONS // ops.PAGE, page.pointer, np.int64))
        zeros = {"weights": self._zeros.pointer, "bias": self._vectors.pointer}
        normed = {"norm_weight": self._vectors.pointer, "sums": self._vectors.pointer}
        self._products = {
            "qkv": ops.PersistentProduct(**zeros, **normed),
            "attention_out": ops.PersistentProduct(**zeros),
            "feed_forward_in": ops.PersistentProduct(**zeros, **normed),
            "feed_forward_out": ops.PersistentProduct(**zeros),
            "head": ops.PersistentProduct(**{**zeros, "bias": self._bias.pointer}, **normed),
        }

    def arguments(self, choice: ops.SampleArgs) -> ops.PersistentArgs:
        """A step that ends with this choice."""
        args = ops.PersistentArgs(
            dtype=ops.FLOAT16,
            hidden=HIDDEN,
            intermediate=HIDDEN,
            vocab=self._logits.size,
            layers=1,
            heads=1,
            eps=1e-5,
            embedding=ops.Matrix(
                data=self._zeros.pointer,
                row_bytes=2 * HIDDEN,
                dtype=ops.FLOAT16,
                in_=HIDDEN,
                out=self._logits.size,
            ),
            positions=self._positions.pointer,
            position_stride=HIDDEN,
            cache=ops.CacheLayout(ops.FLOAT16, 1, 1, HIDDEN, HIDDEN),
            row_list=choice.row_list,
            slots=choice.slots,
            rows=choice.rows,
            logits=choice.logits,
            ld=choice.ld,
            choice=ctypes.pointer(choice),
            **self._products,
        )
        assert self._library.persistent_blocks(args) > 0
        self._exchange = Buffer(np.zeros(self._library.persistent_exchange(args), np.uint8))
        args.exchange = self._exchange.pointer
        return args

    def check(self, cases: Sequence[Case], padding: int = 0, steps: int = 1) -> None:
        """So many steps do what the sampling kernel does."""
        ours = Rows(cases, steps, padding, pages=self.pages.pointer)
        theirs = Rows(cases, steps, padding)
        args = self.arguments(ours.arguments(self._library))
        for _ in range(steps):
            self._library.call("persistent_step", args)
        for step in range(steps):
            theirs.sample(self._library)
            for mine, other in zip(ours.result(step), theirs.result(step)):
                assert np.array_equal(mine, other, equal_nan=True), (
                    f"{mine} instead of {other}, step {step}, {[c.options for c in cases]}"
                )
        assert ours.step.numpy()[0] == theirs.step.numpy()[0] == steps
        assert np.array_equal(ours.tokens.numpy(), theirs.tokens.numpy())
        for row in range(len(cases)):
            mine, other = ours.slot(row)[0], theirs.slot(row)[0]
            assert (mine.length, mine.finished) == (other.length, other.finished)


def drawn_case(rng: np.random.Generator, logits: Array) -> Case:
    """A row with any options that a step takes."""
    vocab = logits.size
    options = sampling(
        top_k=int(rng.integers(1, min(TOP_K + 1, vocab))),
        top_p=float(rng.choice([1.0, 1.0, 0.9, 0.5, 0.1, 1e-9])),
        temperature=float(rng.choice([1.0, 1.0, 0.7, 1.3, 0.1, 30.0])),
        max_length=int(rng.choice([4, 5, 64])),
        eos_token_id=int(rng.choice([-1, int(np.nanargmax(logits)) if vocab else -1])),
    )
    if rng.random() < 0.25:
        options = GREEDY
    prompt = int(rng.integers(1, 20))
    history = rng.integers(vocab, size=prompt + int(rng.integers(3))).tolist()
    seed, sequence = (int(n) for n in rng.integers(2**62, size=2))
    finished = bool(rng.random() < 0.15)
    return Case(logits, options, history, prompt, seed, sequence % 2**32, finished)


def rows_of(rng: np.random.Generator, logits: Array) -> tuple[list[Case], int]:
    """One to four rows, and how many of padding."""
    rows = int(rng.integers(1, 5))
    return [drawn_case(rng, logits) for _ in range(rows)], int(rng.integers(0, 5 - rows))


@pytest.mark.parametrize("vocab", [2, 7, 250, 1000, 5003, 50257])
def test_any_logits(library: ops.Library, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(30):
        logits = draw_logits(rng, vocab)
        network = GivenLogits(library, logits)
        for _ in range(4):
            network.check(*rows_of(rng, logits))


def special_logits(rng: np.random.Generator, vocab: int) -> dict[str, Array]:
    """What asks for more than the few best of each block."""
    plain = rng.normal(size=vocab).astype(np.float32)

    def with_values(ids: Array, values: Array | float) -> Array:
        logits = plain.copy()
        logits[ids] = values
        return logits

    first = np.arange(min(300, vocab))
    some = rng.integers(vocab, size=5)
    return {
        "best together": with_values(first, 20.0 + 5.0 * rng.random(first.size)),
        "equals together": with_values(first, 20.0),
        "few equals together": with_values(first[:9], 20.0),
        "equals far apart": with_values(np.arange(0, vocab, 97), 20.0),
        "nearly equal": with_values(np.arange(0, vocab, 5), 20.0 + 2e-6 * rng.random()),
        "all equal": np.full(vocab, 3.0, np.float32),
        "all zero": np.where(rng.random(vocab) < 0.5, 0.0, -0.0).astype(np.float32),
        "steep": with_values(some[:2], np.float32(1e30)),
        "one is infinite": with_values(some[:1], np.inf),
        "some are infinite": with_values(some, np.inf),
        "some are masked": with_values(np.arange(0, vocab, 2), -np.inf),
        "all but one are masked": np.where(np.arange(vocab) == some[0], 1.0, -np.inf).astype("f4"),
        "all are masked": np.full(vocab, -np.inf, np.float32),
        "one is no number": with_values(some[:1], np.nan),
        "none is a number": np.full(vocab, np.nan, np.float32),
        "half are no numbers": with_values(rng.random(vocab) < 0.5, np.nan),
        "two thirds are no numbers": with_values(rng.random(vocab) < 0.65, np.nan),
        # Three of the four that a thread adds up at once.
        "most are no numbers": with_values(np.arange(vocab) // 32 % 4 != 0, np.nan),
    }


@pytest.mark.parametrize("vocab", [250, 50257])
def test_special_logits(library: ops.Library, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for logits in special_logits(rng, vocab).values():
        network = GivenLogits(library, logits)
        for top_k in range(1, TOP_K + 1):
            for top_p, temperature in ((1.0, 1.0), (0.6, 0.7)):
                options = sampling(top_k=top_k, top_p=top_p, temperature=temperature)
                cases = [Case(logits, options, sequence=row, seed=top_k) for row in range(3)]
                network.check([*cases, Case(logits, GREEDY)])
        network.check([Case(logits, sampling(top_k=4, temperature=1e-30)), Case(logits, GREEDY)])


def test_steps_in_sequence(library: ops.Library) -> None:
    """Lists and counts of a step are not those of the one before; rows end on the way."""
    rng = np.random.default_rng(5)
    logits = draw_logits(rng, 1000)
    network = GivenLogits(library, logits)
    for _ in range(20):
        network.check(*rows_of(rng, logits), steps=8)


def test_draws_are_as_frequent_as_they_should_be(library: ops.Library) -> None:
    """The third of four tokens that are equally probable, in a quarter of the draws."""
    logits = np.full(50257, -5.0, np.float32)
    logits[[11, 12, 40000, 50256]] = 7.0
    network = GivenLogits(library, logits)
    found: list[int] = []
    for seed in range(100):
        cases = [Case(logits, sampling(top_k=4), seed=seed, sequence=i) for i in range(4)]
        rows = Rows(cases, pages=network.pages.pointer)
        library.call("persistent_step", network.arguments(rows.arguments(library)))
        found += rows.result()[0].tolist()
    assert set(found) == {11, 12, 40000, 50256}
    assert 60 < found.count(40000) < 140  # 5 standard deviations about 100


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "shape",
    [
        GPTShape(97, 64, 256, 1, 4, 512),
        GPTShape(50257, 256, 1024, 2, 16, 4096),
        GPTShape(97, 64, 1280, 1, 20, 1280),
    ],
    ids=lambda s: f"h{s.hidden_size}",
)
def test_generation(shape: GPTShape, dtype: str) -> None:
    """Whole requests: the same tokens and scores as with a choice of its own, and both together."""
    kinds = {
        "greedy": GenerationOptions(max_length=20, eos_token_id=-1),
        "few": GenerationOptions(
            max_length=20,
            decode_strategy="sampling",
            top_k=4,
            top_p=0.95,
            temperature=0.9,
            eos_token_id=-1,
        ),
        "many": GenerationOptions(
            max_length=20, decode_strategy="sampling", top_k=9, eos_token_id=-1
        ),
        "processed": GenerationOptions(max_length=20, min_length=1, eos_token_id=-1),
        "penalized": GenerationOptions(max_length=20, repetition_penalty=1.2, eos_token_id=-1),
        "without repeats": GenerationOptions(
            max_length=20, no_repeat_ngram_size=2, eos_token_id=-1
        ),
    }
    rng = np.random.default_rng(3)
    with EngineModel(
        shape, make_tensors(shape, WeightRecipe(1)), device="cuda", weight_dtype=dtype
    ) as model:
        for rows in (1, 2, 3, 4):
            prompts = [
                rng.integers(0, shape.vocab_size, int(n)).tolist()
                for n in rng.integers(1, 40, rows)
            ]
            for name, options in kinds.items():
                before = steps_that_chose()
                ours = model.generate(prompts, options, seed=rows)
                chose = steps_that_chose() - before
                # Of many rows only where one warp is enough to copy weights.
                free = rows <= 2 or shape.hidden_size <= 1024 or not dtype.startswith("int")
                expected = name in ("greedy", "few") and free
                assert (chose >= 20) if expected else (chose == 0), (name, rows, chose)
                with choice_apart():
                    theirs = model.generate(prompts, options, seed=rows)
                assert steps_that_chose() - before == chose
                for one, other in zip(ours, theirs):
                    assert one.tokens == other.tokens
                    assert one.score == other.score


def test_vocabularies_that_blocks_cannot_keep() -> None:
    """Up to 2,048 logits a block are kept: of two rows, half as many tokens' as of one."""
    import torch

    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    options = GenerationOptions(max_length=10, decode_strategy="sampling", top_k=4, eos_token_id=-1)
    for share, most_rows in ((0.25, 4), (0.75, 2), (1.5, 1), (2.25, 0)):
        shape = GPTShape(int(share * 1024 * blocks), 64, 64, 1, 2, 64)
        tensors = make_tensors(shape, WeightRecipe(1))
        with EngineModel(shape, tensors, device="cuda", weight_dtype="float16") as model:
            for rows in (1, 2, 4):
                prompts = [[17 * i % shape.vocab_size, 5 + i] for i in range(rows)]
                before = steps_that_chose()
                ours = model.generate(prompts, options, seed=2)
                chose = steps_that_chose() - before
                assert (chose >= 9) if rows <= most_rows else (chose == 0), (share, rows, chose)
                with choice_apart():
                    theirs = model.generate(prompts, options, seed=2)
                for one, other in zip(ours, theirs):
                    assert one.tokens == other.tokens
                    assert one.score == other.score


def test_beside_a_row_that_no_step_chooses_for() -> None:
    """As long as it is there, tokens are chosen apart, and then in the step."""
    shape = GPTShape(97, 64, 256, 1, 4, 512)
    few, many = (
        GenerationOptions(max_length=n, decode_strategy="sampling", top_k=k, eos_token_id=-1)
        for n, k in ((30, 4), (5, 9))
    )

    def run(model: EngineModel) -> list[list[int]]:
        with model.session() as session:
            ids = session.submit([1, 2, 3], few, 7) + session.submit([4, 5], many, 8)
            while session.step(1):
                pass
            return [session.get(i).tokens for i in ids]

    with EngineModel(
        shape, make_tensors(shape, WeightRecipe(1)), device="cuda", weight_dtype="float16"
    ) as model:
        before = steps_that_chose()
        ours = run(model)
        assert 20 <= steps_that_chose() - before <= 26
        with choice_apart():
            theirs = run(model)
        assert ours == theirs
        assert [len(tokens) for tokens in ours] == [30, 5]


def test_rows_end_at_different_times() -> None:
    """By their own eos or length, in a step that others go on after."""
    shape = GPTShape(61, 128, 64, 2, 4, 256)
    rng = np.random.default_rng(1)
    with EngineModel(
        shape, make_tensors(shape, WeightRecipe(3)), device="cuda", weight_dtype="float16"
    ) as model:
        for seed in range(20):
            prompts = [rng.integers(0, 61, int(n)).tolist() for n in rng.integers(1, 30, 4)]
            options = GenerationOptions(
                max_length=int(rng.integers(1, 60)),
                decode_strategy="sampling",
                top_k=4,
                eos_token_id=int(rng.integers(61)),
            )
            before = steps_that_chose()
            ours = model.generate(prompts, options, seed=seed)
            assert steps_that_chose() > before
            with choice_apart():
                theirs = model.generate(prompts, options, seed=seed)
            for one, other in zip(ours, theirs):
                assert one.tokens == other.tokens
                # Rows that ended stay in more or fewer steps, and sums are rounded by their number.
                assert one.score == pytest.approx(other.score, rel=1e-4)
                assert one.finish_reason == other.finish_reason


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_sequences_grow(dtype: str) -> None:
    """Over lengths at which other blocks take part in attention, again and again, as what comes too
    early is seldom seen."""
    shape = GPTShape(1000, 1024, 1024, 3, 16, 4096)
    options = GenerationOptions(
        max_length=200, decode_strategy="sampling", top_k=4, eos_token_id=-1
    )
    rng = np.random.default_rng(2)
    with EngineModel(
        shape, make_tensors(shape, WeightRecipe(1)), device="cuda", weight_dtype=dtype
    ) as model:
        for lengths in ((1,), (120,), (250,), (820,), (5, 120), (500, 820)):
            prompts = [rng.integers(0, 1000, n).tolist() for n in lengths]
            with choice_apart():
                expected = model.generate(prompts, options, seed=1)
            for again in range(10):
                before = steps_that_chose()
                found = model.generate(prompts, options, seed=1)
                assert steps_that_chose() - before >= 190
                for one, other in zip(expected, found):
                    assert one.tokens == other.tokens, (lengths, again)
                    assert one.score == other.score
