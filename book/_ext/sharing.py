"""What a link to a page shows where it is shared: a description and a picture of its own.

The description is the page's `description` metadata; a chapter has none, for its answer stands at
its head: the first paragraph, as far as it goes into what search engines show.  The picture is a
card with the page's title and, where it has one, its first figure.  sphinxext-opengraph writes the
tags.  Its own cards know no figure.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from html import escape
from pathlib import Path

from docutils import nodes
from matplotlib import colormaps, font_manager
from matplotlib.colors import to_hex
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin  # matplotlib needs it, so it is there

import figures

LONG, LONGEST = 110, 160  # characters; search engines show so many
MORE = "…"

#: Pages that no file stands behind.
MADE = {
    "genindex": "Every function and class of gradlab, the library of Exploding Gradients, by name.",
    "py-modindex": "The modules of gradlab, the library of the book Exploding Gradients, by name.",
    "search": "Search Exploding Gradients: the chapters, the ledger of claims and the library.",
    "_modules/index": "The source of gradlab, the library of Exploding Gradients, by module.",
}


# ---------------------------------------------------------------------------------------------
# The description


def description(pagename: str, doctree: nodes.document | None) -> str:
    """One to two sentences about a page, without markup."""
    if doctree is None:
        module = pagename.removeprefix("_modules/").replace("/", ".")
        return MADE.get(
            pagename, f"The source of {module}, from the library of Exploding Gradients."
        )
    for meta in doctree.findall(nodes.meta):
        if meta.get("name") == "description":
            return meta["content"]
    return shorten(answer(doctree))


def answer(doctree: nodes.document) -> str:
    """A page's first paragraph, as plain text; where a formula begins, it breaks off."""
    section = doctree.next_node(nodes.section)
    paragraph = section.next_node(nodes.paragraph) if section else None
    text = ""
    for leaf in paragraph.findall(nodes.Text) if paragraph else ():
        if isinstance(leaf.parent, (nodes.math, nodes.raw)):
            text = text.rstrip() + MORE
            break
        text += leaf.astext()
    return " ".join(text.split())


def shorten(text: str) -> str:
    """As many whole sentences as fit; where they leave much room, or none fits, as many words."""
    if len(text) <= LONGEST:
        return text
    ends = [match.end() for match in re.finditer(r"[.?!][”’)]*(?= )", text[: LONGEST + 1])]
    if ends and ends[-1] >= LONG:
        return text[: ends[-1]]
    return text[: LONGEST - 1].rsplit(" ", 1)[0].rstrip(" ,;:–—.") + MORE


# ---------------------------------------------------------------------------------------------
# The card

SIZE = (1200, 630)
PAPER, INK, FAINT = "#140b34", "#ffffff", "#c9c3dc"
#: The picture of the book: a gradient that grows from the last layer, above, to the first.
LAYERS = 12
BOOK, ABOUT = "Exploding Gradients", "Causes, diagnosis and cures"
STRIP, MARGIN, GAP, FOOT = 36, 56, 32, 92  # pixels
CARDS = Path("share")


def font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    """The font of the figures, which matplotlib brings."""
    properties = font_manager.FontProperties(family="DejaVu Sans", weight=weight)
    return ImageFont.truetype(font_manager.findfont(properties), size)


def wrapped(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines that fit the width."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def write(
    draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int], largest: int, ink: str,
    weight: str = "normal",
) -> int:  # fmt: skip
    """Write a text into a box, as large as it fits.

    Args:
        box: left, top, right and bottom.
        largest: the font's size to begin with.

    Returns:
        Where the text ends, below.
    """
    left, top, right, bottom = box
    for size in range(largest, 17, -2):
        face = font(size, weight)
        lines = wrapped(text, face, right - left)
        step = round(size * 1.28)
        widest = max(face.getlength(line) for line in lines)
        if len(lines) * step <= bottom - top and widest <= right - left:
            break
    for number, line in enumerate(lines):
        draw.text((left, top + number * step), line, font=face, fill=ink)
    return top + len(lines) * step


def card(title: str, text: str, figure: Path | None) -> Image.Image:
    """The picture of a page.

    Args:
        title: the page's title.
        text: stands below it where a figure leaves room.
        figure: the image to show.
    """
    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    width, height = SIZE
    for layer in range(LAYERS):
        colour = to_hex(colormaps["magma"](0.15 + 0.8 * layer / (LAYERS - 1)))
        top, bottom = round(layer * height / LAYERS), round((layer + 1) * height / LAYERS)
        draw.rectangle((0, top, STRIP, bottom), fill=colour)

    left, right, bottom = STRIP + MARGIN, width - MARGIN, height - FOOT
    name = BOOK if title != BOOK else ABOUT
    draw.text((left, height - 64), name, font=font(26, "bold"), fill=INK)
    tested = "tested in PyTorch and TensorFlow"
    draw.text((right, height - 60), tested, font=font(22), fill=FAINT, anchor="ra")

    if figure is None:
        below = write(draw, title, (left, MARGIN, right, 330), 76, INK, "bold")
        write(draw, text, (left, below + GAP, right, bottom), 34, FAINT)
        return image
    with Image.open(figure) as opened:
        shown = opened.convert("RGB")
    if shown.width > 2 * shown.height:  # below the title
        below = write(draw, title, (left, MARGIN - 12, right, MARGIN + 112), 56, INK, "bold")
        box = (left, below + 20, right, bottom)
    else:  # beside it
        middle = left + 430
        below = write(draw, title, (left, MARGIN, middle - GAP, 330), 52, INK, "bold")
        write(draw, text, (left, below + GAP, middle - GAP, bottom), 26, FAINT)
        box = (middle, MARGIN, right, bottom)
    place(image, shown, box)
    return image


def place(image: Image.Image, shown: Image.Image, box: tuple[int, int, int, int]) -> None:
    """Paste a figure into the middle of a box, on a sheet of white paper around it."""
    left, top, right, bottom = box
    edge = 14
    room = (right - left - 2 * edge, bottom - top - 2 * edge)
    scale = min(room[0] / shown.width, room[1] / shown.height)
    shown = shown.resize((round(shown.width * scale), round(shown.height * scale)), Image.LANCZOS)
    x = left + (right - left - shown.width) // 2
    y = top + (bottom - top - shown.height) // 2
    sheet = (x - edge, y - edge, x + shown.width + edge, y + shown.height + edge)
    ImageDraw.Draw(image).rounded_rectangle(sheet, 10, fill="#ffffff")
    image.paste(shown, (x, y))


def save(path: Path, title: str, text: str, figure: Path | None) -> None:
    """Draw a page's card, unless the one that is there shows the same."""
    digest = hashlib.sha256(repr((title, text)).encode())
    digest.update(Path(__file__).read_bytes())
    if figure:
        digest.update(figure.read_bytes())
    shows = digest.hexdigest()
    if path.exists():
        with Image.open(path) as old:
            if old.info.get("shows") == shows:
                return
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text("shows", shows)
    card(title, text, figure).save(path, pnginfo=info)


# ---------------------------------------------------------------------------------------------
# In the pages


def tag(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Give a page its description, and sphinxext-opengraph what it needs for the rest."""
    if app.builder.format != "html":
        return
    text = description(pagename, doctree)
    meta = "" if 'name="description"' in context.get("metatags", "") else description_tag(text)
    context["metatags"] = context.get("metatags", "") + meta
    if doctree is None:
        return
    title = app.env.titles[pagename].astext()
    shown = next(iter(figures.noted(app.env).get(pagename, ())), None)
    file = figures.image_file(app, shown) if shown else None
    if file is not None and file.suffix == ".svg":
        shown = file = None
    own = {}
    if pagename == app.config.root_doc:  # else its title were the book's name, twice
        context["title"] = ABOUT
        own["og:title"] = f"{BOOK}: {ABOUT[0].lower()}{ABOUT[1:]}"
    path = CARDS / f"{pagename}.png"
    save(Path(app.outdir) / path, title, text, file)
    says = f"{title}. {shown.alt if shown else text}".replace("?.", "?")
    context["meta"] = {
        **(context.get("meta") or {}),
        **own,
        "og:description": text,
        "og:image": path.as_posix(),
        "og:image:alt": textwrap.shorten(says, 420, placeholder=MORE),
        "og:image:width": str(SIZE[0]),
        "og:image:height": str(SIZE[1]),
    }


def description_tag(text: str) -> str:
    return f'<meta name="description" content="{escape(text)}" />\n'


def write_index(app, exception) -> None:
    """Say on the page behind the book's bare address, too, what a link to it shows.

    It leads to the first page; who only looks at its tags does not follow.
    """
    if exception or app.builder.name != "html":
        return
    first = app.builder.get_target_uri(app.config.root_doc)
    page = (Path(app.outdir) / first).read_text(encoding="utf-8")
    tags = re.findall(
        r'<(?:meta|link) [^>]*(?:"og:|"twitter:|"description"|"canonical")[^>]*>', page
    )
    tags.append(f"<title>{escape(app.config.html_title)}</title>")
    (Path(app.outdir) / "index.html").write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        + "\n".join(tags)
        + f'\n<meta http-equiv="refresh" content="0; url={first}">\n'
        + f'<p><a href="{first}">{escape(app.config.html_title)}</a></p>\n',
        encoding="utf-8",
    )


def setup(app):
    # Before sphinxext-opengraph, which reads what it finds here.
    app.connect("html-page-context", tag, priority=400)
    app.connect("build-finished", write_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
