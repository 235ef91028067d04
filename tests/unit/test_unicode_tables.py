"""The tables of Unicode that the library's tokenizer splits text by."""

from __future__ import annotations

import importlib.util
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "csrc" / "text" / "unicode_tables.h"


def table_maker() -> ModuleType:
    path = ROOT / "tools" / "make_unicode_tables.py"
    spec = importlib.util.spec_from_file_location("make_unicode_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unicode_tables_are_those_of_the_script() -> None:
    maker = table_maker()
    header = TABLES.read_text()
    version, changes = maker.parse(header)
    database = maker.newest_database()
    if database.unidata_version == version:
        assert maker.render(database) == header
    assert changes[0][0] == 0
    assert all(a[0] < b[0] and a[1] != b[1] for a, b in zip(changes, changes[1:]))
    # An older Unicode knows fewer characters, and has every one of them in the same class.
    assert maker.as_numbers(version) >= maker.as_numbers(unicodedata.unidata_version)
    ends = [first for first, _ in changes[1:]] + [sys.maxunicode + 1]
    for (first, kind), end in zip(changes, ends):
        for code in range(first, end):
            known = unicodedata.category(chr(code)) != "Cn"
            assert not known or maker.class_of(code) == kind, hex(code)
