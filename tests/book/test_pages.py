"""Every page of the built book, in a real browser and link by link."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

import executed
from fresh import ROOT
from gradlab import claims

HTML = ROOT / "_build" / "html"
DOCUMENTS = list(executed.documents(yaml.safe_load((ROOT / "_toc.yml").read_text())))
CHAPTERS = [name for name in DOCUMENTS if (ROOT / f"{name}.ipynb").exists()]
#: A line of TensorFlow's C++, which depends on the machine.
CPP_LOG = re.compile(r"[IWE]\d{4} |WARNING: All log messages before|To enable the following")
MODES = ("light", "dark", "phone")
every_page = pytest.mark.parametrize("document", [*DOCUMENTS, "genindex", "search"])
# All tests of one look at one page run in one process, which opens the page once.
every_look = pytest.mark.parametrize(
    ("document", "mode"),
    [
        pytest.param(document, mode, marks=pytest.mark.xdist_group(f"{document} {mode}"))
        for document in (*DOCUMENTS, "genindex", "search")
        for mode in MODES
    ],
)

pytestmark = pytest.mark.usefixtures("book")


@cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(path: Path) -> set[str]:
    return {tag[key] for key in ("id", "name") for tag in soup(path).find_all(attrs={key: True})}


# ---------------------------------------------------------------------------------------------
# In the browser


@every_look
def test_loads_without_an_error(visit, document, mode):
    assert visit(document, mode).errors == []


@every_look
def test_asks_no_other_host(visit, document, mode):
    assert visit(document, mode).foreign == []


@every_look
def test_is_accessible(visit, document, mode):
    assert visit(document, mode).violations == []


@every_look
def test_does_not_scroll_sideways(visit, document, mode):
    assert visit(document, mode).overflow <= 0


@every_look
def test_nothing_begins_where_nobody_can_scroll(visit, document, mode):
    assert visit(document, mode).cut == []


@pytest.mark.parametrize("document", CHAPTERS)
def test_tabs_switch_together_and_remember(page, document):
    page.goto(f"/{document}.html")
    labels = page.locator("label[data-sync-id=tensorflow]")
    if not labels.count():
        pytest.skip("no tabs on this page")
    labels.first.click()
    for framework, shown in (("tensorflow", True), ("pytorch", False)):
        states = page.locator(f"label[data-sync-id={framework}]").evaluate_all(
            "ls => ls.map(l => document.getElementById(l.htmlFor).checked)"
        )
        assert states == [shown] * len(states)
    page.reload()
    chosen = labels.evaluate_all("ls => ls.map(l => document.getElementById(l.htmlFor).checked)")
    assert all(chosen)


def test_both_tabs_are_shown_without_a_script(browser, site, tab_sets):
    context = browser.new_context(base_url=site, java_script_enabled=False)
    page = context.new_page()
    seen = 0
    for document in DOCUMENTS:
        page.goto(f"/{document}.html")
        seen += page.locator(".sd-tab-set.framework-tabs").count()
        assert tab_sets(page) == [], document
    assert seen
    context.close()


def test_a_link_into_a_hidden_tab_shows_it(page):
    page.goto("/notebooks/01_what_explodes.html")
    figure = page.locator("[id='fig-two-ways-tensorflow']")
    assert not figure.is_visible()
    page.goto("/book/gallery.html")
    page.locator("a[href$='#fig-two-ways-tensorflow']").click()
    figure.wait_for(state="visible")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_page_has_its_colours_before_the_theme_s_script_runs(browser, site, mode):
    context = browser.new_context(base_url=site, color_scheme=mode)
    page = context.new_page()
    page.route("**/book.js*", lambda route: route.abort())
    page.goto("/book/claims.html")
    assert page.evaluate("document.documentElement.dataset.theme") == mode
    context.close()


def test_a_page_has_colours_without_a_script(browser, site):
    context = browser.new_context(base_url=site, java_script_enabled=False)
    page = context.new_page()
    page.goto("/book/claims.html")
    badge = page.locator(".verdict-badge-refuted").first
    assert badge.evaluate("b => getComputedStyle(b).backgroundColor") == "rgb(254, 226, 226)"
    context.close()


# ---------------------------------------------------------------------------------------------
# In the files


@every_page
def test_every_figure_has_alt_text(document):
    article = soup(HTML / f"{document}.html").find("article")
    for image in article.find_all("img") if article else ():
        text = image.get("alt", "").strip()
        assert len(text) >= 10, image
        assert not re.search(r"\.(png|svg|jpe?g|gif)$", text), image


@pytest.mark.parametrize("document", CHAPTERS)
def test_every_described_figure_is_on_the_page(document):
    notebook = json.loads((ROOT / f"{document}.ipynb").read_text(encoding="utf-8"))
    described = [cell["metadata"].get("mystnb", {}).get("image", {}) for cell in notebook["cells"]]
    texts = [" ".join(image["alt"].split()) for image in described if "alt" in image]
    images = soup(HTML / f"{document}.html").find("article").find_all("img")
    shown = {" ".join(image.get("alt", "").split()) for image in images}
    assert set(texts) <= shown


@every_page
def test_every_internal_link_resolves(document):
    here = HTML / f"{document}.html"
    for link in soup(here).find_all("a", href=True):
        if urlsplit(link["href"]).scheme or link["href"].startswith("//"):
            continue
        address, fragment = urldefrag(link["href"])
        target = (here.parent / unquote(urlsplit(address).path)).resolve() if address else here
        assert target.is_file(), link["href"]
        if fragment and target.suffix == ".html":
            assert unquote(fragment) in anchors(target), link["href"]


@pytest.mark.parametrize("document", CHAPTERS)
def test_every_chapter_was_executed_without_a_complaint(document):
    notebook = executed.executed(ROOT / f"{document}.ipynb", executed.cache_of(ROOT))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count, f"not executed: {cell.source}"
            said = [out.text for out in cell.outputs if out.get("name") == "stderr"]
            lines = [line for text in said for line in text.splitlines() if not CPP_LOG.match(line)]
            assert not lines, f"{cell.source}\nwrote to stderr: {lines}"


@pytest.mark.parametrize("document", CHAPTERS)
def test_the_page_shows_the_verdicts_of_its_notebook(document):
    shown = [card.get_text() for card in soup(HTML / f"{document}.html").select(".verdict")]
    given = claims.verdicts_in(ROOT / "_build" / "executed" / f"{document}.ipynb")
    assert len(shown) == len(given)
    for text, (claim_id, word) in zip(shown, given, strict=True):
        assert text.startswith(claim_id)
        assert f"{word.capitalize()}." in text


def test_the_ledger_page_says_what_the_ledger_says():
    ledger = json.loads((ROOT / "_build" / "ledger.json").read_text())
    page = soup(HTML / "book" / "claims.html")
    registry = claims.load(ROOT / "book" / "claims.yml")
    rows = {row["id"]: row for row in page.select("table.ledger tbody tr")}
    assert set(rows) == {f"claim-{claim_id}" for claim_id in registry}
    words = Counter(open=0)  # the summary says so, too, where none is open
    for claim_id in registry:
        word = rows[f"claim-{claim_id}"].select_one(".verdict-badge").get_text()
        assert word == ledger.get(claim_id, {}).get("verdict", "open")
        words[word] += 1
    summary = page.select_one(".ledger-summary").get_text()
    assert summary.startswith(f"{len(ledger)} of {len(registry)} ")
    assert {w: int(n) for n, w in re.findall(r"(\d+) ([a-z]+)[,.]", summary)} == dict(words)


@every_page
def test_every_page_takes_its_words_from_the_ledger(document):
    ledger = json.loads((ROOT / "_build" / "ledger.json").read_text())
    for badge in soup(HTML / f"{document}.html").select("a .verdict-badge"):
        claim_id = urldefrag(badge.find_parent("a")["href"]).fragment.removeprefix("claim-")
        assert badge.get_text() == ledger.get(claim_id, {}).get("verdict", "open"), claim_id


def test_the_page_on_the_articles_names_every_claim():
    page = soup(HTML / "book" / "articles.html")
    shown = [link.get_text() for link in page.select("article li a[href*='claims.html#claim-']")]
    assert sorted(shown) == sorted(claims.load(ROOT / "book" / "claims.yml"))


def test_the_claims_of_the_chapters_are_all_decided():
    ledger = json.loads((ROOT / "_build" / "ledger.json").read_text())
    chapters = {Path(name).name for name in CHAPTERS}
    registry = claims.load(ROOT / "book" / "claims.yml")
    assert set(ledger) == {c.id for c in registry.values() if c.chapter in chapters}
