"""`{figure-gallery}`: every figure of every chapter, as a small picture that leads to it.

The parts of the table of contents become sections when the page is read; the pictures come when it
is written, after every chapter has been read, so that none can be missing.
"""

from __future__ import annotations

import hashlib
from html import escape
from pathlib import Path

from docutils import nodes
from PIL import Image  # matplotlib needs it, so it is there
from sphinx.util.docutils import SphinxDirective
from sphinx.util.osutil import relative_uri

import figures

THUMBNAILS = Path("_images/thumbnails")
WIDTH, QUALITY = 480, 70  # twice a tile's width; WebP's scale
SHAPE = (480, 240)  # of a tile: custom.css gives every picture that much room


class FiguresSlot(nodes.General, nodes.Element):
    """Where the figures of one part go: `pages` says of which."""


class FigureGallery(SphinxDirective):
    """`{figure-gallery}`: one section for each part of `_toc.yml`."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(Path(self.env.srcdir) / "_toc.yml"))
        self.env.gallery_page = self.env.docname
        found = []
        for number, part in enumerate(self.env.external_site_map.root.subtrees, start=1):
            if self.env.docname in part.items:  # the part about the book
                continue
            section = nodes.section(ids=[f"part-{number}"], names=[part.caption.lower()])
            section += nodes.title("", part.caption)
            section += FiguresSlot(pages=[str(item) for item in part.items])
            found.append(section)
        return found


def always_written(app, env) -> list[str]:
    """The gallery's page: any page that was read again may have changed its figures."""
    page = getattr(env, "gallery_page", None)
    return [page] if page in env.found_docs else []


def fill(app, doctree: nodes.document, docname: str) -> None:
    """Put the figures where their part waits for them."""
    for slot in list(doctree.findall(FiguresSlot)):
        chapters = [
            chapter(app, docname, page)
            for page in slot["pages"]
            if figures.noted(app.env).get(page)
        ]
        slot.replace_self(chapters or nodes.paragraph("", "No figures yet."))


def chapter(app, here: str, page: str) -> nodes.section:
    """One chapter's figures, below its title."""
    uri = app.builder.get_relative_uri(here, page)
    section = nodes.section(ids=[f"figures-of-{page.replace('/', '-')}"])
    heading = nodes.title()
    heading += nodes.reference("", app.env.titles[page].astext(), refuri=uri, internal=True)
    section += [heading, html('<ul class="gallery">')]
    for figure in figures.noted(app.env)[page]:
        label = app.env.toc_fignumbers.get(page, {}).get("figure", {}).get(figure.id)
        name = app.config.numfig_format["figure"] % ".".join(map(str, label)) if label else ""
        section += html(f'<li><a href="{escape(uri)}#{escape(figure.id)}">')
        section += html(picture(app, here, figure))
        section += nodes.inline("", name, classes=["gallery-number"])
        section += nodes.inline("", "", *(node.deepcopy() for node in figure.caption))
        section += html("</a></li>")
    section += html("</ul>")
    return section


def html(text: str) -> nodes.raw:
    return nodes.raw("", text, format="html")


def picture(app, here: str, figure: figures.Figure) -> str:
    """The `<img>` of a figure's thumbnail, which is made if there is none yet."""
    source = figures.image_file(app, figure)
    if source.suffix == ".svg":  # light as it is
        address, (width, height) = f"_images/{app.env.images[figure.path][1]}", SHAPE
    else:
        address, (width, height) = thumbnail(source, Path(app.outdir))
    uri = relative_uri(app.builder.get_target_uri(here), address)
    return (
        f'<img src="{uri}" alt="{escape(figure.alt)}" width="{width}" height="{height}" '
        'loading="lazy" decoding="async">'
    )


def thumbnail(source: Path, outdir: Path) -> tuple[str, tuple[int, int]]:
    """Its address below the pages, and its size; named after what it shows, so never stale."""
    content = source.read_bytes()
    digest = hashlib.sha256(f"{WIDTH} {QUALITY} ".encode() + content).hexdigest()[:20]
    path = outdir / THUMBNAILS / f"{digest}.webp"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source) as image:
            small = image.convert("RGB")
        small.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
        small.save(path, "WEBP", quality=QUALITY, method=6)
    with Image.open(path) as image:
        return path.relative_to(outdir).as_posix(), image.size


def setup(app):
    app.add_node(FiguresSlot)
    app.add_directive("figure-gallery", FigureGallery)
    app.connect("env-updated", always_written)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": False, "parallel_write_safe": True, "env_version": 1}
