"""What the pages need beyond the theme: alt text, accessible roles, their colours at once.

A figure without a text alternative is a warning, hence fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)

#: What is changed in the finished pages, and into what.
MENDED = (
    # docutils' roles for bibliographies are deprecated, and a list of them is no list to a reader.
    (re.compile(r' role="(?:doc-biblioentry|doc-backlink)"'), ""),
    (re.compile(r' role="list"(?= class="citation-list")'), ""),
    # MyST and the theme repeat what Sphinx says already.
    (re.compile(r'<meta name="viewport" content="width=device-width, initial-scale=1" ?/>'), ""),
    # The theme's name for "as the reader's system" selects no colours, until a script at the page's
    # end replaces it: a flash, and no colours at all where no script runs.
    (re.compile(r'(<html [^>]*data-theme=)"auto"'), r'\1"light"'),
    (
        re.compile(r'localStorage\.getItem\("theme"\) \|\| "auto"'),
        '{ light: "light", dark: "dark" }[document.documentElement.dataset.mode] ?? '
        '(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")',
    ),
)


def require_alt_text(app, doctree, docname: str) -> None:
    """Warn of every image whose alternative text is missing, empty or a file's name."""
    for image in doctree.findall(nodes.image):
        text = image.get("alt", "").strip()
        if not text or text == image.get("uri") or re.fullmatch(r"\S+\.(png|svg|jpe?g)", text):
            advice = "in a notebook: cell metadata mystnb.image.alt"
            LOGGER.warning("%s has no alt text; %s", image.get("uri"), advice, location=docname)


def mend(app, exception) -> None:
    """Change what stands in the finished pages as the theme and docutils wrote it."""
    if exception or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        before = page.read_text(encoding="utf-8")
        after = before
        for pattern, better in MENDED:
            after = pattern.sub(better, after)
        if after != before:
            page.write_text(after, encoding="utf-8")


def setup(app):
    app.connect("doctree-resolved", require_alt_text)
    app.connect("build-finished", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
