"""The same tokens through every door: fastgen-gpt, paddle.inference, FasterGPT, Generator and
fastgen-gpt-paddle, for any small model, ragged batch and options."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddlenlp")

import paddle
from fastgen_tests.exports import pad, predict, write_model, write_tokenizer
from fastgen_tests.programs import run
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from fastgen import FasterGPT, GenerationOptions, Generator
from fastgen.convert import to_paddlenlp
from fastgen.export_model import export
from fastgen.generator import GenerationResult
from fastgen.testing import profiles
from fastgen.testing import strategies as fg

HAS_JIT_PROGRAM = not paddle.__version__.startswith("3")
FORMATS = ["pdmodel"] if HAS_JIT_PROGRAM else ["pdmodel", "json"]
#: What both programs and the inputs of an export can be given.
RUNTIME = ("top_k", "top_p", "temperature", "max_length")
#: What FasterGPT and fastgen-gpt are given besides.
OTHERS = (
    "decode_strategy", "min_length", "repetition_penalty", "no_repeat_ngram_size",
    "num_return_sequences", "eos_token_id",
)  # fmt: skip

# As arguments of a program: no NUL. Letters that this Python's Unicode does not know may be letters
# to one tokenizer only.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(blacklist_categories=("Cs", "Cn"), blacklist_characters="\0"),
                min_size=1, max_size=20),
        st.sampled_from(["Return the number", " of items\n", "<|endoftext|>the", "'s list.", "--"]),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@st.composite
def examples(draw: st.DrawFn) -> tuple[fg.Case, list[str] | None, bool, str]:
    """A case, prompts as texts or None, whether options are inputs, and the program's form."""
    # Mostly sampling: it is what has to agree on more than the logits.
    strategy = draw(st.sampled_from(["sampling"] * 4 + ["greedy_search"]))
    case = draw(fg.cases(strategy, large=False, max_new_tokens=8))
    # The programs have no option for these; tests/paddle/test_export.py has them.
    options = dataclasses.replace(
        case.options, seed=case.seed, forced_bos_token_id=-1, forced_eos_token_id=-1
    )
    case = dataclasses.replace(case, options=options)
    texts = draw(st.one_of(st.none(), TEXTS))
    if texts is not None:
        # A vocabulary and positions that hold them: at most four tokens a character.
        shape = dataclasses.replace(case.shape, vocab_size=310, max_position_embeddings=96)
        case = dataclasses.replace(case, shape=shape)
    return case, texts, draw(st.booleans()), draw(st.sampled_from(FORMATS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of 300 tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory / "tokenizer.json"


def arguments(options: GenerationOptions, names: Sequence[str]) -> list[str]:
    return [part for name in names for part in (f"--{name}", str(getattr(options, name)))]


def check_program(
    document: dict[str, Any], expected: GenerationResult, texts: list[str] | None
) -> None:
    assert document["prompt_ids"] == expected.prompt_ids
    assert document["token_ids"] == expected.token_ids
    assert document["finish_reasons"] == expected.finish_reasons
    np.testing.assert_array_equal(np.float32(document["scores"]), np.float32(expected.scores))
    assert document["prompts"] == texts
    assert document["texts"] == (None if texts is None else expected.texts)


def check_array(ids: np.ndarray, scores: np.ndarray, expected: GenerationResult) -> None:
    np.testing.assert_array_equal(ids, expected.to_padded_array())
    np.testing.assert_array_equal(scores[:, 0], np.float32(expected.scores))


@pytest.fixture(scope="module")
def jit_program(request: pytest.FixtureRequest) -> Path | None:
    """fastgen-gpt-paddle; where it cannot be built, the other doors are still compared."""
    try:
        return Path(request.getfixturevalue("gpt_paddle"))
    except pytest.skip.Exception as reason:
        if HAS_JIT_PROGRAM:
            warnings.warn(f"without fastgen-gpt-paddle: {reason}", stacklevel=1)
        return None


# An example takes about a second, most of it for the export and for Paddle to start.
@profiles.share(0.015, suppress_health_check=list(HealthCheck))
@given(example=examples())
def test_every_door_gives_the_same_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    gpt: Path,
    jit_program: Path | None,
    tokenizer: Path,
    example: tuple[fg.Case, list[str] | None, bool, str],
) -> None:
    case, texts, runtime, program_format = example
    options = case.options
    folder = tmp_path_factory.mktemp("doors")
    model = write_model(folder / "model", case.shape, case.recipe, eos_token_id=None)
    if texts is not None:
        shutil.copy(tokenizer, model)
    directory = export(
        model,
        folder / "export",
        options,
        runtime_options=runtime,
        program_format=program_format,
        tokenizer=texts is not None,
    )
    prompts: list[str] | list[list[int]] = case.prompts if texts is None else texts

    with Generator.from_pretrained(model) as generator:
        expected = generator.generate(prompts, options)
    ids = expected.prompt_ids
    with Generator.from_pretrained(directory) as generator:
        again = generator.generate(prompts, options)
    assert (again.token_ids, again.texts) == (expected.token_ids, expected.texts)

    feeds: dict[str, Any] = {}
    if runtime:
        feeds = {name: [getattr(options, name)] for name in RUNTIME}
        feeds["seed"] = np.array([case.seed], dtype=np.uint64).view(np.int64)
    check_array(*predict(directory, ids, **feeds), expected)

    eager = FasterGPT(to_paddlenlp(model)[0], eos_id=-1, pad_id=-1)
    padded, lengths = pad(ids)
    outputs = eager(
        paddle.to_tensor(padded),
        seq_len=paddle.to_tensor(lengths),
        pad_token_id=options.pad_token_id,
        seed=case.seed,
        **{name: getattr(options, name) for name in (*RUNTIME, *OTHERS)},
    )
    check_array(*(output.numpy() for output in outputs), expected)

    if texts is None:
        given_prompts = [
            part for prompt in ids for part in ("--prompt_ids", " ".join(map(str, prompt)))
        ]
    else:
        given_prompts = [part for text in texts for part in ("--prompt", text)]
    command = ["--model_dir", str(directory), "--json", *given_prompts]
    seed = ["--seed", str(case.seed)]
    output, _ = run(gpt, *command, *arguments(options, (*RUNTIME, *OTHERS)), *seed)
    check_program(json.loads(output), expected, texts)

    if jit_program is not None:
        chosen = [*arguments(options, RUNTIME), *seed] if runtime else []
        output, _ = run(jit_program, *command, *chosen)
        check_program(json.loads(output), expected, texts)
    shutil.rmtree(folder)
