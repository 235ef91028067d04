"""What the solver makes of all variants: with and without a GPU, on old systems, when mixed.

    cases.py [--recipe <dir>] [--catalogue <file>]

GPU packages cannot be built here, but what the solver goes by can be had: the packages' names,
build strings and requirements, rendered from the recipe as they are published. They are put into
temporary repodata, with the packages of the catalogue that they require. Nothing of it
can be installed. The exit status is 1 where a case gets anything else than it should.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import render
import solve
import variants
from leave import leave


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        what: in words.
        specs: what is asked for.
        expected: how the build strings of what must be chosen begin; None: a refusal.
        cuda: version of __cuda, None for no GPU.
        glibc: version of __glibc.
        reason: a word that a refusal must have.
    """

    what: str
    specs: tuple[str, ...]
    expected: dict[str, str] | None
    cuda: str | None = None
    glibc: str = "2.36"
    reason: str = ""


ALL = ("fastgen", "fastgen-paddle")
CASES = (
    Case("no GPU", ALL, {"libfastgen": "cpu_", "fastgen": "cpu_", "paddlepaddle": ""}),
    Case("__cuda 9.2", ALL, {"libfastgen": "cpu_", "fastgen": "cpu_", "paddlepaddle": ""}, "9.2"),
    Case(
        "__cuda 10.2",
        ALL,
        {
            "libfastgen": "cuda102_",
            "libfastgen-cuda": "cuda102_",
            "fastgen": "cuda102_py310_",
            "fastgen-paddle": "cuda102_paddle252_",
            "paddlepaddle-gpu": "",
            "cudatoolkit": "",
        },
        "10.2",
    ),
    Case(
        "__cuda 10.2, Python 3.9",
        (*ALL, "python =3.9"),
        {"fastgen": "cuda102_py39_", "fastgen-paddle": "cuda102_paddle252_py39_"},
        "10.2",
    ),
    Case(
        "__cuda 10.2, Python 3.12: no such Paddle for CUDA 10.2",
        (*ALL, "python =3.12"),
        {"fastgen": "cpu_py312_", "paddlepaddle": ""},
        "10.2",
    ),
    Case("__cuda 12", ALL, {"fastgen": "cuda118_", "fastgen-paddle": "cuda118_paddle262_"}, "12.0"),
    Case("__cuda 13", ALL, {"fastgen": "cuda130_", "fastgen-paddle": "cuda130_paddle331_"}, "13.0"),
    Case("__cuda 13, library only", ("libfastgen",), {"libfastgen": "cuda130_"}, "13.0"),
    Case("__cuda 13, glibc 2.17", ALL, {"fastgen": "cuda118_"}, "13.0", "2.17"),
    Case("glibc 2.12", ("libfastgen",), None, glibc="2.12", reason="__glibc"),
    Case("__cuda 10.2, glibc 2.12", ("libfastgen",), None, "10.2", "2.12", "__glibc"),
    Case("the user's pin without a GPU", ("fastgen * cuda102_*",), None, reason="__cuda"),
    Case("the user's pin, __cuda 9.2", ("fastgen * cuda102_*",), None, "9.2", reason="__cuda"),
    Case("the CUDA library without a GPU", ("libfastgen-cuda",), None, reason="__cuda"),
    Case("CPU by choice", ("fastgen * cpu_*",), {"fastgen": "cpu_", "libfastgen": "cpu_"}, "13.0"),
    Case("the user's pin by choice", ("fastgen * cuda102_*",), {"libfastgen": "cuda102_"}, "13.0"),
    Case(
        "mixed: library for the CPU, CUDA library",
        ("libfastgen * cpu_*", "libfastgen-cuda"),
        None,
        "13.0",
        reason="libfastgen",
    ),
    Case(
        "mixed: library for the CPU, Python package for a GPU",
        ("libfastgen * cpu_*", "fastgen * cuda118_*"),
        None,
        "13.0",
        reason="libfastgen",
    ),
    Case(
        "mixed: library for a GPU, static library for the CPU",
        ("libfastgen * cuda118_*", "libfastgen-static * cpu_*"),
        None,
        "13.0",
        reason="libfastgen",
    ),
    Case(
        "mixed: op for Paddle's CPU build, Paddle for GPUs",
        ("fastgen-paddle * cpu_*", "paddlepaddle-gpu"),
        None,
        "13.0",
        reason="paddlepaddle-gpu",
    ),
    Case(
        "mixed: op for Paddle 2.6.2, Paddle 3.3.1",
        ("fastgen-paddle * cpu_paddle262_*", "paddlepaddle =3.3.1"),
        None,
        reason="paddlepaddle",
    ),
    Case(
        "mixed: op for CUDA 10.2, Paddle 2.6.2",
        ("fastgen-paddle * cuda102_*", "paddlepaddle-gpu =2.6.2"),
        None,
        "13.0",
        reason="paddlepaddle-gpu",
    ),
)


def _record(name: str, version: str, build: str, depends: list[str], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "build": build,
        "build_number": 0,
        "depends": depends,
        "constrains": [],
        "subdir": "linux-64",
        "md5": "0" * 32,
        "sha256": "0" * 64,
        "size": 0,
        **more,
    }


def _upstream(catalogue: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of what the catalogue says that channels hold."""
    records = []
    for entry in catalogue:
        more = [entry["cuda"]] if "cuda" in entry else []
        for version in entry["versions"]:
            if "pythons" not in entry:
                records.append(_record(entry["package"], version, "0", more))
            for python in entry.get("pythons", []):
                build = "py" + python.replace(".", "")
                depends = [f"python {python}.*", *more]
                records.append(_record(entry["package"], version, build, depends))
    return records


def _own(recipe: Path) -> list[dict[str, Any]]:
    """Records of all packages of the recipe."""
    records = {}
    for row in variants.read_rows(recipe):
        rendered = variants.render([row], recipe)
        for one in rendered:
            name, build = one.recipe.package.name, one.recipe.build.string
            # What conda's Python adds to packages that are built on it.
            depends = [
                f"python {row['python']}.*" if spec == "python" else spec
                for spec in variants.requirements(one, "run", rendered)
            ]
            records[(name, build)] = _record(
                name,
                str(one.recipe.package.version),
                build,
                depends,
                constrains=variants.requirements(one, "run_constraints", rendered),
                build_number=int(build.rsplit("_", 1)[1]),
            )
    return list(records.values())


def write_channel(channel: Path, recipe: Path, catalogue: Path) -> None:
    records = _upstream(render.read_catalogue(catalogue)) + _own(recipe)
    for platform in ("linux-64", "noarch"):
        (channel / platform).mkdir(parents=True)
        packages = {
            f"{one['name']}-{one['version']}-{one['build']}.conda": one
            for one in records
            if one["subdir"] == platform
        }
        data = {"info": {"subdir": platform}, "packages": {}, "packages.conda": packages}
        (channel / platform / "repodata.json").write_text(json.dumps(data))


async def failure(channel: Path, case: Case) -> str | None:
    """What is wrong with the solver's answer."""
    try:
        records = await solve.solve(channel, list(case.specs), case.cuda, case.glibc)
    except solve.Unsolvable as error:
        if case.expected is not None:
            return f"refused: {error}"
        return None if case.reason in str(error) else f"refused without {case.reason}: {error}"
    found = {str(one.name.normalized): str(one.build) for one in records}
    if case.expected is None:
        return f"not refused: {found}"
    for name, prefix in case.expected.items():
        if not found.get(name, "(none)").startswith(prefix) or name not in found:
            return f"{name} is {found.get(name)}, not {prefix}*: {found}"
    flavours = {build.split("_")[0] for name, build in found.items() if "fastgen" in name}
    return None if len(flavours) == 1 else f"more than one flavour: {found}"


async def run(recipe: Path, catalogue: Path) -> int:
    failed = 0
    with tempfile.TemporaryDirectory(prefix="cases-") as folder:
        channel = Path(folder) / "channel"
        write_channel(channel, recipe, catalogue)
        for case in CASES:
            wrong = await failure(channel, case)
            answer = (
                "refused"
                if case.expected is None
                else ", ".join(f"{name} {prefix}*" for name, prefix in case.expected.items())
            )
            print(f"{'FAILED' if wrong else 'ok':7} {case.what}: {answer}")
            if wrong:
                failed += 1
                print(f"cases.py: {case.what}: {wrong}", file=sys.stderr)
    print(f"{len(CASES) - failed} of {len(CASES)} cases")
    return 1 if failed else 0


def main() -> int:
    arguments = variants.recipe_arguments(__doc__)
    try:
        return asyncio.run(run(arguments.recipe.resolve(), arguments.catalogue))
    except variants.RecipeError as error:
        print(f"cases.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    leave(main())
