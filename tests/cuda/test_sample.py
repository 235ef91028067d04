"""The sampling kernel against the NumPy rules of fastgen.testing, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastgen.options import GenerationOptions
from fastgen.testing.sampling import BANNED, filter_probs, probabilities
from tests.cuda import ops
from tests.cuda.memory import Array
from tests.cuda.sample_case import POISON, Case, Rows, compare, draw_logits, run, sampling

VOCABS = [1, 2, 7, 250, 1000, 5003, 50257]
GREEDY = GenerationOptions(decode_strategy="greedy_search", eos_token_id=-1, max_length=64)


def draw_case(rng: np.random.Generator, vocab: int) -> Case:
    """A row with any options."""

    def sometimes(value: Any, otherwise: Any, chance: float = 0.25) -> Any:
        return value if rng.random() < chance else otherwise

    prompt = int(rng.integers(1, 20))
    new = int(rng.choice([0, 1, 5, 200]))
    few = max(1, min(vocab, int(rng.choice([3, 1000000]))))
    history = rng.integers(few, size=prompt + new).tolist()
    token = int(rng.integers(vocab))
    options = GenerationOptions(
        decode_strategy=sometimes("greedy_search", "sampling", 0.2),
        max_length=new + int(rng.choice([1, 2, 50])),
        min_length=sometimes(new + 1, 0),
        top_k=int(sometimes(rng.choice([1, 2, 50, 300, vocab, vocab + 1]), 0, 0.5)),
        top_p=float(sometimes(rng.choice([0.0, 1e-9, 0.1, 0.5, 0.9, 0.99, 0.999999]), 1.0, 0.6)),
        temperature=float(sometimes(rng.choice([0.1, 0.7, 1.3, 30.0]), 1.0, 0.5)),
        repetition_penalty=float(sometimes(rng.choice([0.7, 1.2, 5.0]), 1.0)),
        no_repeat_ngram_size=int(sometimes(rng.choice([1, 2, 3, 500]), 0)),
        eos_token_id=sometimes(token, -1, 0.5),
        forced_bos_token_id=sometimes(token, None, 0.1),
        forced_eos_token_id=sometimes(token, None, 0.1),
    )
    seed, sequence = (int(n) for n in rng.integers(2**62, size=2))
    return Case(draw_logits(rng, vocab), options, history, prompt, seed, sequence % 2**32)


def run_grouped(library: ops.Library, cases: list[Case]) -> tuple[Array, Array]:
    """Tokens and scores of a step, which are the same bits in many rows and in few: those are
    divided over more blocks each."""
    tokens, scores, _ = run(library, cases)
    for first in range(0, len(cases), 20):
        group = slice(first, first + 20)
        few_tokens, few_scores, _ = run(library, cases[group])
        assert np.array_equal(few_tokens, tokens[group])
        assert np.array_equal(few_scores.view(np.int32), scores[group].view(np.int32))
    return tokens, scores


def is_distribution(case: Case) -> bool:
    """Whether the rules know what to do: temperature may push everything to -inf."""
    with np.errstate(over="ignore"):
        largest = (case.processed() / np.float32(case.options.temperature)).max()
    return bool(np.isfinite(largest))


@pytest.mark.parametrize("vocab", VOCABS)
def test_any_options(library: ops.Library, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    drawn = [draw_case(rng, vocab) for _ in range(200 if vocab > 10000 else 600)]
    cases = [case for case in drawn if is_distribution(case)]
    assert len(cases) > 0.9 * len(drawn)
    tokens, scores = run_grouped(library, cases)
    same = [compare(*row) for row in zip(cases, tokens.tolist(), scores.tolist())]
    assert np.mean(same) > 0.985


def test_vocabulary_beyond_shared_memory(library: ops.Library) -> None:
    rng = np.random.default_rng(0)
    cases = [draw_case(rng, 300_001) for _ in range(30)]
    cases = [case for case in cases if is_distribution(case)]
    tokens, scores, _ = run(library, cases)
    assert np.mean([compare(*row) for row in zip(cases, tokens.tolist(), scores.tolist())]) > 0.9


@pytest.mark.parametrize("vocab", [16, 4096, 50257])
def test_equals_at_the_border(library: ops.Library, vocab: int) -> None:
    """Top-p keeps the smallest ids of equals, top-k all of them."""
    cases = []
    for sixteenths in range(1, 16):
        for top_k in (0, 3):
            options = sampling(top_k=top_k, top_p=sixteenths / 16)
            logits = np.zeros(vocab, np.float32)
            logits[vocab // 2 :: 5] = 1.0 if top_k else 0.0
            cases += [Case(logits, options, seed=sixteenths, sequence=i) for i in range(20)]
    tokens, scores, _ = run(library, cases)
    same = [compare(*row) for row in zip(cases, tokens.tolist(), scores.tolist())]
    assert np.mean(same) > 0.99
    for case, token in zip(cases, tokens):
        if case.options.top_k == 0 and vocab in (16, 4096):  # sums are exact
            assert token <= case.options.top_p * vocab


def check(library: ops.Library, cases: list[Case], share: float = 0.985) -> None:
    """All choices are the rules', but for so many that they are undecided in."""
    tokens, scores = run_grouped(library, cases)
    same = [compare(*row) for row in zip(cases, tokens.tolist(), scores.tolist())]
    assert np.mean(same) > share


@pytest.mark.parametrize("kind", ["shuffled", "descending", "in one stretch", "rounded"])
@pytest.mark.parametrize("vocab", [300, 5003, 50257])
def test_any_number_of_candidates(library: ops.Library, vocab: int, kind: str) -> None:
    """Wherever the likely tokens lie: over all blocks, in one, in one warp, among many equals."""
    rng = np.random.default_rng(vocab)
    cases = []
    ks = (1, 2, 4, 15, 16, 17, 63, 64, 65, 200, 256, 257, 1000, 2048, 2049, vocab - 1, vocab)
    for top_k in (0, *(k for k in ks if k <= vocab)):
        for top_p in (1.0, 0.3, 0.9, 0.999999):
            for sequence in range(3):
                logits = np.sort(rng.normal(size=vocab) * 2)[::-1].astype(np.float32)
                if kind == "in one stretch":
                    logits[100:] -= 50.0
                    logits = np.roll(logits, rng.integers(vocab))
                elif kind == "rounded":
                    logits = rng.permutation(np.round(logits * 8) / 8)
                elif kind == "shuffled":
                    logits = rng.permutation(logits)
                options = sampling(top_k=top_k, top_p=top_p, temperature=rng.choice([1.0, 1.5]))
                cases.append(Case(logits, options, seed=top_k, sequence=sequence))
    check(library, cases)


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 600, 50257])
def test_few_tokens_are_possible(library: ops.Library, vocab: int) -> None:
    """Fewer than k, the others having no probability at all."""
    rng = np.random.default_rng(vocab)
    cases = []
    for possible in (1, 2, 3, 40):
        for top_k in (0, 1, 2, 4, 50, 100):
            for top_p in (1.0, 0.5):
                logits = np.full(vocab, rng.choice([-np.inf, BANNED, -1000.0]), np.float32)
                where = rng.permutation(vocab)[:possible]
                logits[where] = rng.choice([0.0, 1.0, 5.0], size=where.size)
                cases.append(Case(logits, sampling(top_k=top_k, top_p=top_p), sequence=top_k))
    check(library, cases)


@pytest.mark.parametrize("vocab", [5, 513, 50257])
def test_all_tokens_are_alike(library: ops.Library, vocab: int) -> None:
    """Top-k keeps them all, top-p the first."""
    for value in (0.0, -1000.0, 77.7):
        logits = np.full(vocab, value, np.float32)
        kept = [Case(logits, sampling(top_k=3), sequence=i) for i in range(50)]
        check(library, kept)
        cut = [Case(logits, sampling(top_k=4, top_p=0.25), sequence=i) for i in range(50)]
        check(library, cut)
        tokens, _, _ = run(library, cut)
        assert (tokens <= 0.25 * vocab + 1).all()


def test_choices_of_no_distribution(library: ops.Library) -> None:
    """The largest logit that is a number, the first of equals; token 0 if none is."""
    nan, inf = np.nan, np.inf
    rows = [
        ([nan, 1, 2, nan, 2], 2),
        ([nan] * 5, 0),
        ([-inf, nan, -inf, -inf, nan], 0),
        ([nan, -inf, -inf, nan, -inf], 1),
        ([1, inf, nan, inf, 2], 1),
        ([-0.0, 0.0, -1, 0.0, -3], 0),
        ([0, 3e38, -3e38, 1, 2], 1),
        ([BANNED] * 5, 0),
    ]
    for options in (GREEDY, sampling(temperature=0.01), sampling(temperature=0.01, top_k=2)):
        if options is not GREEDY:
            rows[5] = ([-3e38, -2e38, -1e38, -3e38, -3e38], 2)
        cases = [Case(np.array(logits, np.float32), options) for logits, _ in rows]
        tokens, scores, _ = run(library, cases)
        assert tokens.tolist() == [token for _, token in rows]
        if options is GREEDY:
            expected = [case.logits[token] for case, token in zip(cases, tokens)]
            assert np.array_equal(scores, np.array(expected, np.float32), equal_nan=True)
        else:
            assert np.isnan(scores[:5]).all()
            assert scores[6] == 0.0
            assert scores[7] == pytest.approx(0.0, abs=1e32)  # -FLT_MAX - (-FLT_MAX + log 5)


def test_states(library: ops.Library) -> None:
    """Steps append until a sequence ends; what has ended or is padding stays as it is."""
    vocab, steps = 100, 6
    logits = np.zeros(vocab, np.float32)
    logits[[5, 7]] = 3.0, 2.0

    def case(**options: Any) -> Case:
        return Case(
            logits, GenerationOptions(decode_strategy="greedy_search", **options), [1, 2], 2
        )

    cases = [
        case(max_length=3, eos_token_id=-1),
        case(max_length=50, eos_token_id=5),
        case(max_length=50, eos_token_id=5, min_length=2),
        case(max_length=50, eos_token_id=-1),
        Case(logits, GREEDY, [1, 2], 2, finished=True),
    ]
    rows = Rows(cases, steps, padding=2)
    for _ in range(steps):
        rows.sample(library)
    found = np.stack([rows.result(step)[0] for step in range(steps)], axis=1)
    assert found.tolist() == [
        [5, 5, 5, -1, -1, -1],
        [5, -1, -1, -1, -1, -1],
        [7, 7, 5, -1, -1, -1],
        [5, 5, 5, 5, 5, 5],
        [-1] * 6,
        [-1] * 6,
        [-1] * 6,
    ]
    flags = np.stack([rows.result(step)[2] for step in range(steps)], axis=1)
    assert flags.tolist()[0] == [0, 0, 1, 1, 1, 1]
    assert flags.tolist()[3] == [0] * 6
    assert rows.step.numpy()[0] == steps
    for row, new in enumerate((3, 1, 3, 6, 0)):
        slot, tokens = rows.slot(row)
        assert slot.length == 2 + new
        assert bool(slot.finished) == (row != 3)
        assert (tokens[2 + new :] == POISON).all()
        assert (tokens[: 2 + new] != POISON).all()


@pytest.mark.parametrize("count", [1, 3, 40])
def test_steps_may_overlap(library: ops.Library, count: int) -> None:
    """Steps that start before the one before has ended give the same."""
    rng = np.random.default_rng(count)
    steps = 30
    cases = []
    for sequence in range(count):
        options = sampling(
            top_k=int(rng.choice([0, 4, 300])), no_repeat_ngram_size=2, max_length=steps - 3
        )
        cases.append(Case(draw_logits(rng, 5003), options, [1, 2, 3], 3, 7, sequence))
    found = []
    for overlap in (False, True):
        rows = Rows(cases, steps)
        arguments = rows.arguments(library)
        arguments.overlap = overlap
        for _ in range(steps - 1):
            library.launch("sample", arguments)
        library.call("sample", arguments)
        assert rows.step.numpy()[0] == steps
        found.append((rows.results.numpy(), rows.tokens.numpy()))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


def test_rows_do_not_depend_on_each_other(library: ops.Library) -> None:
    rng = np.random.default_rng(5)
    cases = [draw_case(rng, 5003) for _ in range(70)]
    together = run(library, cases)
    for row in range(0, 70, 9):
        alone = run(library, cases[row : row + 1])
        for one, all_ in zip(alone, together):
            assert one[0] == all_[row] or (one[0] != one[0] and all_[row] != all_[row])


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.7, "temperature": 1.4}],
)
def test_frequencies(library: ops.Library, options: dict[str, Any]) -> None:
    """Chi-square of many draws; nothing that is filtered out is ever drawn."""
    rng = np.random.default_rng(9)
    vocab, draws = 40, 8192
    logits = rng.normal(size=vocab).astype(np.float32) * 1.5
    chosen = sampling(**options)
    cases = [Case(logits, chosen, seed=1234, sequence=i) for i in range(draws)]
    tokens, _, _ = run(library, cases)
    kept = filter_probs(
        probabilities(logits, chosen.temperature), chosen.top_k, chosen.top_p
    ).astype(np.float64)
    expected = kept / kept.sum() * draws
    counts = np.bincount(tokens, minlength=vocab)
    assert not counts[kept == 0].any()
    inside = kept > 0
    chi_square = ((counts[inside] - expected[inside]) ** 2 / expected[inside]).sum()
    freedom = int(inside.sum()) - 1
    # Wilson-Hilferty: a cube root that is nearly normal.
    deviate = ((chi_square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (
        2 / (9 * freedom)
    ) ** 0.5
    assert abs(deviate) < 4.0
