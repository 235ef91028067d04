"""The Doxygen comments of the public headers as reStructuredText, for hawkmoth.

hawkmoth finds declarations and comments with libclang; this turns a comment's commands into field
lists, its Markdown into reStructuredText, and names of the C interface into references. A command
that is not known, and a parameter that is not documented or does not exist, is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

#: Doxygen's command -> field of Sphinx's C and C++ domains; with an argument where it takes one.
FIELDS = {
    "param": "param",
    "return": "returns",
    "retval": "retval",
    "throws": "throws",
    "since": "since",
}
WITH_ARGUMENT = ("param", "retval", "throws")
#: Commands that leave nothing behind but their text.
PLAIN = ("brief",)
#: Commands whose whole line says nothing to a reader.
DROPPED = ("file", "{", "}")

_COMMAND = re.compile(r"@(?P<name>[a-z]+|[{}])(?P<direction>\[[a-z,]+\])?\s*(?P<rest>.*)")
# In this order: what is code, an explicit link, a member, a function.
_INLINE = re.compile(
    r"`(?P<code>[^`]+)`"
    r"|::(?P<link>\w+)"
    r"|\b(?P<owner>fastgen_\w+)::(?P<member>\w+)"
    r"|\b(?P<function>fastgen_\w+)\(\)"
    r"|\bfastgen::(?P<name>\w+)"
)


def _inline(text: str) -> str:
    done = []
    at = 0
    for match in _INLINE.finditer(text):
        done.append(_escape(text[at : match.start()]))
        done.append(_reference(match))
        at = match.end()
    return "".join(done) + _escape(text[at:])


def _escape(text: str) -> str:
    """Ours has neither substitutions nor references by name; `**bold**` is the same in both."""
    return re.sub(r"([|_\\])", r"\\\1", text)


def _reference(match: re.Match[str]) -> str:
    if match["code"]:
        return f"``{match['code']}``"
    if match["link"]:
        role = "enumerator" if match["link"].isupper() else "type"
        return f":c:{role}:`{match['link']}`"
    if match["owner"]:
        return f":c:member:`{match['owner']}.{match['member']}`"
    if match["function"]:
        return f":c:func:`{match['function']}`"
    return f":cpp:any:`fastgen::{match['name']}`"


def _without_prefix(lines: list[str]) -> list[str]:
    """Comment lines without the ` *  ` that hawkmoth leaves on a last line with text."""
    return [*lines[:-1], re.sub(r"^\s*\*\s*", "", lines[-1])] if len(lines) > 1 else lines


def convert(lines: list[str]) -> Iterator[str]:
    """Lines of a comment without its delimiters -> lines of reStructuredText.

    Raises:
        ValueError: a command is not known.
    """
    in_code = in_field = False
    for line in _without_prefix(lines):
        if in_code:
            in_code = line.strip() != "@endcode"
            yield f"   {line}" if in_code and line else ""
            continue
        match = _COMMAND.fullmatch(line.strip())
        if match is None:
            in_field = in_field and bool(line.strip())
            yield f"   {_inline(line.strip())}" if in_field else _inline(line)
            continue
        name, rest = match["name"], match["rest"]
        if name in DROPPED:
            continue
        if name in PLAIN:
            yield _inline(rest)
        elif name == "code":
            in_code = True
            yield from ("", ".. code-block:: cpp", "")
        elif name == "defgroup":
            _, title = rest.split(maxsplit=1)
            yield from (title, "-" * len(title), "")
        elif name in FIELDS:
            field = FIELDS[name]
            if name in WITH_ARGUMENT:
                argument, _, rest = rest.partition(" ")
                field = f"{field} {argument}"
            direction = f"*{match['direction']}* " if match["direction"] else ""
            # A field list begins after a blank line; one between its fields does no harm.
            yield from ("", f":{field}: {direction}{_inline(rest)}")
            in_field = True
        else:
            raise ValueError(f"@{name} is not a command that docs/extensions knows")


def _process(app: Sphinx, lines: list[str], transform: str | None, options: Any) -> None:
    try:
        lines[:] = list(convert(lines))
    except ValueError as error:
        logger.warning("a comment of the public headers: %s: %s", error, " ".join(lines)[:200])


def _check_parameters(app: Sphinx, domain: str, objtype: str, content: nodes.Element) -> None:
    """What is documented as a parameter against what the function takes."""
    if domain not in ("c", "cpp") or objtype != "function":
        return
    signature = content.parent[0]
    taken = [
        name.astext()
        for parameter in signature.findall(lambda node: isinstance(node, addnodes.desc_parameter))
        for name in list(parameter.findall(addnodes.desc_sig_name))[-1:]
    ]
    documented = [
        field[0].astext().split(maxsplit=1)[1]
        for field in content.findall(nodes.field)
        if field[0].astext().startswith("param ")
    ]
    if taken != documented:
        logger.warning(
            "%s documents the parameters %s and takes %s",
            signature.astext(), documented, taken,
            location=signature,
        )  # fmt: skip


def _resolve(
    app: Sphinx, env: Any, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """C++ declarations speak of types of the C interface."""
    if node.get("refdomain") != "cpp" or not node["reftarget"].lower().startswith("fastgen_"):
        return None
    return env.get_domain("c").resolve_xref(
        env, node["refdoc"], app.builder, "any", node["reftarget"], node, content
    )


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects it."""
    app.setup_extension("hawkmoth")
    app.connect("hawkmoth-process-docstring", _process)
    app.connect("object-description-transform", _check_parameters, priority=100)
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True}
