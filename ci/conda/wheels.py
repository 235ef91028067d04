"""Wheels as conda packages for the running CPython.

whl2conda refuses the platform tags of Paddle's wheels and drops requirements with markers; this
does what the local channel of ci/conda needs and no more.
"""

from __future__ import annotations

import compileall
import configparser
import email
import py_compile
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from datetime import datetime, timezone
from email.message import Message
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from rattler_build import assemble_package

XY = f"{sys.version_info.major}.{sys.version_info.minor}"
TAG = XY.replace(".", "")
# One time for all, so that the same wheel gives the same package.
TIMESTAMP = datetime.fromtimestamp(1700000000, timezone.utc)
_DATA = re.compile(r"[^/]+\.data/(purelib|platlib|data|scripts|headers)/(.*)")


def conda_spec(requirement: Requirement) -> str:
    """The conda specification of a wheel's requirement, e.g. `numpy >=1.20,<2`."""
    parts = []
    for specifier in requirement.specifier:
        operator, version = specifier.operator, specifier.version
        if operator == "~=":
            parts += [f">={version}", "=" + version.rsplit(".", 1)[0]]
        elif operator == "==" and version.endswith(".*"):
            parts.append("=" + version[:-2])
        elif operator == "===":
            parts.append("==" + version)
        else:
            parts.append(operator + version)
    return f"{canonicalize_name(requirement.name)} {','.join(parts)}".strip()


def read_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(
            name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)
        )
        return email.message_from_string(archive.read(name).decode("utf-8", "replace"))


def requirements(metadata: Message) -> list[Requirement]:
    """What the wheel requires here, without extras."""
    found = map(Requirement, metadata.get_all("Requires-Dist") or [])
    return [item for item in found if not item.marker or item.marker.evaluate({"extra": ""})]


def closure(wheels: Iterable[Path], roots: Iterable[str]) -> list[Path]:
    """The wheels that `roots` need, themselves included, by name.

    Raises:
        KeyError: a wheel is missing.
    """
    by_name = {canonicalize_name(parse_wheel_filename(path.name)[0]): path for path in wheels}
    wanted, queue = {}, [canonicalize_name(name) for name in roots]
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted[name] = by_name[name]
            queue += [
                canonicalize_name(item.name) for item in requirements(read_metadata(by_name[name]))
            ]
    return [wanted[name] for name in sorted(wanted)]


def _unpack(wheel: Path, root: Path, site_packages: Path, name: str) -> None:
    targets = {
        "purelib": site_packages,
        "platlib": site_packages,
        "data": root,
        "scripts": root / "bin",
        "headers": root / "include" / f"python{XY}" / name,
    }
    with zipfile.ZipFile(wheel) as archive:
        for item in archive.infolist():
            if item.is_dir():
                continue
            data = _DATA.match(item.filename)
            path = targets[data[1]] / data[2] if data else site_packages / item.filename
            is_script = data is not None and data[1] == "scripts"
            content = archive.read(item)
            if is_script and content.startswith(b"#!python"):
                content = b"#!/usr/bin/env python" + content[len(b"#!python") :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            executable = (item.external_attr >> 16) & 0o111
            path.chmod(0o755 if executable or is_script else 0o644)


def _write_commands(root: Path, info: Path) -> None:
    parser = configparser.ConfigParser(delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    if (info / "entry_points.txt").is_file():
        parser.read(info / "entry_points.txt")
    if not parser.has_section("console_scripts"):
        return
    for name, target in parser["console_scripts"].items():
        module, _, function = target.split("[")[0].strip().partition(":")
        script = root / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(
            "#!/usr/bin/env python\nimport sys\n\n"
            f"from {module} import {function.split('.')[0]}\n\nsys.exit({function}())\n"
        )
        script.chmod(0o755)


def convert(wheel: Path, channel: Path, extra: Iterable[str] = ()) -> Path:
    """Writes the conda package of a wheel.

    Args:
        wheel: the file.
        channel: directory of the channel; the package goes to its `linux-64`.
        extra: what the wheel needs and does not say.

    Returns:
        The package.
    """
    name, version, _, _ = parse_wheel_filename(wheel.name)
    root = Path(tempfile.mkdtemp(prefix="wheel-"))
    try:
        site_packages = root / "lib" / f"python{XY}" / "site-packages"
        _unpack(wheel, root, site_packages, name)
        info = next(site_packages.glob("*.dist-info"))
        (info / "INSTALLER").write_text("conda\n")
        record = info / "RECORD"
        lines = record.read_text().splitlines(keepends=True)
        record.write_text("".join(line for line in lines if ".data/" not in line))
        _write_commands(root, info)
        # Without byte code, packages built on this one would sweep up what Python writes later.
        compileall.compile_dir(
            site_packages,
            quiet=2,
            workers=2,
            stripdir=str(root),
            prependdir="/conda",
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        metadata = read_metadata(wheel)
        needs = [conda_spec(item) for item in requirements(metadata)]
        return Path(
            assemble_package(
                name=canonicalize_name(name),
                version=str(version),
                target_platform="linux-64",
                build_string=f"wheel_py{TAG}_0",
                output_dir=channel / "linux-64",
                files_dir=root,
                depends=[f"python {XY}.*", f"python_abi {XY}.* *_cp{TAG}", *needs, *extra],
                summary=(metadata["Summary"] or "")[:200],
                license=metadata["License-Expression"] or "see dist-info",
                timestamp=TIMESTAMP,
                compression_level=1,
                detect_prefix=False,
            ).path
        )
    finally:
        shutil.rmtree(root)
