"""What a link to a page shows where it is shared, and what a search engine shows of it."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup
from PIL import Image

import executed
from fresh import ROOT

HTML = ROOT / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
SITE = CONFIG["html"]["baseurl"]
DOCUMENTS = list(executed.documents(yaml.safe_load((ROOT / "_toc.yml").read_text())))
CHAPTERS = [name for name in DOCUMENTS if (ROOT / f"{name}.ipynb").exists()]
MODULES = sorted(
    path.relative_to(ROOT / "src").with_suffix("").as_posix()
    for path in (ROOT / "src").rglob("*.py")
)
SIZE, WEIGHT = (1200, 630), 300_000  # of a card: pixels, and bytes at most
#: What would show that markup has leaked into plain text.
MARKUP = re.compile(r"[\\$`{}<>*_]{2}|\\[a-z]+|\$|`|&[a-z]+;")

pytestmark = pytest.mark.usefixtures("book")
every_document = pytest.mark.parametrize("document", DOCUMENTS)


def pages() -> list[str]:
    """Every page of this build, the redirect behind the bare address apart."""
    sources = [f"_modules/{name}" for name in MODULES if (HTML / f"_modules/{name}.html").exists()]
    return [*DOCUMENTS, "genindex", "py-modindex", "search", "_modules/index", *sources]


@cache
def tags(page: str) -> dict[str, list[str]]:
    """The metadata in a page's head: every name's contents, the canonical address among them."""
    text = (HTML / f"{page}.html").read_text(encoding="utf-8").partition("<body")[0]
    head = BeautifulSoup(text, "html.parser")
    found: dict[str, list[str]] = {}
    for tag in head.find_all("meta", content=True):
        found.setdefault(tag.get("property") or tag.get("name", ""), []).append(tag["content"])
    found["canonical"] = [link["href"] for link in head.find_all("link", rel="canonical")]
    return found


def only(page: str, name: str) -> str:
    """The one content that a page gives for a name."""
    contents = tags(page).get(name, [])
    assert len(contents) == 1, f"{page}: {name} stands there {len(contents)} times"
    return contents[0]


def card(document: str) -> Path:
    """The file of a page's share image."""
    address = only(document, "og:image")
    assert address.startswith(SITE)
    return HTML / address.removeprefix(SITE)


def test_every_page_describes_itself_in_a_line():
    for page in pages():
        text = only(page, "description")
        assert 50 <= len(text) <= 160, f"{page}: {len(text)} characters: {text}"
        assert not MARKUP.search(text), f"{page}: {text}"


def test_no_two_pages_describe_themselves_alike():
    texts = Counter(only(page, "description") for page in pages())
    assert [text for text, number in texts.items() if number > 1] == []


@pytest.mark.parametrize("document", CHAPTERS)
def test_a_chapter_describes_itself_by_its_answer(document):
    page = BeautifulSoup((HTML / f"{document}.html").read_text(encoding="utf-8"), "html.parser")
    answer = " ".join(page.select_one("article section > p").get_text().split())
    shown = only(document, "description")
    assert answer.startswith(shown.removesuffix("…"))
    # Where it ends early, it says so, or it ends with a sentence.
    assert shown == answer or shown[-1] in "…?." or shown[-2] in ".?"


@every_document
def test_a_shared_link_has_its_tags(document):
    address = f"{SITE}{document}.html"
    assert only(document, "og:url") == address
    assert only(document, "canonical") == address
    assert only(document, "og:description") == only(document, "description")
    assert only(document, "og:site_name") == CONFIG["title"]
    assert only(document, "og:type")
    assert only(document, "twitter:card") == "summary_large_image"
    title = only(document, "og:title")
    assert title
    assert not MARKUP.search(title)


@every_document
def test_a_shared_link_has_a_picture(document):
    path = card(document)
    assert path.stat().st_size <= WEIGHT
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", SIZE)
    said = (only(document, "og:image:width"), only(document, "og:image:height"))
    assert tuple(map(int, said)) == SIZE
    assert 50 <= len(only(document, "og:image:alt")) <= 420


def test_every_picture_is_another():
    contents = Counter(card(document).read_bytes() for document in DOCUMENTS)
    assert len(contents) == len(DOCUMENTS)


def test_the_bare_address_shares_the_first_page():
    for name in ("description", "canonical", "og:url", "og:title", "og:image", "twitter:card"):
        assert only("index", name) == only(DOCUMENTS[0], name)
    assert tags("index")[""] == [f"0; url={DOCUMENTS[0]}.html"]  # http-equiv="refresh"
