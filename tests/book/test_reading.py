"""What a reader uses on a page: the copy buttons, previous and next, and the book from the disk."""

from __future__ import annotations

import itertools
import json

import pytest
import yaml

import executed
from fresh import ROOT

DOCUMENTS = list(executed.documents(yaml.safe_load((ROOT / "_toc.yml").read_text())))
CHAPTER = "notebooks/06_clipping"


def clipboard(page) -> str:
    return page.evaluate("navigator.clipboard.readText()")


@pytest.fixture
def copying(browser, site):
    """A page that may read the clipboard."""
    context = browser.new_context(base_url=site, viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site)
    yield context.new_page()
    context.close()


def test_a_cell_is_copied_as_it_stands_in_the_notebook(copying):
    notebook = json.loads((ROOT / f"{CHAPTER}.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    copying.goto(f"/{CHAPTER}.html", wait_until="networkidle")
    blocks = copying.locator(".cell_input .highlight")
    copied = []
    for block in blocks.all():
        if block.is_visible():  # the other framework's tab is not
            block.hover()
            block.locator("button.copybtn").click()
            copied.append(clipboard(copying).rstrip("\n"))
    assert len(copied) > 5
    assert set(copied) <= set(sources)


def test_a_copy_button_is_reached_and_seen_by_keyboard(copying):
    copying.goto(f"/{CHAPTER}.html", wait_until="networkidle")
    button = copying.locator(".cell_input button.copybtn").first
    copying.locator("article section p > a:visible").first.focus()
    for _ in range(60):
        copying.keyboard.press("Tab")
        if button.evaluate("b => b === document.activeElement"):
            break
    else:
        pytest.fail("the keyboard never comes to the first copy button")
    copying.wait_for_function("getComputedStyle(document.activeElement).opacity === '1'")
    copying.keyboard.press("Enter")  # its sign of success lasts a second and a half
    copying.wait_for_function("b => b.matches('.success')", arg=button.element_handle())
    assert "from gradlab import notebook" in clipboard(copying)


def test_only_code_has_a_copy_button(page):
    page.goto(f"/{CHAPTER}.html", wait_until="networkidle")
    assert page.locator(".cell_output .highlight").count()
    assert page.locator(".cell_output button.copybtn").count() == 0
    inputs = page.locator(".cell_input .highlight")
    assert page.locator(".cell_input button.copybtn").count() == inputs.count()


def test_a_prompt_is_not_copied(copying):
    copying.goto("/book/api.html", wait_until="networkidle")
    block = copying.locator(".highlight", has_text=">>> x = Tensor").first
    block.hover()
    block.locator("button.copybtn").click()
    text = clipboard(copying)
    assert "x = Tensor([1.0, 2.0])" in text
    assert ">>>" not in text


def test_next_leads_through_the_whole_book_and_previous_back(page):
    page.goto(f"/{DOCUMENTS[0]}.html")
    assert page.locator("a.left-prev").count() == 0
    for before, after in itertools.pairwise(DOCUMENTS):
        page.locator("a.right-next").click()
        page.wait_for_url(f"**/{after}.html", wait_until="domcontentloaded")
        back = page.locator("a.left-prev").evaluate("a => a.href")
        assert back.endswith(f"/{before}.html")
    assert page.locator("a.right-next").count() == 0


@pytest.mark.parametrize(
    "document",
    [
        "index",
        "notebooks/01_what_explodes",
        CHAPTER,
        "book/claims",
        "book/glossary",
        "book/explorer",
    ],
)
def test_reads_from_the_disk(browser, book, document):
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
    page.goto((book / f"{document}.html").as_uri(), wait_until="networkidle")
    assert errors == []
    if page.locator(".katex").count():  # set in its own font, not in whatever there is
        fonts = page.evaluate(
            "[...document.fonts].filter(f => f.status === 'loaded').map(f => f.family)"
        )
        assert any(family.startswith("KaTeX") for family in fonts)
    labels = page.locator("label[data-sync-id=tensorflow]")
    if labels.count():
        labels.first.click()
        page.reload()
        panel = page.locator(f"[id='{labels.first.get_attribute('aria-controls')}']")
        assert panel.is_visible()
    context.close()
