"""What the pages need beyond the theme: alt text and accessible roles.

A figure without a text alternative is a warning, hence fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)

#: What is taken out of the finished pages.
UNWANTED = (
    # docutils' roles for bibliographies are deprecated, and a list of them is no list to a reader.
    re.compile(r' role="(?:doc-biblioentry|doc-backlink)"'),
    re.compile(r' role="list"(?= class="citation-list")'),
)


def require_alt_text(app, doctree, docname: str) -> None:
    """Warn of every image whose alternative text is missing, empty or a file's name."""
    for image in doctree.findall(nodes.image):
        text = image.get("alt", "").strip()
        if not text or text == image.get("uri") or re.fullmatch(r"\S+\.(png|svg|jpe?g)", text):
            advice = "in a notebook: cell metadata mystnb.image.alt"
            LOGGER.warning("%s has no alt text; %s", image.get("uri"), advice, location=docname)


def mend(app, exception) -> None:
    """Take out of the finished pages what they are better without."""
    if exception or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        before = page.read_text(encoding="utf-8")
        after = before
        for pattern in UNWANTED:
            after = pattern.sub("", after)
        if after != before:
            page.write_text(after, encoding="utf-8")


def setup(app):
    app.connect("doctree-resolved", require_alt_text)
    app.connect("build-finished", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
