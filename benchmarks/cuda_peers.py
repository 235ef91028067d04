"""The peers of `python -m benchmarks.cuda`: what else decodes GPT-2 on the same device."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.cuda_cells import COMPILED, GRAPH, HF_EAGER, HF_STATIC, MAX_POSITIONS, STEPS, Cell
from benchmarks.cuda_contestants import Contestant
from benchmarks.torch_gpt2 import TorchGPT2, milliseconds

Weights = dict[str, torch.Tensor]


class TimeLimitError(BaseException):
    """Not an Exception: a compiler that carries on after errors must not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what takes longer with a TimeLimitError. Main thread only."""

    def stop(*_: object) -> None:
        raise TimeLimitError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def weights_on_device(tensors: dict[str, np.ndarray]) -> Weights:
    """float16 copies that all peers share."""
    return {
        name: torch.from_numpy(values).to("cuda").to(torch.float16)
        for name, values in tensors.items()
    }


def forget_compiled() -> None:
    """Drops what PyTorch has compiled, of which it keeps so much only. For when nothing runs it
    any more: a graph may still launch kernels that would be unloaded."""
    torch._dynamo.reset()


def give_memory_back() -> None:
    """Returns what PyTorch keeps for later to the device."""
    gc.collect()
    torch.cuda.empty_cache()


class TorchStep:
    """A step of benchmarks/torch_gpt2.py from a CUDA graph."""

    def __init__(
        self, config: dict[str, Any], weights: Weights, cell: Cell, compiled: bool
    ) -> None:
        # As long a cache as the context asks for: attention runs over all of it.
        length = min(MAX_POSITIONS, cell.context + STEPS)
        self._centre = cell.centre
        self._model = TorchGPT2(config, weights, cell.batch, length)
        self._replay = self._model.capture(compiled)

    def sample(self) -> float:
        """Milliseconds per step."""
        return milliseconds(self._replay, self._model, self._centre, STEPS)

    def close(self) -> None:
        """Frees the cache and the graph."""
        del self._model, self._replay


def _huggingface(config: dict[str, Any], weights: Weights) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    finally:
        torch.set_default_dtype(before)
    named = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    named["lm_head.weight"] = weights["wte.weight"]
    model.load_state_dict(named, assign=True)
    return model


def _step_clock() -> Any:
    from transformers import StoppingCriteria

    class StepClock(StoppingCriteria):
        """Reads the clock when the device has chosen the first token, and the last."""

        def __init__(self) -> None:
            self.calls = 0
            self.begin = self.end = 0.0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.calls += 1
            if self.calls in (1, STEPS + 1):
                torch.cuda.synchronize()
                self.begin, self.end = self.end, time.perf_counter()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return StepClock()


class HuggingFaceDecode:
    """Steps of ``generate``; a static cache is compiled by it."""

    def __init__(self, config: dict[str, Any], weights: Weights, cell: Cell, static: bool) -> None:
        self._model = _huggingface(config, weights)
        self._static = static
        length = max(1, cell.centre - STEPS // 2)
        self._ids = torch.randint(0, config["vocab_size"], (cell.batch, length), device="cuda")
        self._mask = torch.ones_like(self._ids)

    def sample(self) -> float:
        """Milliseconds per step, the prompt left out."""
        clock = _step_clock()
        with torch.inference_mode():
            self._model.generate(
                self._ids,
                attention_mask=self._mask,
                max_new_tokens=STEPS + 1,
                do_sample=True,
                top_k=4,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[clock],
                **({"cache_implementation": "static"} if self._static else {}),
            )
        return 1e3 * (clock.end - clock.begin) / STEPS

    def close(self) -> None:
        """Frees the model's own parts."""
        del self._model


class HuggingFacePrefill:
    """One forward pass over all prompts that keeps the cache and the last position's logits."""

    def __init__(self, config: dict[str, Any], weights: Weights, cell: Cell) -> None:
        self._model = _huggingface(config, weights)
        shape = (cell.batch, cell.context)
        self._ids = torch.randint(0, config["vocab_size"], shape, device="cuda")

    def sample(self) -> float:
        """Milliseconds."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.inference_mode():
            self._model(self._ids, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    def close(self) -> None:
        """Frees the model's own parts."""
        del self._model


def make_peer(name: str, config: dict[str, Any], weights: Weights, cell: Cell) -> Contestant:
    """The peer of that name, ready for the cell."""
    if cell.kind == "prefill":
        return HuggingFacePrefill(config, weights, cell)
    if name in (GRAPH, COMPILED):
        return TorchStep(config, weights, cell, name == COMPILED)
    if name in (HF_EAGER, HF_STATIC):
        return HuggingFaceDecode(config, weights, cell, name == HF_STATIC)
    raise ValueError(name)
