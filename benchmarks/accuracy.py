"""What types of weights and of the KV cache lose: logits of a random network, and perplexity of the
embedded model.

python -m benchmarks.accuracy --help
"""

from __future__ import annotations

import ast
import itertools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastgen import convert, models
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from fastgen.tokenizer import Tokenizer

TYPES = ("float32", "float16", "bfloat16", "int8", "int4")
CACHES = ("float16", "bfloat16", "int8")  # beside float32 weights; a GPU has no choice


def docstrings() -> Iterator[str]:
    """Of Python's standard library, module by module: the text the embedded model was made of."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def windows(tokens: list[int], length: int) -> list[list[int]]:
    """The tokens in pieces of that length; what is left over is dropped."""
    return [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]


def perplexity(model: EngineModel, pieces: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of every token of a piece but the first."""
    total, count = 0.0, 0
    for piece in pieces:
        logits = model.logits(piece)[:-1].astype(np.float64)
        peak = logits.max(axis=1)
        likelihood = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
        total += float((likelihood - logits[np.arange(len(logits)), piece[1:]]).sum())
        count += len(logits)
    return float(np.exp(total / count))


def embedded(tokens: int) -> tuple[GPTShape, dict[str, np.ndarray], list[list[int]]]:
    """The embedded model, and that many tokens in pieces of its context."""
    directory = models.resolve(models.DEFAULT_MODEL)
    config, tensors = convert.load_directory(directory)
    tokenizer = Tokenizer.from_directory(directory)
    end = config["eos_token_id"]
    ids = itertools.chain.from_iterable([*tokenizer.encode(text), end] for text in docstrings())
    shape = GPTShape(
        config["vocab_size"],
        config["n_positions"],
        config["n_embd"],
        config["n_layer"],
        config["n_head"],
        config.get("n_inner") or 4 * config["n_embd"],
    )
    return shape, dict(tensors), windows(list(itertools.islice(ids, tokens)), config["n_positions"])


@click.command(context_settings={"show_default": True})
@click.option("--tokens", default=50_000, help="Tokens that perplexity is measured on.")
@click.option("--device", default="cpu", help="cpu, cuda, cuda:<index>.")
@click.option("--threads", default=0, help="Of the CPU; 0: all processors.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write this file.")
def main(tokens: int, device: str, threads: int, json_path: Path | None) -> None:
    """Prints what each type of weights and of the cache loses against float32."""
    random = GPTShape(50257, 128, 768, 4, 12, 3072)
    weights = make_tensors(random, WeightRecipe(1))
    prompt = np.random.default_rng(0).integers(0, random.vocab_size, 64).tolist()
    shape, tensors, pieces = embedded(tokens)
    rows: list[dict[str, Any]] = []
    reference = None
    cases: list[tuple[str, str | None]] = [(dtype, None) for dtype in TYPES]
    if device == "cpu":
        cases = [(dtype, "float32") for dtype in TYPES] + [("float32", c) for c in CACHES]
    for dtype, cache in cases:
        options: dict[str, Any] = {
            "device": device, "weight_dtype": dtype, "cache_dtype": cache, "num_threads": threads
        }  # fmt: skip
        with EngineModel(random, weights, **options) as model:
            logits = model.logits(prompt).astype(np.float64)
        if reference is None:
            reference = logits
        with EngineModel(shape, tensors, **options) as model:
            loss = perplexity(model, pieces)
        error = float(((logits - reference) ** 2).sum() / (reference**2).sum())
        change = loss / rows[0]["perplexity"] - 1 if rows else 0.0
        rows.append(
            {
                "weights": dtype,
                "cache": cache or "as the weights",
                "nmse": error,
                "perplexity": loss,
                "change": change,
            }
        )
    click.echo(
        f"{device}; logits of a random network, 768 wide, 4 layers; "
        f"{len(pieces)} x {len(pieces[0])} tokens of docstrings"
    )
    click.echo(
        f"{'weights':10}{'cache':16}{'NMSE of logits':>16}{'perplexity':>12}{'against float32':>17}"
    )
    for r in rows:
        click.echo(
            f"{r['weights']:10}{r['cache']:16}{r['nmse']:16.1e}{r['perplexity']:12.4f}"
            f"{r['change']:+17.3%}"
        )
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
