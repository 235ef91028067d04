"""Compares what two builds made, and looks for traces of the builds in it.

python ci/artifacts.py compare <directory> <directory>
python ci/artifacts.py search <directory> <word>...

Archives (wheels, sdists, static libraries) are opened. The exit status is 1 if something was found.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import stat
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

# What __DATE__, __TIME__ and __TIMESTAMP__ become, and homes, which no map of paths knows.
_MONTHS = rb"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_TRACES = {
    "a date": re.compile(
        _MONTHS + rb" [ 0-3][0-9](?: [0-2][0-9]:[0-5][0-9]:[0-5][0-9])? 20[0-9]{2}"
    ),
    "a time": re.compile(rb"(?<![0-9:])[0-2][0-9]:[0-5][0-9]:[0-5][0-9](?![0-9:])"),
    "a home directory": re.compile(rb"(?<![A-Za-z0-9_.~-])/(?:home/[a-z]|root/|Users/)[^\s\0\"']*"),
}


def files(directory: Path) -> dict[str, Path]:
    """Relative name -> path of every file and link below a directory."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder) / name
            found[path.relative_to(directory).as_posix()] = path
    return dict(sorted(found.items()))


def members(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The content of a file and of everything packed in it. Headers of archives are in it too."""
    yield name, data
    if data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                yield from members(f"{name}!{entry.filename}", archive.read(entry))
    elif data.startswith(b"\x1f\x8b"):
        yield from members(f"{name}!", gzip.decompress(data))
    elif data[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for info in tar:
                file = tar.extractfile(info)
                if file is not None:
                    yield from members(f"{name}{info.name}", file.read())


def content(path: Path) -> bytes:
    return str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()


def mode(path: Path) -> str:
    """Whether it can be run: the rest is up to the umask of who installs."""
    found = path.lstat().st_mode
    return "link" if stat.S_ISLNK(found) else "program" if found & stat.S_IXUSR else "file"


def first_difference(name: str, one: bytes, two: bytes) -> str:
    """The packed file that differs, where there is one, and the first byte that does."""
    inner_one, inner_two = dict(members(name, one)), dict(members(name, two))
    if list(inner_one) != list(inner_two):
        names = sorted(set(inner_one) ^ set(inner_two)) or ["the order of its members"]
        return f"{name}: not the same members: {', '.join(names[:5])}"
    # The innermost one comes last.
    name = next((n for n in reversed(inner_one) if inner_one[n] != inner_two[n]), name)
    one, two = inner_one[name], inner_two[name]
    at = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
    around = slice(max(0, at - 16), at + 48)
    sizes = f"{len(one)} and {len(two)} bytes"
    return f"{name}: from byte {at} ({sizes}): {one[around]!r}, {two[around]!r}"


def compare(first: Path, second: Path) -> int:
    ours, theirs = files(first), files(second)
    problems = [f"{name}: in one build only" for name in sorted(set(ours) ^ set(theirs))]
    if not ours:
        problems.append(f"{first} is empty")
    for name in ours:
        if name not in theirs:
            continue
        if mode(ours[name]) != mode(theirs[name]):
            problems.append(f"{name}: a {mode(ours[name])} and a {mode(theirs[name])}")
            continue
        one, two = content(ours[name]), content(theirs[name])
        if one == two:
            print(f"identical  {hashlib.sha256(one).hexdigest()[:16]}  {name}")
        else:
            problems.append(first_difference(name, one, two))
    for problem in problems:
        print(f"DIFFERENT  {problem}")
    return 1 if problems else 0


def search(directory: Path, words: list[str]) -> int:
    traces = dict(_TRACES)
    traces.update({f"'{word}'": re.compile(re.escape(word.encode())) for word in words if word})
    found = 0
    count = 0
    for outer, path in files(directory).items():
        for name, data in members(outer, content(path)):
            count += 1
            for what, pattern in traces.items():
                for match in pattern.finditer(name.encode() + b"\0" + data):
                    print(f"FOUND      {what} in {name}: {match.group(0)[:100]!r}")
                    found += 1
                    break
    print(f"searched   {count} files, packed ones too: {found or 'no'} traces of the builds")
    return 1 if found else 0


def main(arguments: list[str]) -> int:
    if len(arguments) == 3 and arguments[0] == "compare":
        return compare(Path(arguments[1]), Path(arguments[2]))
    if len(arguments) >= 2 and arguments[0] == "search":
        return search(Path(arguments[1]), arguments[2:])
    asked = arguments in (["-h"], ["--help"])
    print(__doc__, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
