"""Below the title of every chapter, and nowhere else, stands the control that runs it."""

from __future__ import annotations

import nbformat
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup

import executed
from fresh import ROOT

HTML = ROOT / "_build" / "html"
CHAPTERS = [f"notebooks/{path.stem}" for path in executed.notebooks(ROOT)]
ADDRESS = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
every_chapter = pytest.mark.parametrize("document", CHAPTERS)

# One window, opened once.
pytestmark = [pytest.mark.xdist_group("run button"), pytest.mark.usefixtures("book")]


def soup(document: str) -> BeautifulSoup:
    text = (HTML / f"{document}.html").read_text(encoding="utf-8")
    return BeautifulSoup(text, "html.parser")


@every_chapter
def test_a_chapter_has_three_ways_to_run_it(document):
    (control,) = soup(document).select(".run-chapter")
    assert control.find_previous_sibling().name == "h1"
    assert control.summary.get_text() == "Run this chapter"
    owner, name = ADDRESS.removeprefix("https://github.com/").split("/")
    slug = document.removeprefix("notebooks/")
    assert {link.get_text(): link["href"] for link in control.find_all("a")} == {
        "Binder": f"https://mybinder.org/v2/gh/{owner}/{name}/main?urlpath=lab/tree/{document}.ipynb",
        "Colab": "https://colab.research.google.com/github/"
        f"{owner}/{name}/blob/gh-pages/{document}.ipynb",
        "Download": f"{slug}.ipynb",
    }
    assert control.find("a", string="Download").has_attr("download")  # whatever type the host names


@every_chapter
def test_what_is_downloaded_runs_anywhere(document):
    copy = nbformat.read(HTML / f"{document}.ipynb", as_version=4)
    own = nbformat.read(ROOT / f"{document}.ipynb", as_version=4)
    code, expected = (
        [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        for notebook in (copy, own)
    )
    assert code[1:] == expected
    assert f"fetch_the_book('{ADDRESS}', 'main')" in code[0]


def test_other_pages_have_none():
    others = {path.relative_to(HTML).with_suffix("").as_posix() for path in HTML.rglob("*.html")}
    others = {
        name for name in others - set(CHAPTERS) if not name.startswith(("_static", "_modules"))
    }
    assert {"book/intro", "search", "genindex"} <= others
    assert [name for name in sorted(others) if soup(name).select(".run-chapter")] == []


@pytest.mark.parametrize("document", ["book/intro", CHAPTERS[0]])
def test_the_theme_offers_nothing_twice(document):
    labels = [button.get("aria-label") for button in soup(document).select("button")]
    assert not {"Launch interactive content", "Download this page"} & set(labels)


def test_it_opens_by_keyboard_and_without_a_script(browser, site):
    context = browser.new_context(base_url=site, java_script_enabled=False)
    page = context.new_page()
    page.goto(f"/{CHAPTERS[0]}.html")
    link = page.get_by_role("link", name="Colab", exact=True)
    assert not link.is_visible()
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to main content"
    page.keyboard.press("Enter")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.locator(".run-chapter summary:focus").count():
            break
    page.keyboard.press("Enter")
    assert link.is_visible()
    page.keyboard.press("Tab")
    assert page.locator(".run-chapter a:focus").inner_text() == "Binder"
    context.close()


def test_a_click_downloads_the_notebook(page):
    page.goto(f"/{CHAPTERS[0]}.html")
    page.get_by_text("Run this chapter").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download", exact=True).click()
    assert download.value.suggested_filename == f"{CHAPTERS[0]}.ipynb".removeprefix("notebooks/")
    assert download.value.path().read_bytes() == (HTML / f"{CHAPTERS[0]}.ipynb").read_bytes()


def test_paper_does_not_show_it(page):
    page.goto(f"/{CHAPTERS[0]}.html")
    assert page.locator(".run-chapter").is_visible()
    page.emulate_media(media="print")
    assert not page.locator(".run-chapter").is_visible()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_it_is_accessible_and_fits(browser, site, scheme, width):
    window = {"width": width, "height": 800}
    context = browser.new_context(base_url=site, color_scheme=scheme, viewport=window)
    page = context.new_page()
    page.goto(f"/{CHAPTERS[0]}.html", wait_until="networkidle")
    page.get_by_text("Run this chapter").click()
    found = Axe().run(page, context=".run-chapter", options={"preload": False}).response
    assert found["violations"] == []
    assert found["passes"]  # it did look
    box = page.locator(".run-chapter").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    context.close()
