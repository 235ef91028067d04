"""CTranslate2 as a contestant of `python -m benchmarks.cpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np

from benchmarks.cpu_models import token_name
from benchmarks.cpu_worker import Clock, Load


class Contestant:
    """``generate_batch``, with the whole prompt forwarded at once."""

    def __init__(self, load: Load) -> None:
        self._generator = ctranslate2.Generator(
            str(self._converted(load)),
            device="cpu",
            compute_type=load.dtype,
            inter_threads=1,
            intra_threads=load.threads,
        )

    @staticmethod
    def convert(load: Load) -> None:
        """Converts, where the CPU has arithmetic for the type: CTranslate2 would take another in
        silence."""
        Contestant._converted(load)

    @staticmethod
    def _converted(load: Load) -> Path:
        types = sorted(ctranslate2.get_supported_compute_types("cpu"))
        if load.dtype not in types:
            raise ValueError(f"CTranslate2 computes on this CPU in {', '.join(types)} only")

        def make(path: Path) -> None:
            from ctranslate2.converters import TransformersConverter

            quantization = None if load.dtype == "float32" else load.dtype
            TransformersConverter(str(load.source)).convert(str(path), quantization=quantization)

        return load.made(f"ctranslate2-{ctranslate2.__version__}-{load.dtype}", make)

    def about(self) -> dict[str, Any]:
        """Version, and the arithmetic that was chosen."""
        return {"version": ctranslate2.__version__, "compute_type": self._generator.compute_type}

    def make_room(self, rows: int, positions: int) -> None:
        """Nothing: it makes its cache while it runs."""

    def decode(self, prompts: np.ndarray, steps: int, clock: Clock) -> None:
        """See cpu_worker.Peer."""
        last = len(prompts) - 1

        def each_token(result: Any) -> bool:
            if result.batch_id == last:
                clock.tick()
            return clock.done

        self._generate(prompts, 1 + steps, each_token)

    def prefill(self, prompts: np.ndarray) -> list[int]:
        """See cpu_worker.Peer."""
        return [result.sequences_ids[0][0] for result in self._generate(prompts, 1, None)]

    def _generate(self, prompts: np.ndarray, length: int, callback: Any) -> Any:
        return self._generator.generate_batch(
            [[token_name(token) for token in prompt] for prompt in prompts.tolist()],
            max_length=length,
            min_length=length,  # past any end token
            include_prompt_in_result=False,
            sampling_topk=1,
            callback=callback,
        )
