"""Generator: tokens, batches, seeds, text, lifetime, and a sentence for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgen import GenerationInterrupted, GenerationOptions, Generator
from fastgen.errors import NotFoundError
from fastgen.testing.reference import gpt2_logits, greedy_search, normalised_error

PROMPTS = [[5, 6, 7], [300], [9] * 40, [11, 2, 250, 17, 300, 4, 1]]
SAMPLING: dict[str, Any] = {
    "decode_strategy": "sampling",
    "top_k": 0,
    "temperature": 1.5,
    "max_length": 12,
}


# ---- Numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 17, 96])
def test_logits_are_those_of_the_reference(generator: Generator, tiny: Any, length: int) -> None:
    tokens = np.random.default_rng(length).integers(0, 320, size=length)
    actual = generator.logits(tokens)
    assert actual.shape == (length, 320)
    assert actual.dtype == np.float32
    expected = gpt2_logits(tiny.config, tiny.tensors, tokens)
    assert normalised_error(actual, expected) < 1e-10


def test_greedy_tokens_are_those_of_the_reference(generator: Generator, tiny: Any) -> None:
    result = generator.generate(PROMPTS, max_length=20)
    for prompt, tokens, reason in zip(PROMPTS, result.token_ids, result.finish_reasons):
        assert tokens == greedy_search(tiny.config, tiny.tensors, prompt, 20, eos_token_id=0)
        assert reason == ("eos" if tokens[-1] == 0 else "length")


def test_tensors_in_memory_are_the_same_model(generator: Generator, tiny: Any) -> None:
    with Generator.from_tensors(tiny.config, tiny.tensors) as other:
        assert np.array_equal(other.logits(PROMPTS[3]), generator.logits(PROMPTS[3]))
        assert other.tokenizer is None
        with pytest.raises(ValueError, match=r"made without a tokenizer: give token ids"):
            other.generate("text")


def test_half_precision_files_are_read(make_model: Callable[..., Any], tiny: Any) -> None:
    from safetensors.numpy import save_file

    half = {name: array.astype(np.float16) for name, array in tiny.tensors.items()}
    model = make_model()
    save_file(half, str(model.directory / "model.safetensors"))
    with Generator.from_pretrained(model.directory) as generator:
        expected = gpt2_logits(model.config, half, PROMPTS[3])
        assert normalised_error(generator.logits(PROMPTS[3]), expected) < 1e-10


def test_score_of_sampling_is_the_mean_log_probability(generator: Generator, tiny: Any) -> None:
    result = generator.generate(PROMPTS[0], seed=3, **SAMPLING)
    tokens = result.token_ids[0]
    logits = gpt2_logits(tiny.config, tiny.tensors, PROMPTS[0] + tokens)[len(PROMPTS[0]) - 1 : -1]
    log_probs = logits - logits.max(axis=-1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(axis=-1, keepdims=True))
    expected = np.mean([row[token] for row, token in zip(log_probs, tokens)])
    assert result.scores[0] == pytest.approx(expected, rel=1e-4)


# ---- Batches and seeds -------------------------------------------------------------------------


def test_a_ragged_batch_equals_single_runs(generator: Generator) -> None:
    batch = generator.generate(PROMPTS, seed=[7, 8, 9, 10], **SAMPLING)
    for i, prompt in enumerate(PROMPTS):
        alone = generator.generate(prompt, seed=7 + i, **SAMPLING)
        assert alone.token_ids == [batch.token_ids[i]]
        assert alone.scores == [batch.scores[i]]
        assert alone.seed == 7 + i
    assert batch.seed == (7, 8, 9, 10)


def test_prompts_may_come_in_many_forms(generator: Generator) -> None:
    expected = generator.generate([[5, 6, 7], [1, 2, 3]]).token_ids
    forms: list[Any] = [
        ((5, 6, 7), (1, 2, 3)),
        np.array([[5, 6, 7], [1, 2, 3]]),
        [np.array([5, 6, 7], dtype=np.int32), np.array([1, 2, 3], dtype=np.uint8)],
        [[np.int64(5), 6, 7], range(1, 4)],
    ]
    for form in forms:
        assert generator.generate(form).token_ids == expected
    for one in ([5, 6, 7], (5, 6, 7), np.array([5, 6, 7])):
        assert generator.generate(one).token_ids == expected[:1]


def test_one_seed_is_spread_over_rows(generator: Generator) -> None:
    same = [[5, 6, 7]] * 3
    result = generator.generate(same, seed=5, num_return_sequences=2, **SAMPLING)
    assert len({tuple(tokens) for tokens in result.token_ids}) == 6
    assert [list(result.sequences_of(i)) for i in range(3)] == [[0, 1], [2, 3], [4, 5]]
    again = generator.generate(same, seed=5, num_return_sequences=2, **SAMPLING)
    assert again.token_ids == result.token_ids
    # Six rows of one sequence each have the same six draws.
    six = generator.generate([[5, 6, 7]] * 6, seed=5, **SAMPLING)
    assert six.token_ids == result.token_ids
    with pytest.raises(IndexError):
        result.sequences_of(3)


def test_a_list_of_seeds_gives_what_each_gives_alone(generator: Generator) -> None:
    options = GenerationOptions(num_return_sequences=2, **SAMPLING)
    batch = generator.generate(PROMPTS[:2], options, seed=[4, 4])
    for i in range(2):
        alone = generator.generate(PROMPTS[i], options, seed=4)
        assert alone.token_ids == batch.token_ids[2 * i : 2 * i + 2]


def test_no_seed_draws_one_and_reports_it(generator: Generator) -> None:
    first = generator.generate(PROMPTS[0], **SAMPLING)
    second = generator.generate(PROMPTS[0], **SAMPLING)
    assert first.seed != second.seed
    assert generator.generate(PROMPTS[0], seed=first.seed, **SAMPLING).token_ids == first.token_ids


def test_max_batch_size_changes_nothing(generator: Generator) -> None:
    expected = generator.generate(PROMPTS, seed=5, **SAMPLING)
    actual = generator.generate(PROMPTS, seed=5, max_batch_size=1, **SAMPLING)
    assert actual == expected


def test_progress_counts_tokens(generator: Generator) -> None:
    seen: list[tuple[int, int]] = []
    result = generator.generate(
        PROMPTS, max_length=7, eos_token_id=-1, progress=lambda *counts: seen.append(counts)
    )
    assert seen[-1] == (28, 28)
    assert seen == sorted(seen)
    assert result.num_tokens == 28


# ---- Special tokens and padding ----------------------------------------------------------------


def test_eos_ends_a_sequence_and_is_not_in_the_text(generator: Generator) -> None:
    free = generator.generate(PROMPTS[0], max_length=10, eos_token_id=-1)
    eos = free.token_ids[0][4]
    end = free.token_ids[0].index(eos) + 1
    result = generator.generate(PROMPTS[0], max_length=10, eos_token_id=eos)
    assert result.token_ids == [free.token_ids[0][:end]]
    assert result.finish_reasons == ["eos"]
    assert generator.tokenizer is not None
    assert result.texts == [generator.tokenizer.decode(free.token_ids[0][: end - 1])]


def test_the_models_eos_is_the_default(
    make_model: Callable[..., Any], generator: Generator
) -> None:
    eos = generator.generate(PROMPTS[0], max_length=3, eos_token_id=-1).token_ids[0][1]
    with Generator.from_pretrained(make_model(eos_token_id=eos).directory) as other:
        assert other.info.eos_token_id == eos
        assert other.generate(PROMPTS[0], max_length=3).finish_reasons == ["eos"]


def test_min_length_and_forced_tokens(generator: Generator) -> None:
    eos = generator.generate(PROMPTS[0], max_length=1, eos_token_id=-1).token_ids[0][0]
    longer = generator.generate(PROMPTS[0], max_length=6, min_length=4, eos_token_id=eos)
    assert len(longer.token_ids[0]) > 4
    forced = generator.generate(
        [5], max_length=4, forced_bos_token_id=33, forced_eos_token_id=44, eos_token_id=-1
    )
    assert forced.token_ids[0][0] == 33
    assert forced.token_ids[0][3] == 44


def test_padding_is_paddlenlps(generator: Generator) -> None:
    free = generator.generate(PROMPTS, max_length=8, eos_token_id=-1)
    eos = free.token_ids[1][2]
    result = generator.generate(PROMPTS, max_length=8, eos_token_id=eos, pad_token_id=319)
    array = result.to_padded_array()
    assert array.dtype == np.int64
    assert array.shape == (4, max(map(len, result.token_ids)))
    for row, tokens in zip(array, result.token_ids):
        assert row.tolist() == tokens + [319] * (array.shape[1] - len(tokens))
    assert (result.to_padded_array(pad=1)[1, len(result.token_ids[1]) :] == 1).all()


def test_padding_falls_back_to_eos(generator: Generator, bare: Any) -> None:
    assert generator.generate(PROMPTS[0], eos_token_id=7).pad_token_id == 7
    assert generator.generate(PROMPTS[0]).pad_token_id == 0
    with Generator.from_pretrained(bare.directory) as other:
        assert other.info.eos_token_id is None
        result = other.generate(PROMPTS[0])
        assert result.pad_token_id is None
        assert result.to_padded_array().tolist() == result.token_ids


# ---- Text --------------------------------------------------------------------------------------


def test_text_in_text_out(generator: Generator) -> None:
    assert generator.tokenizer is not None
    prompts = ["Return the naïve 中文 😀", "<|endoftext|>"]
    ids = [generator.tokenizer.encode(text) for text in prompts]
    assert ids[1] == [0]
    assert generator.tokenizer.decode(ids[0]) == prompts[0]
    by_text = generator.generate(prompts, max_length=9)
    by_ids = generator.generate(ids, max_length=9)
    assert by_text == with_seed(by_ids, by_text.seed)
    assert by_text.prompt_ids == ids
    one = generator.generate(prompts[0], max_length=9)
    assert one.texts == by_text.texts[:1] if by_text.texts else False


def with_seed(result: Any, seed: Any) -> Any:
    """`result` with another seed: greedy tokens do not depend on it."""
    import dataclasses

    return dataclasses.replace(result, seed=seed)


@pytest.mark.parametrize("seed", range(12))
def test_streaming_is_the_same_text(generator: Generator, seed: int) -> None:
    # At this temperature most tokens are stray bytes: half characters everywhere.
    options = GenerationOptions(
        decode_strategy="sampling", top_k=0, temperature=30.0, max_length=60, seed=seed
    )
    pieces = list(generator.stream("Return é", options))
    result = generator.generate("Return é", options)
    assert result.texts == ["".join(pieces)]


def test_streaming_never_cuts_a_character(generator: Generator) -> None:
    assert generator.tokenizer is not None
    text = "aé中😀b\ufffdc 🎉 naïve"
    stream = generator.tokenizer.stream()
    ids = generator.tokenizer.encode(text)
    assert len(ids) > len("aé")
    pieces = [stream.push([token]) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    # The one U+FFFD is that of the text, not of a cut.
    assert "".join(pieces).count("\ufffd") == 1
    unfinished = generator.tokenizer.stream()
    first_byte = generator.tokenizer.encode("😀")[:1]
    assert unfinished.push(first_byte) == ""
    assert unfinished.flush() == "\ufffd"
    assert unfinished.flush() == ""


def test_a_stream_may_be_left(generator: Generator) -> None:
    for _ in generator.stream("Return", max_length=50, eos_token_id=-1):
        break
    assert generator.generate("Return", max_length=2).texts is not None


def test_a_stream_gives_one_sequence(generator: Generator) -> None:
    with pytest.raises(ValueError, match=r"^stream\(\) gives one sequence: the request asks for 2"):
        generator.stream(["a", "b"])
    with pytest.raises(ValueError, match=r"^stream\(\) gives one sequence: the request asks for 3"):
        generator.stream("a", num_return_sequences=3, **SAMPLING)


def test_vocab_and_merges_are_a_tokenizer(tiny: Any, make_model: Callable[..., Any]) -> None:
    model = make_model(seed=1)
    spec = json.loads((tiny.directory / "tokenizer.json").read_text())["model"]
    (model.directory / "vocab.json").write_text(json.dumps(spec["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["merges"]]
    (model.directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    with (
        Generator.from_pretrained(model.directory) as split,
        Generator.from_pretrained(tiny.directory) as whole,
    ):
        assert split.tokenizer is not None
        assert whole.tokenizer is not None
        for text in ("Return the é 中文 😀.", "<|endoftext|>Return", "  two  spaces\n"):
            ids = whole.tokenizer.encode(text)
            assert split.tokenizer.encode(text) == ids
            assert split.tokenizer.decode(ids) == whole.tokenizer.decode(ids)
    for text in ('{"eos_token": ', "[" * 100_000, "[]"):
        (model.directory / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json is not (a )?JSON"):
            Generator.from_pretrained(model.directory)


def test_without_a_tokenizer_ids_work(bare: Any) -> None:
    with Generator.from_pretrained(bare.directory) as generator:
        result = generator.generate(PROMPTS, max_length=4)
        assert result.texts is None
        assert [len(tokens) for tokens in result.token_ids] == [4] * 4
        with pytest.raises(ValueError, match=r"bare has no tokenizer \(tokenizer.json, or merges"):
            generator.generate("text")
        with pytest.raises(ValueError, match=r"has no tokenizer"):
            generator.stream([1, 2])


def test_sentencepiece_is_named(make_model: Callable[..., Any]) -> None:
    model = make_model()
    (model.directory / "sentencepiece.model").write_bytes(b"...")
    with Generator.from_pretrained(model.directory) as generator:
        with pytest.raises(ValueError, match=r"has a sentencepiece.model, which fastgen does not"):
            generator.generate("你好")
        assert generator.generate([1, 2, 3], max_length=2).num_tokens == 2


def test_a_broken_tokenizer_is_named(make_model: Callable[..., Any]) -> None:
    model = make_model()
    (model.directory / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer: "):
        Generator.from_pretrained(model.directory)


# ---- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([], "prompts is empty: there must be at least one prompt"),
        ([[]], "the prompt is empty: it must have at least one token"),
        ("", "the prompt is empty: it must have at least one token"),
        ([[1], []], "prompt 1 is empty: it must have at least one token"),
        (["a", ""], "prompt 1 is empty: it must have at least one token"),
        ([1, 320], "the prompt has token id 320: it must be between 0 and 319"),
        ([[1], [2, -1]], "prompt 1 has token id -1: it must be between 0 and 319"),
        ([2**40], "the prompt has token id 1099511627776: it must be between 0 and 319"),
        ([[1.5, 2]], "the prompt is [1.5, 2]: it must be a text or a sequence of integers"),
        ([[1], [True]], "prompt 1 is [True]: it must be a text or a sequence of integers"),
        ([1, [2]], "prompt 0 is 1: it must be a text or a sequence of integers"),
        (["a", None], "prompt 1 is None: it must be a text or a sequence of integers"),
        ([b"a"], "the prompt is b'a': it must be a text or a sequence of integers"),
        (7, "prompts is of type int: it must be a text, token ids, or a list of either"),
        (None, "prompts is of type NoneType: it must be"),
        (b"text", "prompts is of type bytes: it must be"),
        ({"a": 1}, "prompts is of type dict: it must be"),
        (np.zeros((1, 2, 3), int), "prompts is an array of 3 dimensions: it must have one"),
        (np.zeros(3), "the prompt is array([0., 0., 0.]): it must be a text or a sequence"),
    ],
)
def test_bad_prompts_are_named(generator: Generator, prompts: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the sentence is compared below)
        generator.generate(prompts)
    assert str(caught.value).startswith(sentence)
    assert generator.generate([1], max_length=1).num_tokens == 1


def test_positions_run_out(generator: Generator) -> None:
    with pytest.raises(ValueError, match=r"96") as caught:
        generator.generate([[1], [1] * 90], max_length=10)
    assert str(caught.value).startswith("prompt 1: ")
    assert "max_length" in str(caught.value)
    assert generator.generate([1] * 90, max_length=6, eos_token_id=-1).num_tokens == 6
    with pytest.raises(ValueError, match=r"97"):
        generator.logits([1] * 97)
    with pytest.raises(ValueError, match=r"^token_ids is 'abc': it must be a text or a sequence"):
        generator.logits("abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["eos_token_id", "forced_bos_token_id", "forced_eos_token_id"])
def test_special_tokens_outside_the_vocabulary(generator: Generator, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is 320"):
        generator.generate([1], **{name: 320})


def test_bad_options_of_a_call(generator: Generator) -> None:
    with pytest.raises(ValueError, match=r"^'no_such' is not an option"):
        generator.generate([1], no_such=1)
    with pytest.raises(ValueError, match=r"^max_batch_size is 0: it must be from 1 to 4096"):
        generator.generate([1], max_batch_size=0)
    with pytest.raises(
        ValueError, match=r"^seed is a list of 2: there must be one for each of the 1"
    ):
        generator.generate([1], seed=[1, 2])


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"isa": "sse9"}, ValueError, "sse9"),
        ({"device": "abacus"}, (ValueError, RuntimeError), "abacus"),
        ({"weight_dtype": "float8"}, (ValueError, RuntimeError), "float8"),
        ({"num_threads": 0}, ValueError, "num_threads is 0: it must be from 1 to 1024"),
        ({"isa": 3}, ValueError, "isa is 3: it must be a string"),
        ({"device": None}, ValueError, "device is None: it must be a string"),
        ({"num_threads": 1.5}, ValueError, "num_threads is 1.5: it must be from 1 to 1024"),
    ],
)
def test_bad_load_options(tiny: Any, options: dict[str, Any], kind: Any, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        Generator.from_pretrained(tiny.directory, **options)


def test_unknown_isa_in_the_environment(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_ISA", "mmx")
    with pytest.raises(ValueError, match=r"FASTGEN_ISA.*mmx|mmx.*FASTGEN_ISA"):
        Generator.from_pretrained(tiny.directory)
    monkeypatch.setenv("FASTGEN_ISA", "generic")
    with Generator.from_pretrained(tiny.directory) as generator:
        assert generator.info.isa == "generic"


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is neither a directory nor a model known by"):
        Generator.from_pretrained(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"is a file: a model is a directory"):
        Generator.from_pretrained(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"config\.json"):
        Generator.from_pretrained(tmp_path / "empty")


def test_files_that_are_not_models(make_model: Callable[..., Any]) -> None:
    model = make_model("truncated")
    weights = model.directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Generator.from_pretrained(model.directory)
    model = make_model("other_shape")
    config = {**model.config, "n_layer": 3}
    (model.directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"h\.2\."):
        Generator.from_pretrained(model.directory)


def test_paddlenlp_checkpoints_are_to_be_converted(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "model_state.pdparams").write_bytes(b"")
    (directory / "model_config.json").write_text("{}")
    command = f"fastgen convert {directory} {directory}-fastgen"
    with pytest.raises(
        ValueError, match=r"is a checkpoint of PaddleNLP: convert it with"
    ) as caught:
        Generator.from_pretrained(directory)
    assert command in str(caught.value)


def test_tensors_of_other_types(tiny: Any) -> None:
    tensors = {**tiny.tensors, "wte.weight": tiny.tensors["wte.weight"].astype(np.float64)}
    with pytest.raises(RuntimeError, match=r"^tensor wte.weight is float64: it must be float32 or"):
        Generator.from_tensors(tiny.config, tensors)


# ---- Life --------------------------------------------------------------------------------------


def test_repr_info_and_close(tiny: Any) -> None:
    generator = Generator.from_pretrained(tiny.directory, num_threads=1)
    assert generator.info.num_threads == 1
    assert generator.info.step_bytes > 0
    assert repr(generator).startswith(f"<fastgen.Generator '{tiny.directory}' layers=2 hidden=48")
    generator.close()
    generator.close()
    assert repr(generator).endswith(" closed>")
    for call in (
        lambda: generator.generate([1]),
        lambda: generator.logits([1]),
        lambda: generator.stream("a"),
    ):
        with pytest.raises(ValueError, match=r"^the Generator is closed: load the model again"):
            call()


def test_files_may_go_after_loading(tiny: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny.directory, copy)
    with Generator.from_pretrained(copy) as generator:
        expected = generator.generate(PROMPTS).token_ids
        shutil.rmtree(copy)
        assert generator.generate(PROMPTS).token_ids == expected


def test_loading_reports_progress(tiny: Any) -> None:
    seen: list[tuple[int, int]] = []
    Generator.from_pretrained(tiny.directory, progress=lambda *b: seen.append(b)).close()
    assert seen
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_an_exception_in_progress_comes_back(tiny: Any) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyError("from progress")

    with pytest.raises(KeyError, match=r"from progress"):
        Generator.from_pretrained(tiny.directory, progress=fail)


def test_two_threads_on_one_model(generator: Generator) -> None:
    expected = [generator.generate(p, seed=i, **SAMPLING) for i, p in enumerate(PROMPTS)]
    failures: list[Any] = []

    def work(offset: int) -> None:
        for turn in range(6):
            i = (turn + offset) % len(PROMPTS)
            actual = generator.generate(PROMPTS[i], seed=i, **SAMPLING)
            if actual != expected[i]:
                failures.append((i, actual))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_closing_waits_for_running_requests(tiny: Any) -> None:
    generator = Generator.from_pretrained(tiny.directory)
    expected = generator.generate(PROMPTS[0], max_length=80, eos_token_id=-1).token_ids
    pieces = generator.stream(PROMPTS[0], max_length=80, eos_token_id=-1)
    first = next(pieces)
    generator.close()
    assert generator.tokenizer is not None
    assert first + "".join(pieces) == generator.tokenizer.decode(expected[0])


def test_a_forked_child_generates_the_same(generator: Generator) -> None:
    expected = generator.generate(PROMPTS, seed=1, **SAMPLING)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if generator.generate(PROMPTS, seed=1, **SAMPLING) == expected else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while True:
        pid, wait_status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(wait_status) == 0
    assert generator.generate(PROMPTS, seed=1, **SAMPLING) == expected


def test_ctrl_c_leaves_the_model_usable(slow: Any) -> None:
    with Generator.from_pretrained(slow.directory) as generator:
        expected = generator.generate([1, 2, 3], max_length=50).token_ids[0]
        timer = threading.Timer(0.4, signal.raise_signal, [signal.SIGINT])
        timer.start()
        begin = time.monotonic()
        with pytest.raises(GenerationInterrupted) as caught:
            generator.generate([1, 2, 3], max_length=39000)
        assert time.monotonic() - begin < 5
        timer.join()
        assert isinstance(caught.value, KeyboardInterrupt)
        partial = caught.value.result
        assert partial.finish_reasons == ["cancelled"]
        assert 0 < partial.num_tokens < 39000
        shared = min(50, partial.num_tokens)
        assert partial.token_ids[0][:shared] == expected[:shared]
        assert generator.generate([1, 2, 3], max_length=50).token_ids[0] == expected


def test_nothing_is_printed(tiny: Any) -> None:
    program = (
        "import sys; from fastgen import Generator\n"
        "g = Generator.from_pretrained(sys.argv[1])\n"
        "g.generate([[1, 2]], max_length=3)\n"
        "for bad in ([], [[999]], [[1] * 200]):\n"
        "    try: g.generate(bad)\n"
        "    except ValueError: pass\n"
        "    else: raise SystemExit('no error')\n"
        "del g\n"
    )
    command = [sys.executable, "-c", program, str(tiny.directory)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
