"""A hand-written GPT-2 decode step in PyTorch: the peer that a good programmer has in an afternoon.

Static cache, attention over the whole of it with a mask, sampling on the device, one CUDA graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


class TorchGPT2:
    """The network of :func:`fastgen.bench.random_model` with a cache for ``batch`` sequences.

    Args:
        config: as HuggingFace writes it.
        tensors: float32, with HuggingFace's names.
        batch: sequences.
        length: positions of the cache.
        dtype: of weights, activations and cache.
    """

    def __init__(
        self,
        config: dict[str, Any],
        tensors: dict[str, np.ndarray],
        batch: int,
        length: int,
        dtype: torch.dtype,
    ) -> None:
        self.layers, self.heads = config["n_layer"], config["n_head"]
        self.size = config["n_embd"] // self.heads
        self.w = {
            name: torch.from_numpy(values).cuda().to(dtype) for name, values in tensors.items()
        }
        shape = (self.layers, 2, batch, self.heads, length, self.size)
        self.cache = torch.zeros(shape, dtype=dtype, device="cuda")
        self.tokens = torch.zeros(batch, dtype=torch.int64, device="cuda")
        self.position = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.steps = torch.arange(length, device="cuda")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.addmm(self.w[f"{name}.bias"], x, self.w[f"{name}.weight"])

    def step(self) -> None:
        """Feeds ``tokens`` at ``position``, samples the next with top-k 4, moves on."""
        w, batch = self.w, self.tokens.shape[0]
        x = w["wte.weight"][self.tokens] + w["wpe.weight"][self.position]
        mask = (self.steps <= self.position)[None, None, None, :]
        for i in range(self.layers):
            h = self.norm(x, f"h.{i}.ln_1")
            q, k, v = (
                self.linear(h, f"h.{i}.attn.c_attn").view(batch, 3, self.heads, self.size).unbind(1)
            )
            self.cache[i, 0].index_copy_(2, self.position, k.unsqueeze(2))
            self.cache[i, 1].index_copy_(2, self.position, v.unsqueeze(2))
            a = F.scaled_dot_product_attention(
                q.unsqueeze(2), self.cache[i, 0], self.cache[i, 1], attn_mask=mask
            )
            x = x + self.linear(a.reshape(batch, -1), f"h.{i}.attn.c_proj")
            h = self.norm(x, f"h.{i}.ln_2")
            h = F.gelu(self.linear(h, f"h.{i}.mlp.c_fc"), approximate="tanh")
            x = x + self.linear(h, f"h.{i}.mlp.c_proj")
        logits = self.norm(x, "ln_f") @ w["wte.weight"].T
        values, ids = logits.float().topk(4)
        chosen = torch.multinomial(values.softmax(-1), 1)
        self.tokens.copy_(ids.gather(1, chosen).squeeze(1))
        self.position.add_(1)

    def capture(self, compiled: bool = False) -> Any:
        """A function that runs one step from a CUDA graph."""
        step = self.step
        if compiled:
            step = torch.compile(self.step, mode="max-autotune-no-cudagraphs", fullgraph=True)
        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):
                step()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step()
        return graph.replay


def milliseconds(replay: Any, model: TorchGPT2, position: int, steps: int = 32) -> float:
    """Milliseconds per step, around ``position``."""
    model.position.fill_(position - steps // 2)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(steps):
        replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / steps
