"""Files of the library's own tokenizer, good and bad."""

from __future__ import annotations

import contextlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from fastgen_tests.native_tokenizer import CORPUS, Native, save_vocabulary, trained

from fastgen.errors import (
    InvalidArgumentError,
    ModelFileError,
    NotFoundError,
    UnsupportedError,
)


def write(directory: Path, **files: str | bytes | dict[str, Any]) -> Path:
    """Writes files; `vocab_json` is `vocab.json`."""
    for name, content in files.items():
        stem, suffix = name.rsplit("_", 1)
        path = directory / f"{stem}.{suffix}"
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab_json": "[]"}, r"vocab.json: is a list, it must be an object"),
        ({"vocab_json": "{"}, r"vocab.json: is not valid JSON"),
        ({"vocab_json": {}}, r"vocab.json: has no tokens"),
        ({"vocab_json": {"": 0}}, r"vocab.json: token 0 is empty"),
        ({"vocab_json": {"a": 0, "b": 0}}, r"vocab.json: id 0 is there twice, for 'b' and"),
        ({"vocab_json": '{"a": 0, "a": 1}'}, r"the key 'a' is given twice"),
        ({"vocab_json": {"a": -1}}, r"token 'a' has id -1, it must be an integer from 0 to"),
        ({"vocab_json": {"a": 1 << 20}}, r"has id 1048576, it must be an integer from 0 to"),
        ({"vocab_json": {"a": 1.5}}, r"token 'a' has id 1.5, it must be an integer"),
        ({"vocab_json": {"a": "x"}}, r"token 'a' has id 'x', it must be an integer"),
        ({"vocab_txt": ""}, r"vocab.txt: has no tokens"),
        ({"vocab_txt": "a\nb\na\n"}, r"vocab.txt: token 'a' is there twice"),
        ({"vocab_txt": b"a\nb\xff\n"}, r"vocab.txt: line 2, 'b\\xff', is not UTF-8"),
        ({"vocab_txt": "\n" * (1 << 20) + "a"}, r"vocab.txt: has more than 1048576 lines"),
        ({"merges_txt": "a"}, r"merges.txt: line 1 is 'a', it must be two tokens"),
        ({"merges_txt": "a b c"}, r"line 1 is 'a b c', it must be two tokens"),
        ({"merges_txt": "a b\n b"}, r"line 2 is ' b', it must be two tokens"),
        ({"merges_txt": "a b\n\na b"}, r"line 2 is empty, and not the last one"),
        ({"merges_txt": b"\xff a"}, r"merges.txt: line 1, '\\xff a', is not UTF-8"),
        ({"merges_txt": "a x"}, r"merge 1, 'a x', needs the token 'x', which is not in the"),
        ({"merges_txt": "a b\nb a"}, r"merges.txt: merge 2, 'b a', needs the token 'ba'"),
        ({"merges_txt": "a b\na b"}, r"merges.txt: merge 'a b' is there twice"),
        ({"special_tokens_map_json": "3"}, r"special_tokens_map.json: is 3, it must be an object"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    good = {"vocab_json": {"a": 0, "b": 1, "ab": 2}, "merges_txt": "#version: 0.2\na b\n"}
    if "vocab_txt" in files:
        del good["vocab_json"]
    Native(write(tmp_path, **{"vocab_json": {"a": 0, "b": 1, "ab": 2}}, merges_txt="a b")).close()
    (tmp_path / "vocab.json").unlink()
    write(tmp_path, **{**good, **files})
    with pytest.raises(ModelFileError, match=message):
        Native(tmp_path)


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    """A good one, with members of it, or of its model, replaced."""
    document: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    }
    for key, value in changes.items():
        (document if key in document else document["model"])[key] = value
    return document


def added(**changes: Any) -> dict[str, Any]:
    return {"added_tokens": [{"id": 3, "content": "<x>", "special": True, **changes}]}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": 3}, ModelFileError, "'model' of the file is 3, which is not what it must be"),
        ({"type": "WordPiece"}, UnsupportedError, "'model' is of type 'WordPiece', it must be"),
        ({"vocab": []}, ModelFileError, "'vocab' of 'model' is a list"),
        ({"merges": [3]}, ModelFileError, "merge 1 is 3, it must be two tokens"),
        ({"merges": [["a"]]}, ModelFileError, "merge 1 is a list, it must be two tokens"),
        ({"dropout": 0.1}, UnsupportedError, "'dropout' of 'model' is 0.1, it must be null"),
        ({"end_of_word_suffix": "</w>"}, UnsupportedError, "'end_of_word_suffix' of 'model' is"),
        ({"byte_fallback": True}, UnsupportedError, "'byte_fallback' of 'model' is true"),
        ({"normalizer": {"type": "NFC"}}, UnsupportedError, "'normalizer' is an object, it must"),
        ({"pre_tokenizer": None}, UnsupportedError, "'pre_tokenizer' is missing, it must be"),
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            UnsupportedError,
            "'pre_tokenizer' is of type 'Whitespace', it must be of type ByteLevel",
        ),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            UnsupportedError,
            "'add_prefix_space' of 'pre_tokenizer' is true, it must be false",
        ),
        ({"decoder": {"type": "BPEDecoder"}}, UnsupportedError, "'decoder' is of type 'BPEDec"),
        ({"added_tokens": {}}, ModelFileError, "'added_tokens' is an object, it must be a list"),
        ({"added_tokens": [1]}, ModelFileError, "added token 1 is 1, it must be an object"),
        (added(content=3), ModelFileError, "'content' of added token 1 is 3"),
        (added(content=""), ModelFileError, "token 3 is empty"),
        (added(id=-1), ModelFileError, "added token 1 has id -1, it must be from 0 to"),
        (added(id=1), ModelFileError, "id 1 is there twice"),
        (added(content="a"), ModelFileError, "'a' has id 3, and id 0 in the vocabulary"),
        (added(special=1), ModelFileError, "'special' of added token 1 is 1, it must be true or"),
        (added(lstrip=True), UnsupportedError, "'lstrip' of the added token '<x>' is true"),
    ],
)
def test_a_bad_tokenizer_json_is_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    Native(write(tmp_path, tokenizer_json=tokenizer_json(**added()))).close()
    write(tmp_path, tokenizer_json=tokenizer_json(**changes))
    with pytest.raises(kind, match=message):
        Native(tmp_path)


def test_directories_without_a_tokenizer(tmp_path: Path) -> None:
    for directory in (tmp_path / "absent", tmp_path):
        with pytest.raises(NotFoundError, match=r"has no tokenizer, which is tokenizer.json, or"):
            Native(directory)
    write(tmp_path, vocab_json={"a": 0})
    with pytest.raises(NotFoundError, match=r"with merges.txt"):
        Native(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(NotFoundError, match=r"tokenizer.json: cannot be opened"):
        Native(tmp_path)


def test_a_vocabulary_may_lack_bytes_and_ids(tmp_path: Path) -> None:
    native = Native(write(tmp_path, vocab_txt="a\r\n\r\nb\r\nab", merges_txt="a b\r\n\r\n"))
    assert native.vocab_size == 3
    assert native.encode("aabb") == [0, 3, 2]
    assert native.decode([0, 1, 3, 4]) == "aab"
    with pytest.raises(
        InvalidArgumentError, match=r"text has the byte '\\xc3' at 2, for which the tokenizer's"
    ):
        native.encode("abé")
    native.close()


@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt", "merges.txt", "tokenizer.json"])
def test_damaged_files_never_do_harm(tmp_path: Path, name: str) -> None:
    """Truncations and changed bytes: an error with a sentence, or a tokenizer that works."""
    backend = trained(300)
    save_vocabulary(backend, tmp_path, lines=name == "vocab.txt")
    if name == "tokenizer.json":
        backend.save(str(tmp_path / name), pretty=False)
    path = tmp_path / name
    whole = path.read_bytes()
    rng = random.Random(5)
    loaded = 0
    messages = []
    for step in range(300):
        data = bytearray(whole)
        if step % 3 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(step % 3):
            data[rng.randrange(len(data))] = rng.choice(b'\0\n "{}[],:\\a\xff')
        path.write_bytes(data)
        try:
            native = Native(tmp_path)
        except (ModelFileError, UnsupportedError) as error:
            messages.append(str(error))
            continue
        loaded += 1
        # A byte whose token is gone cannot be encoded; everything else comes back as it was.
        with contextlib.suppress(InvalidArgumentError):
            assert native.decode(native.encode(CORPUS[0]), False) == CORPUS[0]
        native.close()
    assert 0 < loaded < 300
    for message in messages:
        assert re.fullmatch(re.escape(str(tmp_path)) + r"/\S+: [^\n]+", message)
