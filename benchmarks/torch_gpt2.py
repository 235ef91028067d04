"""A hand-written GPT-2 decode step in PyTorch: the peer that a good programmer has in an afternoon.

Static cache, attention over the whole of it with a mask, sampling on the device, one CUDA graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

Pair = tuple[torch.Tensor, torch.Tensor]  # weight and bias


class Attention(NamedTuple):
    """A layer's attention and its cache, [batch, heads, length, head size] each."""

    norm: Pair
    qkv: Pair
    out: Pair
    keys: torch.Tensor
    values: torch.Tensor


class FeedForward(NamedTuple):
    """A layer's feed-forward block."""

    norm: Pair
    into: Pair
    out: Pair


def _norm(x: torch.Tensor, of: Pair) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], *of)


def _linear(x: torch.Tensor, of: Pair) -> torch.Tensor:
    return torch.addmm(of[1], x, of[0])


class TorchGPT2:
    """GPT-2 with a cache for ``batch`` sequences.

    The step is cut behind each layer's attention, where nothing could be fused, so that a compiler
    sees every layer's code once.

    Args:
        config: as HuggingFace writes it.
        weights: on the device, with HuggingFace's names; activations and cache are of their type.
        batch: sequences.
        length: positions of the cache.
    """

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], batch: int, length: int
    ) -> None:
        self.heads = config["n_head"]
        size = config["n_embd"] // self.heads
        self.embedding, self.positions = weights["wte.weight"], weights["wpe.weight"]

        def pair(name: str) -> Pair:
            return weights[f"{name}.weight"], weights[f"{name}.bias"]

        def cache() -> torch.Tensor:
            return self.embedding.new_zeros(batch, self.heads, length, size)

        names = [f"h.{i}" for i in range(config["n_layer"])]
        self.attentions = [
            Attention(
                pair(f"{n}.ln_1"),
                pair(f"{n}.attn.c_attn"),
                pair(f"{n}.attn.c_proj"),
                cache(),
                cache(),
            )
            for n in names
        ]
        self.feed_forwards = [
            FeedForward(pair(f"{n}.ln_2"), pair(f"{n}.mlp.c_fc"), pair(f"{n}.mlp.c_proj"))
            for n in names
        ]
        self.last_norm = pair("ln_f")
        device = self.embedding.device
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.steps = torch.arange(length, device=device)

    def attend(self, x: torch.Tensor, layer: Attention) -> torch.Tensor:
        """What attention adds to ``x`` [batch, hidden]; keys and values go to the cache."""
        batch = x.shape[0]
        qkv = _linear(_norm(x, layer.norm), layer.qkv).view(batch, 3, self.heads, -1)
        q, k, v = qkv.unbind(1)
        layer.keys.index_copy_(2, self.position, k.unsqueeze(2))
        layer.values.index_copy_(2, self.position, v.unsqueeze(2))
        mask = (self.steps <= self.position)[None, None, None, :]
        a = F.scaled_dot_product_attention(q.unsqueeze(2), layer.keys, layer.values, attn_mask=mask)
        return _linear(a.reshape(batch, -1), layer.out)

    def feed(self, x: torch.Tensor, layer: FeedForward) -> torch.Tensor:
        """``x`` and what the feed-forward block adds to it."""
        h = F.gelu(_linear(_norm(x, layer.norm), layer.into), approximate="tanh")
        return x + _linear(h, layer.out)

    def begin(self, layer: Attention) -> Pair:
        """The first part of a step."""
        x = self.embedding[self.tokens] + self.positions[self.position]
        return x, self.attend(x, layer)

    def middle(self, x: torch.Tensor, a: torch.Tensor, feed: FeedForward, layer: Attention) -> Pair:
        """From one layer's attention to the next one's."""
        x = self.feed(x + a, feed)
        return x, self.attend(x, layer)

    def end(self, x: torch.Tensor, a: torch.Tensor, feed: FeedForward) -> None:
        """The last part: samples with top-k 4 and moves on."""
        x = _norm(self.feed(x + a, feed), self.last_norm)
        values, ids = (x @ self.embedding.T).float().topk(4)
        chosen = torch.multinomial(values.softmax(-1), 1)
        self.tokens.copy_(ids.gather(1, chosen).squeeze(1))
        self.position.add_(1)

    def stepper(self, compiled: bool = False) -> Any:
        """A function that feeds ``tokens`` at ``position`` and leaves the next ones there."""
        parts: list[Any] = [self.begin, self.middle, self.end]
        if compiled:
            mode = "max-autotune-no-cudagraphs"
            parts = [torch.compile(part, mode=mode, fullgraph=True) for part in parts]
        begin, middle, end = parts

        def step() -> None:
            x, a = begin(self.attentions[0])
            for feed, attention in zip(self.feed_forwards, self.attentions[1:]):
                x, a = middle(x, a, feed, attention)
            end(x, a, self.feed_forwards[-1])

        return step

    def capture(self, compiled: bool = False) -> Any:
        """A function that runs one step from a CUDA graph."""
        step = self.stepper(compiled)
        stream = torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):
                step()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step()

        def replay(compiled_step: Any = step) -> None:
            """Holds what the graph runs: kernels of a compiled step are unloaded with it."""
            graph.replay()

        return replay


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
