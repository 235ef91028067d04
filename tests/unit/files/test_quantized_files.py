"""Bad files of weights that were rounded ahead of time: refused, naming the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastgen_tests.model_files import (
    FUZZ,
    PROMPT,
    load,
    load_or_refuse,
    make_config,
    refused,
    safetensors_bytes,
    split_file,
    to_paddlenlp,
    write_model,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fastgen.convert import convert

TYPES = ("float16", "bfloat16", "int8", "int4")
FC = "h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A good directory of each type."""
    root = tmp_path_factory.mktemp("rounded")
    source = write_model(root / "source", make_config(tie_word_embeddings=True))
    directories = {name: convert(str(source), root / name, weight_dtype=name) for name in TYPES}
    return directories.__getitem__


def changed(source: Path, to: Path, scheme: Any = ..., **entries: Any) -> Path:
    """A copy with another `fastgen_weights` and tensors that claim something else; a value of None
    takes a tensor's name away."""
    config = json.loads((source / "config.json").read_text())
    if scheme is None:
        del config["fastgen_weights"]
    elif scheme is not ...:
        config["fastgen_weights"] = scheme
    header, data = split_file(source / "model.safetensors")
    for name, change in entries.items():
        if change is None:
            header[f"h.9.{name}"] = header.pop(name)
        else:
            header[name] = {**header[name], **change}
    return write_model(to, json.dumps(config), safetensors_bytes(header, data))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("int8", ["fastgen_weights is 'int8'", "an object"]),
        ({}, ["fastgen_weights has no version"]),
        ({"version": 2, "weight_dtype": "int8"}, ["version of fastgen_weights is 2, it must be 1"]),
        ({"version": "1", "weight_dtype": "int8"}, ["version of fastgen_weights is '1'"]),
        ({"version": 1}, ["fastgen_weights has no weight_dtype"]),
        ({"version": 1, "weight_dtype": "int3"}, ["weight_dtype of fastgen_weights is 'int3'"]),
        ({"version": 1, "weight_dtype": 8}, ["weight_dtype of fastgen_weights is 8"]),
        ({"version": 1, "weight_dtype": "int8"}, ["fastgen_weights has no group_size"]),
        (
            {"version": 1, "weight_dtype": "int8", "group_size": 64},
            ["group_size of fastgen_weights is 64, it must be 32"],
        ),
    ],
)
def test_schemes_that_there_are_not(
    rounded: Callable[[str], Path], tmp_path: Path, scheme: Any, words: list[str]
) -> None:
    directory = changed(rounded("int8"), tmp_path / "model", scheme)
    refused(directory, "config.json", *words)
    with pytest.raises(ValueError, match=r"config\.json: fastgen_weights is .* does not know"):
        convert(str(directory), tmp_path / "out")


@pytest.mark.parametrize(
    ("stored", "scheme", "words"),
    [
        ("int8", None, ["'wte.weight' is there as 'wte.weight.int8'", "has no fastgen_weights"]),
        ("int4", None, ["'wte.weight' is there as 'wte.weight.int8'", "has no fastgen_weights"]),
        ("int8", "int4", ["'h.0.attn.c_attn.weight.int4' is missing"]),
        ("int4", "int8", ["'h.0.attn.c_attn.weight.int8' is missing"]),
        ("float16", "bfloat16", ["'wte.weight'", "'float16', it must be bfloat16", "bfloat16"]),
        ("bfloat16", "float16", ["'wte.weight'", "'bfloat16', it must be float16"]),
        ("float16", "int8", ["'wte.weight.int8' is missing"]),
        ("int8", "float16", ["'wte.weight' is there as 'wte.weight.int8'", "says float16"]),
    ],
)
def test_another_type_than_the_configuration_says(
    rounded: Callable[[str], Path],
    tmp_path: Path,
    stored: str,
    scheme: str | None,
    words: list[str],
) -> None:
    named = scheme and {"version": 1, "weight_dtype": scheme, "group_size": 32}
    refused(changed(rounded(stored), tmp_path / "model", named), *words)


# Sizes of the files' models: hidden 8, inner 20, so one group of inputs or, of c_proj, one too.
@pytest.mark.parametrize(
    ("stored", "entries", "words"),
    [
        ("int8", {f"{FC}.int8": {"shape": [20, 8]}}, ["[20, 8]", "asks for [8, 20]"]),
        ("int8", {f"{FC}.int8": {"dtype": "U8"}}, [f"'{FC}.int8' has the type 'U8'", "be int8"]),
        ("int8", {f"{FC}.scales": {"shape": [20, 1]}}, [f"'{FC}.scales'", "asks for [1, 20]"]),
        ("int8", {f"{FC}.scales": {"dtype": "BF16"}}, [f"'{FC}.scales'", "'bfloat16'", "float16"]),
        ("int8", {f"{FC}.scales": None}, [f"'{FC}.scales' is missing"]),
        ("int8", {f"{FC}.int8": None}, [f"'{FC}.int8' is missing"]),
        ("int8", {"wte.weight.scales": {"shape": [1, 17]}}, ["'wte.weight.scales'", "[17, 1]"]),
        ("int8", {"ln_f.bias": {"dtype": "I32"}}, ["'ln_f.bias' has the type 'I32'"]),
        ("int4", {f"{FC}.int4": {"shape": [2, 40]}}, ["[2, 40]", "asks for [4, 20]"]),
        ("int4", {f"{FC}.int4": {"dtype": "I8"}}, [f"'{FC}.int4' has the type 'I8'", "uint8"]),
        ("int4", {f"{FC}.scales": None}, [f"'{FC}.scales' is missing"]),
        ("float16", {FC: {"dtype": "BF16"}}, [f"'{FC}'", "'bfloat16', it must be float16"]),
    ],
)
def test_tensors_that_contradict_the_configuration(
    rounded: Callable[[str], Path],
    tmp_path: Path,
    stored: str,
    entries: dict[str, Any],
    words: list[str],
) -> None:
    refused(changed(rounded(stored), tmp_path / "model", **entries), *words)


@pytest.mark.parametrize("stored", TYPES)
def test_every_truncation(rounded: Callable[[str], Path], tmp_path: Path, stored: str) -> None:
    content = (rounded(stored) / "model.safetensors").read_bytes()
    config = (rounded(stored) / "config.json").read_text()
    directory = write_model(tmp_path / "model", config)
    for size in sorted({*range(0, len(content), 41), len(content) - 1}):
        (directory / "model.safetensors").write_bytes(content[:size])
        refused(directory, "model.safetensors")


@FUZZ
@given(data=st.data())
def test_flipped_bits(
    tmp_path_factory: pytest.TempPathFactory,
    rounded: Callable[[str], Path],
    data: st.DataObject,
) -> None:
    """Loaded as any type: scales of infinity and NaN are in it, and numbers of no writer."""
    source = rounded(data.draw(st.sampled_from(TYPES)))
    name = data.draw(st.sampled_from(["model.safetensors", "model.safetensors", "config.json"]))
    directory = tmp_path_factory.getbasetemp() / "flipped-rounded"
    directory.mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        content = bytearray((source / file).read_bytes())
        if file == name:
            for _ in range(data.draw(st.integers(1, 4))):
                position = data.draw(st.integers(0, len(content) - 1))
                content[position] ^= 1 << data.draw(st.integers(0, 7))
        (directory / file).write_bytes(bytes(content))
    load_or_refuse(directory)


def test_a_tied_head_that_differs(rounded: Callable[[str], Path], tmp_path: Path) -> None:
    header, data = split_file(rounded("int8") / "model.safetensors")
    for name in ("int8", "scales"):
        entry = header[f"wte.weight.{name}"]
        content = data[slice(*entry["data_offsets"])]
        end = len(data)
        header[f"lm_head.weight.{name}"] = {**entry, "data_offsets": [end, end + len(content)]}
        data += content
    config = (rounded("int8") / "config.json").read_text()
    same = write_model(tmp_path / "same", config, safetensors_bytes(header, data))
    with load(same) as model, load(rounded("int8")) as tied:
        assert (model.logits(PROMPT) == tied.logits(PROMPT)).all()
        assert model.info.weight_bytes == tied.info.weight_bytes
    damaged = data[:-1] + bytes([data[-1] ^ 1])  # a scale
    other = write_model(tmp_path / "other", config, safetensors_bytes(header, damaged))
    refused(other, "'lm_head.weight.int8' differs from 'wte.weight.int8'", "tied")


# ---- Good files of no writer of ours -------------------------------------------------------------


def arrays_of(directory: Path) -> dict[str, np.ndarray]:
    header, data = split_file(directory / "model.safetensors")
    kinds = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_names_of_paddlenlp(
    rounded: Callable[[str], Path], tmp_path: Path, stored: str, fused: bool
) -> None:
    """q, k and v in tensors of their own, or head by head in one: so are their scales."""
    forms: dict[str, dict[str, np.ndarray]] = {"": {}, ".int8": {}, ".int4": {}, ".scales": {}}
    for name, array in arrays_of(rounded(stored)).items():
        form = next((form for form in forms if form and name.endswith(form)), "")
        forms[form][name[: len(name) - len(form)]] = array
    tensors = {}
    for form, arrays in forms.items():
        # to_paddlenlp() copies the embedding as a head, which only some forms have.
        given = {"wte.weight": forms[".int8"]["wte.weight"], **arrays}
        for name, array in to_paddlenlp(given, "gpt.", fused).items():
            table = "word_embeddings" in name or name == "lm_head.weight"
            if not table or "wte.weight" in arrays:
                tensors[f"{name}{form}"] = array
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text((rounded(stored) / "config.json").read_text())
    save_file(tensors, directory / "model.safetensors")
    with load(directory) as model, load(rounded(stored)) as expected:
        assert model.info == expected.info
        assert (model.logits(PROMPT) == expected.logits(PROMPT)).all()


def test_shards(rounded: Callable[[str], Path], tmp_path: Path) -> None:
    """Numbers and scales may lie in different files."""
    parts: list[dict[str, np.ndarray]] = [{}, {}]
    for name, array in arrays_of(rounded("int8")).items():
        parts[name.endswith(".scales")][name] = array
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"{i}.safetensors")
    index = {"weight_map": {name: f"{i}.safetensors" for i in (0, 1) for name in parts[i]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((rounded("int8") / "config.json").read_text())
    with load(tmp_path) as model, load(rounded("int8")) as expected:
        assert (model.logits(PROMPT) == expected.logits(PROMPT)).all()
