"""Writes csrc/text/unicode_tables.h: what the pre-tokenizer has to know of every code point.

    python tools/make_unicode_tables.py            # rewrites the header
    python tools/make_unicode_tables.py --check    # exit status 1 if it is not current

The classes come from Python's `unicodedata`, or from the package `unicodedata2`, the same module
with the tables of a newer Unicode, where that is installed. The header records the version it was
made for; an older one is not written over it, since letters would be lost.

Classes are those of the pattern that GPT-2 splits text with: letters (`\\p{L}`), numbers (`\\p{N}`)
and white space (`\\s`: the property White_Space, which is what the `tokenizers` library takes;
Python's `str.isspace` has four control characters more).
"""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "text" / "unicode_tables.h"
OTHER, LETTER, NUMBER, SPACE = range(4)
NAMES = {LETTER: "letters", NUMBER: "numbers", SPACE: "white space"}
CONTROL_SPACES = (0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x85)


def newest_database() -> Any:
    """`unicodedata2` if it is installed and newer, else `unicodedata`."""
    try:
        import unicodedata2  # type: ignore[import-not-found]
    except ImportError:
        return unicodedata
    newer = as_numbers(unicodedata2.unidata_version) > as_numbers(unicodedata.unidata_version)
    return unicodedata2 if newer else unicodedata


def as_numbers(version: str) -> tuple[int, ...]:
    """ "16.0.0" -> (16, 0, 0)."""
    return tuple(map(int, version.split(".")))


def class_of(code_point: int, database: Any = unicodedata) -> int:
    """OTHER, LETTER, NUMBER or SPACE."""
    category = database.category(chr(code_point))
    if category[0] == "L":
        return LETTER
    if category[0] == "N":
        return NUMBER
    if category[0] == "Z" or code_point in CONTROL_SPACES:
        return SPACE
    return OTHER


def class_changes(database: Any) -> list[tuple[int, int]]:
    """(first code point, class) of every run of code points of one class, ascending."""
    changes: list[tuple[int, int]] = []
    for code_point in range(sys.maxunicode + 1):
        kind = class_of(code_point, database)
        if not changes or changes[-1][1] != kind:
            changes.append((code_point, kind))
    return changes


def parse(header: str) -> tuple[str, list[tuple[int, int]]]:
    """Unicode version and class changes that a header holds."""
    version = re.search(r'kUnicodeVersion\[\] = "([0-9.]+)"', header)
    body = re.search(r"kClassChanges\[\] = \{(.*?)\};", header, flags=re.S)
    if version is None or body is None:
        raise ValueError("the header holds no tables")
    entries = [int(word, 16) for word in re.findall(r"0x[0-9a-f]+", body[1])]
    return version[1], [(entry >> 2, entry & 3) for entry in entries]


def render(database: Any) -> str:
    """The header."""
    changes = class_changes(database)
    ends = [first for first, _ in changes[1:]] + [sys.maxunicode + 1]
    sizes = dict.fromkeys(NAMES, 0)
    for (first, kind), end in zip(changes, ends):
        if kind in sizes:
            sizes[kind] += end - first
    words = [f"0x{first << 2 | kind:x}" for first, kind in changes]
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) + 2 > 100:
            lines.append("")
        lines[-1] += f" {word}," if lines[-1] else f"    {word},"
    counts = ", ".join(f"{sizes[kind]} {name}" for kind, name in NAMES.items())
    return "\n".join(
        [
            "// Made by tools/make_unicode_tables.py; not to be edited.",
            f"// Unicode {database.unidata_version}: {counts}.",
            "#pragma once",
            "",
            "#include <cstdint>",
            "",
            "namespace fastgen::text {",
            "",
            f'constexpr char kUnicodeVersion[] = "{database.unidata_version}";',
            "",
            "// The first code point of every run of one class, times 4, plus the class (0: other,",
            "// 1: letter, 2: number, 3: white space). Ascending.",
            "// clang-format off",
            "constexpr uint32_t kClassChanges[] = {",
            *lines,
            "};",
            "// clang-format on",
            "",
            "}  // namespace fastgen::text",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    check = parser.parse_args().check
    database = newest_database()
    present = HEADER.read_text() if HEADER.exists() else None
    if present is not None:
        version, _ = parse(present)
        if as_numbers(version) > as_numbers(database.unidata_version):
            print(
                f"{HEADER} is of Unicode {version}, this Python has {database.unidata_version}: "
                "install unicodedata2 or use a newer Python",
                file=sys.stderr,
            )
            return 1
    text = render(database)
    if check:
        if text != present:
            print(f"{HEADER} is not current, run {Path(__file__).name}", file=sys.stderr)
        return int(text != present)
    HEADER.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
