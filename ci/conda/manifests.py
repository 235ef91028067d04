"""Compares the files of fastgen's packages in a channel with the manifests of the recipe.

    manifests.py <channel> [--recipe <dir>]           whether they agree
    manifests.py <channel> [--recipe <dir>] --write   writes the manifests anew, to be read over

recipe/manifests/<output>.txt lists every file of an output, one a line, sorted; links end in
" (link)". {version} and {soversion} stand for the library's version, {python} and {pytag} for
Python's, e.g. 3.11 and 311. A file too much or too few is a line of its own; the exit status is
then 1. Every output of the recipe must have a manifest, those too that are built on other machines.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import payload
import variants
import wheels
from leave import leave
from rattler.package_streaming import extract


def placeholders(version: str) -> dict[str, str]:
    """What stands in manifests, and for what."""
    return {
        "{version}": version,
        "{soversion}": ".".join(version.split(".")[:2]),
        "{python}": wheels.XY,
        "{pytag}": wheels.TAG,
    }


def read(path: Path, version: str) -> list[str]:
    """The files that a manifest lists."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines != sorted(set(lines)):
        raise variants.RecipeError(f"{path.name} is not sorted, or has a line twice")
    for key, value in placeholders(version).items():
        lines = [line.replace(key, value) for line in lines]
    return lines


def write(path: Path, found: list[str], version: str) -> None:
    # Where each placeholder may stand: 0.1 or 311 by itself may be anything.
    places = {
        "{version}": rf"(?<=[-.]){re.escape(version)}(?=\.dist-info/|$| )",
        "{soversion}": rf"(?<=\.so\.){re.escape(placeholders(version)['{soversion}'])}(?=$| )",
        "{python}": rf"(?<=/python){re.escape(wheels.XY)}(?=/)",
        "{pytag}": rf"(?<=\.cpython-){wheels.TAG}(?=\.)",
    }
    lines = []
    for line in found:
        for key, pattern in places.items():
            line = re.sub(pattern, key, line)
        lines.append(line)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")


def contents(package: Path) -> tuple[str, list[str]]:
    """Version and files of a package; those of info/ are the build tool's."""
    with tempfile.TemporaryDirectory(prefix="manifest-") as folder:
        extract(package, folder)
        info = Path(folder) / "info"
        version = json.loads((info / "index.json").read_text(encoding="utf-8"))["version"]
        entries = payload.check_paths(payload.name_of(package), Path(folder))
    return version, sorted(
        entry["_path"] + (" (link)" if entry["path_type"] == "softlink" else "")
        for entry in entries
    )


def problems(package: Path, manifests: Path) -> list[str]:
    """A sentence for each file that a package has too much or too few."""
    name = payload.name_of(package)
    path = manifests / f"{name}.txt"
    if not path.is_file():
        return [f"output {name} has no manifest {path.parent.name}/{path.name}"]
    version, found = contents(package)
    wanted = read(path, version)
    return [
        *(f"output {name} lacks {file}" for file in sorted(set(wanted) - set(found))),
        *(
            f"output {name} has {file}, which its manifest does not list"
            for file in sorted(set(found) - set(wanted))
        ),
    ]


def run(channel: Path, recipe: Path, rewrite: bool) -> int:
    manifests = recipe / "manifests"
    built = {payload.name_of(package): package for package in payload.packages(channel)}
    if rewrite:
        for name, package in built.items():
            version, found = contents(package)
            write(manifests / f"{name}.txt", found, version)
    wrong = []
    outputs = {
        one.recipe.package.name for one in variants.render(variants.read_rows(recipe), recipe)
    }
    listed = {path.stem for path in manifests.glob("*.txt")}
    wrong += [f"output {name} has no manifest" for name in sorted(outputs - listed)]
    wrong += [f"{name}.txt is of no output of the recipe" for name in sorted(listed - outputs)]
    for name, package in built.items():
        found = problems(package, manifests)
        wrong += found
        if not found:
            print(f"{name}: all {len(contents(package)[1])} files are those of its manifest")
    for name in sorted(outputs - set(built)):
        print(f"{name}: not in this channel, so not compared")
    for sentence in wrong:
        print(f"manifests.py: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("channel", type=Path)
    parser.add_argument("--recipe", type=Path, default=variants.RECIPE, help="its directory")
    parser.add_argument(
        "--write", action="store_true", help="makes them say what the packages hold"
    )
    arguments = parser.parse_args()
    try:
        return run(arguments.channel.resolve(), arguments.recipe.resolve(), arguments.write)
    except (variants.RecipeError, payload.PayloadError) as error:
        print(f"manifests.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    leave(main())
