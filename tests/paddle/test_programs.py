"""fastgen-gpt and fastgen-gpt-paddle on exports: what they read, print and refuse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddlenlp")

from fastgen_tests.exports import PROMPTS
from fastgen_tests.programs import run

from fastgen import GenerationOptions, Generator
from fastgen.export_model import export

SAMPLING = GenerationOptions(
    decode_strategy="sampling", max_length=9, top_k=12, top_p=0.9, temperature=1.3, seed=11
)
GREEDY = GenerationOptions(max_length=9, top_k=0)
#: The same as options of fastgen-gpt.
SAMPLED = ["--max_length=9", "--topk=12", "--topp=0.9", "--temperature=1.3", "--seed=11"]
TEXTS = ["Return the number", " of items: é 中文 😀", "the<|endoftext|>list"]


def words(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def lines(rows: Sequence[Sequence[int]]) -> str:
    return "".join(f"{words(row)}\n" for row in rows)


def given(option: str, values: Sequence[Any]) -> list[str]:
    return [part for value in values for part in (option, str(value))]


@pytest.fixture(scope="module")
def fixed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with its options inside."""
    return export(source, tmp_path_factory.mktemp("fixed") / "export", SAMPLING)


@pytest.fixture(scope="module")
def flexible(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that takes its options, in the form that Paddle's jit loader reads."""
    return export(
        source,
        tmp_path_factory.mktemp("flexible") / "export",
        SAMPLING,
        runtime_options=True,
        program_format="pdmodel",
    )


@pytest.fixture(scope="module")
def bare(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export without a tokenizer."""
    return export(
        source,
        tmp_path_factory.mktemp("bare") / "export",
        SAMPLING,
        tokenizer=False,
        program_format="pdmodel",
    )


def blocks(texts: Sequence[str], reasons: Sequence[str]) -> str:
    """How several texts are printed."""
    return "".join(
        f"==> prompt {i}, sequence 0 ({reason})\n{prompt}{text}\n\n"
        for i, (prompt, text, reason) in enumerate(zip(TEXTS, texts, reasons))
    )


# ---- fastgen-gpt -------------------------------------------------------------------------------


def test_gpt_text(gpt: Path, fixed: Path) -> None:
    command = (gpt, "--model_dir", fixed, *SAMPLED)
    with Generator.from_pretrained(fixed) as generator:
        expected = generator.generate(TEXTS, SAMPLING)
    assert expected.texts is not None
    output, note = run(*command, *given("--prompt", TEXTS))
    assert output == blocks(expected.texts, expected.finish_reasons)
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s, seed 11\n", note)
    assert run(*command, "--prompt", TEXTS[0])[0] == f"{TEXTS[0]}{expected.texts[0]}\n"
    document = json.loads(run(*command, *given("--prompt", TEXTS), "--json")[0])
    assert document["prompts"] == TEXTS
    assert document["prompt_ids"] == expected.prompt_ids
    assert document["texts"] == expected.texts
    assert document["token_ids"] == expected.token_ids
    assert document["finish_reasons"] == expected.finish_reasons
    assert document["seed"] == 11
    np.testing.assert_array_equal(np.float32(document["scores"]), np.float32(expected.scores))


def test_gpt_token_ids(gpt: Path, bare: Path) -> None:
    command = (gpt, "--model_dir", bare, *SAMPLED, *given("--prompt_ids", map(words, PROMPTS)))
    with Generator.from_pretrained(bare) as generator:
        expected = generator.generate(PROMPTS, SAMPLING)
    assert run(*command)[0] == lines(expected.token_ids)
    document = json.loads(run(*command, "--json")[0])
    assert document["prompts"] is None
    assert document["texts"] is None
    assert document["prompt_ids"] == PROMPTS
    assert document["token_ids"] == expected.token_ids
    one = (gpt, "--model_dir", bare, *SAMPLED, "--prompt_ids", words(PROMPTS[0]))
    assert run(*one, "--stream")[0] == lines(expected.token_ids[:1])
    *pieces, last = map(json.loads, run(*command, "--stream", "--json")[0].splitlines())
    for index, tokens in enumerate(last["token_ids"]):
        assert [p["token_id"] for p in pieces if p["index"] == index] == tokens


def test_gpt_prompts_from_files(gpt: Path, fixed: Path, tmp_path: Path) -> None:
    command = (gpt, "--model_dir", fixed, *SAMPLED, "--json")
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n\n" for text in TEXTS))
    (tmp_path / "ids.txt").write_text(lines(PROMPTS))
    expected = json.loads(run(*command, *given("--prompt", TEXTS))[0])
    text = (tmp_path / "prompts.txt").read_text()
    for arguments, stdin in (
        (("--prompt_file", tmp_path / "prompts.txt"), ""),
        (("--prompt_file=-",), text),
        ((), text),
    ):
        document = json.loads(run(*command, *arguments, stdin=stdin)[0])
        assert document["texts"] == expected["texts"]
    ids = json.loads(run(*command, *given("--prompt_ids", map(words, PROMPTS)))[0])["token_ids"]
    for arguments, stdin in (
        (("--prompt_ids_file", tmp_path / "ids.txt"), ""),
        (("--prompt_ids_file", "-"), lines(PROMPTS)),
    ):
        assert json.loads(run(*command, *arguments, stdin=stdin)[0])["token_ids"] == ids


def test_gpt_batch_size_and_seed(gpt: Path, fixed: Path) -> None:
    command = (gpt, "--model_dir", fixed, *SAMPLED, *given("--prompt", TEXTS), "--json")
    document = json.loads(run(*command)[0])
    for size in (1, 2, 7):
        assert json.loads(run(*command, "--batch_size", size)[0])["texts"] == document["texts"]
    other = json.loads(run(*command, "--seed", "12")[0])
    assert other["token_ids"] != document["token_ids"]
    assert other["seed"] == 12
    drawn = [json.loads(run(*command[:3], "--prompt", "the", "--json")[0]) for _ in range(2)]
    assert drawn[0]["seed"] != drawn[1]["seed"]
    again = run(*command[:3], "--prompt", "the", "--json", "--seed", drawn[0]["seed"])[0]
    assert json.loads(again)["token_ids"] == drawn[0]["token_ids"]


def test_gpt_end_token(gpt: Path, fixed: Path) -> None:
    command = (gpt, "--model_dir", fixed, "--decode_strategy=greedy_search", "--prompt=the")
    free = json.loads(run(*command, "--json", "--eos_token_id=-1")[0])
    assert free["finish_reasons"] == ["length"]
    (tokens,) = free["token_ids"]
    end = tokens[1]
    ended = json.loads(run(*command, "--json", "--eos_token_id", end)[0])
    assert ended["token_ids"] == [tokens[: tokens.index(end) + 1]]
    assert ended["finish_reasons"] == ["eos"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--prompt_ids", "320"], 1, "320"),
        (["--prompt_ids", "-1"], 1, "-1"),
        (["--prompt_ids", ""], 1, "prompt is empty"),
        (["--prompt_ids", words([1] * 48)], 1, "48"),
        (["--prompt_ids", "1 x"], 2, "a token id is 'x', it must be an integer in range"),
        (["--prompt_ids", "1", "--prompt", "a"], 2, "prompts are texts or token ids"),
        (["--prompt_ids_file", "/no/such"], 1, "prompt_ids_file /no/such cannot be read"),
        (["--prompt", "a"], 1, "has no tokenizer"),
        ([], 1, "prompt_file - holds no prompt"),
    ],
)
def test_gpt_errors(gpt: Path, bare: Path, arguments: list[str], status: int, message: str) -> None:
    output, error = run(gpt, "--model_dir", bare, *arguments, status=status)
    assert output == ""
    assert message in error
    assert re.fullmatch(r"fastgen-gpt: [^\n]+\n", error)
    assert ("prompts are token ids (--prompt_ids)" in error) == ("tokenizer" in message)


def test_gpt_damaged_exports(gpt: Path, fixed: Path, tmp_path: Path) -> None:
    for name in ("fastgen.json", "gpt.pdiparams", "vocab.txt", "merges.txt"):
        directory = Path(shutil.copytree(fixed, tmp_path / name))
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2] + b"\xff")
        _, error = run(gpt, "--model_dir", directory, "--prompt", "a", status=1)
        assert f"{directory}/{name}: " in error
        assert error.count("\n") == 1


# ---- fastgen-gpt-paddle ------------------------------------------------------------------------


@pytest.mark.slow
def test_paddle_fixed_options(source: Path, tmp_path: Path, gpt_paddle: Path) -> None:
    for options in (GREEDY, SAMPLING):
        directory = export(source, tmp_path / options.decode_strategy, options)
        command = (gpt_paddle, "--model_dir", directory)
        with Generator.from_pretrained(directory) as generator:
            ids = generator.generate(PROMPTS, options)
            texts = generator.generate(TEXTS, options)
        output = run(*command, *given("--prompt_ids", map(words, PROMPTS)))
        assert output == (lines(ids.token_ids), "")
        assert texts.texts is not None
        output = run(*command, *given("--prompt", TEXTS))
        assert output == (blocks(texts.texts, texts.finish_reasons), "")
    _, error = run(*command, "--topk", 3, "--prompt", "a", status=2)
    assert "need one made with --runtime_options" in error


@pytest.mark.slow
def test_paddle_runtime_options(flexible: Path, tmp_path: Path, gpt_paddle: Path) -> None:
    command = (
        gpt_paddle, "--model_dir", flexible, "--json", "--topk=5", "--topp=0.8",
        "--temperature=2", "--seed", 2**64 - 1, "--max_length", 20,
    )  # fmt: skip
    options = GenerationOptions(
        decode_strategy="sampling", top_k=5, top_p=0.8, temperature=2.0, seed=2**64 - 1,
        max_length=20,
    )  # fmt: skip
    (tmp_path / "ids.txt").write_text(lines(PROMPTS).replace("\n", "\n\n"))
    (tmp_path / "prompts.txt").write_text("\r\n".join(TEXTS))
    with Generator.from_pretrained(flexible) as generator:
        for prompts, arguments in (
            (PROMPTS, ["--prompt_ids_file", tmp_path / "ids.txt"]),
            (TEXTS, ["--prompt_file", tmp_path / "prompts.txt"]),
        ):
            expected = generator.generate(prompts, options)
            document = json.loads(run(*command, *arguments)[0])
            is_text = prompts is TEXTS
            assert document["prompts"] == (TEXTS if is_text else None)
            assert document["texts"] == (expected.texts if is_text else None)
            assert document["prompt_ids"] == expected.prompt_ids
            assert document["token_ids"] == expected.token_ids
            assert document["finish_reasons"] == expected.finish_reasons
            scores = np.float32(document["scores"])
            np.testing.assert_array_equal(scores, np.float32(expected.scores))
        defaults = generator.generate(TEXTS[:1], SAMPLING)
    assert defaults.texts is not None
    # Standard input, and the export's own options.
    for arguments in ([], ["--prompt_file", "-"]):
        output, _ = run(gpt_paddle, "--model_dir", flexible, *arguments, stdin=TEXTS[0])
        assert output == f"{TEXTS[0]}{defaults.texts[0]}\n"


@pytest.mark.slow
def test_paddle_errors(flexible: Path, bare: Path, tmp_path: Path, gpt_paddle: Path) -> None:
    def refused(directory: Path, arguments: list[str], status: int, message: str) -> None:
        output, error = run(gpt_paddle, "--model_dir", directory, *arguments, status=status)
        assert output == ""
        assert message in error
        assert error.count("\n") == 1

    for arguments, status, message in (
        (["--prompt_ids", "320"], 1, "token id 320, it must be from 0 to 319"),
        (["--prompt_ids", "1 x"], 2, "'x', it must be an integer"),
        (["--prompt_ids", words([1] * 48)], 1, "fewer than the model's 48 positions"),
        (["--prompt_ids", ""], 1, "a prompt is empty"),
        (["--prompt", ""], 1, "a prompt is empty"),
        (["--prompt", "a", "--prompt_ids", "1"], 2, "prompts are texts or token ids"),
        (["--prompt", "a", "--temperature", "0"], 1, "temperature is 0"),
        (["--prompt", "a", "--max_length", "48"], 1, "48 positions"),
        (["--seed", "-1"], 2, "--seed is '-1'"),
        (["--prompt", "a", "--op_library", "/nowhere.so"], 1, "/nowhere.so cannot be read"),
        (["--prompt_file", "/no/such"], 1, "prompt_file /no/such cannot be read"),
        ([], 1, "prompt_file - holds no prompt"),
        (["--bogus"], 2, "'--bogus' is not an option"),
    ):
        refused(flexible, arguments, status, message)
    refused(bare, ["--prompt", "a"], 1, "has no tokenizer")
    refused(bare, ["--prompt", "a"], 1, "prompts are token ids (--prompt_ids)")
    _, error = run(gpt_paddle, "--prompt", "a", status=2)
    assert error == ("fastgen-gpt-paddle: --model_dir is missing; see fastgen-gpt-paddle --help\n")
    assert "--prompt_ids_file" in run(gpt_paddle, "--help")[0]
    directory = Path(shutil.copytree(flexible, tmp_path / "export"))
    (directory / "gpt.pdmodel").write_bytes((directory / "gpt.pdmodel").read_bytes()[:500])
    refused(directory, ["--prompt", "a"], 1, "cannot be loaded by Paddle")
