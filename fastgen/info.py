"""`fastgen info`: what is installed, what this machine can do, and where things are kept."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import click
import numpy as np
import psutil

from fastgen import _capi, models
from fastgen._checkpoint import tensor_shapes
from fastgen._cli_options import option
from fastgen._export import is_export
from fastgen._json import read_json
from fastgen._quantize import stored_weight_dtype
from fastgen.errors import FastgenError
from fastgen.generator import Generator
from fastgen.infer import versions

_VARIABLES = ("FASTGEN_CACHE", "FASTGEN_ISA", "FASTGEN_LIBRARY", "FASTGEN_NUM_THREADS")


def collect() -> dict[str, Any]:
    """Everything that `fastgen info` shows. Paddle is not imported, which would take seconds."""
    import fastgen

    memory = psutil.virtual_memory()
    op_cache = models.cache_directory() / "op"
    document: dict[str, Any] = {
        "fastgen": fastgen.__version__,
        "versions": {name: v for name, v in versions().items() if name != "fastgen"},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "library": {"path": str(_capi.library_path()), "version": _capi.library_version()},
        "isas": [{"name": name, "supported": supported} for name, supported in _capi.isas()],
        "processors": len(os.sched_getaffinity(0)),
        "memory": {"total": memory.total, "available": memory.available},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "model_cache": str(models.cache_directory() / "models"),
        "op_cache": str(op_cache),
        "op_libraries": sorted(map(str, op_cache.rglob("libdecoding_op.so"))),
    }
    try:
        document.update(_chosen())
    except FastgenError as error:  # an environment variable asks for what cannot be had
        document.update(isa=None, threads=None, error=str(error))
    return document


def _chosen() -> dict[str, Any]:
    """Kernel set and threads that a model gets here: those of the smallest model there is."""
    config = {"vocab_size": 8, "n_positions": 1, "n_embd": 8, "n_layer": 1, "n_head": 1}
    tensors = {
        name: np.zeros(shape, dtype=np.float32) for name, shape in tensor_shapes(config).items()
    }
    with Generator.from_tensors(config, tensors) as generator:
        return {"isa": generator.info.isa, "threads": generator.info.num_threads}


def _describe(name_or_path: str) -> dict[str, Any]:
    """Where a model lies, its files' bytes, and the type that they were rounded to."""
    directory = models.resolve(name_or_path)
    files = [*directory.glob("*.safetensors"), *directory.glob("*.pdiparams")]
    config = {} if is_export(directory) else read_json(directory / "config.json")
    return {
        "directory": str(directory),
        "weight_dtype": stored_weight_dtype(config, directory / "config.json"),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _show_build(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(document))
        return
    for name, value in document.items():
        if name == "kernels":
            for isa, flags in value.items():
                click.echo(f"{'kernels ' + isa + ':':<20} {flags or 'no flags of their own'}")
            continue
        if name == "cuda":
            value = value or "none"
        elif value is None:
            value = "not told to the build"
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        click.echo(f"{name.replace('_', ' ') + ':':<20} {value}")


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("--build", is_flag=True, help="What the library was built from, and nothing else.")
@option("model_name_or_path", help="Tell of this model too: its directory and type of weights.")
def command(as_json: bool, build: bool, model_name_or_path: str | None) -> int:
    """Show versions, kernel sets, memory and where op libraries are kept."""
    if build:
        _show_build(_capi.build_info(), as_json)
        return 0
    document = collect()
    if model_name_or_path is not None:
        document["model"] = _describe(model_name_or_path)
    if as_json:
        click.echo(json.dumps(document))
        return 0
    library, memory = document["library"], document["memory"]
    isas = ", ".join(
        isa["name"] + ("" if isa["supported"] else " (not on this machine)")
        for isa in document["isas"]
    )
    lines = [
        ("fastgen", document["fastgen"]),
        ("library", f"{library['path']} (version {library['version']})"),
        ("kernel sets", isas),
        ("chosen", document["isa"] or document["error"]),
        ("threads", f"{document['threads']} of {document['processors']} processors"),
        ("memory", f"{memory['available'] / 1e9:.1f} GB free of {memory['total'] / 1e9:.1f} GB"),
        ("python", f"{document['python']} on {document['platform']}"),
        *((name, version or "not installed") for name, version in document["versions"].items()),
        *document["environment"].items(),
        ("model cache", document["model_cache"]),
        ("op cache", f"{document['op_cache']} ({len(document['op_libraries'])} built)"),
    ]
    if "model" in document:
        model = document["model"]
        kind = model["weight_dtype"] or "not named, loaded as float32"
        lines += [
            ("model", model["directory"]),
            ("weights", f"{model['bytes'] / 1e6:.1f} MB, type {kind}"),
        ]
    for name, value in lines:
        click.echo(f"{name + ':':<20} {value}")
    return 0
