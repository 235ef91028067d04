"""PaddleNLP generate as a contestant of `python -m benchmarks.cpu`; Paddle has its own packages."""

from __future__ import annotations

import os
import zlib  # noqa: F401  before paddle, whose bundled zlib breaks later imports
from typing import Any

import numpy as np

from benchmarks.cpu_worker import Clock, Load
from fastgen.convert import import_paddle, import_paddlenlp, to_paddlenlp

# Without it the MKL that Paddle brings takes a slow path on processors that are not Intel's.
os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


class Contestant:
    """``GPTLMHeadModel`` in float32."""

    def __init__(self, load: Load) -> None:
        self._paddle = import_paddle()
        self._paddlenlp_version = _version()
        self._model, _ = to_paddlenlp(load.source)

    @staticmethod
    def convert(load: Load) -> None:
        """Nothing: the weights go from the file into the model."""
        if load.dtype != "float32":
            raise ValueError("PaddleNLP decodes in float32 on a CPU")

    def about(self) -> dict[str, Any]:
        """Versions."""
        return {"version": self._paddlenlp_version, "paddle": self._paddle.__version__}

    def make_room(self, rows: int, positions: int) -> None:
        """Nothing: it makes its cache while it runs."""

    def decode(self, prompts: np.ndarray, steps: int, clock: Clock) -> None:
        """See cpu_worker.Peer."""
        self._generate(prompts, 1 + steps, clock)

    def prefill(self, prompts: np.ndarray) -> list[int]:
        """See cpu_worker.Peer."""
        return self._generate(prompts, 1, None)[:, 0].tolist()

    def _generate(self, prompts: np.ndarray, length: int, clock: Clock | None) -> np.ndarray:
        """New tokens [batch, length]."""
        from paddlenlp.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

        class Stop(StoppingCriteria):
            """Called once a step, when the tokens are chosen."""

            def __call__(self, input_ids: Any, logits: Any, **_: Any) -> bool:
                return clock is not None and clock.tick()

        with self._paddle.no_grad():
            ids, _ = self._model.generate(
                self._paddle.to_tensor(prompts),
                decode_strategy="greedy_search",
                # Both spellings: with one, PaddleNLP takes the other from its defaults.
                max_length=length,
                max_new_tokens=length,
                eos_token_id=-1,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Stop()]),
            )
        return ids.numpy()


def _version() -> str:
    import_paddlenlp()
    import paddlenlp
    from paddlenlp.utils.log import logger

    logger.set_level("ERROR")
    return str(paddlenlp.__version__)
