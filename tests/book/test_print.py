"""The pages on paper: A4, as Chromium lays it out for printing."""

from __future__ import annotations

import pytest
import yaml

import executed
from fresh import ROOT

DOCUMENTS = list(executed.documents(yaml.safe_load((ROOT / "_toc.yml").read_text())))
SOME = [
    "notebooks/01_what_explodes",
    "notebooks/06_clipping",
    "notebooks/16_best_practice",
    "book/claims",
    "book/triage",
    "book/intro",
]
#: What the margins of custom.css leave of 210 mm, in pixels of 1/96 inch.
WIDTH = int((210 - 2 * 15) / 25.4 * 96)

#: Nothing that can only be pressed.
CHROME = ", ".join(
    (
        "button", ".bd-header", ".bd-header-article", ".bd-sidebar-primary",
        ".bd-sidebar-secondary", ".prev-next-footer", ".bd-footer", ".headerlink",
        ".sd-tab-set > input",
    )
)  # fmt: skip


@pytest.fixture
def paper(page):
    """`paper(document)` opens a page as it is printed."""
    page.set_viewport_size({"width": WIDTH, "height": 1000})

    def opened(document: str):
        page.goto(f"/{document}.html")
        page.emulate_media(media="print")
        return page

    return opened


@pytest.mark.parametrize("document", SOME)
def test_nothing_to_press_is_printed(paper, document):
    shown = (
        paper(document)
        .locator(CHROME)
        .evaluate_all(
            "all => all.filter(e => e.checkVisibility()).map(e => e.outerHTML.slice(0, 120))"
        )
    )
    assert shown == []


@pytest.mark.parametrize("document", SOME)
def test_folded_solutions_are_printed(paper, document):
    page = paper(document)
    folded = page.locator(".admonition.toggle-hidden > :not(.admonition-title, button)")
    if document.startswith("notebooks"):
        assert folded.count()
    look = {"opacityProperty": True, "visibilityProperty": True}
    shown = folded.evaluate_all("(all, look) => all.map(e => e.checkVisibility(look))", look)
    assert all(shown)
    assert all(box["height"] > 10 for box in (each.bounding_box() for each in folded.all()))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_nothing_is_cut_off_at_the_margin(paper, document):
    page = paper(document)
    beyond = page.evaluate("""() => {
        const width = document.documentElement.clientWidth;
        const out = [...document.querySelectorAll("article *")].filter(e =>
            e.checkVisibility() && !e.closest(".katex-mathml, svg *")
            && (e.getBoundingClientRect().right > width + 1
                || (e.scrollWidth > e.clientWidth + 1
                    && ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)
                    && e.matches("pre, table, .highlight, div.math, .output"))));
        return out.map(e => e.outerHTML.slice(0, 120));
    }""")
    assert beyond == []
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTH


@pytest.mark.parametrize("document", SOME)
def test_both_frameworks_are_printed_each_below_its_name(paper, tab_sets, document):
    assert tab_sets(paper(document)) == []


def test_the_dark_prints_light(browser, site):
    context = browser.new_context(base_url=site, color_scheme="dark")
    page = context.new_page()
    page.goto("/notebooks/06_clipping.html", wait_until="networkidle")
    colours = "getComputedStyle(document.querySelector('article p')).color"
    ground = "getComputedStyle(document.body).backgroundColor"
    code = "getComputedStyle(document.querySelector('.highlight .kn')).color"
    dark = page.evaluate(code)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'light'")
    assert page.evaluate(colours) == "rgb(0, 0, 0)"
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    assert page.evaluate(code) != dark
    page.emulate_media(media="screen", color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    context.close()
