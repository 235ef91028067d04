"""Solves specifications in the local channel alone and installs them into an empty prefix.

    solve.py <channel> <spec>... [--prefix <dir>] [--cuda <version>] [--glibc <version>]

What is chosen is printed, one package a line. With --prefix it is installed there. The exit status
is 1, with the solver's reasons, where nothing fits. The virtual packages are this machine's, but
__cuda, which is there only with --cuda.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import rattler
from leave import leave
from rattler.exceptions import SolverError


class Unsolvable(Exception):
    """Nothing fits; the solver's reasons."""


def virtual_packages(cuda: str | None, glibc: str | None) -> list[Any]:
    """This machine's, with the given CUDA (None: no GPU) and C library (None: the real one)."""

    def virtual(name: str, version: str) -> Any:
        return rattler.GenericVirtualPackage(
            rattler.PackageName(name), rattler.Version(version), rattler.BuildString("0")
        )

    chosen = {"__cuda": cuda, "__glibc": glibc}
    found = [item.into_generic() for item in rattler.VirtualPackage.detect()]
    found = [
        item
        for item in found
        if item.name.normalized != "__cuda" and not chosen.get(item.name.normalized)
    ]
    return found + [virtual(name, version) for name, version in chosen.items() if version]


async def solve(
    channel: Path, specs: list[str], cuda: str | None = None, glibc: str | None = None
) -> list[Any]:
    """The records that `specs` need.

    Raises:
        Unsolvable: nothing fits.
    """
    try:
        records = await rattler.solve(
            [rattler.Channel(channel.resolve().as_uri())],
            [rattler.MatchSpec(spec) for spec in specs],
            platforms=["linux-64", "noarch"],
            virtual_packages=virtual_packages(cuda, glibc),
        )
    except SolverError as error:
        raise Unsolvable(str(error)) from error
    return sorted(records, key=lambda record: str(record.name.normalized))


async def run(arguments: argparse.Namespace) -> int:
    try:
        records = await solve(arguments.channel, arguments.specs, arguments.cuda, arguments.glibc)
    except Unsolvable as error:
        print(error, file=sys.stderr)
        return 1
    for record in records:
        print(record.name.normalized, record.version, record.build)
    if arguments.prefix is not None:
        prefix = arguments.prefix.resolve()
        cache = prefix.with_name(prefix.name + ".cache")
        # A package that was built again has its old name, which the cache would go by.
        for path in (prefix, cache):
            shutil.rmtree(path, ignore_errors=True)
        await rattler.install(
            records,
            target_prefix=prefix,
            cache_dir=cache,
            show_progress=False,
            execute_link_scripts=True,
        )
        shutil.rmtree(cache, ignore_errors=True)
        print(f"{len(records)} packages installed in {prefix}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("channel", type=Path)
    parser.add_argument("specs", nargs="+")
    parser.add_argument("--prefix", type=Path, help="made anew")
    parser.add_argument("--cuda", help="version of __cuda")
    parser.add_argument("--glibc", help="version of __glibc")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    leave(main())
