"""How much a reader's phone has to fetch, and that nothing shown is lost by it."""

import gzip
import json
import re
from functools import cache
from pathlib import Path

import pytest
from test_pages import CHAPTERS, DOCUMENTS, HTML, soup

from conftest import MODES

KIB = 1024
every_page = pytest.mark.parametrize(
    "document",
    # In the process that looks at the page anyway.
    [
        pytest.param(document, marks=pytest.mark.xdist_group(f"{document} light"))
        for document in (*DOCUMENTS, "genindex", "search")
    ],
)

pytestmark = pytest.mark.usefixtures("book")


@cache
def compressed(name: str) -> int:
    """A file's size as a server sends it: text with gzip, pictures and fonts as they are."""
    content = (HTML / name).read_bytes()
    packed = Path(name).suffix in (".png", ".webp", ".woff2")
    return len(content) if packed else len(gzip.compress(content, 6))


def figures(document: str) -> set[str]:
    here = HTML / f"{document}.html"
    return {
        (here.parent / image["src"]).resolve().relative_to(HTML.resolve()).as_posix()
        for image in soup(here).find_all("img", src=re.compile("_images/"))
    }


@every_page
def test_a_page_is_light(visit, document):
    asked = visit(document, "light").files
    rest = {name for name in asked if "_images/" not in name}
    weight = sum(map(compressed, rest))
    assert weight <= 400 * KIB, {name: compressed(name) for name in rest}
    assert sum(map(compressed, figures(document))) <= 1.5 * KIB * KIB
    if document != "book/gallery":  # whose thumbnails arrive as one scrolls
        assert len(rest | figures(document)) <= 25, rest


@every_page
def test_math_is_loaded_where_there_is_some(visit, document):
    asked = visit(document, "light").files
    math = bool(soup(HTML / f"{document}.html").select(".katex"))
    assert any("math.css" in name for name in asked) == math
    if not math:
        assert not any("katex" in name.lower() for name in asked)


@every_page
def test_what_can_be_copied_unfolded_or_switched_has_its_script(visit, document):
    asked = visit(document, "light").files
    needs = ".highlight pre, .toggle, .admonition.dropdown, .sd-tab-set"
    used = bool(soup(HTML / f"{document}.html").select(needs))
    assert any("code.js" in name for name in asked) == used


@every_page
def test_words_are_searched_only_where_one_searches(visit, document):
    asked = visit(document, "light").files
    assert any("searchindex" in name for name in asked) == (document == "search")


@pytest.mark.parametrize("document", [*DOCUMENTS, "genindex", "search"])
def test_every_image_says_how_large_it_is(document):
    for image in soup(HTML / f"{document}.html").find_all("img", src=re.compile(r"_images/.*png")):
        assert image.get("width"), image
        assert image.get("height"), image


#: What an element looks like, before and after; sizes in whole pixels.
LOOKS = """() => [...document.body.querySelectorAll('*')].map(element => {
    const looks = ['', '::before', '::after'].map(pseudo => {
        const style = getComputedStyle(element, pseudo);
        if (pseudo && style.content === 'none') return '';
        return ['display', 'position', 'color', 'backgroundColor', 'fontFamily', 'fontSize',
                'fontWeight', 'margin', 'padding', 'border', 'visibility', 'opacity', 'overflow',
                'textDecorationLine', 'content', 'flex', 'gridTemplateColumns', 'listStyleType',
                'transform', 'whiteSpace', 'cursor', 'zIndex'].map(name => style[name]).join();
    });
    const { x, y, width, height } = element.getBoundingClientRect();
    const box = [x, y, width, height].map(Math.round).join();
    return `${element.tagName}.${element.className} ${box} ${looks.join(' ')}`;
})"""

#: Puts the sheets that book.css was made of in its place, whole.
WHOLE = """async names => {
    const sheet = document.querySelector('link[href*="book.css"]');
    for (const name of names) {
        const whole = sheet.cloneNode();
        whole.href = sheet.href.replace(/book\\.css.*/, name);
        sheet.before(whole);
        await new Promise((done, failed) => { whole.onload = done; whole.onerror = failed; });
    }
    sheet.remove();
    await document.fonts.ready;
}"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "document", ["book/intro", "book/claims", "book/explorer", "search", CHAPTERS[0], CHAPTERS[-1]]
)
def test_the_rules_left_out_change_nothing(browser, site, document, mode):
    context = browser.new_context(base_url=site, reduced_motion="reduce", **MODES[mode])
    page = context.new_page()
    page.goto(f"/{document}.html", wait_until="networkidle")
    page.add_style_tag(content="* { transition: none !important; animation: none !important }")
    made_of = re.search(r"/\* Of (.*?):", (HTML / "_static" / "book.css").read_text())[1]
    light = page.evaluate(LOOKS)
    page.evaluate(WHOLE, made_of.split(", "))
    whole = page.evaluate(LOOKS)
    context.close()
    assert len(light) > 100
    different = [(a, b) for a, b in zip(light, whole, strict=True) if a != b]
    assert not different, json.dumps(different[:5], indent=1)


def test_every_icon_is_in_its_font(page):
    page.goto("/notebooks/06_clipping.html", wait_until="networkidle")
    drawn = page.evaluate(
        """() => [...document.querySelectorAll('i[class*=fa-]')].map(icon => {
            const style = getComputedStyle(icon, '::before');
            return [icon.className, style.content, style.fontFamily, style.fontWeight];
        })"""
    )
    from fontTools.ttLib import TTFont

    assert len(drawn) > 5
    for name, content, family, weight in drawn:
        kind = "brands" if "Brands" in family else "solid" if int(weight) >= 900 else "regular"
        font = next((HTML / "_static").glob(f"icons-fa-{kind}-*.woff2"))
        assert ord(content.strip("\"'")) in TTFont(font).getBestCmap(), name
