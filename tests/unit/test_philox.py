"""Philox-4x32-10: known answers, and the mapping from (seed, sequence, step) to a draw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.testing.philox import philox4x32_10, uniform

ONES = 0xFFFFFFFF

# Known-answer vectors of Random123, the authors' own implementation: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox4x32_10(counter, key).tolist() == expected


def test_known_answers_at_once() -> None:
    counters, keys, expected = (np.array(column) for column in zip(*KNOWN))
    np.testing.assert_array_equal(philox4x32_10(counters, keys), expected)


def test_key_broadcasts() -> None:
    counters = np.arange(40).reshape(10, 4)
    together = philox4x32_10(counters, [1, 2])
    for row, counter in zip(together, counters):
        np.testing.assert_array_equal(row, philox4x32_10(counter, [1, 2]))


@pytest.mark.parametrize(("counter", "key"), [([0, 0, 0], [0, 0]), ([0] * 4, [0]), (0, [0, 0])])
def test_wrong_shapes(counter: object, key: object) -> None:
    with pytest.raises(ValueError, match="must have shape"):
        philox4x32_10(counter, key)  # type: ignore[arg-type]


@given(
    seed=st.integers(0, 2**64 - 1),
    sequence=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**32 - 1),
)
def test_draw_is_word_0_of_its_counter(seed: int, sequence: int, step: int) -> None:
    words = philox4x32_10([step, 0, sequence, 0], [seed & ONES, seed >> 32])
    draw = float(uniform(seed, sequence, step))
    assert draw == int(words[0]) / 2**32
    assert 0.0 <= draw < 1.0


def test_draws_broadcast() -> None:
    draws = uniform(7, np.arange(3)[:, None], np.arange(5))
    assert draws.shape == (3, 5)
    assert draws[2, 4] == uniform(7, 2, 4)
    assert len(np.unique(draws)) == 15
