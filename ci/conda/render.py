"""Renders every variant of the recipe; compares it with the promise and what channels hold.

    render.py [--recipe <dir>] [--catalogue <file>]

Prints the packages, and what nobody has seen on a channel yet. The exit status is 1 where
* the variants are not those of VARIANTS below, which is the table of docs/packaging.md,
* the version is not that of CMakeLists.txt,
* an output is missing, or two have one name and build string,
* a GPU variant would not outrank the CPU's or an older CUDA's,
* a package is not pinned to the exact ones below it, or CPU and GPU packages could be mixed,
* a requirement is not in the catalogue.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rattler
import variants
import yaml
from leave import leave
from variants import RecipeError, Row

# CUDA, gcc, Paddle, Pythons.
VARIANTS = (
    ("10.2", "8.2", "paddlepaddle-gpu 2.5.2", ("3.9", "3.10")),
    ("11.8", "11", "paddlepaddle-gpu 2.6.2", ("3.10", "3.11", "3.12")),
    ("13.0", "14", "paddlepaddle-gpu 3.3.1", ("3.10", "3.11", "3.12")),
    ("None", "14", "paddlepaddle 2.6.2", ("3.10", "3.11", "3.12")),
    ("None", "14", "paddlepaddle 3.3.1", ("3.10", "3.11", "3.12")),
)
CPU_OUTPUTS = {"libfastgen", "libfastgen-static", "fastgen", "fastgen-paddle", "fastgen-tests"}
# Output -> what it must be pinned to exactly.
PINS = {
    "libfastgen-cuda": {"libfastgen"},
    "fastgen": {"libfastgen"},
    "fastgen-paddle": {"fastgen"},
    "fastgen-tests": {"fastgen-paddle"},
}


def read_catalogue(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return list(yaml.safe_load(file))


def flavour(row: Row) -> str:
    cuda = row["cuda_compiler_version"]
    return "cpu" if cuda == "None" else "cuda" + cuda.replace(".", "")


def check_table(rows: list[Row]) -> Iterator[str]:
    expected = {
        (cuda, gcc, paddle, python) for cuda, gcc, paddle, pythons in VARIANTS for python in pythons
    }
    found = [
        (
            row["cuda_compiler_version"],
            row["cxx_compiler_version"],
            f"{row['paddle_package']} {row['paddle_version']}",
            row["python"],
        )
        for row in rows
    ]
    for one in sorted(expected.difference(found)):
        yield f"the variant {' / '.join(one)} is missing"
    for one in sorted(set(found).difference(expected)):
        yield f"there is a variant {' / '.join(one)}, which is not in the table"
    if len(found) != len(set(found)):
        yield "a variant is there twice"


def check_version(recipe: Path, rendered: list[Any]) -> Iterator[str]:
    text = (variants.ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    version = re.search(r"project\(fastgen VERSION ([0-9.]+)", text)
    assert version is not None
    found = {str(one.recipe.package.version) for one in rendered}
    if found != {version[1]}:
        yield f"{recipe / 'recipe.yaml'} has the version {found}, CMakeLists.txt has {version[1]}"


def has(catalogue: list[dict[str, Any]], spec: str, python: str) -> tuple[bool, str]:
    """Whether a channel holds what a specification asks for, and what nobody has seen of it."""
    match = rattler.MatchSpec(spec)
    name = str(match.name.normalized)
    wanted = None if match.version is None else rattler.VersionSpec(str(match.version))
    unseen = ""
    for entry in catalogue:
        if entry["package"] != name or python not in entry.get("pythons", [python]):
            continue
        for version in entry["versions"]:
            if wanted is None or wanted.matches(rattler.Version(version)):
                if entry["seen"]:
                    return True, ""
                unseen = f"{name} {version} ({entry['channel']})"
    return bool(unseen), unseen


def check_requirements(
    row: Row, rendered: list[Any], catalogue: list[dict[str, Any]], unseen: set[str]
) -> Iterator[str]:
    own = {one.recipe.package.name for one in rendered}
    for one in rendered:
        where = f"{one.recipe.package.name} {one.recipe.build.string}"
        for kind in ("build", "host", "run"):
            for spec in variants.requirements(one, kind, rendered):
                name = spec.split()[0]
                if name.startswith("__") or name in own:
                    continue
                if name == "python":
                    spec = f"python {row['python']}.*"
                known, missing = has(catalogue, spec, row["python"])
                if not known:
                    yield f"{where}: no channel is known to hold {spec} (in {kind})"
                elif missing:
                    unseen.add(missing)


def check_pins(row: Row, rendered: list[Any]) -> Iterator[str]:
    by_name = {one.recipe.package.name: one for one in rendered}
    names = CPU_OUTPUTS if flavour(row) == "cpu" else CPU_OUTPUTS | {"libfastgen-cuda"}
    if set(by_name) != names:
        yield f"the outputs of {flavour(row)} are {sorted(by_name)}, not {sorted(names)}"
        return
    for name, one in by_name.items():
        build = one.recipe.build.string
        if not build.startswith(flavour(row) + "_"):
            yield f"{name}: the build string {build} does not begin with {flavour(row)}"
        run = variants.requirements(one, "run", rendered)
        needed = PINS.get(name, set()) | (
            {"libfastgen-cuda"} if name == "fastgen" and flavour(row) != "cpu" else set()
        )
        for other in sorted(needed):
            pin = by_name[other].recipe
            if f"{other} =={pin.package.version} {pin.build.string}" not in run:
                yield f"{name} {build} is not pinned to the exact {other}"
    library = by_name["libfastgen"]
    run = variants.requirements(library, "run", rendered)
    constraints = variants.requirements(library, "run_constraints", rendered)
    if f"__glibc >={row['c_stdlib_version']}" not in run:
        yield f"libfastgen {flavour(row)} does not ask for a C library"
    cuda = row["cuda_compiler_version"]
    if cuda != "None" and f"__cuda >={cuda}" not in run:
        yield f"libfastgen {flavour(row)} does not ask for __cuda >={cuda}"
    for other in ("fastgen", "fastgen-paddle", "libfastgen-static"):
        if f"{other} * {flavour(row)}_*" not in constraints:
            yield f"libfastgen {flavour(row)} can be mixed with a {other} of another flavour"
    if cuda == "None" and "libfastgen-cuda <0a0" not in constraints:
        yield "libfastgen cpu can be mixed with libfastgen-cuda"


def check_ranks(rows: list[Row], rendered: list[Any]) -> Iterator[str]:
    numbers: dict[str, set[int]] = {}
    for one in rendered:
        prefix = one.recipe.build.string.split("_")[0]
        numbers.setdefault(prefix, set()).add(int(one.recipe.build.string.rsplit("_", 1)[1]))
    cudas = {row["cuda_compiler_version"] for row in rows} - {"None"}
    order = ["cpu"] + [
        "cuda" + cuda.replace(".", "") for cuda in sorted(cudas, key=lambda text: float(text))
    ]
    for lower, higher in zip(order, order[1:]):
        if max(numbers[lower]) >= min(numbers[higher]):
            yield f"{higher} does not outrank {lower}: build numbers {numbers}"


def check(recipe: Path, catalogue_path: Path) -> tuple[list[str], list[Any], set[str]]:
    """What is wrong, all packages, and what nobody has seen."""
    rows = variants.read_rows(recipe)
    catalogue = read_catalogue(catalogue_path)
    unseen: set[str] = set()
    wrong = list(check_table(rows))
    everything: dict[tuple[str, str], Any] = {}
    for row in rows:
        rendered = variants.render([row], recipe)
        wrong += check_pins(row, rendered)
        wrong += check_requirements(row, rendered, catalogue, unseen)
        for one in rendered:
            everything[(one.recipe.package.name, one.recipe.build.string)] = one
    wrong += check_version(recipe, list(everything.values()))
    wrong += check_ranks(rows, list(everything.values()))
    return list(dict.fromkeys(wrong)), [everything[key] for key in sorted(everything)], unseen


def main() -> int:
    arguments = variants.recipe_arguments(__doc__)
    try:
        wrong, packages, unseen = check(arguments.recipe.resolve(), arguments.catalogue)
    except (RecipeError, rattler_build_errors()) as error:
        print(f"render.py: {error}", file=sys.stderr)
        return 1
    for one in packages:
        print(
            f"{one.recipe.package.name:18} {one.recipe.package.version}  {one.recipe.build.string}"
        )
    print(f"{len(packages)} packages in {len(variants.read_rows(arguments.recipe))} variants")
    for item in sorted(unseen):
        print(f"not seen on a channel: {item}")
    for item in wrong:
        print(f"render.py: {item}", file=sys.stderr)
    return 1 if wrong else 0


def rattler_build_errors() -> type[Exception]:
    import rattler_build

    return rattler_build.RattlerBuildError


if __name__ == "__main__":
    leave(main())
