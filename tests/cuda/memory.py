"""Device memory of tests: NumPy arrays that go to the device and back."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Buffer:
    """A copy of an array in device memory."""

    def __init__(self, array: Array) -> None:
        import torch

        self._shape, self._dtype = array.shape, array.dtype
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._tensor = torch.from_numpy(raw.copy()).cuda()

    @property
    def pointer(self) -> int:
        """Address in device memory."""
        return int(self._tensor.data_ptr())

    def numpy(self) -> Array:
        """What the memory holds now."""
        return self._tensor.cpu().numpy().view(self._dtype).reshape(self._shape)


def to_bfloat16(values: Array) -> Array:
    """Bits of the nearest bfloat16 of finite float32 numbers, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    """float32 numbers of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
