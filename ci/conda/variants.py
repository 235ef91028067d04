"""The variants of recipe/conda_build_config.yaml: read, chosen from, rendered."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rattler_build
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipe"

Row = dict[str, str]


class RecipeError(Exception):
    """The recipe or its variants are wrong; one sentence for a line of output."""


def recipe_arguments(description: str | None) -> argparse.Namespace:
    """The command line of a script that holds a recipe against a catalogue."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="its directory")
    parser.add_argument(
        "--catalogue", type=Path, default=Path(__file__).resolve().parent / "catalogue.yaml"
    )
    return parser.parse_args()


def _read(path: Path) -> dict[str, Any]:
    # BaseLoader: what looks like a number stays text, so that 3.10 is not 3.1.
    with path.open(encoding="utf-8") as file:
        return dict(yaml.load(file, Loader=yaml.BaseLoader))


def read_rows(recipe: Path = RECIPE) -> list[Row]:
    """The zipped keys, one dictionary for each variant."""
    config = _read(recipe / "conda_build_config.yaml")
    (keys,) = config["zip_keys"]
    lengths = {key: len(config[key]) for key in keys}
    if len(set(lengths.values())) != 1:
        raise RecipeError(f"conda_build_config.yaml: zipped lists of different lengths: {lengths}")
    return [dict(zip(keys, values)) for values in zip(*(config[key] for key in keys))]


def _unzipped(recipe: Path) -> dict[str, list[str]]:
    config = _read(recipe / "conda_build_config.yaml")
    (keys,) = config.pop("zip_keys")
    return {key: values for key, values in config.items() if key not in keys}


def overrides(path: Path) -> dict[str, str]:
    """The keys of an overlay such as ci/conda/host.yaml, each of which has one value."""
    result = {}
    for key, values in _read(path).items():
        if len(values) != 1:
            raise RecipeError(f"{path.name}: {key} must have one value, it has {values}")
        result[key] = values[0]
    return result


def render(
    rows: Iterable[Row], recipe: Path = RECIPE, replace: dict[str, str] | None = None
) -> list[Any]:
    """Renders the recipe for each row; the same output of several rows comes once.

    Args:
        rows: of :func:`read_rows`.
        recipe: directory of the recipe.
        replace: keys with another value than conda_build_config.yaml has, for every row.
    """
    stage0 = rattler_build.Stage0Recipe.from_file(recipe / "recipe.yaml")
    found: dict[tuple[str, str], Any] = {}
    for row in rows:
        values = {key: list(one) for key, one in _unzipped(recipe).items()}
        values.update({key: [value] for key, value in row.items()})
        values.update({key: [value] for key, value in (replace or {}).items()})
        for variant in stage0.render(rattler_build.VariantConfig(values)):
            package = variant.recipe
            found.setdefault((package.package.name, package.build.string), variant)
    return list(found.values())


def requirements(variant: Any, kind: str, all_variants: Iterable[Any]) -> list[str]:
    """Requirements of a rendered output as conda specifications.

    Args:
        variant: of :func:`render`.
        kind: `build`, `host`, `run` or `run_constraints`.
        all_variants: of the same row, to look exact pins up in.
    """
    result = []
    for item in variant.recipe.requirements.to_dict().get(kind, []):
        if isinstance(item, str):
            result.append(item)
        elif "pin_subpackage" in item:
            pin = item["pin_subpackage"]
            if not pin.get("exact"):
                raise RecipeError(f"{variant.recipe.package.name}: {pin} is not exact")
            (other,) = (one for one in all_variants if one.recipe.package.name == pin["name"])
            package = other.recipe
            result.append(f"{pin['name']} =={package.package.version} {package.build.string}")
        else:
            raise RecipeError(f"{variant.recipe.package.name}: unknown requirement {item}")
    return result
