"""Sphinx: docs/ as a site. `ci/docs.sh` builds it; every package comes from the package index."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import inspect

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "extensions"), str(ROOT)]

project = "fastgen"
author = "the fastgen authors"
copyright = "the fastgen authors, Apache-2.0"  # noqa: A001  Sphinx's name
_version = re.search(r"project\(fastgen VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())
assert _version is not None
release = version = _version[1]

extensions = ["myst_parser", "header_comments", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["extensions"]
html_theme = "furo"
html_title = f"fastgen {release}"

# ---- Markdown: what GitHub renders too -----------------------------------------------------------

myst_heading_anchors = 3
smartquotes = False  # "cpu" is a value
default_role = "code"  # in docstrings, a word between backticks is code as it is in Markdown

# ---- C and C++, from the headers -----------------------------------------------------------------

hawkmoth_root = str(ROOT / "csrc" / "include")
# libclang comes without the standard library's headers: those of the compiler are used.
hawkmoth_compiler = os.environ.get("CXX", "g++")
hawkmoth_clang = [f"-I{hawkmoth_root}"]
hawkmoth_clang_c = ["-std=c11"]
hawkmoth_clang_cpp = ["-std=c++17"]

# ---- Python --------------------------------------------------------------------------------------

# The reference is made without Paddle.
autodoc_mock_imports = ["paddle", "paddlenlp"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False


def _real_signature(app, what, name, obj, options, signature, returns):
    """That of the class, where Sphinx sees that of the stand-in for its base."""
    if what != "class" or signature != "(*args, **kwargs)" or "__init__" not in vars(obj):
        return None
    own = inspect.signature(obj.__init__, bound_method=True)
    return inspect.stringify_signature(own, show_annotation=False), returns


def setup(app: Sphinx) -> None:
    """Connects what is above."""
    app.connect("autodoc-process-signature", _real_signature)


# ---- References ----------------------------------------------------------------------------------

# Everything that is not ours: types of the standard libraries and of other packages.
nitpick_ignore_regex = [
    ("c:identifier", r"u?int\d+_t|size_t"),
    ("cpp:identifier", r"std(::.*)?|fastgen|u?int\d+_t|size_t"),
    ("py:.*", r"(numpy|np|paddle|os|pathlib|collections|typing)(\..*)?|Path|Any|Scalars"),
]
