"""Exports that Paddle writes, run by Paddle Inference: the tokens are those of FasterGPT and of
Generator."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddlenlp")

import paddle
from fastgen_tests.exports import EXPORT_SHAPE, PROMPTS, pad, predict, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fastgen import FasterGPT, GenerationOptions, Generator, _program, export_model
from fastgen.convert import to_paddlenlp
from fastgen.errors import InvalidArgumentError, ModelFileError, UnsupportedError
from fastgen.export_model import export
from fastgen.testing import strategies as fg
from fastgen.testing.models import GPTShape, WeightRecipe, huggingface_tensors, make_tensors

# PIR, which saves programs as gpt.json, came with Paddle 3.
NATIVE = "json" if paddle.__version__.startswith("3") else "pdmodel"
FORMATS = ["pdmodel"] if NATIVE == "pdmodel" else ["pdmodel", "json"]
SAMPLING = GenerationOptions(
    decode_strategy="sampling", max_length=9, top_k=12, top_p=0.9, temperature=1.3, seed=11
)
GREEDY = GenerationOptions(max_length=9, top_k=0)


# ---- The same tokens everywhere ----------------------------------------------------------------


@pytest.mark.parametrize("program_format", FORMATS)
@pytest.mark.parametrize("options", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_fixed_options(
    source: Path, tmp_path: Path, program_format: str, options: GenerationOptions, half: bool
) -> None:
    directory = export(
        source,
        tmp_path / "export",
        options,
        use_fp16_decoding=half,
        program_format=program_format,
    )
    ids, scores = predict(directory, PROMPTS)
    with Generator.from_pretrained(directory) as generator:
        expected = generator.generate(PROMPTS, options)
    np.testing.assert_array_equal(ids, expected.to_padded_array())
    np.testing.assert_array_equal(scores[:, 0], np.float32(expected.scores))
    if not half:
        model, _ = to_paddlenlp(source)
        fields = dataclasses.asdict(options)
        padded, lengths = pad(PROMPTS)
        eager, _ = FasterGPT(model, eos_id=0, pad_id=0)(
            paddle.to_tensor(padded),
            seq_len=paddle.to_tensor(lengths),
            **{name: fields[name] for name in ("decode_strategy", "max_length", "top_k", "top_p",
                                               "temperature", "seed")},
        )  # fmt: skip
        np.testing.assert_array_equal(ids, eager.numpy())


@pytest.mark.parametrize("program_format", FORMATS)
def test_runtime_options(source: Path, tmp_path: Path, program_format: str) -> None:
    directory = export(
        source, tmp_path / "export", SAMPLING, runtime_options=True, program_format=program_format
    )
    rows: list[dict[str, Any]] = [
        {"top_k": 4, "top_p": 0.0, "temperature": 1.0, "seed": 2**63 + 5, "max_length": 9},
        {"top_k": 0, "top_p": 0.75, "temperature": 0.5, "seed": 6, "max_length": 3},
        {"top_k": 1, "top_p": 1.0, "temperature": 9.0, "seed": 7, "max_length": 12},
    ]
    feeds = {name: [row[name] for row in rows] for name in rows[0]}
    feeds["seed"] = np.array(feeds["seed"], dtype=np.uint64).view(np.int64)
    ids, _ = predict(directory, PROMPTS, **feeds)
    with Generator.from_pretrained(directory) as generator:
        for row, prompt, options in zip(ids, PROMPTS, rows):
            result = generator.generate([prompt], decode_strategy="sampling", **options)
            tokens = result.token_ids[0]
            assert row[: len(tokens)].tolist() == tokens
            assert (row[len(tokens) :] == 0).all()
        # One seed is spread over the rows, as everywhere.
        feeds.update({name: [value] for name, value in rows[0].items()}, seed=[6])
        ids, _ = predict(directory, PROMPTS, **feeds)
        spread = generator.generate(PROMPTS, decode_strategy="sampling", **{**rows[0], "seed": 6})
        np.testing.assert_array_equal(ids, spread.to_padded_array())
    with pytest.raises(ValueError, match="temperature is 0"):
        predict(directory, PROMPTS, **{**feeds, "temperature": [0.0]})


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=fg.cases(large=False), runtime=st.booleans())
def test_any_case(tmp_path_factory: pytest.TempPathFactory, case: fg.Case, runtime: bool) -> None:
    folder = tmp_path_factory.mktemp("case")
    model = write_model(folder / "model", case.shape, case.recipe, eos_token_id=None)
    options = dataclasses.replace(case.options, seed=case.seed)
    directory = export(model, folder / "export", options, runtime_options=runtime, tokenizer=False)
    feeds: dict[str, Any] = {}
    if runtime:
        feeds = {name: [getattr(options, name)]
                 for name in ("top_k", "top_p", "temperature", "max_length")}  # fmt: skip
        feeds["seed"] = np.array([case.seed], dtype=np.uint64).view(np.int64)
    ids, scores = predict(directory, case.prompts, **feeds)
    with Generator.from_pretrained(directory) as generator:
        expected = generator.generate(case.prompts, options)
    with Generator.from_pretrained(model) as generator:
        assert generator.generate(case.prompts, options).token_ids == expected.token_ids
    np.testing.assert_array_equal(ids, expected.to_padded_array())
    np.testing.assert_array_equal(scores[:, 0], np.float32(expected.scores))
    shutil.rmtree(folder)


def test_an_export_can_be_exported_again(source: Path, tmp_path: Path) -> None:
    # Paddle sorts parameters by names with a number, which otherwise counts on from one export to
    # the next: 9 stands behind 10.
    with paddle.utils.unique_name.guard():
        first = export(source, tmp_path / "first", SAMPLING)
    with paddle.utils.unique_name.guard():
        second = export(first, tmp_path / "second", SAMPLING)
    for name in ("vocab.txt", "merges.txt", "fastgen.json", "gpt.pdiparams"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_separate_head(tmp_path: Path) -> None:
    recipe = WeightRecipe(seed=5)
    model = write_model(tmp_path / "model", EXPORT_SHAPE, recipe, tie_word_embeddings=False)
    tensors = huggingface_tensors(EXPORT_SHAPE, make_tensors(EXPORT_SHAPE, recipe))
    tensors["lm_head.weight"] = tensors["wte.weight"][::-1].copy()
    save_file(tensors, str(model / "model.safetensors"))
    directory = export(model, tmp_path / "export", GREEDY, tokenizer=False)
    ids, _ = predict(directory, PROMPTS)
    for place in (model, directory):
        with Generator.from_pretrained(place) as generator:
            result = generator.generate(PROMPTS, GREEDY, pad_token_id=0)
            np.testing.assert_array_equal(ids, result.to_padded_array())


# ---- The directory -----------------------------------------------------------------------------


def test_files(source: Path, tmp_path: Path) -> None:
    expected = {"fastgen.json", "gpt.pdiparams", "vocab.txt", "merges.txt", f"gpt.{NATIVE}"}
    if NATIVE == "pdmodel":
        expected.add("gpt.pdiparams.info")
    directory = export(source, tmp_path / "deep" / "export", SAMPLING)
    assert {path.name for path in directory.iterdir()} == expected
    assert [path.name for path in directory.parent.iterdir()] == ["export"]
    manifest = json.loads((directory / "fastgen.json").read_text())
    assert manifest["program"] == f"gpt.{NATIVE}"
    assert manifest["generation"]["seed"] == "11"
    assert manifest["tokenizer"]["special_tokens"] == ["<|endoftext|>"]
    with Generator.from_pretrained(directory) as one, Generator.from_pretrained(source) as other:
        assert one.tokenizer is not None
        assert one.tokenizer.encode("Return") == other.tokenizer.encode("Return")
    bare = export(source, tmp_path / "bare", SAMPLING, tokenizer=False)
    assert {path.name for path in bare.iterdir()} == expected - {"vocab.txt", "merges.txt"}


def test_force_replaces_exports_only(source: Path, tmp_path: Path) -> None:
    directory = export(source, tmp_path / "export", SAMPLING)
    (directory / "mine.txt").write_text("")
    with pytest.raises(InvalidArgumentError, match="exists: give --force"):
        export(source, directory, SAMPLING)
    export(source, directory, GREEDY, force=True)
    assert not (directory / "mine.txt").exists()
    assert json.loads((directory / "fastgen.json").read_text())["generation"]["top_k"] == 0
    with pytest.raises(InvalidArgumentError, match="is not an export"):
        export(directory, source, GREEDY, force=True)
    with pytest.raises(InvalidArgumentError, match="into itself"):
        export(directory, directory, GREEDY, force=True)


def test_nothing_is_left_of_a_failure(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = export(source, tmp_path / "export", SAMPLING)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_model, "_locate", fail)
    with pytest.raises(KeyboardInterrupt):
        export(source, directory, GREEDY, force=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert list(tmp_path.iterdir()) == [directory]


@pytest.mark.parametrize("program_format", FORMATS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_weights_are_written_as_paddle_writes_them(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program_format: str,
    half: bool,
) -> None:
    theirs = tmp_path / "theirs.pdiparams"
    real_save = paddle.jit.save

    def save_both(program: Any, path: str) -> None:
        with monkeypatch.context() as context:
            context.delattr(_program._FixedOptions, "to_static_state_dict")
            real_save(program, path)
        Path(f"{path}.pdiparams").rename(theirs)
        real_save(program, path)

    monkeypatch.setattr(paddle.jit, "save", save_both)
    directory = export(
        source, tmp_path / "export", use_fp16_decoding=half, program_format=program_format
    )
    assert (directory / "gpt.pdiparams").read_bytes() == theirs.read_bytes()


def test_a_paddle_that_saves_in_another_way_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.delattr(_program._FixedOptions, "to_static_state_dict")
        with pytest.raises(ModelFileError, match="does not hold what Paddle was given to save"):
            export(source, tmp_path / "export", SAMPLING)
    model, _ = to_paddlenlp(source)
    parameters = dict(model.named_parameters())
    order = [parameter.name for parameter in parameters.values()]
    assert list(export_model._in_order(parameters, order[::-1])) == list(parameters)[::-1]
    with pytest.raises(ModelFileError, match=f"they differ in {order[3]}: "):
        export_model._in_order(parameters, order[:3] + order[4:])
    path = tmp_path / "gpt.pdiparams"
    export_model._write_parameters(path, parameters, progress=False)
    located = export_model._locate(path, parameters)
    with path.open("r+b") as file:
        file.seek(located["gpt.decoder.norm.bias"].offset + 7)
        file.write(b"\x55")
    with pytest.raises(ModelFileError, match=r"does not have tensor gpt\.decoder\.norm\.bias"):
        export_model._locate(path, parameters)
    assert list(tmp_path.iterdir()) == [path]


MEMORY = """
import resource, sys, zlib
from pathlib import Path
import paddle, paddlenlp.transformers
from fastgen.export_model import export

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
directory = export(sys.argv[1], sys.argv[2], tokenizer=False)
print((peak() - before) / (directory / "gpt.pdiparams").stat().st_size)
"""


def test_exporting_holds_the_weights_about_once(tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "model", GPTShape(2000, 64, 512, 16, 8, 2048), WeightRecipe(seed=5)
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(model), str(tmp_path / "export")],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    # Paddle's own parameters, and what a tensor takes on its way.
    assert float(done.stdout.splitlines()[-1]) < 1.7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 48}, "max_length is 48"),
        ({"eos_token_id": 320}, "eos_token_id is 320"),
        ({"pad_token_id": 999}, "pad_token_id is 999"),
        ({"seed": [1, 2]}, "seed is a list"),
    ],
)
def test_options_that_the_model_cannot_do(
    source: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        export(source, tmp_path / "export", dataclasses.replace(SAMPLING, **changes))
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", EXPORT_SHAPE, WeightRecipe(seed=5))
    with pytest.raises(InvalidArgumentError, match=r"no tokenizer .*--no_tokenizer"):
        export(model, tmp_path / "export", SAMPLING)
    large = make_tensors(EXPORT_SHAPE, WeightRecipe(seed=5))
    large["gpt.decoder.norm.bias"][3] = 1e6
    save_file(huggingface_tensors(EXPORT_SHAPE, large), str(model / "model.safetensors"))
    with pytest.raises(ModelFileError, match=r"ln_f\.bias has values that float16 cannot hold"):
        export(model, tmp_path / "export", SAMPLING, use_fp16_decoding=True, tokenizer=False)
    assert not (tmp_path / "export").exists()


@pytest.mark.skipif(NATIVE == "json", reason="this Paddle can save both forms")
def test_a_form_that_this_paddle_does_not_save(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="program_format is 'json'"):
        export(source, tmp_path / "export", SAMPLING, program_format="json")


def test_the_command(source: Path, tmp_path: Path) -> None:
    directory = tmp_path / "infer_model"
    command = [
        sys.executable, "-m", "fastgen.export_model", "--model_name_or_path", str(source),
        "--topk", "4", "--topp", "0.0", "--max_out_len", "7", "--temperature", "1.0",
        "--seed", "3", "--inference_model_dir", str(directory),
    ]  # fmt: skip
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    ids, _ = predict(directory, PROMPTS)
    with Generator.from_pretrained(source) as generator:
        expected = generator.generate(
            PROMPTS, decode_strategy="sampling", top_k=4, max_length=7, seed=3, pad_token_id=0
        )
    np.testing.assert_array_equal(ids, expected.to_padded_array())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr == f"fastgen export: {directory} exists: give --force to replace it\n"
