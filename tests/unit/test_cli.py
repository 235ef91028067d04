"""The command line: output, exit statuses, and one sentence for every error."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastgen import Generator, bench, models
from fastgen.testing.reference import gpt2_logits, normalised_error


class Result:
    """What a finished command left."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code = code
        self.stdout = stdout
        self.stderr = stderr

    @property
    def document(self) -> dict[str, Any]:
        """Standard output as JSON, which must be one line."""
        assert self.code == 0, self.stderr
        assert self.stdout.count("\n") == 1
        value: dict[str, Any] = json.loads(self.stdout)
        return value


def fastgen(*arguments: Any, stdin: str = "", module: str = "fastgen", **variables: str) -> Result:
    """Runs the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        check=False,
        env={**os.environ, **variables},
        timeout=300,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


# ---- infer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [["--use_fp16_decoding"], ["--weight_dtype", "int8"], ["--cache_dtype", "int8"]],
    ids=str,
)
def test_other_types_of_weights(option: list[str]) -> None:
    """The command line of the old guide works on the CPU as well."""
    result = fastgen("infer", "--prompt", "Return the", "--seed", 1, "--max_length", 8, *option)
    assert result.code == 0
    assert result.stdout.startswith("Return the")


def test_the_embedded_model_writes() -> None:
    result = fastgen("infer", "--prompt", "Return the", "--seed", 1)
    assert result.code == 0
    assert result.stdout.startswith("Return the")
    assert len(result.stdout) > 20
    # One line, and no progress where standard error is not a terminal.
    line = r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s, seed 1, engine fastgen\n"
    assert re.fullmatch(line, result.stderr)
    assert fastgen("infer", "--prompt", "Return the", "--seed", 1).stdout == result.stdout


def test_json_is_what_the_generator_gives(tiny: Any) -> None:
    document = fastgen(
        "infer", "--model_name_or_path", tiny.directory, "--prompt", "Return é", "--prompt", "中",
        "--seed", 5, "--topk", 7, "--topp", 0.9, "--temperature", 1.5, "--max_length", 11,
        "--min_length", 3, "--repetition_penalty", 1.2, "--num_return_sequences", 2, "--json",
    ).document  # fmt: skip
    with Generator.from_pretrained(tiny.directory) as generator:
        expected = generator.generate(
            ["Return é", "中"], decode_strategy="sampling", seed=5, top_k=7, top_p=0.9,
            temperature=1.5, max_length=11, min_length=3, repetition_penalty=1.2,
            num_return_sequences=2,
        )  # fmt: skip
    assert document["engine"] == "fastgen"
    assert document["prompts"] == ["Return é", "中"]
    for name in ("texts", "token_ids", "finish_reasons", "seed", "prompt_ids", "num_tokens"):
        assert document[name] == getattr(expected, name), name
    assert document["scores"] == pytest.approx(expected.scores)
    assert document["tokens_per_second"] == pytest.approx(
        document["num_tokens"] / document["seconds"]
    )
    assert document["versions"]["fastgen"]


def test_spellings_of_options(tiny: Any) -> None:
    plain = ("infer", "--json", "--seed", 3, "--prompt", "a", "--temperature", 3)
    one = fastgen(
        *plain, "--model_name_or_path", tiny.directory, "--topk", 9, "--topp", 0.8,
        "--max_length", 6,
    ).document  # fmt: skip
    two = fastgen(
        *plain, "--model-name-or-path", tiny.directory, "--top_k", 9, "--top-p", 0.8,
        "--max_out_len", 6,
    ).document  # fmt: skip
    assert one["token_ids"] == two["token_ids"]


def test_without_a_prompt_the_start_token_is_one(tiny: Any) -> None:
    arguments = ("infer", "--model_name_or_path", tiny.directory, "--json", "--batch_size", 3)
    document = fastgen(*arguments).document
    assert document["prompts"] == [None] * 3
    assert document["prompt_ids"] == [[0]] * 3
    assert document["seed"] >= 0
    start = fastgen(*arguments, "--start_token", "R", module="fastgen").document
    with Generator.from_pretrained(tiny.directory) as generator:
        assert generator.tokenizer is not None
        assert start["prompt_ids"] == [generator.tokenizer.encode("R")] * 3


def test_an_end_token_ends(tiny: Any) -> None:
    arguments = ("infer", "--model_name_or_path", tiny.directory, "--json", "--prompt", "a",
                 "--decode_strategy", "greedy_search", "--max_length", 9)  # fmt: skip
    free = fastgen(*arguments).document["token_ids"][0]
    tokens = json.loads((tiny.directory / "tokenizer.json").read_text())["model"]["vocab"]
    names = {token: name for name, token in tokens.items()}
    end = free[3]
    document = fastgen(*arguments, "--end_token", names[end]).document
    assert document["token_ids"] == [free[: free.index(end) + 1]]
    assert document["finish_reasons"] == ["eos"]


def test_blocks_of_text(tiny: Any) -> None:
    result = fastgen(
        "infer", "--model_name_or_path", tiny.directory, "--prompt_file", "-", "--max_length", 4,
        "--num_return_sequences", 2, "--end_token", "R", stdin="first\n\nsecond é\n",
    )  # fmt: skip
    headers = [line.split(" (")[0] for line in result.stdout.splitlines() if "==> " in line]
    assert headers == [
        f"==> prompt {prompt}, sequence {sequence}" for prompt in (0, 1) for sequence in (0, 1)
    ]
    assert result.stdout.count("\nsecond é") == 2


def test_lines_end_where_the_library_ends_them(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfReturn\xe2\x80\xa8 a\r\n\n \t\nx\x1cy\x0b z\n")
    document = fastgen("infer", "--model_name_or_path", tiny.directory, "--prompt_file", file,
                       "--max_length", 2, "--json").document  # fmt: skip
    assert document["prompts"] == ["Return\u2028 a", "x\x1cy\x0b z"]


@pytest.mark.parametrize(
    ("closed", "code", "said"),
    [
        ("<&-", 1, "prompt_file - cannot be read: standard input is closed"),
        (">&-", 0, "tokens/s"),
        ("2>&-", 0, ""),
    ],
)
def test_closed_streams(tiny: Any, closed: str, code: int, said: str) -> None:
    words = [sys.executable, "-m", "fastgen", "infer", "--model_name_or_path", tiny.directory]
    words += ["--max_length", "2"]
    words += ["--prompt_file", "-"] if closed == "<&-" else ["--prompt", "Return"]
    line = " ".join(shlex.quote(str(word)) for word in words)
    result = subprocess.run(["sh", "-c", f"{line} {closed}"], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert closed != "2>&-" or result.stdout.startswith("Return")


def test_without_a_tokenizer_ids_are_printed(bare: Any) -> None:
    result = fastgen("infer", "--model_name_or_path", bare.directory, "--start_token", 7,
                     "--max_length", 5)  # fmt: skip
    assert result.code == 0
    assert len(list(map(int, result.stdout.split()))) == 5


def test_the_module_is_a_command_too(tiny: Any) -> None:
    result = fastgen("--model_name_or_path", tiny.directory, "--prompt", "a", "--max_length", 2,
                     module="fastgen.infer")  # fmt: skip
    assert (result.code, result.stdout[0]) == (0, "a")
    bad = fastgen("--topk", -1, module="fastgen.infer")
    assert (bad.code, bad.stdout) == (1, "")
    assert bad.stderr == "fastgen infer: top_k is -1: it must be at least 0; 0 switches it off\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--topk", "-1"], "top_k is -1: it must be at least 0; 0 switches it off"),
        (["--topp", "1.5"], "top_p is 1.5: it must be between 0 and 1"),
        (["--temperature", "0"], "temperature is 0: it must be greater than 0"),
        (["--temperature", "nan"], "temperature is NaN: it must be a number"),
        (["--max_length", "0"], "max_length is 0: it must be at least 1"),
        (["--max_length", "4000"], "max_length"),
        (["--prompt", ""], "prompt is '': it must have at least one token"),
        (["--start_token", "no such"], "start_token is 'no such': it must be a token of the voc"),
        (["--end_token", "no such"], "end_token is 'no such': it must be a token of the vocabul"),
        (["--isa", "sse9"], "sse9"),
        (["--weight_dtype", "int3"], "weight_dtype=int3 is not one that device=cpu has: float32, "),
        (["--cache_dtype", "int4"], "cache_dtype=int4 is not one that device=cpu has: float32, fl"),
        (["--engine", "paddlenlp", "--cache_dtype", "int8"], "cache_dtype is 'int8': --engine pad"),
        (["--device", "tpu"], "device=tpu is not one of: cpu, cuda, cuda:<index>"),
        (["--device", "cuda", "--isa", "avx2"], "isa=avx2 is for device=cpu"),
        (["--engine", "paddlenlp", "--device", "cuda"], "device is 'cuda' and the weights are"),
        (["--use_fp16_decoding", "--weight_dtype", "int4"], "weight_dtype is 'int4': only one of"),
        (["--decoding_lib", "x.so"], "decoding_lib is 'x.so': it belongs to --engine paddle-op"),
        (["--engine", "paddlenlp", "--isa", "avx2"], "isa is 'avx2': --engine paddlenlp uses Pad"),
        (["--model_name_or_path", "nowhere"], "'nowhere' is neither a directory nor a model kno"),
        (["--prompt", "\udcff\udcfeabc"], "is not UTF-8: surrogates not allowed"),
        (["--threads", "99999999999"], "num_threads is 99999999999: it must be from 1 to 1024"),
        (["--temperature", "inf"], "temperature is inf: it must be greater than 0, and a finite"),
        (["--prompt_file", "nowhere"], "prompt_file nowhere cannot be read: No such file"),
        (["--prompt_file", "-"], "prompt_file - holds no prompt"),
        (["--seed", "-3"], "seed is -3: it must be between 0 and 2^64 - 1"),
        (["--decode_strategy", "greedy_search", "--num_return_sequences", "2"], "num_return_seq"),
    ],
)
def test_errors_are_one_sentence(tiny: Any, arguments: list[str], sentence: str) -> None:
    model = () if "--model_name_or_path" in arguments else ("--model_name_or_path", tiny.directory)
    result = fastgen("infer", *model, *arguments)
    assert (result.code, result.stdout) == (1, "")
    assert result.stderr.startswith("fastgen: ")
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr


def test_an_unknown_isa_in_the_environment(tiny: Any) -> None:
    result = fastgen("infer", "--model_name_or_path", tiny.directory, FASTGEN_ISA="mmx")
    assert (result.code, result.stdout) == (1, "")
    assert "FASTGEN_ISA" in result.stderr
    assert "mmx" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["infer", "--no_such_option"],
        ["infer", "--engine", "abacus"],
        ["infer", "--batch_size", "0"],
        ["infer", "--topk", "many"],
        ["infer", "--decode_strategy", "beam_search"],
        ["convert", "only-one"],
        ["bench", "--batch-sizes", "1,x"],
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    result = fastgen(*arguments)
    assert (result.code, result.stdout) == (2, "")
    assert "Usage: fastgen" in result.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_there_was(slow: Any, as_json: bool) -> None:
    command = [sys.executable, "-m", "fastgen", "infer", "--model_name_or_path",
               str(slow.directory), "--prompt", "Return", "--max_length", "39000",
               "--seed", "1", *(["--json"] if as_json else [])]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # Start and load take well below two seconds of processor time, the request far more.
    deadline = time.monotonic() + 120
    while psutil.Process(process.pid).cpu_times().user < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - begin < 5
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert stderr.rstrip().endswith(b"fastgen: interrupted")
    if as_json:
        document = json.loads(stdout)
        assert document["interrupted"] is True
        assert document["finish_reasons"] == ["cancelled"]
        assert 0 < document["num_tokens"] == len(document["token_ids"][0]) < 39000
        assert len(document["texts"][0]) > 0
    else:
        assert stdout.startswith(b"Return")
        assert len(stdout) > 100


def test_a_reader_that_goes_away(tiny: Any) -> None:
    command = (
        f"{sys.executable} -m fastgen infer --model_name_or_path {tiny.directory} "
        "--batch_size 64 --max_length 90 --temperature 9 --topk 0 | head -c 1"
    )
    done = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert len(done.stdout) == 1
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


# ---- The other commands ------------------------------------------------------------------------


def test_info(tmp_path: Path) -> None:
    document = fastgen(
        "info", "--json", FASTGEN_CACHE=str(tmp_path), FASTGEN_ISA="generic"
    ).document
    assert document["isa"] == "generic"
    assert document["isas"][0] == {"name": "generic", "supported": True}
    assert document["threads"] >= 1
    assert document["library"]["version"] == document["fastgen"]
    assert document["op_cache"] == str(tmp_path / "op")
    assert document["op_libraries"] == []
    assert document["memory"]["total"] > document["memory"]["available"] > 0
    text = fastgen("info")
    assert text.code == 0
    assert "kernel sets:" in text.stdout
    wrong = fastgen("info", "--json", FASTGEN_ISA="mmx").document
    assert wrong["isa"] is None
    assert "mmx" in wrong["error"]


def test_info_build() -> None:
    document = fastgen("info", "--build", "--json").document
    assert set(document) == {
        *("version", "commit", "source_date_epoch", "compiler", "cmake", "system"),
        *("build_type", "flags", "shared", "kernels", "cuda"),
    }
    assert document["version"] == fastgen("info", "--json").document["fastgen"]
    assert re.fullmatch(r"(GNU|Clang) [0-9.]+", document["compiler"])
    assert "-ffp-contract=off" in document["flags"].split()
    assert "/" not in json.dumps(document), "a path of the build"
    isas = [isa["name"] for isa in fastgen("info", "--json").document["isas"]]
    assert list(document["kernels"]) == isas
    text = fastgen("info", "--build").stdout
    assert f"compiler:            {document['compiler']}\n" in text
    assert all(f"kernels {isa}:" in text for isa in isas)


def test_version() -> None:
    assert (
        fastgen("--version").stdout == f"fastgen {fastgen('info', '--json').document['fastgen']}\n"
    )


def test_convert(tiny: Any, tmp_path: Path) -> None:
    result = fastgen("convert", tiny.directory, tmp_path / "out")
    assert (result.code, result.stdout) == (0, "")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = fastgen("convert", tiny.directory, tmp_path / "out")
    assert again.code == 1
    assert again.stderr.endswith("out exists: give --force to replace it\n")
    assert fastgen("convert", tiny.directory, tmp_path / "out", "--force").code == 0
    assert fastgen("convert", "nowhere", tmp_path / "other").code == 1


def test_convert_to_fewer_bits(tiny: Any, tmp_path: Path) -> None:
    target = tmp_path / "int8"
    result = fastgen("convert", "--weight_dtype", "int8", tiny.directory, target)
    assert (result.code, result.stdout) == (0, "")
    assert result.stderr.endswith(" MB of weights, int8\n")
    described = fastgen("info", "--json", "--model_name_or_path", target).document["model"]
    assert described == {
        "directory": str(target),
        "weight_dtype": "int8",
        "bytes": (target / "model.safetensors").stat().st_size,
    }
    text = fastgen("info", "--model_name_or_path", target).stdout
    assert re.search(r"^weights: +[\d.]+ MB, type int8$", text, re.M)
    request = ("infer", "--prompt", "Return", "--seed", "3", "--json", "--model_name_or_path")
    ahead = fastgen(*request, target).document
    loaded = fastgen(*request, tiny.directory, "--weight_dtype", "int8").document
    assert ahead["token_ids"] == loaded["token_ids"]
    export = fastgen("export", "--model_name_or_path", target,
                     "--inference_model_dir", tmp_path / "export")  # fmt: skip
    assert export.code == 1
    assert "rounded to int8, which only the engine reads" in export.stderr
    assert fastgen("convert", "--weight_dtype", "int3", tiny.directory, target).code == 2


def test_bench(tiny: Any) -> None:
    arguments = ("bench", tiny.directory, "--batch-sizes", "1,3", "--steps", 4, "--prefill", 20,
                 "--rounds", 2, "--bandwidth-mib", 16)  # fmt: skip
    document = fastgen(*arguments, "--json").document
    assert [entry["batch_size"] for entry in document["decode"]] == [1, 3]
    for entry in document["decode"]:
        speed = entry["steps_per_second"]
        assert len(speed["values"]) == 2
        assert entry["tokens_per_second"]["best"] == entry["batch_size"] * max(speed["values"])
        # Of the six measurements, those before and after this run.
        bandwidth = document["read_bandwidth"]["values"]
        for i, steps_per_second in enumerate(speed["values"]):
            first = 3 * i + int(entry["batch_size"] == 3)
            share = entry["bytes_per_step"] * steps_per_second / max(bandwidth[first : first + 2])
            assert entry["bandwidth_share"]["values"][i] == pytest.approx(share)
    assert len(document["read_bandwidth"]["values"]) == 6
    assert document["prefill"]["length"] == 20
    text = fastgen(*arguments)
    assert text.code == 0
    assert "of read bandwidth" in text.stdout
    too_long = fastgen("bench", tiny.directory, "--steps", 200)
    assert too_long.code == 1
    assert "steps is 200 and prefill is 0: they need 217 positions and the model has 96" in (
        too_long.stderr
    )


def test_random_models_of_bench_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "small", (2, 64, 4))
    config, tensors = bench.random_model("small")
    with Generator.from_tensors(config, tensors) as generator:
        expected = gpt2_logits(config, tensors, [1, 50256, 7])
        assert normalised_error(generator.logits([1, 50256, 7]), expected) < 1e-10


# ---- Engines of Paddle -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _paddlenlp() -> None:
    import zlib  # noqa: F401  (before Paddle)

    pytest.importorskip("paddle")
    pytest.importorskip("paddlenlp")


@pytest.mark.usefixtures("_paddlenlp")
@pytest.mark.parametrize("engine", ["paddlenlp", "paddle-op"])
def test_engines_agree(make_model: Callable[..., Any], tiny: Any, engine: str) -> None:
    arguments = ["infer", "--model_name_or_path", tiny.directory, "--json", "--prompt", "Return é",
                 "--prompt", "中", "--prompt", "a b c", "--decode_strategy", "greedy_search",
                 "--max_length", 15, "--min_length", 2, "--repetition_penalty", 1.3]  # fmt: skip
    expected = fastgen(*arguments).document
    actual = fastgen(*arguments, "--engine", engine).document
    for name in ("prompts", "prompt_ids", "token_ids", "texts", "finish_reasons"):
        assert actual[name] == expected[name], name
    from fastgen.testing.paddlenlp import GREEDY_BY_LOGITS

    if engine == "paddle-op" or GREEDY_BY_LOGITS:
        assert actual["scores"] == pytest.approx(expected["scores"], rel=1e-3)
    assert actual["engine"] == engine


@pytest.mark.usefixtures("_paddlenlp")
def test_the_op_draws_what_the_engine_draws(tiny: Any) -> None:
    arguments = ["infer", "--model_name_or_path", tiny.directory, "--json", "--prompt", "Return é",
                 "--prompt", "中", "--temperature", 2, "--topk", 50, "--topp", 0.95, "--seed", 4,
                 "--num_return_sequences", 3, "--max_length", 12]  # fmt: skip
    expected = fastgen(*arguments).document
    actual = fastgen(*arguments, "--engine", "paddle-op").document
    assert actual["token_ids"] == expected["token_ids"]
    assert actual["seed"] == 4


@pytest.mark.usefixtures("_paddlenlp")
def test_prompts_of_the_reference_are_checked(tiny: Any) -> None:
    """Beyond its tables Paddle would read, or fail within."""
    positions = tiny.config["n_positions"]
    result = fastgen("infer", "--model_name_or_path", tiny.directory, "--engine", "paddlenlp",
                     "--prompt", "a", "--max_length", positions)  # fmt: skip
    assert (result.code, result.stdout) == (1, "")
    assert f"max_length is {positions}, which is more than the model's {positions} positions" in (
        result.stderr
    )


@pytest.mark.usefixtures("_paddlenlp")
def test_bench_beside_paddlenlp(tiny: Any) -> None:
    document = fastgen(
        "bench", tiny.directory, "--steps", 4, "--rounds", 1, "--bandwidth-mib", 16,
        "--peer", "paddlenlp", "--json",
    ).document  # fmt: skip
    (entry,) = document["decode"]
    assert entry["peer"]["name"] == "paddlenlp"
    ours = entry["request_tokens_per_second"]["median"]
    theirs = entry["peer"]["request_tokens_per_second"]["median"]
    assert entry["peer"]["ratio"] == pytest.approx(ours / theirs)


def test_the_default_model_is_the_embedded_one() -> None:
    assert models.resolve(models.DEFAULT_MODEL).name == "gpt2-docstrings"
