"""OpenVINO as a contestant of `python -m benchmarks.cpu`.

optimum-intel converts the model; its stateful network then runs without the Python of `generate`
between steps, and with the head on the last position only, as OpenVINO GenAI runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino

from benchmarks.cpu_worker import Clock, Load

_VERSION = openvino.__version__.split("-")[0]
_FILE = "openvino_model.xml"


class Contestant:
    """A compiled network whose cache is its state."""

    def __init__(self, load: Load) -> None:
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": load.threads,
        }
        if load.dtype in ("float32", "bfloat16"):
            config["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[load.dtype]
        self._compiled = openvino.Core().compile_model(_converted(load) / _FILE, "CPU", config)
        self._request = self._compiled.create_infer_request()

    @staticmethod
    def convert(load: Load) -> None:
        """See cpu_worker.Peer."""
        if load.dtype == "bfloat16":
            _require_bfloat16()
        _converted(load)

    def about(self) -> dict[str, Any]:
        """Version, and what OpenVINO chose by itself."""
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        types = {name.lower(): self._compiled.get_property(name) for name in names}
        return {"version": _VERSION, **{k: t.get_type_name() for k, t in types.items()}}

    def make_room(self, rows: int, positions: int) -> None:
        """Nothing: it makes its cache while it runs."""

    def decode(self, prompts: np.ndarray, steps: int, clock: Clock) -> None:
        """See cpu_worker.Peer."""
        tokens = self._begin(prompts)
        length = prompts.shape[1]
        while not clock.tick():
            tokens = self._step(tokens, length)
            length += 1

    def prefill(self, prompts: np.ndarray) -> list[int]:
        """See cpu_worker.Peer."""
        return self._begin(prompts)[:, 0].tolist()

    def _begin(self, prompts: np.ndarray) -> np.ndarray:
        self._request.reset_state()
        return self._step(prompts, 0)

    def _step(self, tokens: np.ndarray, past: int) -> np.ndarray:
        """Feeds [batch, length] tokens after ``past`` others; returns the next ones [batch, 1]."""
        batch, length = tokens.shape
        positions = np.arange(past, past + length)
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, past + length), dtype=np.int64),
            "position_ids": np.broadcast_to(positions, (batch, length)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        logits = self._request.infer(inputs, share_outputs=True)["logits"]
        return logits.argmax(-1).astype(np.int64)


def _require_bfloat16() -> None:
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in capabilities:
        raise ValueError(f"OpenVINO computes on this CPU in {', '.join(capabilities)} only")


def _converted(load: Load) -> Path:
    """Directory of the network for a weight type; bfloat16 is arithmetic on float32 weights."""

    def export(path: Path) -> None:
        from optimum.intel import OVModelForCausalLM

        model = OVModelForCausalLM.from_pretrained(
            load.source, export=True, compile=False, load_in_8bit=False
        )
        _only_last_position(model.model)
        path.mkdir()
        # As it is: OpenVINO would write float16.
        openvino.save_model(model.model, path / _FILE, compress_to_fp16=False)

    plain = load.made(f"openvino-{_VERSION}-float32", export)
    if load.dtype in ("float32", "bfloat16"):
        return plain

    def compress(path: Path) -> None:
        import nncf

        mode = nncf.CompressWeightsMode
        options: dict[str, Any] = {"mode": mode.INT8_SYM}
        if load.dtype == "int4":  # the head and the embedding too, as all other contestants do
            options = {"mode": mode.INT4_SYM, "group_size": 32, "ratio": 1.0, "all_layers": True}
        model = openvino.Core().read_model(plain / _FILE)
        path.mkdir()
        openvino.save_model(nncf.compress_weights(model, **options), path / _FILE)

    return load.made(f"openvino-{_VERSION}-{load.dtype}", compress)


def _only_last_position(model: openvino.Model) -> None:
    """Puts a choice of the last position before the head."""
    from openvino import opset13

    (result,) = (r for r in model.get_results() if "logits" in r.output(0).get_names())
    head = result.input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        raise RuntimeError(f"the logits come from {head.get_type_name()}, not from MatMul")
    last = opset13.gather(head.input_value(0), np.array([-1]), np.array(1))
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
