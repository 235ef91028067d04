"""Checkpoints of PaddleNLP: conversion, the way back, names, and a sentence for every error."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fastgen import Generator, convert, models
from fastgen._safetensors import drop_pages
from fastgen.testing.reference import gpt2_logits, normalised_error

PROMPT = [5, 6, 7, 300, 11, 2]


def paddle_config(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """PaddleNLP's form of a configuration of HuggingFace's form."""
    return {
        "model_type": "gpt",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["n_embd"],
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": config["n_head"],
        "intermediate_size": config["n_inner"],
        "max_position_embeddings": config["n_positions"],
        "hidden_activation": "gelu",
        "layer_norm_eps": 1e-12,  # which PaddleNLP's code ignores
        "bos_token_id": 3,
        "eos_token_id": 4,
        "pad_token_id": 0,
        **changes,
    }


def paddle_tensors(
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    fused: bool = False,
    prefix: str = "gpt.",
) -> dict[str, np.ndarray]:
    """PaddleNLP's names and layouts, written independently of `fastgen.convert`."""
    heads = config["n_head"]
    size = config["n_embd"] // heads
    result = {
        f"{prefix}embeddings.word_embeddings.weight": tensors["wte.weight"],
        f"{prefix}embeddings.position_embeddings.weight": tensors["wpe.weight"],
        f"{prefix}decoder.norm.weight": tensors["ln_f.weight"],
        f"{prefix}decoder.norm.bias": tensors["ln_f.bias"],
    }
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_proj": "self_attn.out_proj",
             "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}  # fmt: skip
    for i in range(config["n_layer"]):
        layer = f"{prefix}decoder.layers.{i}"
        for kind in ("weight", "bias"):
            for ours, theirs in names.items():
                result[f"{layer}.{theirs}.{kind}"] = tensors[f"h.{i}.{ours}.{kind}"]
            columns = tensors[f"h.{i}.attn.c_attn.{kind}"]
            parts = [columns[..., j * heads * size : (j + 1) * heads * size] for j in range(3)]
            if fused:
                pieces = [
                    part[..., head * size : (head + 1) * size]
                    for head in range(heads)
                    for part in parts
                ]
                result[f"{layer}.self_attn.qkv_proj.{kind}"] = np.concatenate(pieces, axis=-1)
            else:
                for name, part in zip("qkv", parts):
                    result[f"{layer}.self_attn.{name}_proj.{kind}"] = np.ascontiguousarray(part)
    return result


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of PaddleNLP as safetensors, which takes no Paddle."""

    def write(
        config: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        name: str = "checkpoint",
    ) -> Path:
        from safetensors.numpy import save_file

        directory = tmp_path / name
        directory.mkdir()
        text = json.dumps(config or paddle_config(tiny.config))
        (directory / "config.json").write_text(text)
        save_file(
            tensors or paddle_tensors(tiny.config, tiny.tensors),
            str(directory / "model.safetensors"),
        )
        return directory

    return write


# ---- Without Paddle ----------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prefix", ["gpt.", ""])
def test_a_checkpoint_becomes_the_model(
    tiny: Any, checkpoint: Callable[..., Path], tmp_path: Path, fused: bool, prefix: str
) -> None:
    source = checkpoint(tensors=paddle_tensors(tiny.config, tiny.tensors, fused, prefix))
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").write_text("")
    (source / "notes.txt").write_text("not copied")
    steps: list[tuple[int, int]] = []
    target = convert.convert(
        str(source), tmp_path / "sub" / "out", progress=lambda *s: steps.append(s)
    )
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json", "merges.txt", "model.safetensors", "vocab.json"
    ]  # fmt: skip
    assert list(target.parent.iterdir()) == [target]  # nothing left aside
    assert steps == [(i + 1, len(tiny.tensors)) for i in range(len(tiny.tensors))]
    config, tensors = convert.load_directory(target)
    assert sorted(tensors) == sorted(tiny.tensors)
    for name, array in tiny.tensors.items():
        assert np.array_equal(tensors[name], array), name
    assert config["layer_norm_epsilon"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (3, 4, 0)
    (target / "vocab.json").unlink()
    with Generator.from_pretrained(target) as generator:
        assert generator.info.eos_token_id == 4
        expected = gpt2_logits(tiny.config, tiny.tensors, PROMPT)
        assert normalised_error(generator.logits(PROMPT), expected) < 1e-10


def test_old_nested_configurations_and_names(
    tiny: Any, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    tensors = paddle_tensors(tiny.config, tiny.tensors)
    tensors["lm_head.decoder_weight"] = tiny.tensors["wte.weight"].copy()
    source = checkpoint(tensors=tensors)
    inner = paddle_config(tiny.config, init_class="GPTModel", hidden_act="gelu")
    del inner["hidden_activation"], inner["model_type"]
    (source / "config.json").unlink()
    nested = {"init_args": [inner], "init_class": "GPTLMHeadModel"}
    (source / "model_config.json").write_text(json.dumps(nested))
    config, converted = convert.load_directory(
        convert.convert(str(source), tmp_path / "out", force=True)
    )
    assert config["tie_word_embeddings"] is True
    assert sorted(converted) == sorted(tiny.tensors)


def test_a_separate_head_is_kept(tiny: Any, checkpoint: Callable[..., Path]) -> None:
    tensors = paddle_tensors(tiny.config, tiny.tensors)
    tensors["lm_head.weight"] = tiny.tensors["wte.weight"] * 2
    config, converted = convert.load_directory(checkpoint(tensors=tensors))
    assert config["tie_word_embeddings"] is False
    assert np.array_equal(converted["lm_head.weight"], tensors["lm_head.weight"])
    with Generator.from_tensors(config, converted) as generator:
        expected = gpt2_logits(config, converted, PROMPT)
        assert normalised_error(generator.logits(PROMPT), expected) < 1e-10


def test_tensors_are_mapped_at_any_address(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = tmp_path / "odd.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    for padding in range(5):
        text = header + b" " * padding
        path.write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
        array = convert.read_safetensors(path)["x"]
        assert not array.flags.owndata
        assert not array.flags.writeable
        for _ in range(2):
            np.testing.assert_array_equal(array, values)
            drop_pages(array)  # what is read again comes back
    drop_pages(values)  # is in memory, and stays there
    assert values[1, 2] == 5


def test_bfloat16_files_are_read(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 0.15625], dtype=np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2")
    path = tmp_path / "bf16.safetensors"
    header = json.dumps({"x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    assert np.array_equal(convert.read_safetensors(path)["x"], values)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu': it must be 'gelu'"),
        ({"normalize_before": False}, "normalize_before is false: the engine runs pre-norm"),
        ({"scale_qk_coeff": 2.0}, "scale_qk_coeff is 2.0: it must be 1"),
        ({"hidden_size": 50}, "hidden_size is 50: it must be a multiple of num_attention_heads, 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: it must be a positive integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2': it must be a positive integer"),
        ({"num_attention_heads": None}, "the configuration gives no num_attention_heads"),
        ({"vocab_size": 321}, "word_embeddings.weight has shape [320, 48]: the configuration asks"),
        ({"num_hidden_layers": 3}, "tensor decoder.layers.2.norm1.weight is missing"),
        ({"num_hidden_layers": 1}, "tensor decoder.layers.1.linear1.bias is not one of a GPT"),
    ],
)
def test_what_the_engine_does_not_run_is_named(
    tiny: Any, checkpoint: Callable[..., Path], changes: dict[str, Any], sentence: str
) -> None:
    source = checkpoint(config=paddle_config(tiny.config, **changes))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the sentence is compared below)
        convert.load_directory(source)
    assert sentence in str(caught.value)


def test_files_that_are_missing_or_broken(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a directory"):
        convert.load_directory(tmp_path / "absent")
    source = checkpoint(name="no_weights")
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model_state.pdparams nor model.safe"):
        convert.load_directory(source)
    source = checkpoint(name="broken")
    (source / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file: "):
        convert.load_directory(source)
    source = checkpoint(name="no_sizes")
    (source / "config.json").write_text('{"model_type": "gpt"}')
    with pytest.raises(ValueError, match=r"gives no vocab_size: it is not the configuration of a"):
        convert.load_directory(source)
    source = checkpoint(name="not_json")
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON: "):
        convert.load_directory(source)
    source = checkpoint(name="other", config={"model_type": "bert"})
    with pytest.raises(ValueError, match=r"model_type is 'bert': it must be 'gpt2', or 'gpt'"):
        convert.load_directory(source)


def huggingface(tiny: Any, target: Path, **changes: Any) -> Path:
    """A directory of HuggingFace's, with another configuration."""
    convert.write_directory(target, {**tiny.config, **changes}, tiny.tensors, None)
    return target


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false, it must be true"),
        ({"activation_function": "relu"}, 'activation_function is "relu"|activation_function is'),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false, and there is no tensor lm"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is .*, it must be a number"),
        ({"n_layer": 2**32 + 1}, "n_layer is 4294967297, it must be from 1 to 1024"),
        ({"vocab_size": "2048"}, "vocab_size is .*, it must be an integer from 1 to"),
        ({"n_embd": None}, "n_embd is null, it must be an integer"),
    ],
)
def test_networks_that_compute_otherwise_are_refused(
    tiny: Any, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    """By all doors, as the engine refuses the directory."""
    source = huggingface(tiny, tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=sentence):
        convert.load_directory(source)
    with pytest.raises(ValueError, match=sentence):
        convert.convert(str(source), tmp_path / "out")
    with pytest.raises(ValueError, match=sentence):
        Generator.from_tensors({**tiny.config, **changes}, tiny.tensors)
    if "tie_word_embeddings" not in changes:
        with pytest.raises(ValueError, match=sentence):
            Generator.from_pretrained(source)


def test_sizes_that_are_elsewhere(tiny: Any, tmp_path: Path) -> None:
    """What the engine finds under another name, or gives up, everybody has."""
    config = {name: value for name, value in tiny.config.items() if name != "n_positions"}
    config |= {"n_ctx": tiny.config["n_positions"], "eos_token_id": [3], "bos_token_id": 50256}
    convert.write_directory(tmp_path / "model", config, tiny.tensors, None)
    found, _ = convert.load_directory(tmp_path / "model")
    assert found["n_positions"] == tiny.config["n_positions"]
    assert (found["eos_token_id"], found["bos_token_id"]) == (3, None)
    with Generator.from_tensors(config, tiny.tensors) as generator:
        assert generator.info.max_positions == tiny.config["n_positions"]
        assert generator.info.eos_token_id == 3
    with pytest.raises(ValueError, match=r"config: vocab_size is missing"):
        Generator.from_tensors({}, {})


def test_a_head_of_its_own_under_paddlenlps_names(tiny: Any) -> None:
    config = {**tiny.config, "tie_word_embeddings": False}
    tensors = paddle_tensors(tiny.config, tiny.tensors)
    with pytest.raises(ValueError, match=r"tie_word_embeddings is false, and there is no tensor"):
        Generator.from_tensors(config, tensors)
    tensors["lm_head.decoder_weight"] = tiny.tensors["wte.weight"][::-1].copy()
    with Generator.from_tensors(config, tensors) as generator:
        assert generator.generate(PROMPT, max_length=2).num_tokens == 2


def test_tensors_are_checked(tiny: Any, tmp_path: Path) -> None:
    few = {name: array for name, array in tiny.tensors.items() if name != "h.0.ln_1.weight"}
    convert.write_directory(tmp_path / "few", tiny.config, few, None)
    with pytest.raises(ValueError, match=r"few: tensor h\.0\.ln_1\.weight is missing"):
        convert.load_directory(tmp_path / "few")
    wide = {**tiny.tensors, "ln_f.bias": np.zeros(3, np.float32)}
    convert.write_directory(tmp_path / "wide", tiny.config, wide, None)
    with pytest.raises(ValueError, match=r"tensor ln_f\.bias has shape \[3\]: the configuration"):
        convert.load_directory(tmp_path / "wide")


def test_shards_of_huggingface(tiny: Any, tmp_path: Path) -> None:
    """Weights in several files with an index, as the engine reads them."""
    whole = huggingface(tiny, tmp_path / "whole")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_bytes((whole / "config.json").read_bytes())
    names = sorted(tiny.tensors)
    weight_map = {}
    for part, begin in enumerate((0, len(names) // 2)):
        mine = names[begin : len(names) // 2 if part == 0 else None]
        single = tmp_path / f"single{part}"
        convert.write_directory(single, tiny.config, {n: tiny.tensors[n] for n in mine}, None)
        file = f"model-{part + 1:05}-of-00002.safetensors"
        (single / "model.safetensors").rename(shards / file)
        weight_map |= dict.fromkeys(mine, file)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _, tensors = convert.load_directory(shards)
    assert {name: array.tobytes() for name, array in tensors.items()} == {
        name: array.tobytes() for name, array in tiny.tensors.items()
    }
    assert convert.convert(str(shards), tmp_path / "converted").is_dir()
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../whole/model.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"names '../whole/model.safetensors', which is not in its"
    ):
        convert.load_directory(shards)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"shards has neither model\.safetensors nor model"):
        convert.load_directory(shards)


def test_the_destination_is_protected(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint()
    target = convert.convert(str(source), tmp_path / "out")
    (target / "mark").write_text("old")
    with pytest.raises(ValueError, match=r"out exists: give --force to replace it"):
        convert.convert(str(source), target)
    assert (target / "mark").exists()
    convert.convert(str(source), target, force=True)
    assert not (target / "mark").exists()
    other = tmp_path / "photographs"
    other.mkdir()
    (other / "one.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not a model directory, so --force does not replace"):
        convert.convert(str(source), other, force=True)
    with pytest.raises(ValueError, match=r"cannot be converted into itself"):
        convert.convert(str(source), source, force=True)


def test_force_replaces_nothing_but_models(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint()
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text("{}")
    (project / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"project is not a model directory, so --force does not"):
        convert.convert(str(source), project, force=True)
    assert (project / "thesis.tex").read_text() == "years of work"
    outer = convert.convert(str(source), tmp_path / "outer")
    inner = convert.convert(str(source), outer / "inner")
    for model in (source, inner):
        with pytest.raises(ValueError, match=r"outer has a folder, inner, which a model directory"):
            convert.convert(str(model), outer, force=True)
    assert (inner / "model.safetensors").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/out cannot be written: "):
        convert.convert(str(source), tmp_path / "file" / "out")


@pytest.mark.parametrize("who", ["ctrl-c", "another process"])
def test_the_old_directory_is_never_lost(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    source = checkpoint()
    target = convert.convert(str(source), tmp_path / "place" / "out")
    (target / "mark").write_text("old")
    rename = Path.rename

    def disturbed(self: Path, to: Path) -> Path:
        if self.name == "new":
            if who == "ctrl-c":
                raise KeyboardInterrupt
            (target / "theirs").mkdir(parents=True)
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", disturbed)
    if who == "ctrl-c":
        with pytest.raises(KeyboardInterrupt):
            convert.convert(str(source), target, force=True)
        assert list(target.parent.iterdir()) == [target]
        assert (target / "mark").read_text() == "old"
    else:
        with pytest.raises(
            OSError, match=r"out cannot be replaced: .*; what it held is in "
        ) as error:
            convert.convert(str(source), target, force=True)
        kept = Path(str(error.value).split("is in ")[1])
        assert (kept / "mark").read_text() == "old"


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_a_failed_conversion_leaves_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path, weight_dtype: str | None
) -> None:
    def fail(done: int, _: int) -> None:
        if done == 5:
            raise OSError("disk full")

    source = checkpoint()
    target = convert.convert(str(source), tmp_path / "place" / "out")
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match=r"disk full"):
        convert.convert(str(source), target, weight_dtype=weight_dtype, force=True, progress=fail)
    assert list(target.parent.iterdir()) == [target]
    assert (target / "model.safetensors").read_bytes() == before


# ---- Names -------------------------------------------------------------------------------------


def test_the_embedded_model_is_there() -> None:
    directory = models.resolve(models.DEFAULT_MODEL)
    with Generator.from_pretrained(models.DEFAULT_MODEL) as generator:
        result = generator.generate("Return the", max_length=8)
        assert generator.tokenizer is not None
        assert result.texts
        assert result.texts[0].strip()
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8 << 20


def test_names_are_listed() -> None:
    with pytest.raises(FileNotFoundError, match=r"the names are gpt2-docstrings, gpt2-en,"):
        models.resolve("gpt5")


def test_a_converted_named_model_comes_from_the_cache(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    cached = tmp_path / "models" / "gpt2-en"
    convert.write_directory(cached, tiny.config, tiny.tensors, tiny.directory)
    assert models.resolve("gpt2-en") == cached
    with Generator.from_pretrained("gpt2-en") as generator:
        assert generator.generate("Return", max_length=2).num_tokens == 2


# ---- With PaddleNLP ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paddlenlp() -> Any:
    """`paddlenlp.transformers`; the tests that take it are skipped where it is not installed."""
    import zlib  # noqa: F401  (before Paddle)

    pytest.importorskip("paddle")
    pytest.importorskip("paddlenlp")
    return convert.import_paddlenlp()


def reference_model(transformers: Any, seed: int = 1, **changes: Any) -> Any:
    import paddle

    paddle.seed(seed)
    config = transformers.GPTConfig(
        vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=160, max_position_embeddings=64, bos_token_id=1, eos_token_id=9,
        pad_token_id=2, initializer_range=0.3, **changes,
    )  # fmt: skip
    model = transformers.GPTLMHeadModel(config)
    for parameter in model.parameters():
        if len(parameter.shape) == 1:  # biases and norms start as zeros and ones
            noise = np.random.default_rng(parameter.shape[0]).normal(0, 0.1, parameter.shape)
            parameter.set_value(parameter.numpy() + noise.astype(np.float32))
    model.eval()
    return model


def reference_logits(model: Any) -> np.ndarray:
    import paddle

    with paddle.no_grad():
        return np.asarray(model(paddle.to_tensor([PROMPT])).numpy())[0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_what_save_pretrained_writes(
    paddlenlp: Any, tmp_path: Path, fused: bool, safe: bool
) -> None:
    model = reference_model(paddlenlp, fuse_attention_qkv=fused)
    model.save_pretrained(str(tmp_path / "saved"), safe_serialization=safe)
    target = convert.convert(str(tmp_path / "saved"), tmp_path / "out")
    with Generator.from_pretrained(target) as generator:
        info = generator.info
        assert (info.bos_token_id, info.eos_token_id, info.pad_token_id) == (1, 9, 2)
        error = normalised_error(generator.logits(PROMPT), reference_logits(model))
        assert error < 1e-10
    if not safe:
        with pytest.raises(ValueError, match=r"is a checkpoint of PaddleNLP"):
            Generator.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_in_memory(paddlenlp: Any, fused: bool) -> None:
    model = reference_model(paddlenlp, fuse_attention_qkv=fused)
    config, tensors = convert.from_paddlenlp(model)
    with Generator.from_tensors(config, tensors) as generator:
        error = normalised_error(generator.logits(PROMPT), reference_logits(model))
        assert error < 1e-10
    back = convert.build_paddlenlp(config, tensors)
    assert np.allclose(reference_logits(back), reference_logits(model), rtol=1e-4, atol=1e-4)


def test_there_and_back(paddlenlp: Any, tiny: Any) -> None:
    model, config = convert.to_paddlenlp(tiny.directory)
    assert config["n_layer"] == 2
    expected = gpt2_logits(tiny.config, tiny.tensors, PROMPT)
    assert normalised_error(reference_logits(model), expected) < 1e-9
    config, tensors = convert.from_paddlenlp(model)
    assert sorted(tensors) == sorted(tiny.tensors)
    for name, array in tiny.tensors.items():
        assert np.array_equal(tensors[name], array), name


def test_another_epsilon_and_a_separate_head(
    paddlenlp: Any, make_model: Callable[..., Any]
) -> None:
    model = make_model(layer_norm_epsilon=5e-4)
    tensors = {**model.tensors, "lm_head.weight": model.tensors["wte.weight"][::-1].copy()}
    built = convert.build_paddlenlp(model.config, tensors)
    expected = gpt2_logits(model.config, tensors, PROMPT)
    assert normalised_error(reference_logits(built), expected) < 1e-9
    config, back = convert.from_paddlenlp(built)
    assert config["layer_norm_epsilon"] == pytest.approx(5e-4)
    assert np.array_equal(back["lm_head.weight"], tensors["lm_head.weight"])
    for changes, sentence in (
        ({"layer_norm_epsilon": 0.01}, "layer_norm_epsilon is 0.01: Paddle's layers take at most"),
        ({"activation_function": "relu"}, "activation_function is 'relu': it must be one of gelu_"),
        ({"n_positions": 97}, "has shape .96, 48.: the configuration asks for .97, 48."),
    ):
        with pytest.raises(ValueError, match=sentence):
            convert.build_paddlenlp({**model.config, **changes}, tensors)


def test_half_precision_checkpoints(paddlenlp: Any, tmp_path: Path) -> None:
    import paddle

    model = reference_model(paddlenlp)
    for dtype, kept in (("float16", np.float16), ("bfloat16", np.float32)):
        directory = tmp_path / dtype
        model.save_pretrained(str(directory))
        path = str(directory / "model_state.pdparams")
        state = paddle.load(path)
        paddle.save({name: value.astype(dtype) for name, value in state.items()}, path)
        _, tensors = convert.load_directory(directory)
        weight = model.gpt.embeddings.word_embeddings.weight
        expected = weight.astype(dtype).astype("float32").numpy()
        assert tensors["wte.weight"].dtype == kept
        assert np.array_equal(tensors["wte.weight"].astype(np.float32), expected)


def test_a_broken_pdparams_is_named(paddlenlp: Any, tmp_path: Path) -> None:
    model = reference_model(paddlenlp)
    model.save_pretrained(str(tmp_path / "saved"))
    weights = tmp_path / "saved" / "model_state.pdparams"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model_state\.pdparams cannot be loaded by paddle\.load"):
        convert.load_directory(tmp_path / "saved")


def test_a_named_model_that_paddlenlp_has_is_converted_once(
    paddlenlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reference_model(paddlenlp)

    class Tokenizer:
        resource_files_names: ClassVar[dict[str, str]] = {}

        @classmethod
        def from_pretrained(cls, name: str) -> Any:
            assert name == "gpt2-medium-en"
            return cls()

        def save_resources(self, directory: str) -> None:
            (Path(directory) / "vocab.json").write_text("{}")

    calls: list[str] = []

    def from_pretrained(name: str) -> Any:
        calls.append(name)
        print("noise of PaddleNLP")
        return model

    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(paddlenlp, "GPTTokenizer", Tokenizer)
    monkeypatch.setattr(paddlenlp.GPTLMHeadModel, "from_pretrained", from_pretrained)
    first = models.resolve("gpt2-medium-en")
    assert first == tmp_path / "models" / "gpt2-medium-en"
    assert models.resolve("gpt2-medium-en") == first
    assert calls == ["gpt2-medium-en"]
    assert (first / "vocab.json").is_file()
    _, tensors = convert.load_directory(first)
    weight = model.gpt.embeddings.word_embeddings.weight.numpy()
    assert np.array_equal(tensors["wte.weight"], weight)


def test_files_downloaded_by_hand_are_taken(
    paddlenlp: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    model = reference_model(paddlenlp)
    place = tmp_path / "downloads" / "gpt-cpm-large-cn"
    model.save_pretrained(str(place))
    (place / "sentencepiece.model").write_bytes(b"...")
    with Generator.from_pretrained("gpt-cpm-large-cn") as generator:
        error = normalised_error(generator.logits(PROMPT), reference_logits(model))
        assert error < 1e-10
        with pytest.raises(ValueError, match=r"has a sentencepiece\.model, which fastgen does not"):
            generator.generate("你好")
    assert (tmp_path / "models" / "gpt-cpm-large-cn" / "model.safetensors").is_file()


def test_without_paddle_the_error_says_what_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "paddle", None)
    with pytest.raises(
        FileNotFoundError, match=r"^gpt2-en is a model of PaddleNLP, which"
    ) as caught:
        models.resolve("gpt2-en")
    message = str(caught.value)
    assert "pip install 'fastgen[paddle]'" in message
    assert (
        "download config.json, model_state.pdparams, vocab.json, merges.txt into "
        f"{tmp_path}/downloads/gpt2-en under exactly these names"
    ) in message


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("gpt2-medium-en", ["gpt2-medium-en.pdparams", "gpt-en-vocab.json", "gpt-en-merges.txt"]),
        ("gpt-cpm-large-cn", ["gpt-cpm-large-cn.pdparams", "sentencepiece.model ("]),
        ("gpt3-13B-en", ["model_state.pdparams, ", "vocab.json (", "merges.txt ("]),
    ],
)
def test_without_a_network_the_error_says_what_to_download(
    paddlenlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: list[str]
) -> None:
    def no_network(name: str) -> Any:
        raise OSError(f"Can't load {name}")

    for owner in ("GPTLMHeadModel", "GPTTokenizer", "GPTChineseTokenizer"):
        monkeypatch.setattr(getattr(paddlenlp, owner), "from_pretrained", no_network)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        models.resolve(name)
    message = str(caught.value)
    assert message.startswith(f"PaddleNLP could not get {name} (OSError: Can't load {name})")
    assert f"into {tmp_path}/downloads/{name} under exactly these names" in message
    if importlib.util.find_spec("paddlenlp.utils.download") is None:  # up to 2.7: names alone
        files = models._file_names(name)
    else:
        files = ["config.json (", *files]
    for file in files:
        assert file in message
    assert not (tmp_path / "models").exists()
