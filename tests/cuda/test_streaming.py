"""Steps that run ahead of the caller: the same tokens whoever asks for them, when, and beside what.

What a request must give is what it gives alone with its logits kept: then no step runs ahead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel, EngineSequence, Session
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from tests.cuda.step_policy import kernels_only, steps_as_one_kernel

SHAPE = GPTShape(61, 128, 64, 2, 4, 256)
FREE = GenerationOptions(
    max_length=40, decode_strategy="sampling", top_k=40, top_p=0.95, eos_token_id=-1
)


@dataclass(frozen=True)
class Request:
    """One sequence."""

    prompt: tuple[int, ...]
    options: GenerationOptions
    seed: int

    def submit(self, session: Session, keep_logits: bool = False) -> int:
        (sequence,) = session.submit(self.prompt, self.options, self.seed, keep_logits=keep_logits)
        return sequence

    def alone(self, model: EngineModel) -> EngineSequence:
        (sequence,) = model.generate([self.prompt], self.options, self.seed, keep_logits=True)
        return sequence


def drawn_request(rng: random.Random, vocab: int = SHAPE.vocab_size) -> Request:
    prompt = tuple(rng.randrange(vocab) for _ in range(rng.choice([1, 2, 5, 30, 65, 80])))
    options = replace(
        FREE,
        max_length=rng.choice([1, 2, 3, 4, 10, 30]),
        eos_token_id=rng.choice([-1, *range(8)]),
        temperature=rng.choice([0.3, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.2]),
    )
    return Request(prompt, options, rng.getrandbits(60))


@pytest.fixture(scope="module", params=["float32", "float16"])
def model(request: pytest.FixtureRequest) -> Iterator[EngineModel]:
    with EngineModel(
        SHAPE, make_tensors(SHAPE, WeightRecipe(3)), device="cuda", weight_dtype=request.param
    ) as model:
        yield model


@pytest.fixture(autouse=True)
def _same_kernels_for_few_rows(request: pytest.FixtureRequest) -> Iterator[None]:
    """Sums of the one kernel for few rows are rounded otherwise, which is not meant here."""
    if "model" not in request.fixturenames:
        yield
        return
    with kernels_only():
        yield


def check(model: EngineModel, request: Request, actual: EngineSequence) -> None:
    """All of what the request gives alone, or the beginning if it was cancelled."""
    expected = request.alone(model)
    if actual.finish_reason == "cancelled":
        assert actual.tokens == expected.tokens[: len(actual.tokens)]
        return
    assert actual.tokens == expected.tokens
    assert actual.score == expected.score
    assert actual.finish_reason == expected.finish_reason


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (1, 5, 2), (64,)], ids=str)
def test_any_number_of_steps_a_call(model: EngineModel, sizes: tuple[int, ...]) -> None:
    rng = random.Random(1)
    requests = [drawn_request(rng) for _ in range(9)]
    with model.session() as session:
        ids = [request.submit(session) for request in requests]
        for turn in range(1000):
            if not session.step(sizes[turn % len(sizes)]):
                break
        for request, sequence in zip(requests, ids):
            check(model, request, session.get(sequence))


@pytest.mark.parametrize("seed", range(4))
def test_requests_come_and_go(model: EngineModel, seed: int) -> None:
    """A random schedule: joining, cancelling, calls of any size, two sessions in turn."""
    rng = random.Random(seed)
    requests = [drawn_request(rng) for _ in range(200)]
    for i in range(0, 200, 4):  # some end with a token that they give
        free = replace(requests[i], options=replace(requests[i].options, eos_token_id=-1))
        eos = rng.choice(free.alone(model).tokens)
        requests[i] = replace(free, options=replace(free.options, eos_token_id=eos))
    left = list(requests)
    running: list[tuple[Session, int, Request]] = []
    done: list[tuple[Request, EngineSequence]] = []
    with model.session(rng.choice([5, 24])) as first, model.session(100) as second:
        while left or running:
            for _ in range(rng.choice([0, 0, 1, 1, 2, 9])):
                if left:
                    session = rng.choice([first, second])
                    request = left.pop()
                    running.append((session, request.submit(session), request))
            rng.choice([first, second]).step(rng.choice([1, 1, 1, 1, 2, 3, 7, 64]))
            if running and rng.random() < 0.15:
                session, sequence, _ = rng.choice(running)
                session.cancel(sequence)
            now = [(request, s.get(sequence)) for s, sequence, request in running]
            running = [r for r, (_, s) in zip(running, now) if s.finish_reason == "running"]
            done += [(request, s) for request, s in now if s.finish_reason != "running"]
    assert len(done) == len(requests)
    assert 5 < sum(s.finish_reason == "cancelled" for _, s in done) < 150
    assert sum(s.finish_reason == "eos" for _, s in done) > 20
    for request, sequence in done:
        check(model, request, sequence)


def test_eos_and_length_in_steps_ahead(model: EngineModel) -> None:
    """Ends in every one of the first steps, while others go on."""
    tokens = Request((5,), FREE, 1).alone(model).tokens
    requests = [Request((5,), replace(FREE, max_length=n), 1) for n in range(1, 7)]
    requests += [Request((5,), replace(FREE, eos_token_id=t), 1) for t in tokens[:6]]
    requests += [Request((5,), FREE, 1)]
    for together in (True, False):
        for batch in [requests] if together else [[request] for request in requests]:
            with model.session() as session:
                ids = [request.submit(session) for request in batch]
                while session.step(1):
                    pass
                for request, sequence in zip(batch, ids):
                    check(model, request, session.get(sequence))


def test_a_slot_is_used_again(model: EngineModel) -> None:
    """What was on its way for the sequence before does not reach the next."""
    rng = random.Random(4)
    with model.session() as session:
        for turn in range(40):
            request = drawn_request(rng)
            cancelled, other = request.submit(session), request.submit(session)
            for _ in range(turn % 4):
                session.step(1)
            session.cancel(cancelled)
            follower = drawn_request(rng)
            sequence = follower.submit(session)
            while session.step(1):
                pass
            check(model, request, session.get(cancelled))
            check(model, request, session.get(other))
            check(model, follower, session.get(sequence))


def test_work_space_grows_under_steps_in_flight() -> None:
    """From 1 row to 150: every number of rows has a size, and slots are moved."""
    rng = random.Random(5)
    requests = [Request((i % 60,), FREE, i) for i in range(150)]
    done = []
    with (
        EngineModel(
            SHAPE, make_tensors(SHAPE, WeightRecipe(3)), device="cuda", weight_dtype="float32"
        ) as grown,
        grown.session(150) as session,
    ):
        at = 0
        while at < len(requests):
            count = rng.choice([1, 2, 20])
            done += [(r, r.submit(session)) for r in requests[at : at + count]]
            at += count
            session.step(1)
        while session.step(1):
            pass
        for request, sequence in done:
            check(grown, request, session.get(sequence))


def test_kept_logits_join(model: EngineModel) -> None:
    """A sequence whose logits are kept beside others that had run ahead."""
    rng = random.Random(6)
    requests = [replace(drawn_request(rng), options=FREE) for _ in range(6)]
    with model.session() as session:
        ids = [request.submit(session) for request in requests[:5]]
        for _ in range(4):
            session.step(1)
        kept = requests[5].submit(session, keep_logits=True)
        while session.step(1):
            pass
        for request, sequence in zip(requests, [*ids, kept]):
            check(model, request, session.get(sequence))
        actual, expected = session.get(kept).logits, requests[5].alone(model).logits
        assert actual is not None
        assert np.array_equal(actual, expected)


def test_no_more_steps_than_two_are_wasted() -> None:
    """Counted where every step is one kernel."""
    shape = GPTShape(97, 64, 32, 1, 4, 32)
    options = replace(FREE, max_length=20)
    with EngineModel(
        shape, make_tensors(shape, WeightRecipe(0)), device="cuda", weight_dtype="float16"
    ) as model:
        before = steps_as_one_kernel()
        model.generate([[1]], options)
        if steps_as_one_kernel() == before:
            pytest.skip("steps are not one kernel here")
        with model.session() as session:
            Request((1,), options, 0).submit(session)
            before = steps_as_one_kernel()
            for calls in range(1, 21):
                session.step(1)
                assert steps_as_one_kernel() - before <= min(calls + 2, 20)
            sequence = Request((1,), options, 0).submit(session)
            before = steps_as_one_kernel()
            session.step(1)
            session.cancel(sequence)
            session.step(1)
            assert steps_as_one_kernel() - before <= 3
            # A step is on its way when the host reads of the end.
            eos = session.get(sequence).tokens[0]
            sequence = Request((1,), replace(options, eos_token_id=eos), 0).submit(session)
            before = steps_as_one_kernel()
            session.step(64)
            assert session.get(sequence).finish_reason == "eos"
            assert steps_as_one_kernel() - before <= 2


def test_the_count_of_steps_starts_again() -> None:
    """The device counts to 65536."""
    shape = GPTShape(50, 2048, 32, 1, 1, 32)
    request = Request((3,), replace(FREE, max_length=2047), 9)
    with EngineModel(shape, make_tensors(shape, WeightRecipe(0)), device="cuda") as model:
        expected = request.alone(model)
        for _ in range(34):
            (actual,) = model.generate([request.prompt], request.options, request.seed)
            assert actual.tokens == expected.tokens
