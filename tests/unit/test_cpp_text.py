"""Text through C++: fastgen.hpp, the program fastgen-gpt, and the programs of docs/cpp.md."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastgen_tests.programs import ROOT, compile_gpt, compile_program, run

from fastgen import GenerationOptions, Generator, _capi
from fastgen.models import DEFAULT_MODEL, resolve

GUIDE = ROOT / "docs" / "cpp.md"

Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """`build(source)`: a program of a C or C++ file, linked with the library under test."""
    where = tmp_path_factory.mktemp("programs")
    return lambda source, *flags: compile_program(source, where, *flags)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_gpt(tmp_path_factory.mktemp("gpt"))


def snippets(language: str) -> list[str]:
    """The code blocks of the guide in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), flags=re.M | re.S)


# ---- fastgen.hpp -------------------------------------------------------------------------------

TEXT_API = r"""
#include <fastgen/fastgen.hpp>

#include <cstdio>
#include <map>
#include <thread>

#define CHECK(condition) \
  if (!(condition)) return std::printf("line %d: %s\n", __LINE__, #condition), 1

int main(int, char** argv) {
  const fastgen::Model model = fastgen::Model::load(argv[1]);
  fastgen::Tokenizer loaded = fastgen::Tokenizer::load(argv[1]);
  const fastgen::Tokenizer tokenizer = std::move(loaded);
  const std::string text = "naïve café 😀 \xff 中文";
  CHECK(tokenizer.decode(tokenizer.encode(text)) == "naïve café 😀 \xef\xbf\xbd 中文");
  CHECK(tokenizer.encode("").empty());
  CHECK(tokenizer.decode({}).empty());
  CHECK(tokenizer.token_id("<|endoftext|>") >= 0);
  CHECK(tokenizer.token_id("nothing like that") == -1);
  CHECK(tokenizer.vocab_size() > 256);
  const std::vector<std::int32_t> end = tokenizer.encode("<|endoftext|>");
  CHECK(end.size() == 1 && end[0] == tokenizer.token_id("<|endoftext|>"));
  CHECK(tokenizer.decode(end).empty());
  // Longer than a first guess of the size.
  const std::vector<std::int32_t> many(1000, end[0]);
  CHECK(tokenizer.decode(many, false).size() == 13000);

  fastgen::Options options;
  options.decode_strategy = FASTGEN_SAMPLING;
  options.max_length = 24;
  options.num_return_sequences = 3;
  options.has_seed = 1;
  options.seed = 11;
  const std::vector<std::string> prompts = {"Return the", "Open", "naïve 😀 text"};
  std::map<std::size_t, std::string> pieces;
  const auto results = model.generate(tokenizer, prompts, options,
                                      [&](std::size_t index, const std::string& piece) {
                                        pieces[index] += piece;
                                        return !piece.empty();
                                      });
  CHECK(results.size() == 9);
  for (std::size_t i = 0; i < results.size(); ++i) {
    CHECK(results[i].finish_reason == FASTGEN_FINISH_LENGTH);
    CHECK(results[i].text == tokenizer.decode(results[i].tokens));
    CHECK(results[i].text == pieces[i]);
    CHECK(results[i].prompt == tokenizer.encode(prompts[i / 3]));
    CHECK(results[i].sequence == i);
  }

  // The same without a listener, one row at a time, from four threads.
  std::vector<std::thread> threads;
  int equal[4] = {};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const auto again = model.generate(tokenizer, prompts, options, {}, 1 + t);
      for (std::size_t i = 0; i < again.size(); ++i) equal[t] += again[i].text == results[i].text;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int count : equal) CHECK(count == 9);

  // Cancelled by the listener: text and tokens up to there.
  int calls = 0;
  const auto cancelled = model.generate(tokenizer, {"Return the"}, fastgen::Options(options),
                                        [&](std::size_t index, const std::string&) {
                                          return index != 1 || ++calls < 3;
                                        });
  CHECK(calls == 3);
  CHECK(cancelled[0].finish_reason == FASTGEN_FINISH_LENGTH);
  CHECK(cancelled[1].finish_reason == FASTGEN_FINISH_CANCELLED);
  CHECK(!cancelled[1].text.empty() && cancelled[1].tokens.size() < 24);
  CHECK(results[1].text.compare(0, cancelled[1].text.size(), cancelled[1].text) == 0);

  // eos is no text.
  options.num_return_sequences = 1;
  options.forced_eos_token_id = options.eos_token_id = tokenizer.encode("a")[0];
  std::string heard;
  const auto ended = model.generate(tokenizer, {"Return"}, options,
                                    [&](std::size_t, const std::string& piece) {
                                      heard += piece;
                                      return true;
                                    });
  CHECK(ended[0].finish_reason == FASTGEN_FINISH_EOS);
  CHECK(ended[0].tokens.back() == options.eos_token_id);
  const std::vector<std::int32_t> body(ended[0].tokens.begin(), ended[0].tokens.end() - 1);
  CHECK(ended[0].text == tokenizer.decode(body) && ended[0].text == heard);

  // What a listener throws comes out, and the model goes on.
  try {
    model.generate(tokenizer, {"Return"}, options,
                   [](std::size_t, const std::string&) -> bool { throw 5; });
    CHECK(false);
  } catch (int thrown) {
    CHECK(thrown == 5);
  }
  try {
    model.generate(tokenizer, {""}, options);
    CHECK(false);
  } catch (const fastgen::Error& error) {
    CHECK(error.status() == FASTGEN_INVALID_ARGUMENT);
  }
  try {
    fastgen::Tokenizer::load("/no/such/place");
    CHECK(false);
  } catch (const fastgen::Error& error) {
    CHECK(error.status() == FASTGEN_NOT_FOUND);
  }
  return 0;
}
"""


def test_text_in_and_text_out(build: Compile, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "text_api.cc").write_text(TEXT_API)
    program = build(tmp_path / "text_api.cc")
    for directory in (tiny.directory, resolve(DEFAULT_MODEL)):
        assert run(program, directory) == ("", "")


# ---- The guide ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("language", "name"), [("cpp", "guide.cc"), ("c", "guide.c")])
def test_programs_of_the_guide(build: Compile, tmp_path: Path, language: str, name: str) -> None:
    (source,) = snippets(language)
    (tmp_path / name).write_text(source)
    program = build(tmp_path / name)
    directory = resolve(DEFAULT_MODEL)
    output, _ = run(program, directory, "Return a list of")
    assert len(output) > 20
    if language == "c":
        with Generator.from_pretrained(directory) as generator:
            options = GenerationOptions(max_length=32)
            texts = generator.generate("Return a list of", options).texts
        assert texts is not None
        assert output == texts[0] + "\n"
    else:
        assert re.search(r"\n\d+ tokens, seed \d+\n$", output)
    _, message = run(program, "/no/such/place", "x", status=1)
    assert "/no/such/place" in message
    run(program, status=2)


# ---- fastgen-gpt -------------------------------------------------------------------------------


def infer(*arguments: str, stdin: str = "") -> str:
    return run(sys.executable, "-m", "fastgen", "infer", *arguments, stdin=stdin)[0]


@pytest.mark.parametrize(
    "options",
    [
        ["--decode_strategy", "greedy_search"],
        [],
        ["--topk", "0", "--topp", "0.9", "--temperature", "0.8", "--repetition_penalty", "1.3"],
        ["--num_return_sequences", "3", "--batch_size", "1", "--topk", "20"],
    ],
    ids=["greedy", "defaults", "sampled", "several"],
)
def test_gives_the_text_of_fastgen_infer(gpt: Path, options: list[str]) -> None:
    model = str(resolve(DEFAULT_MODEL))
    prompts = ["Return a list of", "Raise an error if the naïve 😀 'text' isn't"]
    common = [*options, "--seed", "7", "--max_length", "40"]
    for prompt in prompts:
        common += ["--prompt", prompt]
    expected = infer("--model_name_or_path", model, *common)
    output, note = run(gpt, "--model_dir", model, *common)
    assert output == expected
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s, seed 7\n", note)


def test_json_is_that_of_fastgen_infer(gpt: Path, tiny: Any) -> None:
    common = ["--seed", "18446744073709551615", "--num_return_sequences", "2", "--json"]
    common += ["--prompt", 'quotes " and \\ and\ttabs', "--prompt", "é\x01😀"]
    ours = json.loads(run(gpt, "--model_dir", tiny.directory, *common)[0])
    theirs = json.loads(infer("--model_name_or_path", str(tiny.directory), *common))
    for key in (
        "prompts", "prompt_ids", "num_return_sequences", "texts", "token_ids", "finish_reasons",
        "seed", "num_tokens", "interrupted",
    ):  # fmt: skip
        assert ours[key] == theirs[key], key
    assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-6)
    assert ours["tokens_per_second"] == pytest.approx(ours["num_tokens"] / ours["seconds"])


def test_prompts_that_are_not_utf8_give_valid_json(gpt: Path, tiny: Any) -> None:
    output, _ = run(gpt, "--model_dir", tiny.directory, "--json", "--prompt", b"a\xffb\xc3")
    assert json.loads(output)["prompts"] == ["a\ufffdb\ufffd"]


def test_prompts_from_files_and_standard_input(gpt: Path, tiny: Any, tmp_path: Path) -> None:
    lines = "Return the\n\n  \nOpen the file\r\nRaise"
    path = tmp_path / "prompts.txt"
    path.write_bytes(lines.encode())
    common = (gpt, "--model_dir", tiny.directory, "--seed=3", "--json")
    wanted = ["Return the", "Open the file", "Raise"]
    documents = [
        json.loads(run(*common, "--prompt_file", path)[0]),
        json.loads(run(*common, "--prompt-file", "-", stdin=lines)[0]),
        json.loads(run(*common, stdin=lines)[0]),
    ]
    assert all(document["prompts"] == wanted for document in documents)
    assert all(document["texts"] == documents[0]["texts"] for document in documents)
    both = json.loads(run(*common, "--prompt", "first", "--prompt_file", path)[0])
    assert both["prompts"] == ["first", *wanted]


def test_streams(gpt: Path, tiny: Any) -> None:
    common = (gpt, "--model_dir", tiny.directory, "--seed", "5", "--topk", "0", "--prompt", "naïve")
    whole, _ = run(*common)
    assert run(*common, "--stream")[0] == whole
    lines = run(*common, "--stream", "--json", "--num_return_sequences", "2")[0].splitlines()
    *pieces, document = map(json.loads, lines)
    for index, text in enumerate(document["texts"]):
        assert "".join(p["text"] for p in pieces if p["index"] == index) == text


def test_benchmark(gpt: Path, tiny: Any) -> None:
    common = (gpt, "--model_dir", tiny.directory, "--bench", "--seed", "1", "--prompt", "a")
    output, _ = run(*common, "--threads", "1", "--isa", "generic")
    assert re.fullmatch(
        r"\d+ tokens, median of 5 runs: [\d.]+ s \(best [\d.]+ s\), [\d.]+ tokens/s, first text "
        r"after [\d.]+ ms; generic, 1 threads\n",
        output,
    )
    document = json.loads(run(*common, "--json")[0])
    assert 0 < document["first_text_seconds"] <= document["seconds"]
    assert document["best_seconds"] <= document["seconds"]


def test_help_names_every_option(gpt: Path) -> None:
    text, _ = run(gpt, "--help")
    assert run(gpt, "-h") == (text, "")
    sources = [ROOT / "csrc" / "apps" / name for name in ("gpt.cc", "command_line.h")]
    names = set(
        re.findall(
            r'line(?:->|\.)(?:Value|Choice|Flag)\("(\w+)"',
            "".join(source.read_text() for source in sources),
        )
    )
    assert {"model_dir", "prompt", "prompt_ids", "seed", "stream"} <= names
    for name in names - {"top_k", "top_p", "max_out_len"}:
        assert f"--{name}" in text, name
    assert run(gpt, "--version")[0] == f"fastgen-gpt {_capi.library_version()}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "--model_dir is missing"),
        (["--colour"], "'--colour' is not an option"),
        (["word"], "'word' is not an option"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "-1"], "--seed is '-1', it must be an integer in range"),
        (["--seed", "18446744073709551616"], "it must be an integer in range"),
        (["--topk", "4x"], "--topk is '4x', it must be an integer in range"),
        (["--temperature", ""], "--temperature is '', it must be a number"),
        (["--json=1"], "'--json=1' is not an option"),
        (["--decode_strategy", "beam"], "it must be greedy_search or sampling"),
        (["--model_dir", "x", "--stream", "--bench"], "--stream and --bench exclude each other"),
        (["--model_dir", "x", "--stream", "--prompt", "a", "--prompt", "b"], "one sequence"),
    ],
)
def test_bad_usage_ends_with_status_2(gpt: Path, arguments: list[str], message: str) -> None:
    output, error = run(gpt, *arguments, status=2)
    assert output == ""
    assert message in error
    assert re.fullmatch(r"fastgen-gpt: [^\n]+; see fastgen-gpt --help\n", error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_dir", "/no/such/place", "--prompt", "a"], "/no/such/place"),
        (["--temperature", "0", "--prompt", "a"], "temperature is 0"),
        (["--topk", "-1", "--prompt", "a"], "top_k is -1"),
        (["--max_length", "5000", "--prompt", "a"], "max_length"),
        (["--isa", "mmx", "--prompt", "a"], "mmx"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt_file", "/no/such/file"], "/no/such/file cannot be read"),
        ([], "holds no prompt"),
    ],
)
def test_failures_end_with_status_1(
    gpt: Path, tiny: Any, arguments: list[str], message: str
) -> None:
    model = [] if "--model_dir" in arguments else ["--model_dir", str(tiny.directory)]
    output, error = run(gpt, *model, *arguments, status=1)
    assert output == ""
    assert message in error
    assert re.fullmatch(r"fastgen-gpt: [^\n]+\n", error)


def test_a_full_disk_is_a_failure(gpt: Path, tiny: Any) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [str(gpt), "--model_dir", str(tiny.directory), "--prompt", "a"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "standard output cannot be written" in done.stderr


def test_ctrl_c_gives_what_there_is(gpt: Path, slow: Any) -> None:
    process = subprocess.Popen(
        [
            *(str(gpt), "--model_dir", str(slow.directory), "--prompt", "a", "--json", "--stream"),
            *("--max_length", "39000", "--seed", "1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begin < 30
    document = json.loads(output.splitlines()[-1])
    assert document["interrupted"]
    assert document["finish_reasons"] == ["cancelled"]
    assert document["texts"][0].startswith(first["text"])
