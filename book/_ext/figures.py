"""Every figure of the book, as it is read: `env.figures` is `{page: [Figure, ...]}`, in page order.

The gallery shows them all; a page's share image shows its first one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from docutils import nodes

#: The end of a caption's first sentence: a full stop, not that of "Fig. 3" or of a number.
SENTENCE_END = re.compile(r"(?<!\bFig)(?<!\bi\.e)(?<!\be\.g)[.?!](?=\s|$)")


@dataclass
class Figure:
    """One numbered figure of a page."""

    id: str  #: its anchor on the page
    alt: str  #: its text alternative
    path: str  #: its image, relative to the book's root
    caption: list[nodes.Node]  #: the first sentence of its caption, without links


def first_sentence(caption: nodes.Node) -> list[nodes.Node]:
    """The nodes of a caption up to the end of its first sentence; what was a link is its text."""
    found: list[nodes.Node] = []
    for child in caption.children:
        text = child.astext()
        if isinstance(child, nodes.Text) and (end := SENTENCE_END.search(text)):
            found.append(nodes.Text(text[: end.end()]))
            break
        keep = isinstance(child, (nodes.math, nodes.emphasis, nodes.literal, nodes.strong))
        found.append(child.deepcopy() if keep else nodes.Text(text))
    return found


def collect(app, doctree: nodes.document) -> None:
    """Note the figures of a page that has just been read."""
    figures = []
    for figure in doctree.findall(nodes.figure):
        image = figure.next_node(nodes.image)
        caption = figure.next_node(nodes.caption)
        if image is None or caption is None or not figure["ids"]:
            continue
        path = image["candidates"].get("*") or next(iter(image["candidates"].values()))
        alt = " ".join(image.get("alt", "").split())
        figures.append(Figure(figure["ids"][0], alt, path, first_sentence(caption)))
    noted(app.env)[app.env.docname] = figures


def noted(env) -> dict[str, list[Figure]]:
    """The figures of every page read so far."""
    if not hasattr(env, "figures"):
        env.figures = {}
    return env.figures


def image_file(app, figure: Figure) -> Path:
    """Where a figure's image lies."""
    return Path(app.srcdir) / figure.path


def purge(app, env, docname: str) -> None:
    noted(env).pop(docname, None)


def setup(app):
    app.connect("env-purge-doc", purge)
    # After Sphinx's own collector, which finds out where each image lies.
    app.connect("doctree-read", collect, priority=900)
    return {"parallel_read_safe": False, "parallel_write_safe": True, "env_version": 1}
