"""The reference is complete: every public declaration of the headers is in it, with its history."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from clang.cindex import AccessSpecifier, Cursor, CursorKind, Index
from hawkmoth.util import compiler
from sphinx.util.inventory import InventoryFile

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc" / "include" / "fastgen"
SITE = ROOT / "build" / "docs"

#: Kinds of declarations -> what Sphinx calls them.
KINDS = {
    CursorKind.FUNCTION_DECL: "function",
    CursorKind.CONSTRUCTOR: "function",
    CursorKind.CXX_METHOD: "function",
    CursorKind.STRUCT_DECL: "struct",
    CursorKind.CLASS_DECL: "class",
    CursorKind.FIELD_DECL: "member",
    CursorKind.ENUM_DECL: "enum",
    CursorKind.ENUM_CONSTANT_DECL: "enumerator",
    CursorKind.TYPEDEF_DECL: "type",
    CursorKind.TYPE_ALIAS_DECL: "type",
}


def parse(header: str) -> Cursor:
    """The declarations of a header."""
    c = header.endswith(".h")
    arguments = [
        *(("-xc-header", "-std=c11") if c else ("-xc++-header", "-std=c++17")),
        f"-I{HEADERS.parent}",
        *compiler.get_include_args(os.environ.get("CXX", "g++"), "c" if c else "c++"),
    ]
    unit = Index.create().parse(str(HEADERS / header), args=arguments)
    assert not list(unit.diagnostics)
    return unit.cursor


def public(parent: Cursor, header: str, prefix: str = "") -> Iterator[tuple[str, Cursor]]:
    """Names and declarations that users of a header may use."""
    for cursor in parent.get_children():
        if cursor.location.file is None or Path(cursor.location.file.name).name != header:
            continue
        is_method = cursor.kind in (CursorKind.CONSTRUCTOR, CursorKind.CXX_METHOD)
        if is_method and cursor.semantic_parent != parent:  # defined here, declared in its class
            continue
        name = f"{prefix}{cursor.spelling}"
        if cursor.kind is CursorKind.NAMESPACE and cursor.spelling != "detail":
            yield from public(cursor, header, f"{name}::")
        elif cursor.kind is CursorKind.LINKAGE_SPEC:
            yield from public(cursor, header, prefix)
        elif cursor.kind in KINDS and cursor.access_specifier in (
            AccessSpecifier.PUBLIC,
            AccessSpecifier.INVALID,
            AccessSpecifier.NONE,
        ):
            declared_only = cursor.kind in (CursorKind.STRUCT_DECL, CursorKind.CLASS_DECL)
            if declared_only and not cursor.is_definition():
                continue
            # `typedef struct fastgen_config {...} fastgen_config;` is one thing with one comment.
            is_alias = cursor.kind is CursorKind.TYPEDEF_DECL
            if is_alias and cursor.underlying_typedef_type.get_declaration().is_definition():
                continue
            yield name, cursor
            separator = "." if header.endswith(".h") else "::"
            yield from public(cursor, header, f"{name}{separator}")


DECLARATIONS = [
    pytest.param(header, name, cursor, id=f"{header}:{name}:{cursor.location.line}")
    for header in ("fastgen.h", "fastgen.hpp")
    for name, cursor in public(parse(header), header)
]


@pytest.fixture(scope="module")
def inventory() -> dict[str, set[str]]:
    """What the built site has a place for: domain and kind -> names."""
    data = InventoryFile.loads((SITE / "objects.inv").read_bytes(), uri="").data
    return {kind: set(names) for kind, names in data.items()}


@pytest.mark.parametrize(("header", "name", "cursor"), DECLARATIONS)
def test_every_declaration_is_in_the_reference(
    header: str, name: str, cursor: Cursor, inventory: dict[str, set[str]]
) -> None:
    kind = KINDS[cursor.kind]
    if header.endswith(".hpp"):
        # C++ calls both classes in its index.
        assert name in inventory[f"cpp:{'class' if kind == 'struct' else kind}"]
    else:
        assert name in inventory[f"c:{kind}"]


@pytest.mark.parametrize(
    ("header", "name", "cursor"),
    [
        case
        for case in DECLARATIONS
        if not re.search(r"\w(\.|::)\w", str(case.values[1]).replace("fastgen::", ""))
    ],
)
def test_every_declaration_says_since_when(header: str, name: str, cursor: Cursor) -> None:
    assert re.search(r"@since \d+\.\d+\b", cursor.raw_comment or ""), name


def test_every_exported_function_was_looked_at() -> None:
    """Against the text, so that what libclang is not shown is missed too."""
    text = re.sub(r"/\*.*?\*/", "", (HEADERS / "fastgen.h").read_text(), flags=re.DOTALL)
    exported = re.findall(r"^FASTGEN_API [^;]*?\b(fastgen_\w+)\(", text, flags=re.MULTILINE)
    looked_at = [
        case.values[1]
        for case in DECLARATIONS
        if case.values[0] == "fastgen.h" and KINDS[case.values[2].kind] == "function"
    ]
    assert exported == looked_at
    assert len(exported) > 30


@pytest.mark.parametrize("header", ["fastgen.h", "fastgen.hpp"])
def test_comments_come_before_what_they_describe(header: str) -> None:
    """hawkmoth gives a comment behind a declaration to the next one."""
    assert "/**<" not in (HEADERS / header).read_text()


PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part.startswith("build") for part in path.parts)
]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    """In the checkout, also for the pages that are not part of the site."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target
