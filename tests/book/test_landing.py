"""The first page: what stands on its first screen, and that its figures are counted."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from bs4 import BeautifulSoup

from fresh import ROOT
from gradlab import claims

HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
WAYS = {
    "Fix my run": "book/triage",
    "Learn it": "notebooks/01_what_explodes",
    "Check a claim": "book/claims",
}

pytestmark = [pytest.mark.xdist_group("landing"), pytest.mark.usefixtures("book")]
every_screen = pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])


@every_screen
def test_the_first_screen_has_the_promise_the_ways_and_the_picture(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    page.goto(f"/{TOC['root']}.html")
    assert page.locator(".landing-ways .sd-card").count() == len(WAYS)
    order = ["h1", ".landing-promise", ".landing-now", ".landing-picture img"]
    boxes = [page.locator(f"article {selector}").bounding_box() for selector in order]
    tops = [box["y"] for box in boxes]
    assert tops == sorted(tops)
    assert boxes[-1]["y"] + boxes[-1]["height"] <= height


@every_screen
@pytest.mark.parametrize("way", WAYS)
def test_a_way_can_be_clicked_anywhere(page, width, height, way):
    page.set_viewport_size({"width": width, "height": height})
    page.goto(f"/{TOC['root']}.html")
    card = page.locator(".landing-ways .sd-card", has_text=way)
    box = card.bounding_box()
    for place in ((12, 6), (box["width"] - 6, box["height"] - 6)):
        page.goto(f"/{TOC['root']}.html")
        card.click(position={"x": place[0], "y": place[1]})
        page.wait_for_url(f"**/{WAYS[way]}.html")


def test_no_count_is_typed():
    page = BeautifulSoup((HTML / f"{TOC['root']}.html").read_text(encoding="utf-8"), "html.parser")
    source = (ROOT / f"{TOC['root']}.md").read_text(encoding="utf-8")
    asked = re.findall(r"\{verdict-count\}`(\w+)`", source)
    ledger = json.loads((ROOT / "_build" / "ledger.json").read_text())
    words = [row["verdict"] for row in ledger.values()]
    total = len(claims.load(ROOT / "book" / "claims.yml"))
    shown = [int(number.get_text()) for number in page.select(".verdict-count")]
    assert shown == [total if word == "all" else words.count(word) for word in asked]
    assert "refuted" in asked


def test_the_minutes_are_those_of_the_chapter():
    notebook = json.loads((ROOT / f"{WAYS['Learn it']}.ipynb").read_text(encoding="utf-8"))
    minutes = re.search(r"\*Time:\* (\d+ minutes)", "".join(notebook["cells"][0]["source"]))[1]
    page = BeautifulSoup((HTML / f"{TOC['root']}.html").read_text(encoding="utf-8"), "html.parser")
    card = next(c for c in page.select(".landing-ways .sd-card") if "Learn it" in c.get_text())
    assert minutes in card.get_text()
