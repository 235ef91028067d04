"""Exports that Paddle writes, run by Paddle Inference from Python and C++: the tokens are those of
FasterGPT and of Generator."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddlenlp")

import paddle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fastgen import FasterGPT, GenerationOptions, Generator, _program, export_model
from fastgen.convert import to_paddlenlp
from fastgen.errors import InvalidArgumentError, ModelFileError, UnsupportedError
from fastgen.export_model import export
from fastgen.jit import load_op_library
from fastgen.testing import strategies as fg
from fastgen.testing.models import GPTShape, WeightRecipe, huggingface_tensors, make_tensors

ROOT = Path(__file__).resolve().parents[2]
# PIR, which saves programs as gpt.json, came with Paddle 3.
NATIVE = "json" if paddle.__version__.startswith("3") else "pdmodel"
FORMATS = ["pdmodel"] if NATIVE == "pdmodel" else ["pdmodel", "json"]
SHAPE = GPTShape(320, 48, 32, 2, 4, 64)
PROMPTS = [[9, 8, 7], [300, 5, 11, 23, 42], [17]]
SAMPLING = GenerationOptions(
    decode_strategy="sampling", max_length=9, top_k=12, top_p=0.9, temperature=1.3, seed=11
)
GREEDY = GenerationOptions(max_length=9, top_k=0)


def write_model(directory: Path, shape: GPTShape, recipe: WeightRecipe, **config: Any) -> Path:
    """A HuggingFace directory without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "gpt2", "eos_token_id": 0, **shape.huggingface_config(), **config}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = huggingface_tensors(shape, make_tensors(shape, recipe))
    save_file(tensors, str(directory / "model.safetensors"))
    return directory


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Return the number of items in the list."] * 9, trainer)
    backend.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    write_model(directory, SHAPE, WeightRecipe(seed=5))
    write_tokenizer(directory)
    return directory


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = [len(prompt) for prompt in prompts]
    # What stands in the padding must not matter.
    ids = np.full((len(prompts), max(lengths)), 3, dtype=np.int64)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    return ids, np.array(lengths, dtype=np.int32)


def predict(
    directory: Path, prompts: Sequence[Sequence[int]], **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores of paddle.inference."""
    load_op_library()
    manifest = json.loads((directory / "fastgen.json").read_text())
    config = paddle.inference.Config(
        str(directory / manifest["program"]), str(directory / "gpt.pdiparams")
    )
    config.disable_glog_info()
    predictor = paddle.inference.create_predictor(config)
    feeds: dict[str, np.ndarray] = dict(zip(("input_ids", "seq_len"), pad(prompts)))
    types = {entry["name"]: entry["dtype"] for entry in manifest["inputs"]}
    for name, value in options.items():
        feeds[name] = np.array(value, dtype=types[name])
    assert predictor.get_input_names() == list(types)
    for name in predictor.get_input_names():
        predictor.get_input_handle(name).copy_from_cpu(feeds[name])
    predictor.run()
    ids, scores = (
        predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()
    )
    return ids, scores


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
    first = export(source, tmp_path / "first", SAMPLING)
    second = export(first, tmp_path / "second", SAMPLING)
    for name in ("vocab.txt", "merges.txt", "fastgen.json", "gpt.pdiparams"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_separate_head(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", SHAPE, WeightRecipe(seed=5), tie_word_embeddings=False)
    tensors = huggingface_tensors(SHAPE, make_tensors(SHAPE, WeightRecipe(seed=5)))
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
    model = write_model(tmp_path / "model", SHAPE, WeightRecipe(seed=5))
    with pytest.raises(InvalidArgumentError, match=r"no tokenizer .*--no_tokenizer"):
        export(model, tmp_path / "export", SAMPLING)
    large = make_tensors(SHAPE, WeightRecipe(seed=5))
    large["gpt.decoder.norm.bias"][3] = 1e6
    save_file(huggingface_tensors(SHAPE, large), str(model / "model.safetensors"))
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


# ---- C++ ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fastgen-gpt-paddle, built against this Paddle's wheel."""
    if NATIVE != "pdmodel":
        pytest.skip("Paddle 3's C++ jit loader is not what this program is made for")
    for tool in ("cmake", "ninja", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("the sources are not there")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("this Python has no shared libpython")
    build = tmp_path_factory.mktemp("build")
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DON_INFER=ON",
         f"-DPY_CMD={sys.executable}"],
        ["cmake", "--build", str(build), "--target", "gpt_paddle"],
    ):  # fmt: skip
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout
    return build / "fastgen-gpt-paddle"


def run_program(program: Path, *arguments: Any, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(program), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_cpp_fixed_options(source: Path, tmp_path: Path, program: Path) -> None:
    for options in (GREEDY, SAMPLING):
        directory = export(source, tmp_path / options.decode_strategy, options)
        arguments = [part for prompt in PROMPTS for part in ("--prompt_ids", _text(prompt))]
        done = run_program(program, "--model_dir", directory, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        with Generator.from_pretrained(directory) as generator:
            expected = generator.generate(PROMPTS, options)
        assert done.stdout == "".join(f"{_text(ids)}\n" for ids in expected.token_ids)
    done = run_program(program, "--model_dir", directory, "--topk", 3)
    assert done.returncode == 2
    assert "need one made with --runtime_options" in done.stderr


@pytest.mark.slow
def test_cpp_runtime_options(source: Path, tmp_path: Path, program: Path) -> None:
    directory = export(source, tmp_path / "export", SAMPLING, runtime_options=True)
    (tmp_path / "prompts.txt").write_text("".join(f"{_text(prompt)}\n\n" for prompt in PROMPTS))
    done = run_program(
        program, "--model_dir", directory, "--prompt_file", tmp_path / "prompts.txt", "--json",
        "--topk=5", "--topp=0.8", "--temperature=2", "--seed", 2**64 - 1, "--max_length", 20,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    with Generator.from_pretrained(directory) as generator:
        expected = generator.generate(
            PROMPTS, decode_strategy="sampling", top_k=5, top_p=0.8, temperature=2.0,
            seed=2**64 - 1, max_length=20,
        )  # fmt: skip
        defaults = generator.generate([PROMPTS[0]], SAMPLING)
    assert document["token_ids"] == expected.token_ids
    np.testing.assert_array_equal(np.float32(document["scores"]), np.float32(expected.scores))
    done = run_program(
        program, "--model_dir", directory, "--prompt_file", "-", stdin=_text(PROMPTS[0])
    )
    assert done.stdout == f"{_text(defaults.token_ids[0])}\n"


@pytest.mark.slow
def test_cpp_errors(source: Path, tmp_path: Path, program: Path) -> None:
    directory = export(source, tmp_path / "export", SAMPLING, runtime_options=True)
    for arguments, code, words in (
        (["--prompt_ids", "320"], 2, "token id 320 must be from 0 to 319"),
        (["--prompt_ids", "1 x"], 2, "'x', it must be a number"),
        (["--prompt_ids", _text([1] * 48)], 2, "fewer than the model's 48 positions"),
        (["--temperature", "0"], 1, "temperature is 0"),
        (["--max_length", "48"], 1, "48 positions"),
        (["--seed", "-1"], 2, "--seed is '-1'"),
        (["--op_library", "/nowhere.so"], 1, "/nowhere.so cannot be read"),
        (["--bogus"], 2, "--bogus is not an option"),
    ):
        done = run_program(program, "--model_dir", directory, *arguments)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    (directory / "gpt.pdmodel").write_bytes((directory / "gpt.pdmodel").read_bytes()[:500])
    done = run_program(program, "--model_dir", directory)
    assert done.returncode == 1
    assert "cannot be loaded by Paddle" in done.stderr


def _text(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))
