"""Model directories: what is read, whatever form it has, and what is no model at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastgen_tests.model_files import (
    LAYERS,
    PROMPT,
    generate,
    load,
    make_config,
    make_tensors,
    refused,
    safetensors_bytes,
    split_file,
    to_paddlenlp,
    write_model,
)
from safetensors.numpy import save_file

import fastgen
from fastgen.errors import NotFoundError

# ---- Good directories ------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_huggingface_names_and_types(
    tmp_path: Path, expected_logits: np.ndarray, prefix: str, dtype: Any
) -> None:
    model = load(write_model(tmp_path, tensors=make_tensors(prefix, dtype)))
    np.testing.assert_array_equal(model.logits(PROMPT), expected_logits)


def test_bfloat16(tmp_path: Path, expected_logits: np.ndarray) -> None:
    header: dict[str, Any] = {}
    data = b""
    for name, value in make_tensors().items():
        halves = (value.view(np.uint32) >> 16).astype("<u2")
        header[name] = {
            "dtype": "BF16",
            "shape": value.shape,
            "data_offsets": [len(data), len(data) + halves.nbytes],
        }
        data += halves.tobytes()
    model = load(write_model(tmp_path, tensors=safetensors_bytes(header, data)))
    np.testing.assert_array_equal(model.logits(PROMPT), expected_logits)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prefix", ["gpt.", ""])
def test_paddlenlp_names(
    tmp_path: Path, expected_logits: np.ndarray, prefix: str, fused: bool
) -> None:
    tensors = to_paddlenlp(make_tensors(), prefix, fused)
    model = load(write_model(tmp_path, tensors=tensors))
    np.testing.assert_array_equal(model.logits(PROMPT), expected_logits)


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_unaligned_data(
    tmp_path: Path, good_directory: Path, expected_logits: np.ndarray, padding: int
) -> None:
    header, data = split_file(good_directory / "model.safetensors")
    text = json.dumps(header).encode()
    padding += -len(text) % 4
    model = load(write_model(tmp_path, tensors=safetensors_bytes(text, data, padding)))
    np.testing.assert_array_equal(model.logits(PROMPT), expected_logits)


def test_buffers_of_old_checkpoints_are_left_out(
    tmp_path: Path, expected_logits: np.ndarray
) -> None:
    tensors = make_tensors()
    for i in range(LAYERS):
        tensors[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 4, 4), np.bool_))
        tensors[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    model = load(write_model(tmp_path, tensors=tensors))
    np.testing.assert_array_equal(model.logits(PROMPT), expected_logits)


def test_separate_head(tmp_path: Path, expected_logits: np.ndarray) -> None:
    tensors = make_tensors()
    embedding = tensors["transformer.wte.weight"]
    tensors["lm_head.weight"] = embedding.copy()
    equal = load(write_model(tmp_path / "equal", tensors=tensors))
    np.testing.assert_array_equal(equal.logits(PROMPT), expected_logits)
    # Rows in another order give logits in another order.
    tensors["lm_head.weight"] = embedding[::-1].copy()
    reversed_rows = load(write_model(tmp_path / "reversed", tensors=tensors))
    np.testing.assert_array_equal(reversed_rows.logits(PROMPT), expected_logits[:, ::-1])
    tied = make_config(tie_word_embeddings=True)
    refused(write_model(tmp_path / "tied", tied, tensors), "'lm_head.weight'", "tied")
    separate = make_config(tie_word_embeddings=False)
    refused(write_model(tmp_path / "separate", separate), "'lm_head.weight'", "missing")


def write_shards(directory: Path) -> dict[str, str]:
    """The good model in two shards; returns the weight map."""
    tensors = make_tensors()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(make_config()))
    for shard in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, directory / shard)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path: Path, expected_logits: np.ndarray) -> None:
    write_shards(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).logits(PROMPT), expected_logits)


@pytest.mark.parametrize(
    "shard",
    [
        *("../model.safetensors", "/etc/passwd", "a\0b", "a\\b", "", ".", "..", 3, None),
        *("a\nb", "\x1b[31m", "\x7f", "\u202e", "a" * 256),
    ],
)
def test_shard_that_is_no_plain_file_name(tmp_path: Path, shard: Any) -> None:
    weight_map: dict[str, Any] = dict(write_shards(tmp_path))
    weight_map["transformer.wte.weight"] = shard
    write_index(tmp_path, weight_map)
    refused(tmp_path, "index.json", "transformer.wte.weight")


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    first = weight_map["transformer.wte.weight"]
    write_index(tmp_path, {**weight_map, "more.weight": first})
    refused(tmp_path, "'more.weight'", first)
    write_index(tmp_path, {**weight_map, "transformer.wte.weight": "lost.safetensors"})
    refused(tmp_path, "lost.safetensors", error=NotFoundError)
    write_index(tmp_path, ["a", "b"])
    refused(tmp_path, "weight_map")
    shutil.copy(tmp_path / first, tmp_path / "copy.safetensors")
    write_index(tmp_path, {**weight_map, "transformer.wte.weight": "copy.safetensors"})
    refused(tmp_path, "is also in")


def test_files_may_be_removed_after_loading(
    tmp_path: Path, good_model: tuple[fastgen.Generator, list[list[int]], np.ndarray]
) -> None:
    model = load(write_model(tmp_path / "model"))
    # Emptied, not only unlinked: a mapping that was still in use would now raise SIGBUS.
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "model")
    assert generate(model) == good_model[1]


def test_default_special_tokens_of_transformers(tmp_path: Path) -> None:
    # GPT2Config writes 50256 whatever the vocabulary is; there it names no token.
    config = make_config(bos_token_id=50256, eos_token_id=50256)
    info = load(write_model(tmp_path, config)).info
    assert info.eos_token_id in (None, -1)


# ---- Directories -------------------------------------------------------------------------------


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", error=NotFoundError)


def test_file_instead_of_a_directory(good_directory: Path) -> None:
    refused(good_directory / "config.json", "config.json", error=NotFoundError)


def test_directory_without_files(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), error=NotFoundError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_file_missing(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path) / name).unlink()
    refused(tmp_path, name, error=NotFoundError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_symlink_loop(tmp_path: Path, name: str) -> None:
    file = write_model(tmp_path) / name
    file.unlink()
    file.symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(file)
    refused(tmp_path, name, error=NotFoundError)
    refused(tmp_path / "other", "other", error=NotFoundError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_directory_instead_of_a_file(tmp_path: Path, name: str) -> None:
    file = write_model(tmp_path) / name
    file.unlink()
    file.mkdir()
    refused(tmp_path, name, "directory")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_named_pipe_instead_of_a_file(tmp_path: Path, name: str) -> None:
    file = write_model(tmp_path) / name
    file.unlink()
    os.mkfifo(file)
    refused(tmp_path, name, "regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path) / name).chmod(0)
    refused(tmp_path, name, error=NotFoundError)
