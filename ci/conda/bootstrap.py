"""Makes the local channel that ci/conda builds with, from what this machine has.

    bootstrap.py <channel> <wheels>...

* `python`, `python_abi`: the running CPython, repacked.
* The wheels of the directories <wheels> that the recipe needs, and what they need.
* `hostgxx_linux-64`, `hostlibc_linux-64`: this machine's g++ and C library. The first is a script
  that sets CC and CXX, the second has no files; their versions are the real ones.

Nothing stands under the name of a package that it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rattler
import rattler_build
import wheels
from leave import leave
from packaging.utils import canonicalize_name, parse_wheel_filename

HERE = Path(__file__).resolve().parent
# What recipe/recipe.yaml asks for; Paddle and its tests only where a directory has Paddle.
ROOTS = [
    "click",
    "numpy",
    "psutil",
    "safetensors",
    "tokenizers",
    "tqdm",
    "cmake",
    "ninja",
    "pip",
    "pkgconf",
    "scikit-build-core",
    "setuptools",
]
PADDLE_ROOTS = ["paddlepaddle", "paddlenlp", "hypothesis", "pytest", "pytest-timeout"]
# What is imported without the wheel saying so.
UNSAID = {"paddlepaddle": ["setuptools"], "paddlenlp": ["pip"]}
# conda's name of a program that the package index has under another name.
ALIASES = {"pkg-config": "pkgconf"}

ACTIVATE = """\
export CC={gcc} CXX={gxx} GCC={gcc} GXX={gxx}
export CFLAGS="-O2 -fPIC -ffile-prefix-map=${{SRC_DIR:-/nowhere}}=/usr/local/src/conda"
export CXXFLAGS="$CFLAGS -isystem ${{PREFIX:-/usr}}/include"
export LDFLAGS="-Wl,-rpath,${{PREFIX:-/usr}}/lib -L${{PREFIX:-/usr}}/lib"
"""


def say(began: float, what: str) -> None:
    print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)


def glibc_version() -> str:
    return str(os.confstr("CS_GNU_LIBC_VERSION")).split()[-1]


def index(channel: Path) -> None:
    """Writes the channel's repodata.json files."""
    asyncio.run(
        rattler.index.index_fs(channel, force=True, write_zst=False, write_shards=False)  # type: ignore[attr-defined]
    )


def _stand_in(channel: Path, name: str, version: str, files: dict[str, str]) -> None:
    root = Path(tempfile.mkdtemp(prefix="stand-in-"))
    try:
        for path, text in files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        rattler_build.assemble_package(
            name=name,
            version=version,
            target_platform="linux-64",
            build_string="host_0",
            output_dir=channel / "linux-64",
            files_dir=root,
            summary="stands for what the machine that made this channel has itself",
            license="see the machine",
            timestamp=wheels.TIMESTAMP,
        )
    finally:
        shutil.rmtree(root)


def host_tools(channel: Path) -> None:
    """The compiler and the C library of this machine."""
    gxx, gcc = (shutil.which(name) for name in ("g++", "gcc"))
    if gxx is None or gcc is None:
        raise SystemExit("bootstrap.py: there is no g++ on this machine")
    output = subprocess.run([gxx, "-dumpfullversion"], capture_output=True, text=True, check=True)
    version = re.fullmatch(r"\d+\.\d+\.\d+", output.stdout.strip())
    if version is None:
        raise SystemExit(f"bootstrap.py: {gxx} has the version {output.stdout!r}")
    _stand_in(
        channel,
        "hostgxx_linux-64",
        version[0],
        {"etc/conda/activate.d/hostgxx.sh": ACTIVATE.format(gcc=gcc, gxx=gxx)},
    )
    _stand_in(
        channel,
        "hostlibc_linux-64",
        glibc_version(),
        {"share/hostlibc/README": "Nothing to install: it is this machine's own C library.\n"},
    )


def host_python(channel: Path, work: Path) -> None:
    """The running CPython."""
    os.environ["HOST_PYTHON_BASE"] = sys.base_prefix
    os.environ["HOST_PYTHON_VERSION"] = "{}.{}.{}".format(*sys.version_info[:3])
    os.environ["HOST_GLIBC"] = glibc_version()
    patchelf = shutil.which("patchelf", path=str(Path(sys.executable).parent))
    assert patchelf is not None, "patchelf is in ci/lock/conda.txt"
    os.environ["HOST_PATCHELF"] = patchelf
    recipe = rattler_build.Stage0Recipe.from_file(HERE / "python" / "recipe.yaml")
    for variant in recipe.render(rattler_build.VariantConfig()):
        variant.run_build(
            tool_config=rattler_build.ToolConfiguration(test_strategy="native", use_sharded=False),
            output_dir=channel,
            channels=[channel.as_uri()],
            no_build_id=True,
            # It stays on this machine: the default takes ten times as long.
            package_format="conda:1",
        )
    shutil.rmtree(channel / "bld", ignore_errors=True)


def aliases(channel: Path, versions: dict[str, str]) -> None:
    for name, real in ALIASES.items():
        rattler_build.assemble_package(
            name=name,
            version=versions[real],
            target_platform="noarch",
            build_string="alias_0",
            output_dir=channel / "noarch",
            files=[],
            depends=[f"{real} =={versions[real]}"],
            noarch="generic",
            summary=f"the {name} of {real}",
            license="ISC",
            timestamp=wheels.TIMESTAMP,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("channel", type=Path, help="made anew")
    parser.add_argument("wheels", type=Path, nargs="+", help="directories of wheels")
    arguments = parser.parse_args()
    channel = arguments.channel.resolve()
    shutil.rmtree(channel, ignore_errors=True)
    for platform in ("linux-64", "noarch"):
        (channel / platform).mkdir(parents=True)

    began = time.monotonic()
    host_tools(channel)
    say(began, "the compiler and the C library of this machine")
    index(channel)
    host_python(channel, channel)
    say(began, f"python {sys.version.split()[0]} from the running interpreter")

    found = [path for directory in arguments.wheels for path in sorted(directory.glob("*.whl"))]
    names = {canonicalize_name(parse_wheel_filename(path.name)[0]) for path in found}
    roots = [*ROOTS, *PADDLE_ROOTS] if "paddlepaddle" in names else ROOTS
    versions: dict[str, str] = {}
    for wheel in wheels.closure(found, roots):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        wheels.convert(wheel, channel, UNSAID.get(name, ()))
        versions[name] = str(version)
        say(began, f"{name} {version} from its wheel")
    aliases(channel, versions)
    index(channel)
    say(began, f"{len(versions)} wheels; the channel is {channel}")


if __name__ == "__main__":
    main()
    leave(0)
