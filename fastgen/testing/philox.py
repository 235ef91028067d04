"""Philox-4x32-10 in NumPy: the engine's randomness, bit for bit.

The engine draws nothing from a hidden state. The number that decides a sampled token is a function
of the seed, the sequence index and the step, made by the counter-based generator of Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11). A reference decode that calls
:func:`uniform` therefore sees the very draws that the engine sees.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["philox4x32_10", "uniform"]

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox4x32_10(counter: npt.ArrayLike, key: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Philox-4x32 with ten rounds.

    Args:
        counter: 32-bit words, shape ``[..., 4]``, word 0 first.
        key: 32-bit words, shape ``[..., 2]``; its leading axes broadcast against the counter's.

    Returns:
        The random words, uint32, shape ``[..., 4]``.

    Raises:
        ValueError: the last axis of ``counter`` is not 4 or that of ``key`` is not 2.
    """
    counter_words = np.asarray(counter, dtype=np.uint64)
    key_words = np.asarray(key, dtype=np.uint64)
    if counter_words.ndim == 0 or counter_words.shape[-1] != 4:
        raise ValueError(f"counter must have shape [..., 4], not {list(counter_words.shape)}")
    if key_words.ndim == 0 or key_words.shape[-1] != 2:
        raise ValueError(f"key must have shape [..., 2], not {list(key_words.shape)}")
    c0, c1, c2, c3 = (counter_words[..., i] & _LOW for i in range(4))
    k0, k1 = (key_words[..., i] & _LOW for i in range(2))
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIER_0 * c0
        product1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    words: npt.NDArray[np.uint64] = np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1)
    return words.astype(np.uint32)


def uniform(
    seed: npt.ArrayLike, sequence: npt.ArrayLike, step: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """The draw of one step of one sequence, in [0, 1) with a resolution of 2**-32.

    It is word 0 of Philox with counter ``(step, 0, sequence, 0)`` and the seed as key (low half
    first), times 2**-32. The arguments broadcast against each other.

    Args:
        seed: 0 <= seed < 2**64.
        sequence: index of the sequence, 0 <= sequence < 2**32.
        step: new tokens that the sequence already has, 0 <= step < 2**32.

    Returns:
        float64, of the broadcast shape.
    """
    seeds, sequences, steps = np.broadcast_arrays(
        np.asarray(seed, dtype=np.uint64),
        np.asarray(sequence, dtype=np.uint64),
        np.asarray(step, dtype=np.uint64),
    )
    zero = np.zeros_like(steps)
    counter = np.stack([steps, zero, sequences, zero], axis=-1)
    key = np.stack([seeds & _LOW, seeds >> _HALF], axis=-1)
    return philox4x32_10(counter, key)[..., 0].astype(np.float64) * 2.0**-32
