"""HuggingFace generate on PyTorch as a contestant of `python -m benchmarks.cpu`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from transformers import GPT2LMHeadModel, StoppingCriteria

from benchmarks.cpu_worker import Clock, Load


class _Stop(StoppingCriteria):
    """Called once a step, when the tokens are chosen."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._clock.tick(), dtype=torch.bool)


class Contestant:
    """``GPT2LMHeadModel`` with its default attention and cache."""

    def __init__(self, load: Load) -> None:
        torch.set_num_threads(load.threads)
        dtype = getattr(torch, load.dtype)
        self._model = GPT2LMHeadModel.from_pretrained(load.source, dtype=dtype).eval()

    @staticmethod
    def convert(load: Load) -> None:
        """Nothing: it loads what HuggingFace writes."""

    def about(self) -> dict[str, Any]:
        """Versions."""
        return {"version": torch.__version__, "transformers": transformers.__version__}

    def make_room(self, rows: int, positions: int) -> None:
        """Nothing: it makes its cache while it runs."""

    def decode(self, prompts: np.ndarray, steps: int, clock: Clock) -> None:
        """See cpu_worker.Peer."""
        ids = torch.from_numpy(prompts)
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=1 + steps,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[_Stop(clock)],
            )

    def prefill(self, prompts: np.ndarray) -> list[int]:
        """See cpu_worker.Peer."""
        with torch.inference_mode():
            output = self._model(torch.from_numpy(prompts), use_cache=True, logits_to_keep=1)
            return output.logits[:, -1].argmax(-1).tolist()
