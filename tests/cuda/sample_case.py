"""Rows of logits with the state of their sequences: as the sampling kernel takes them, and what the
NumPy rules make of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastgen.options import GenerationOptions
from fastgen.testing.margins import MARGIN, margin_at
from fastgen.testing.sampling import (
    BANNED,
    choose,
    filter_probs,
    probabilities,
    process_logits,
)
from tests.cuda import ops
from tests.cuda.memory import Array, Buffer

POISON = -77


@dataclass
class Case:
    """One row: its logits and its sequence."""

    logits: Array
    options: GenerationOptions
    history: list[int] = field(default_factory=lambda: [0])
    prompt_length: int = 1
    seed: int = 0
    sequence: int = 0
    finished: bool = False

    @property
    def step(self) -> int:
        """New tokens so far."""
        return len(self.history) - self.prompt_length

    def parameters(self) -> ops.SamplingParams:
        """The options as the kernel takes them."""
        options = self.options

        def token(value: int | None) -> int:
            return -1 if value is None else value

        return ops.SamplingParams(
            sample=options.decode_strategy == "sampling",
            max_length=options.max_length,
            min_length=options.min_length,
            top_k=options.top_k or 0,
            top_p=1.0 if options.top_p is None else options.top_p,
            temperature=options.temperature,
            repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size or 0,
            eos_token_id=token(options.eos_token_id),
            forced_bos_token_id=token(options.forced_bos_token_id),
            forced_eos_token_id=token(options.forced_eos_token_id),
            sequence=self.sequence,
            seed=self.seed,
        )

    def processed(self) -> Array:
        """Logits after the processors."""
        return process_logits(self.logits, self.history, self.prompt_length, self.options)


def draw_logits(rng: np.random.Generator, vocab: int) -> Array:
    """Logits of one of many kinds."""
    kind = rng.integers(9)
    values = rng.normal(size=vocab) * rng.choice([0.02, 1.0, 3.0, 10.0])
    if kind == 0:
        values = np.round(values * 2) / 2  # many ties
    elif kind == 1:
        values = np.full(vocab, values[0])
    elif kind == 2:
        values *= 1e4
    elif kind == 3:
        values[rng.random(vocab) < 0.9] = BANNED
        values[rng.integers(vocab)] = 1.0
    elif kind == 4:
        values = -1.5 * np.log1p(rng.permutation(vocab)) - rng.random(vocab)  # as of a model
    elif kind == 5:
        values = 300.0 + values * 0.3
    elif kind == 6:
        values[rng.integers(vocab)] = -np.inf
        values[rng.integers(vocab)] = 4.0
    return values.astype(np.float32)


def sampling(**options: Any) -> GenerationOptions:
    """Options of a draw from the whole distribution, but for what is given."""
    defaults = {"decode_strategy": "sampling", "top_k": 0, "eos_token_id": -1, "max_length": 64}
    return GenerationOptions(**{**defaults, **options})


def _structures(items: Sequence[ctypes.Structure]) -> Buffer:
    return Buffer(np.frombuffer(b"".join(bytes(item) for item in items), np.uint8))


class Rows:
    """Cases in device memory. Slots lie in reverse order of the rows, as they may.

    Args:
        cases: the rows.
        max_steps: steps that there is room for.
        padding: rows without a slot behind them.
        pages: address of a table of the cache's pages, which all slots share.
    """

    def __init__(
        self, cases: Sequence[Case], max_steps: int = 1, padding: int = 0, pages: int | None = None
    ) -> None:
        self.cases, self.max_steps = cases, max_steps
        self.count = len(cases) + padding
        self.vocab = cases[0].logits.size
        # Rows start at multiples of 16 bytes but for odd vocabularies, where any start must do.
        self.ld = self.vocab + 5 if self.vocab % 2 else -(-self.vocab // 4) * 4
        self.starts = np.cumsum([0] + [len(c.history) + max_steps + 1 for c in cases])
        tokens = np.full(int(self.starts[-1]), POISON, np.int32)
        for start, case in zip(self.starts, cases):
            tokens[start : start + len(case.history)] = case.history
        self.tokens = Buffer(tokens)
        slots = [
            ops.Slot(
                length=len(case.history),
                prompt_length=case.prompt_length,
                finished=case.finished,
                tokens=self.tokens.pointer + 4 * int(start),
                pages=pages,
                sampling=case.parameters(),
            )
            for start, case in zip(self.starts, cases)
        ]
        self.slots = _structures(slots[::-1])
        row_list = [ops.Row(len(cases) - 1 - row, -1) for row in range(len(cases))]
        self.row_list = _structures(row_list + [ops.Row(-1, -1)] * padding)
        self.results = Buffer(np.full((max_steps, self.count, 4), POISON, np.int32))
        self.step = Buffer(np.zeros(1, np.int32))
        self._state: tuple[bytes, Array] | None = None  # slots and tokens, once asked for

    def arguments(self, library: ops.Library) -> ops.SampleArgs:
        """The kernel's arguments, with fresh logits."""
        logits = np.full((self.count, self.ld), np.inf, np.float32)
        for row, case in enumerate(self.cases):
            logits[row, : self.vocab] = case.logits
        self.logits = Buffer(logits)
        self.workspace = Buffer(
            np.zeros(library.sample_workspace(self.count, self.vocab), np.uint8)
        )
        return ops.SampleArgs(
            logits=self.logits.pointer,
            ld=self.ld,
            vocab=self.vocab,
            row_list=self.row_list.pointer,
            slots=self.slots.pointer,
            rows=self.count,
            results=self.results.pointer,
            result_steps=self.max_steps,
            result_rows=self.count,
            step=self.step.pointer,
            workspace=self.workspace.pointer,
        )

    def sample(self, library: ops.Library) -> None:
        """One step."""
        self._state = None
        library.call("sample", self.arguments(library))
        assert not self.workspace.numpy().any(), "the workspace is not zero after a step"
        assert (self.logits.numpy()[:, self.vocab :] == np.inf).all()

    def result(self, step: int = 0) -> tuple[Array, Array, Array]:
        """Tokens, scores and finished flags of a step."""
        results = self.results.numpy()[step]
        assert (results[:, 3] == step + 1).all(), "a row is not ready"
        return results[:, 0], results[:, 1].copy().view(np.float32), results[:, 2]

    def slot(self, row: int) -> tuple[Any, Array]:
        """State and tokens of a row's slot."""
        if self._state is None:
            self._state = self.slots.numpy().tobytes(), self.tokens.numpy()
        slots, tokens = self._state
        offset = (len(self.cases) - 1 - row) * ctypes.sizeof(ops.Slot)
        slot = ops.Slot.from_buffer_copy(slots, offset)
        return slot, tokens[self.starts[row] : self.starts[row + 1]]


def run(library: ops.Library, cases: Sequence[Case]) -> tuple[Array, Array, Array]:
    """One step of cases; checks what it did to their slots."""
    rows = Rows(cases)
    rows.sample(library)
    tokens, scores, finished = rows.result()
    assert rows.step.numpy()[0] == 1
    for row, case in enumerate(cases):
        slot, stored = rows.slot(row)
        length = len(case.history)
        assert slot.length == length + 1
        assert list(stored[: length + 1]) == [*case.history, tokens[row]]
        assert (stored[length + 1 :] == POISON).all()
        ends = tokens[row] == case.parameters().eos_token_id
        ends = ends or case.step + 1 >= case.options.max_length
        assert slot.finished == finished[row] == ends
    return tokens, scores, finished


def compare(case: Case, token: int, score: float) -> bool:
    """Compares a choice with the rules'.

    Returns:
        True if they are the same, False if the rules were undecided within MARGIN / 10.
    """
    processed, options, step = case.processed(), case.options, case.step
    expected = choose(processed, options, case.seed, case.sequence, step)
    where = f"{token} instead of {expected}, {options}, step {step}, {processed.size} logits"
    if token != expected.token:
        assert options.decode_strategy == "sampling", where
        probs = probabilities(processed, options.temperature)
        reference = SimpleNamespace(
            logits={step: processed},
            kept={step: filter_probs(probs, options.top_k, options.top_p)},
            sequence=case.sequence,
            prompt=case.history[: case.prompt_length],
            tokens=case.history[case.prompt_length :],
        )
        margin = margin_at(reference, step, options, case.seed)
        assert margin.value < MARGIN / 10, f"{where}: {margin}"
        return False
    if options.decode_strategy == "sampling" and processed[token] < BANNED / 2:
        assert score <= 0.0, where  # what is left of a difference of such numbers is rounding
    elif options.decode_strategy == "sampling":
        allowed = np.abs(processed[processed > BANNED / 2]).max(initial=0.0)
        assert abs(score - expected.score) <= 2e-6 * (1.0 + max(allowed, abs(expected.score))), (
            f"score {score} {where}"
        )
    else:
        assert score == np.float32(expected.score), where
    return True
