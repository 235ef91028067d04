"""Model directories, good and bad: every bad one is refused with a sentence, and nothing is lost.

The bad files are made from a good one by hand, because no writer would make them: truncated,
bit-flipped, foreign, with absurd headers, contradicting their configuration.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import fastgen
from fastgen.errors import ModelFileError, NotFoundError

VOCAB, POSITIONS, HIDDEN, LAYERS, HEADS, INNER = 17, 12, 8, 2, 2, 20
PROMPT = [1, 5, 3]

Tensors = dict[str, np.ndarray]

#: Every example loads a whole model from one directory that the examples share.
FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def make_config(**changes: Any) -> dict[str, Any]:
    """A HuggingFace configuration; a value of `...` leaves the key out."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": INNER,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 16,
        "eos_token_id": 16,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def make_tensors(prefix: str = "transformer.", dtype: Any = np.float32) -> Tensors:
    """Random weights with HuggingFace's names. Their values do not depend on the arguments."""
    rng = np.random.default_rng(7)

    def random(*shape: int) -> np.ndarray:
        # Of few bits, so that half precision holds the same values.
        return (rng.integers(-32, 33, shape) / 64).astype(dtype)

    tensors = {
        f"{prefix}wte.weight": random(VOCAB, HIDDEN),
        f"{prefix}wpe.weight": random(POSITIONS, HIDDEN),
    }
    for i in range(LAYERS):
        for name, shape in (
            ("ln_1", (HIDDEN,)),
            ("attn.c_attn", (HIDDEN, 3 * HIDDEN)),
            ("attn.c_proj", (HIDDEN, HIDDEN)),
            ("ln_2", (HIDDEN,)),
            ("mlp.c_fc", (HIDDEN, INNER)),
            ("mlp.c_proj", (INNER, HIDDEN)),
        ):
            tensors[f"{prefix}h.{i}.{name}.weight"] = random(*shape)
            tensors[f"{prefix}h.{i}.{name}.bias"] = random(shape[-1])
    tensors[f"{prefix}ln_f.weight"] = random(HIDDEN)
    tensors[f"{prefix}ln_f.bias"] = random(HIDDEN)
    return tensors


def to_paddlenlp(tensors: Mapping[str, np.ndarray], prefix: str, fused: bool) -> Tensors:
    """HuggingFace's tensors under PaddleNLP's names, q, k and v apart or interleaved by head."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        parts = name.removeprefix("transformer.").split(".")
        kind = parts[-1]
        if parts[0] in ("wte", "wpe"):
            word = {"wte": "word", "wpe": "position"}[parts[0]]
            renamed[f"{prefix}embeddings.{word}_embeddings.weight"] = value
        elif parts[0] == "ln_f":
            renamed[f"{prefix}decoder.norm.{kind}"] = value
        else:
            layer = f"{prefix}decoder.layers.{parts[1]}."
            role = ".".join(parts[2:-1])
            if role != "attn.c_attn":
                word = {
                    "ln_1": "norm1",
                    "ln_2": "norm2",
                    "attn.c_proj": "self_attn.out_proj",
                    "mlp.c_fc": "linear1",
                    "mlp.c_proj": "linear2",
                }[role]
                renamed[f"{layer}{word}.{kind}"] = value
            elif fused:
                by_head = value.reshape(-1, 3, HEADS, HIDDEN // HEADS).swapaxes(1, 2)
                renamed[f"{layer}self_attn.qkv_proj.{kind}"] = by_head.reshape(value.shape).copy()
            else:
                for word, part in zip("qkv", np.split(value, 3, axis=-1)):
                    renamed[f"{layer}self_attn.{word}_proj.{kind}"] = part.copy()
    renamed["lm_head.weight"] = renamed[f"{prefix}embeddings.word_embeddings.weight"].copy()
    return renamed


def safetensors_bytes(header: Any, data: bytes, padding: int = 0) -> bytes:
    """A safetensors file of a header (JSON or bytes) and data that need not belong together."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * padding
    return struct.pack("<Q", len(text)) + text + data


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_model(directory: Path, config: Any = None, tensors: Any = None) -> Path:
    """A model directory; None: the good configuration or tensors, bytes and str: as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    config = make_config() if config is None else config
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / "config.json").write_text(text, encoding="utf-8")
    weights = directory / "model.safetensors"
    if isinstance(tensors, bytes):
        weights.write_bytes(tensors)
    else:
        save_file(tensors or make_tensors(), weights, metadata={"format": "pt"})
    return directory


def load(directory: Path) -> fastgen.Generator:
    return fastgen.Generator.from_pretrained(directory, num_threads=1)


def generate(model: fastgen.Generator) -> list[list[int]]:
    return model.generate([PROMPT], decode_strategy="greedy_search", max_length=6).token_ids


def refused(
    directory: Path,
    *words: str,
    error: type[Exception] = ModelFileError,
) -> str:
    """Loading `directory` raises `error` with one printable sentence that has all the words."""
    with pytest.raises(error) as caught:
        load(directory)
    sentence = str(caught.value)
    assert sentence
    assert len(sentence) < 1000
    assert sentence.isprintable(), repr(sentence)
    for word in words:
        assert word in sentence, sentence
    return sentence


@pytest.fixture(scope="module")
def good_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def good_model(good_directory: Path) -> tuple[fastgen.Generator, list[list[int]], np.ndarray]:
    model = load(good_directory)
    return model, generate(model), model.logits(PROMPT)


@pytest.fixture(autouse=True)
def survivor(
    good_model: tuple[fastgen.Generator, list[list[int]], np.ndarray],
) -> Iterator[None]:
    """Whatever a test loads in vain, the good model still generates the same."""
    yield
    model, expected, _ = good_model
    assert generate(model) == expected


@pytest.fixture
def expected_logits(
    good_model: tuple[fastgen.Generator, list[list[int]], np.ndarray],
) -> np.ndarray:
    """Of the good model, [len(PROMPT), VOCAB]."""
    return good_model[2]


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
    "shard", ["../model.safetensors", "/etc/passwd", "a\0b", "a\\b", "", ".", "..", 3, None]
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


# ---- Damaged files ---------------------------------------------------------------------------


def test_truncated(tmp_path: Path, good_directory: Path) -> None:
    content = (good_directory / "model.safetensors").read_bytes()
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    write_model(tmp_path)
    # In the length, in the header and around its end, in the data, before the last byte.
    places = {*range(10), *range(10, header_end, 7), *range(header_end - 5, header_end + 5)}
    places |= {*range(header_end, len(content), 97), len(content) - 1}
    for size in sorted(places):
        (tmp_path / "model.safetensors").write_bytes(content[:size])
        refused(tmp_path, "model.safetensors")


def test_bytes_after_the_end(tmp_path: Path, good_directory: Path) -> None:
    content = (good_directory / "model.safetensors").read_bytes()
    refused(write_model(tmp_path, tensors=content + b"\0"), "last 1 bytes", "no tensor")


def test_truncated_config(tmp_path: Path) -> None:
    text = json.dumps(make_config())
    for size in range(len(text)):
        refused(write_model(tmp_path, text[:size]), "config.json")


def load_or_refuse(directory: Path) -> None:
    """A damaged directory either loads, and then generates, or is refused with a sentence."""
    try:
        model = load(directory)
    except (ModelFileError, NotFoundError) as error:
        sentence = str(error)
        assert sentence
        assert len(sentence) < 1000
        assert sentence.isprintable(), repr(sentence)
    else:
        with model:
            (tokens,) = model.generate(
                [PROMPT], decode_strategy="greedy_search", max_length=2
            ).token_ids
            assert 1 <= len(tokens) <= 2
            assert all(0 <= token < model.info.vocab_size for token in tokens)


@FUZZ
@given(data=st.data())
def test_flipped_bits_of_weights(
    tmp_path_factory: pytest.TempPathFactory, good_directory: Path, data: st.DataObject
) -> None:
    content = bytearray((good_directory / "model.safetensors").read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    # Most in the header, where they hurt.
    ends = st.sampled_from([8, header_end, header_end, header_end, len(content)])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, data.draw(ends) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    directory = tmp_path_factory.getbasetemp() / "flipped-weights"
    load_or_refuse(write_model(directory, tensors=bytes(content)))


@FUZZ
@given(data=st.data())
def test_flipped_bits_of_config(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(json.dumps(make_config()).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    directory = write_model(tmp_path_factory.getbasetemp() / "flipped-config")
    (directory / "config.json").write_bytes(bytes(content))
    load_or_refuse(directory)


@FUZZ
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "wte.weight"])
                | st.text(),
                inner,
            )
        ),
    ),
    data=st.binary(max_size=64),
)
def test_arbitrary_headers(
    tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp() / "arbitrary-header"
    refused(write_model(directory, tensors=safetensors_bytes(header, data)))


def test_foreign_files(tmp_path: Path) -> None:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", "x" * 1000)
    for content in (
        b"",
        b"{}",
        archive.read_bytes(),
        b"\x80\x02}q\x00." * 40,  # a pickle, as in model_state.pdparams
        b"GGUF\x03\0\0\0" + bytes(100),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        bytes(1000),
        np.random.default_rng(1).bytes(1000),
    ):
        refused(write_model(tmp_path / "model", tensors=content), "model.safetensors")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**63 - 1, 2**40, 100_000_001])
def test_huge_header_length(tmp_path: Path, good_directory: Path, length: int) -> None:
    content = (good_directory / "model.safetensors").read_bytes()
    bad = struct.pack("<Q", length) + content[8:]
    refused(write_model(tmp_path, tensors=bad), "model.safetensors", str(length), "header")


def one_tensor(**changes: Any) -> dict[str, Any]:
    """Header of a file with the one tensor `a` of 16 bytes."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return {"a": {key: value for key, value in entry.items() if value is not ...}}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (one_tensor(data_offsets=[0, 17]), ["'a'", "[0, 17)", "16"]),
        (one_tensor(data_offsets=[16, 0]), ["'a'", "[16, 0)"]),
        (one_tensor(data_offsets=[-16, 0]), ["'a'", "-16"]),
        (one_tensor(data_offsets=[0, 2**63 - 1]), ["'a'", str(2**63 - 1)]),
        (one_tensor(data_offsets=[0, 2**64]), ["'a'", "offset"]),
        (one_tensor(data_offsets=[0.0, 16.0]), ["'a'", "offset"]),
        (one_tensor(data_offsets=[0]), ["'a'", "'data_offsets'"]),
        (one_tensor(data_offsets=...), ["'a'", "'data_offsets'"]),
        (one_tensor(data_offsets=[0, 12], shape=[3]), ["last 4 bytes"]),
        (one_tensor(data_offsets=[4, 16], shape=[3]), ["[0, 4)", "no tensor"]),
        (one_tensor(shape=[2, 3]), ["'a'", "[2, 3]"]),
        (one_tensor(shape=[2, -2]), ["'a'", "-2"]),
        (one_tensor(shape=[2, 2.0]), ["'a'", "shape"]),
        (one_tensor(shape=[2**32, 2**32]), ["'a'", "too many"]),
        (one_tensor(shape=[2**62, 4]), ["'a'", "too many"]),
        (one_tensor(shape=[2**61]), ["'a'", "does not fill"]),
        (one_tensor(shape=[2**63]), ["'a'", "shape"]),
        (one_tensor(shape=[1] * 65), ["'a'", "65"]),
        (one_tensor(shape=...), ["'a'", "'shape'"]),
        (one_tensor(dtype="F16"), ["'a'", "F16"]),
        (one_tensor(dtype=32), ["'a'", "'dtype'"]),
        (one_tensor(dtype=...), ["'a'", "'dtype'"]),
        ({**one_tensor(), "b": one_tensor()["a"]}, ["overlaps", "'a'", "'b'"]),
        ({**one_tensor(), "b": one_tensor(data_offsets=[12, 16], shape=[1])["a"]}, ["overlaps"]),
        ({**one_tensor(), "__metadata__": {"a": 1}}, ["__metadata__"]),
        ({**one_tensor(), "__metadata__": "a"}, ["__metadata__"]),
        ({"a": [1, 2]}, ["'a'"]),
        ([1, 2], ["object"]),
        (b"", ["JSON"]),
        (b'{"a":1,"a":1}', ["'a'", "twice"]),
        (b'{"a\xff":1}', ["UTF-8"]),
        (b'{"\xed\xa0\x80":1}', ["UTF-8"]),
        (b'{"\xc0\x80":1}', ["UTF-8"]),
        (b'{"\\ud800":1}', ["surrogate"]),
        (b'{"a\n":1}', ["control character"]),
        (b'{"a":1}x', ["after the end"]),
        (b'{"a":01}', ["begin with 0"]),
        (b"[" * 100_000, ["deeper"]),
        (b'{"a":' * 100, ["deeper"]),
        (b"[" + b"0," * 1_100_000 + b"0]", ["more than"]),
        (b'{"' + b"\\u001b[31m" * 500 + b'":1}', ["\\x1b"]),
    ],
)
def test_bad_headers(tmp_path: Path, header: Any, words: list[str]) -> None:
    content = safetensors_bytes(header, bytes(16))
    refused(write_model(tmp_path, tensors=content), "model.safetensors", *words)


@pytest.mark.parametrize(
    "header",
    [
        one_tensor(),
        {**one_tensor(), "z": one_tensor(shape=[0], data_offsets=[16, 16])["a"]},
        one_tensor(dtype="F7", shape=[1]),  # a type of the future may be there, if nobody asks
    ],
)
def test_tensors_of_another_network(tmp_path: Path, header: Any) -> None:
    content = safetensors_bytes(header, bytes(16))
    refused(write_model(tmp_path, tensors=content), "no word embedding", "'a'")


def test_file_without_tensors(tmp_path: Path) -> None:
    refused(write_model(tmp_path, tensors=safetensors_bytes({}, b"")), "no tensor at all")


# ---- Tensors and configuration that do not belong together ------------------------------------


def test_missing_tensors(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    refused(write_model(tmp_path, tensors=tensors), "'transformer.h.1.mlp.c_fc.bias'", "missing")
    del tensors["transformer.ln_f.bias"]
    refused(write_model(tmp_path, tensors=tensors), "'transformer.h.1.mlp.c_fc.bias'", "2 missing")


@pytest.mark.parametrize(
    "name", ["transformer.h.0.more.weight", "score.weight", "transformer.h.0.attn.bias2"]
)
def test_left_over_tensor(tmp_path: Path, name: str) -> None:
    tensors = {**make_tensors(), name: np.zeros(3, np.float32)}
    refused(write_model(tmp_path, tensors=tensors), repr(name), "left over")


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.bool_])
def test_weights_of_a_type_that_is_not_read(tmp_path: Path, dtype: Any) -> None:
    tensors = make_tensors()
    name = "transformer.h.0.ln_1.weight"
    tensors[name] = np.ones(HIDDEN, dtype)
    refused(write_model(tmp_path, tensors=tensors), repr(name), "float32, float16 or bfloat16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 16}, ["'transformer.wte.weight'", "[17, 8]", "[17, 16]"]),
        ({"vocab_size": 18}, ["'transformer.wte.weight'", "[17, 8]", "[18, 8]"]),
        ({"n_positions": 11}, ["'transformer.wpe.weight'", "[12, 8]", "[11, 8]"]),
        ({"n_inner": 24}, ["'transformer.h.0.mlp.c_fc.weight'", "[8, 20]", "[8, 24]"]),
        ({"n_inner": None}, ["'transformer.h.0.mlp.c_fc.weight'", "[8, 20]", "[8, 32]"]),
        ({"n_layer": 3}, ["'transformer.h.2.ln_1.weight'", "12 missing"]),
        ({"n_layer": 1024}, ["'transformer.h.2.ln_1.weight'", "missing"]),
        ({"n_layer": 1}, ["'transformer.h.1.attn.c_attn.bias'", "left over"]),
    ],
)
def test_config_that_contradicts_the_weights(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    refused(write_model(tmp_path, make_config(**changes)), *words)


# ---- Configurations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": ...}, ["n_embd", "missing"]),
        ({"n_positions": ...}, ["n_positions", "missing"]),
        ({"vocab_size": None}, ["vocab_size", "null"]),
        ({"vocab_size": "17"}, ["vocab_size", "'17'"]),
        ({"vocab_size": 0}, ["vocab_size", "0", "16777216"]),
        ({"vocab_size": 2**24 + 1}, ["vocab_size", "16777217"]),
        ({"vocab_size": 2**70}, ["vocab_size", "integer"]),
        ({"n_embd": -8}, ["n_embd", "-8"]),
        ({"n_embd": 8.0}, ["n_embd", "integer"]),
        ({"n_embd": True}, ["n_embd", "true", "integer"]),
        ({"n_embd": 65544}, ["n_embd", "65544", "65536"]),
        ({"n_head": 3}, ["n_embd", "multiple", "n_head", "3"]),
        ({"n_embd": 4096, "n_head": 2}, ["n_embd", "2048", "1024"]),
        ({"n_layer": 1025}, ["n_layer", "1025", "1024"]),
        ({"n_positions": 2**20 + 1}, ["n_positions", "1048577"]),
        ({"n_inner": 0}, ["n_inner", "0"]),
        ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon", "0"]),
        ({"layer_norm_epsilon": 1.0}, ["layer_norm_epsilon", "1"]),
        ({"layer_norm_epsilon": -1e-5}, ["layer_norm_epsilon", "-1e-05"]),
        ({"layer_norm_epsilon": 1e-60}, ["layer_norm_epsilon", "1e-60"]),
        ({"layer_norm_epsilon": "1e-5"}, ["layer_norm_epsilon", "number"]),
        ({"eos_token_id": 17}, ["eos_token_id", "17"]),
        ({"eos_token_id": -2}, ["eos_token_id", "-2"]),
        ({"eos_token_id": [3, 4]}, ["eos_token_id", "several"]),
        ({"bos_token_id": "a"}, ["bos_token_id", "'a'"]),
        ({"pad_token_id": 1.5}, ["pad_token_id", "1.5"]),
        ({"model_type": "llama"}, ["model_type", "'llama'", "'gpt2'"]),
        ({"model_type": 3}, ["model_type", "3"]),
        ({"model_type": ..., "architectures": ["OPTForCausalLM"]}, ["model_type"]),
        ({"activation_function": "relu"}, ["activation_function", "'relu'", "gelu_new"]),
        ({"activation_function": "gelu"}, ["activation_function", "'gelu'", "gelu_new"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"reorder_and_upcast_attn": True}, ["reorder_and_upcast_attn"]),
        ({"add_cross_attention": True}, ["add_cross_attention"]),
        ({"add_cross_attention": "no"}, ["add_cross_attention", "'no'"]),
    ],
)
def test_bad_config(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    refused(write_model(tmp_path, make_config(**changes)), "config.json", *words)


@pytest.mark.parametrize("key", ["vocab_size", "n_embd", "layer_norm_epsilon", "eos_token_id"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-NaN"])
def test_config_numbers_that_are_none(tmp_path: Path, key: str, number: str) -> None:
    text = json.dumps(make_config(**{key: "HERE"})).replace('"HERE"', number)
    refused(write_model(tmp_path, text), "config.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "gpt2",
        "{",
        "{}",
        "[" * 100_000,
        '{"n_embd": 8, "n_embd": 8}',
        "\ufeff{}",
    ],
)
def test_config_that_is_none(tmp_path: Path, text: str) -> None:
    refused(write_model(tmp_path, text), "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ...},
        {"n_positions": ..., "n_ctx": POSITIONS},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": ...},
        {"layer_norm_epsilon": ...},
        {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
        {"eos_token_id": [16]},
        {"architectures": None},
        {"name_or_path": "\U0001f600 é \u0000"},
    ],
)
def test_config_that_says_the_same(
    tmp_path: Path, expected_logits: np.ndarray, changes: dict[str, Any]
) -> None:
    model = load(write_model(tmp_path, make_config(**changes)))
    np.testing.assert_array_equal(model.logits(PROMPT), expected_logits)


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
