"""The page that shows all figures."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup

import executed
from fresh import ROOT

HTML = ROOT / "_build" / "html"
PAGE = "book/gallery"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
#: The pages of every part but the gallery's own, which is about the book.
SHOWN = [
    document
    for part in TOC["parts"]
    if PAGE not in (documents := list(executed.documents(part)))
    for document in documents
]
WEIGHT = 1_500_000  # bytes of all pictures together, at most

pytestmark = [pytest.mark.xdist_group("gallery"), pytest.mark.usefixtures("book")]


@cache
def soup(document: str) -> BeautifulSoup:
    return BeautifulSoup((HTML / f"{document}.html").read_text(encoding="utf-8"), "html.parser")


def figures() -> dict[str, tuple[str, str]]:
    """Number and text alternative of every numbered figure, by address as the gallery has it."""
    found = {}
    for document in SHOWN:
        for number in soup(document).select("article figcaption .caption-number"):
            figure = number.find_parent("figure")
            alt = " ".join(figure.find("img")["alt"].split())
            found[f"{document}.html#{figure['id']}"] = (number.get_text().strip(), alt)
    return found


def tiles() -> dict[str, tuple[str, str]]:
    """The same, as the gallery shows them."""
    found = {}
    for link in soup(PAGE).select(".gallery a"):
        address = (HTML / PAGE).parent.joinpath(link["href"]).resolve().relative_to(HTML)
        number = link.select_one(".gallery-number").get_text().strip()
        found[address.as_posix()] = (number, link.find("img")["alt"])
    return found


def test_every_numbered_figure_is_there_in_order():
    assert len(figures()) > len(SHOWN)  # more figures than chapters
    assert list(tiles().items()) == list(figures().items())


def test_every_tile_has_a_caption():
    for link in soup(PAGE).select(".gallery a"):
        number = link.select_one(".gallery-number").get_text()
        assert len(link.get_text().removeprefix(number).strip()) >= 10, link


def test_the_pictures_are_light_and_wait_until_they_are_needed():
    images = soup(PAGE).select(".gallery img")
    files = {(HTML / PAGE).parent.joinpath(image["src"]).resolve() for image in images}
    assert sum(Path(file).stat().st_size for file in files) <= WEIGHT
    for image in images:
        assert image["loading"] == "lazy"
        assert int(image["width"]) > 0
        assert int(image["height"]) > 0


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_jumps_when_the_pictures_arrive(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    height = "document.documentElement.scrollHeight"
    held = []
    page.route("**/thumbnails/*", lambda route: held.append(route))  # neither answered nor refused
    page.goto(f"/{PAGE}.html", wait_until="domcontentloaded")
    page.evaluate("document.fonts.ready")
    before = page.evaluate(height)
    page.evaluate("document.querySelectorAll('.gallery img').forEach(i => i.loading = 'eager')")
    for route in held:
        route.continue_()
    page.unroute("**/thumbnails/*")
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth)")
    assert held
    assert page.evaluate(height) == before
