"""Sphinx: pages are the Markdown files of ``docs/``, the reference is made of docstrings.

``make docs`` builds the site into ``build/site``; every warning is an error.
"""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

REPOSITORY_URL = ""
"""Where a link that leaves ``docs/`` leads, e.g. ``https://example.org/repo/blob/main``.

Empty until the owner publishes the repository (see ``CONTRIBUTING.md``); such links
are then plain text on the site, and work in the checkout.
"""

project = "remat-planner"
author = "the remat-planner authors"
release = version = installed_version("remat-planner")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]  # the first page is made of it, see _on_source_read
html_theme = "furo"
html_title = f"{project} {version}"
html_show_sphinx = False

myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # pages of record begin sections at the level they like

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_rtype = False

_LEAVES_DOCS = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)]*)\)")


def _lead_out(text: str, depth: int) -> str:
    """Links out of ``docs/`` from a page ``depth`` folders below it."""

    def replace(link: re.Match[str]) -> str:
        if link[0].count("../") <= depth:
            return link[0]
        return f"[{link[1]}]({REPOSITORY_URL}/{link[2]})" if REPOSITORY_URL else link[1]

    return _LEAVES_DOCS.sub(replace, text)


def _on_source_read(app: Any, name: str, source: list[str]) -> None:
    """The first page is docs/README.md with the menu of index.md."""
    if name == "index":
        readme = Path(app.srcdir, "README.md").read_text(encoding="utf-8")
        source[0] = f"{readme}\n{source[0]}"
    source[0] = _lead_out(source[0], name.count("/"))


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _on_source_read)
