"""What two builds of the packages have to have in common: their payload, file by file.

    payload.py unpack <channel> <dir>     fastgen's packages of the channel, each into <dir>/<name>
    payload.py compare <dir> <dir>        what was unpacked of two builds; one line a package

The files of a package are compared by their sums in info/paths.json, which is checked against the
files; those of info/ are compared as they are. What the build tool itself stamps is left out while
unpacking, and nothing else:

* info/index.json: `timestamp`
* info/about.json: `channels`, where the build got its tools from
* info/recipe/rendered_recipe.yaml: `timestamp`, `directories` and `channels` of the build, `url`
  and `channel` of the packages it used, and of those that are fastgen's own the archive's sums,
  size and time
* the prefix of the build, in files that info/paths.json says to hold it and in itself: installing
  writes the real one there

A binary that holds the prefix of the build is refused: replacing it there breaks strings whose
length the compiler knows. The exit status is 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from leave import leave
from rattler.package_streaming import extract

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import artifacts

# Stands for the prefix of the build.
PREFIX = "/prefix/of/the/build"
_OWN_ARCHIVE = ("md5", "sha256", "size", "timestamp")


class PayloadError(Exception):
    """A package is not what it says; one sentence."""


def packages(channel: Path) -> Iterator[Path]:
    """fastgen's packages of a channel."""
    found = sorted((channel / "linux-64").glob("*fastgen*.conda"))
    if not found:
        raise PayloadError(f"{channel} has no package of fastgen")
    yield from found


def name_of(package: Path) -> str:
    """`libfastgen-static` of `libfastgen-static-0.1.0-cpu_h3e3f329_0.conda`."""
    return package.name.rsplit("-", 2)[0]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_paths(name: str, root: Path) -> list[dict[str, Any]]:
    """The entries of info/paths.json, which must be the files that are there, with their sums."""
    entries = json.loads((root / "info" / "paths.json").read_text(encoding="utf-8"))["paths"]
    listed = {entry["_path"] for entry in entries}
    found = {path for path in artifacts.files(root) if not path.startswith("info/")}
    if listed != found:
        odd = ", ".join(sorted(listed ^ found)[:5])
        raise PayloadError(f"{name}: info/paths.json and the package do not agree on: {odd}")
    for entry in entries:
        # The sum of a link is that of the file it leads to, which need not be in the package.
        if entry["path_type"] == "hardlink":
            data = (root / entry["_path"]).read_bytes()
            if (_digest(data), len(data)) != (entry["sha256"], entry["size_in_bytes"]):
                raise PayloadError(f"{name}: info/paths.json has another sum of {entry['_path']}")
    return list(entries)


def _without_prefix(name: str, root: Path, entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        if "prefix_placeholder" not in entry:
            continue
        path = root / entry["_path"]
        if entry["file_mode"] != "text":
            raise PayloadError(f"{name}: {entry['_path']} is binary and holds the build's prefix")
        data = path.read_bytes()
        prefix = entry["prefix_placeholder"].encode()
        if prefix not in data:
            raise PayloadError(f"{name}: {entry['_path']} does not hold the prefix, as it says")
        data = data.replace(prefix, PREFIX.encode())
        path.write_bytes(data)
        entry.update(prefix_placeholder=PREFIX, sha256=_digest(data), size_in_bytes=len(data))


def _pop(where: str, mapping: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in mapping:
            raise PayloadError(f"{where} has no '{key}': the build tool has changed")
        del mapping[key]


def _without_stamps(name: str, info: Path) -> None:
    for file, key in (("index.json", "timestamp"), ("about.json", "channels")):
        document = json.loads((info / file).read_text(encoding="utf-8"))
        _pop(f"{name}: info/{file}", document, key)
        (info / file).write_text(json.dumps(document, indent=1), encoding="utf-8")
    path = info / "recipe" / "rendered_recipe.yaml"
    where = f"{name}: info/recipe/{path.name}"
    # BaseLoader: everything stays the text it is.
    document = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    _pop(where, document["build_configuration"], "timestamp", "directories", "channels")
    for environment in map(document["finalized_dependencies"].get, ("build", "host")):
        # The text "null" where an output has no such environment.
        for used in environment["resolved"] if isinstance(environment, dict) else ():
            _pop(where, used, "url", "channel")
            if "fastgen" in used["name"]:
                _pop(where, used, *_OWN_ARCHIVE)
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def unpack(channel: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for package in packages(channel):
        name = name_of(package)
        root = target / name
        root.mkdir(parents=True)
        extract(package, root)
        entries = check_paths(name, root)
        _without_prefix(name, root, entries)
        _without_stamps(name, root / "info")
        (root / "info" / "paths.json").write_text(
            json.dumps({"paths": entries}, indent=1), encoding="utf-8"
        )


def compare(first: Path, second: Path) -> int:
    names = sorted({path.name for top in (first, second) for path in top.iterdir()})
    different = 0
    for name in names:
        ours, theirs = artifacts.files(first / name), artifacts.files(second / name)
        problems = [f"{file}: in one build only" for file in sorted(set(ours) ^ set(theirs))]
        for file in sorted(set(ours) & set(theirs)):
            if artifacts.mode(ours[file]) != artifacts.mode(theirs[file]):
                problems.append(f"{file}: not of the same kind")
                continue
            one, two = artifacts.content(ours[file]), artifacts.content(theirs[file])
            if one != two:
                problems.append(artifacts.first_difference(file, one, two))
        for problem in problems:
            print(f"DIFFERENT  conda package {name}: {problem}")
        different += bool(problems)
        if not problems:
            # Of all sums, so that two runs can be compared by eye.
            total = _digest((first / name / "info" / "paths.json").read_bytes())[:16]
            info = sum(file.startswith("info/") for file in ours)
            print(
                f"identical  {total}  conda package {name}: "
                f"{len(ours) - info} files and {info} of info/"
            )
    return 1 if different or not names else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, names in (("unpack", ("channel", "dir")), ("compare", ("first", "second"))):
        one = commands.add_parser(command)
        for name in names:
            one.add_argument(name, type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "compare":
            return compare(arguments.first, arguments.second)
        unpack(arguments.channel, arguments.dir)
    except PayloadError as error:
        print(f"payload.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
