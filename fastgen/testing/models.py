"""Small GPT-2 networks with seeded random weights, made to be hard on a decoder.

Tensors have PaddleNLP's names, so that the same dictionary fills a ``GPTLMHeadModel`` and a
``fastgen`` model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "GPTShape",
    "Tensors",
    "WeightRecipe",
    "controlled_tensors",
    "huggingface_tensors",
    "make_tensors",
]

Tensors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class GPTShape:
    """Sizes of a GPT-2 network, with PaddleNLP's names where it has one."""

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def huggingface_config(self) -> dict[str, int]:
        """The sizes under the names of a HuggingFace GPT-2 configuration."""
        return {
            "vocab_size": self.vocab_size,
            "n_positions": self.max_position_embeddings,
            "n_embd": self.hidden_size,
            "n_layer": self.num_hidden_layers,
            "n_head": self.num_attention_heads,
            "n_inner": self.intermediate_size,
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in PaddleNLP's order."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "gpt.embeddings.word_embeddings.weight": (self.vocab_size, hidden),
            "gpt.embeddings.position_embeddings.weight": (self.max_position_embeddings, hidden),
        }
        for layer in range(self.num_hidden_layers):
            prefix = f"gpt.decoder.layers.{layer}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes[f"{prefix}self_attn.{name}.weight"] = (hidden, hidden)
                shapes[f"{prefix}self_attn.{name}.bias"] = (hidden,)
            shapes[f"{prefix}linear1.weight"] = (hidden, inner)
            shapes[f"{prefix}linear1.bias"] = (inner,)
            shapes[f"{prefix}linear2.weight"] = (inner, hidden)
            shapes[f"{prefix}linear2.bias"] = (hidden,)
            for name in ("norm1", "norm2"):
                shapes[f"{prefix}{name}.weight"] = (hidden,)
                shapes[f"{prefix}{name}.bias"] = (hidden,)
        shapes["gpt.decoder.norm.weight"] = (hidden,)
        shapes["gpt.decoder.norm.bias"] = (hidden,)
        return shapes


@dataclass(frozen=True)
class WeightRecipe:
    """How the weights of a network are drawn.

    Attributes:
        seed: of NumPy's generator.
        logit_std: about the standard deviation of the logits: 0.05 gives nearly flat
            distributions, 8 gives peaked ones.
        kind: ``random``; ``paired``: the second half of the vocabulary repeats the first half's
            embeddings, so that logits tie in pairs; ``table``: the logits are the same at every
            position, small multiples of 1/4, and tie exactly in whole groups; ``flat``: all
            logits are 0.
    """

    seed: int
    logit_std: float = 2.0
    kind: str = "random"


def make_tensors(shape: GPTShape, recipe: WeightRecipe) -> Tensors:
    """Weights of a network of ``shape``; the same arguments give the same bits.

    Raises:
        ValueError: ``recipe.kind`` is unknown.
    """
    rng = np.random.default_rng(recipe.seed)
    tensors: Tensors = {}
    for name, dims in shape.tensor_shapes().items():
        values = rng.standard_normal(dims, dtype=np.float32)
        if name.startswith("gpt.embeddings."):
            values *= np.float32(recipe.logit_std / np.sqrt(shape.hidden_size))
        elif len(dims) == 2:
            values *= np.float32(1.0 / np.sqrt(dims[0]))
        else:
            values *= np.float32(0.1)
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
                values += np.float32(1.0)
        tensors[name] = values
    embedding = tensors["gpt.embeddings.word_embeddings.weight"]
    if recipe.kind == "random":
        return tensors
    if recipe.kind == "paired":
        half = shape.vocab_size // 2
        embedding[half : 2 * half] = embedding[:half]
        return tensors
    if recipe.kind == "table":
        steps = np.rint(rng.standard_normal(shape.vocab_size) * recipe.logit_std * 4)
        return controlled_tensors(shape, (steps / 4).astype(np.float32), tensors)
    if recipe.kind == "flat":
        return controlled_tensors(shape, np.zeros(shape.vocab_size, np.float32), tensors)
    raise ValueError(f"kind is {recipe.kind!r}; allowed are 'random', 'paired', 'table' and 'flat'")


def controlled_tensors(
    shape: GPTShape, logits: npt.ArrayLike, base: Tensors | None = None
) -> Tensors:
    """Weights with which every position of every input has exactly the given logits.

    The final norm has weight 0 and bias (1, 0, 0, ...), so the logits are the embedding's first
    column, whatever the blocks before do.

    Args:
        shape: of the network.
        logits: ``[vocab]``, float32.
        base: tensors for everything else; zeros when None. Its arrays are reused and changed.
    """
    tensors = base
    if tensors is None:
        tensors = {name: np.zeros(dims, np.float32) for name, dims in shape.tensor_shapes().items()}
    bias = np.zeros(shape.hidden_size, np.float32)
    bias[0] = 1.0
    tensors["gpt.decoder.norm.weight"] = np.zeros(shape.hidden_size, np.float32)
    tensors["gpt.decoder.norm.bias"] = bias
    tensors["gpt.embeddings.word_embeddings.weight"][:, 0] = np.asarray(logits, np.float32)
    return tensors


def huggingface_tensors(shape: GPTShape, tensors: Tensors) -> Tensors:
    """The same weights under HuggingFace's names, q, k and v side by side in ``c_attn``."""
    result = {
        "wte.weight": tensors["gpt.embeddings.word_embeddings.weight"],
        "wpe.weight": tensors["gpt.embeddings.position_embeddings.weight"],
    }
    modules = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.c_proj": "self_attn.out_proj",
        "mlp.c_fc": "linear1",
        "mlp.c_proj": "linear2",
    }
    for layer in range(shape.num_hidden_layers):
        prefix = f"gpt.decoder.layers.{layer}"
        for part in ("weight", "bias"):
            for theirs, ours in modules.items():
                result[f"h.{layer}.{theirs}.{part}"] = tensors[f"{prefix}.{ours}.{part}"]
            qkv = [tensors[f"{prefix}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            result[f"h.{layer}.attn.c_attn.{part}"] = np.concatenate(qkv, axis=-1)
    for part in ("weight", "bias"):
        result[f"ln_f.{part}"] = tensors[f"gpt.decoder.norm.{part}"]
    return result
