"""What a model name or path stands for."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fastgen._checkpoint import import_paddlenlp, load_directory, write_directory
from fastgen._paddlenlp import from_paddlenlp
from fastgen.errors import FastgenError, NotFoundError, UnsupportedError

__all__ = ["DEFAULT_MODEL", "PADDLENLP_NAMES", "cache_directory", "resolve"]

#: The model that comes with the package.
DEFAULT_MODEL = "gpt2-docstrings"

#: Models that PaddleNLP knows by name.
PADDLENLP_NAMES = (
    "gpt2-en",
    "gpt2-medium-en",
    "gpt2-large-en",
    "gpt2-xl-en",
    "gpt-cpm-large-cn",
    "gpt-cpm-small-cn-distill",
    "gpt3-1.3B-en",
    "gpt3-6.7B-en",
    "gpt3-13B-en",
    "gpt3-89B-en",
    "gpt3-175B-en",
)


def cache_directory() -> Path:
    """Where converted named models are kept: `$FASTGEN_CACHE`, else `~/.cache/fastgen`."""
    forced = os.environ.get("FASTGEN_CACHE")
    return Path(forced) if forced else Path.home() / ".cache" / "fastgen"


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The directory of a model.

    Args:
        name_or_path: a directory (taken as it is), `gpt2-docstrings` (comes with the package), or a
            name of :data:`PADDLENLP_NAMES`, which PaddleNLP loads and which is converted into
            `<cache>/models/<name>` once.

    Raises:
        NotFoundError: it is none of these, or PaddleNLP could not get the model; the message then
            says which files to get and where to put them.
    """
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise NotFoundError(f"{name} is a file: a model is a directory with a config.json")
    if name == DEFAULT_MODEL:
        return _embedded(name)
    if name in PADDLENLP_NAMES:
        return _from_paddlenlp(name)
    raise NotFoundError(
        f"{name!r} is neither a directory nor a model known by name: the names are "
        f"{', '.join((DEFAULT_MODEL, *PADDLENLP_NAMES))}"
    )


def _embedded(name: str) -> Path:
    import fastgen

    folders = [Path(entry) / "models" / name for entry in fastgen.__path__]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise NotFoundError(
        f"the model {name} is missing from this installation ({' or '.join(map(str, folders))}): "
        "reinstall the package"
    )


def _is_complete(directory: Path) -> bool:
    return (directory / "config.json").is_file() and (directory / "model.safetensors").is_file()


def _from_paddlenlp(name: str) -> Path:
    cached = cache_directory() / "models" / name
    if _is_complete(cached):
        return cached
    by_hand = _download_directory(name)
    if all((by_hand / file).is_file() for file in _file_names(name)):
        config, tensors = load_directory(by_hand)
        _write_once(cached, config, tensors, by_hand)
        return cached
    try:
        transformers = import_paddlenlp()
    except UnsupportedError as error:
        raise NotFoundError(
            f"{name} is a model of PaddleNLP, which cannot get it here ({error}): "
            f"{_what_to_download(name, {})}"
        ) from error
    tokenizer_class = getattr(transformers, _tokenizer_class(name))
    try:
        # PaddleNLP reports to standard output, which belongs to the caller's results.
        with contextlib.redirect_stdout(sys.stderr):
            tokenizer = tokenizer_class.from_pretrained(name)
            model = transformers.GPTLMHeadModel.from_pretrained(name)
    except Exception as error:
        # PaddleNLP lets every kind of error through: of the network, of its maps, of its files.
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 120 else reason[:120] + "..."
        urls = _urls(name, transformers)
        raise NotFoundError(
            f"PaddleNLP could not get {name} ({type(error).__name__}: {reason}): "
            f"{_what_to_download(name, urls)}"
        ) from error
    config, tensors = from_paddlenlp(model)
    del model
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_resources(scratch)
        _write_once(cached, config, tensors, Path(scratch))
    return cached


def _write_once(
    cached: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], tokenizer_source: Path
) -> None:
    try:
        write_directory(cached, config, tensors, tokenizer_source)
    except (FastgenError, OSError):
        if not _is_complete(cached):  # else another process was faster
            raise


def _download_directory(name: str) -> Path:
    """Where files that were downloaded by hand are looked for."""
    return cache_directory() / "downloads" / name


def _tokenizer_class(name: str) -> str:
    return "GPTChineseTokenizer" if "-cpm-" in name else "GPTTokenizer"


def _file_names(name: str) -> list[str]:
    vocabulary = ["sentencepiece.model"] if "-cpm-" in name else ["vocab.json", "merges.txt"]
    return ["config.json", "model_state.pdparams", *vocabulary]


def _urls(name: str, transformers: Any) -> dict[str, str]:
    """Where the installed PaddleNLP gets the files of a model from, as far as it tells."""
    urls = {}
    try:
        from paddlenlp.utils.download.bos_download import bos_url

        urls["config.json"] = bos_url(repo_id=name, filename="config.json")
    except ModuleNotFoundError:  # PaddleNLP up to 2.7 makes it up where it downloads
        pass
    weights = transformers.GPTLMHeadModel.pretrained_resource_files_map.get("model_state", {})
    urls["model_state.pdparams"] = weights.get(name, "")
    tokenizer_class = getattr(transformers, _tokenizer_class(name))
    for key, file in tokenizer_class.resource_files_names.items():
        urls[file] = tokenizer_class.pretrained_resource_files_map.get(key, {}).get(name, "")
    return urls


def _what_to_download(name: str, urls: dict[str, str]) -> str:
    files = ", ".join(
        f"{file} ({urls[file]})" if urls.get(file) else file for file in _file_names(name)
    )
    return (
        f"download {files} into {_download_directory(name)} under exactly these names, and run the "
        "same command again"
    )
