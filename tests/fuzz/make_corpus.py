"""Writes the first inputs of the fuzz targets `safetensors` and `export`: tiny, good models.

    python tests/fuzz/make_corpus.py [<folder>]

Those of `tokenizer` are written by hand. An input must stay below ci/fuzz.sh's -max_len.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.testing.models import (
    GPTShape,
    Tensors,
    WeightRecipe,
    huggingface_tensors,
    make_tensors,
)

CORPUS = Path(__file__).parent / "corpus"
SEPARATOR = b"\n====\n"
SHAPE = GPTShape(3, 2, 2, 1, 1, 2)
TWO_HEADS = GPTShape(3, 2, 2, 1, 2, 3)
KINDS = {"bool": "BOOL", "int8": "I8", "uint8": "U8", "float16": "F16"}
HALF = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}


def dense(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def stored(array: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes of float32 values as F32, F16 or BF16."""
    if dtype == "BF16":
        return (array.astype("<f4").view("<u4") >> np.uint32(16)).astype("<u2").tobytes()
    return array.astype(HALF[dtype]).tobytes()


# ---- safetensors -------------------------------------------------------------------------------


def safetensors(tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        kind = KINDS.get(str(array.dtype), dtype)
        content = stored(array, dtype) if kind == dtype else array.tobytes()
        header[name] = {
            "dtype": kind,
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = dense(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def whole(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Numbers and scales of no weights in particular, as docs/weights.md has them."""
    rng = np.random.default_rng(1)
    result = {}
    for name, array in tensors.items():
        table = name in ("wte.weight", "lm_head.weight")
        if array.ndim == 1 or name == "wpe.weight":
            result[name] = array
            continue
        rows, columns = array.shape
        groups = [rows, -(-columns // 32)] if table else [-(-rows // 32), columns]
        result[f"{name}.scales"] = rng.random(groups).astype(np.float16)
        if dtype == "int4" and not table:
            values = rng.integers(0, 256, (-(-rows // 2), columns))
            result[f"{name}.int4"] = values.astype(np.uint8)
        else:
            result[f"{name}.int8"] = rng.integers(-127, 128, array.shape).astype(np.int8)
    return result


def configuration(shape: GPTShape, **changes: Any) -> bytes:
    return dense({"model_type": "gpt2", **shape.huggingface_config(), "eos_token_id": 0, **changes})


def rounded(dtype: str, **changes: Any) -> bytes:
    scheme = {"version": 1, "weight_dtype": dtype, "group_size": 32}
    return configuration(SHAPE, fastgen_weights=scheme, **changes)


def checkpoints() -> dict[str, bytes]:
    named = make_tensors(SHAPE, WeightRecipe(seed=1))
    tensors = huggingface_tensors(SHAPE, named)
    buffers = {**tensors, "h.0.attn.bias": np.ones((1, 1, 2, 2), np.bool_)}
    prefixed = {f"transformer.{name}": array for name, array in tensors.items()}
    head = {**tensors, "lm_head.weight": tensors["wte.weight"][::-1]}
    shards = [f"{i}.safetensors" for i in (1, 2)]
    parts: list[Tensors] = [{}, {}]
    for i, (name, array) in enumerate(tensors.items()):
        parts[i % 2][name] = array
    index = {"weight_map": {name: shards[i] for i in (0, 1) for name in parts[i]}}
    good = configuration(SHAPE)
    return {
        "huggingface": SEPARATOR.join([good, b"", safetensors(buffers)]),
        "prefix_float16": SEPARATOR.join([good, b"", safetensors(prefixed, "F16")]),
        "paddlenlp_bfloat16": SEPARATOR.join([good, b"", safetensors(named, "BF16")]),
        "separate_head": SEPARATOR.join(
            [configuration(SHAPE, tie_word_embeddings=False), b"", safetensors(head)]
        ),
        "int8_head": SEPARATOR.join(
            [rounded("int8", tie_word_embeddings=False), b"", safetensors(whole(head, "int8"))]
        ),
        "int4": SEPARATOR.join([rounded("int4"), b"", safetensors(whole(tensors, "int4"))]),
        "bfloat16": SEPARATOR.join([rounded("bfloat16"), b"", safetensors(tensors, "BF16")]),
        "shards": SEPARATOR.join([good, dense(index), *map(safetensors, parts)]),
    }


# ---- Exports -----------------------------------------------------------------------------------


def fused(shape: GPTShape, tensors: Tensors) -> Tensors:
    """q, k and v in one tensor, head by head."""
    result = {name: array for name, array in tensors.items() if "_proj" not in name}
    prefix = "gpt.decoder.layers.0.self_attn."
    for part in ("weight", "bias"):
        q_k_v = [tensors[f"{prefix}{name}_proj.{part}"] for name in "qkv"]
        rows = q_k_v[0].shape[:-1]
        heads = [value.reshape(*rows, shape.num_attention_heads, -1) for value in q_k_v]
        value = np.stack(heads, axis=-2).reshape(*rows, -1)
        result[f"{prefix}qkv_proj.{part}"] = value
        result[f"{prefix}out_proj.{part}"] = tensors[f"{prefix}out_proj.{part}"]
    return result


def exported(shape: GPTShape, tensors: Tensors, dtype: str = "F32", **changes: Any) -> bytes:
    number, name = {"F32": (5, "float32"), "F16": (4, "float16"), "BF16": (22, "bfloat16")}[dtype]
    content = b""
    entries = []
    for tensor, array in sorted(tensors.items()):
        desc = bytes([8, number]) + b"".join(bytes([16, size]) for size in array.shape)
        content += struct.pack("<IQIi", 0, 0, 0, len(desc)) + desc
        entries.append(
            {"name": tensor, "dtype": name, "shape": array.shape, "offset": len(content)}
        )
        content += stored(array, dtype)
    manifest = {
        "format": "fastgen-export",
        "format_version": 1,
        "program": "gpt.pdmodel",
        "config": {
            "vocab_size": shape.vocab_size,
            "max_positions": shape.max_position_embeddings,
            "hidden_size": shape.hidden_size,
            "num_layers": shape.num_hidden_layers,
            "num_heads": shape.num_attention_heads,
            "intermediate_size": shape.intermediate_size,
            "layer_norm_eps": 1e-5,
            "bos_token_id": -1,
            "eos_token_id": 0,
            "pad_token_id": -1,
        },
        "generation": {},
        "inputs": [{"name": "input_ids"}],
        "tokenizer": None,
        "tensors": entries,
        **changes,
    }
    return SEPARATOR.join([dense(manifest), content])


def exports() -> dict[str, bytes]:
    tensors = make_tensors(SHAPE, WeightRecipe(seed=1))
    word = tensors["gpt.embeddings.word_embeddings.weight"]
    tokenizer = {"type": "byte-level-bpe", "special_tokens": ["<|endoftext|>"]}
    heads = fused(TWO_HEADS, make_tensors(TWO_HEADS, WeightRecipe(seed=2)))
    return {
        "float32": exported(SHAPE, tensors),
        "float16_head": exported(SHAPE, {**tensors, "lm_head.weight": word[::-1]}, "F16"),
        "bfloat16_fused": exported(TWO_HEADS, heads, "BF16", tokenizer=tokenizer),
    }


def main(corpus: Path) -> None:
    for target, inputs in (("safetensors", checkpoints()), ("export", exports())):
        folder = corpus / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            assert len(content) <= 4096, (name, len(content))
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else CORPUS)
