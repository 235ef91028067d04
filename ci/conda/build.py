"""Builds the recipe's CPU packages for the running Python into the local channel, and tests them.

    build.py <channel> [--paddle <version>] [--recipe <dir>] [--no-tests]

The compiler keys are those of ci/conda/host.yaml; everything else is as it is published. Each
package is tested as the recipe says, in an environment of the local channel, and must hold the
files of its manifest, recipe/manifests/<output>.txt. Without --paddle, fastgen-paddle and
fastgen-tests are left out. SOURCE_DATE_EPOCH and FASTGEN_COMMIT say what the library tells of its
sources.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import manifests
import rattler_build
import variants
import wheels
from leave import leave

HERE = Path(__file__).resolve().parent
PADDLE_OUTPUTS = ("fastgen-paddle", "fastgen-tests")


def host_keys(channel: Path) -> dict[str, str]:
    """The compiler keys of ci/conda/host.yaml with the versions that the channel has."""
    keys = variants.overrides(HERE / "host.yaml")
    packages = json.loads((channel / "linux-64" / "repodata.json").read_text())["packages.conda"]
    for key in ("cxx_compiler", "c_stdlib"):
        name = f"{keys[key]}_linux-64"
        (version,) = {one["version"] for one in packages.values() if one["name"] == name}
        keys[f"{key}_version"] = version
    return keys


class Log:
    """The build's output: all of it in a file, for the screen what goes wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("w", encoding="utf-8")

    def on_log(self, event: Any) -> None:
        print(f"[{event.level}] {event.message}", file=self.file, flush=True)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *arguments, **keywords: None


def build(channel: Path, recipe: Path, paddle: str | None, test: bool) -> None:
    rows = [
        row
        for row in variants.read_rows(recipe)
        if row["cuda_compiler_version"] == "None"
        and row["python"] == wheels.XY
        and (paddle is None or row["paddle_version"] == paddle)
    ]
    if not rows:
        raise variants.RecipeError(
            f"there is no CPU variant for Python {wheels.XY} and Paddle {paddle}"
        )
    for old in (channel / "linux-64").glob("*fastgen*.conda"):
        old.unlink()
    logs = channel.parent / "logs"
    logs.mkdir(exist_ok=True)
    for variant in variants.render(rows[:1], recipe, host_keys(channel)):
        name = variant.recipe.package.name
        if paddle is None and name in PADDLE_OUTPUTS:
            continue
        began = time.monotonic()
        log = Log(logs / f"build-{name}.log")
        try:
            result = variant.run_build(
                tool_config=rattler_build.ToolConfiguration(
                    test_strategy="native" if test else "skip",
                    # Its replacement would break strings whose length the compiler knows.
                    error_prefix_in_binary=True,
                    use_sharded=False,
                ),
                output_dir=channel,
                channels=[channel.as_uri()],
                no_build_id=True,
                progress_callback=log,
            )
        except Exception as error:
            lines = log.path.read_text(encoding="utf-8").splitlines()
            print("\n".join(lines[-40:]), file=sys.stderr)
            raise variants.RecipeError(f"{name} was not built: {error}; {log.path}") from error
        (package,) = map(Path, result.packages)
        wrong = manifests.problems(package, recipe / "manifests")
        if wrong:
            raise variants.RecipeError("; ".join(wrong))
        what = "built and tested" if test else "built"
        print(f"{time.monotonic() - began:6.1f} s  {what} {package.name}", flush=True)
    shutil.rmtree(channel / "bld", ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("channel", type=Path, help="made by bootstrap.py")
    parser.add_argument("--paddle", help="build the Paddle outputs for this version of it")
    parser.add_argument("--recipe", type=Path, default=variants.RECIPE, help="its directory")
    parser.add_argument("--no-tests", action="store_true", help="only builds")
    arguments = parser.parse_args()
    try:
        build(
            arguments.channel.resolve(),
            arguments.recipe.resolve(),
            arguments.paddle,
            not arguments.no_tests,
        )
    except variants.RecipeError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
