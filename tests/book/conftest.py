"""The built book, served to a real headless Chromium."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from filelock import FileLock
from playwright.sync_api import Browser, BrowserContext, Page

import serve
from fresh import ROOT

HTML = ROOT / "_build" / "html"

PATIENCE = 120_000  # milliseconds; a busy machine is no broken page

#: How a page is looked at: the browser context's settings.
MODES = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}

#: Removes, of the visible elements that a selector names, every one that looks like one before it:
#: same colour, size and weight, on the same backgrounds.
ONE_OF_EACH_LOOK = """selector => {
    const behind = new Map(), seen = new Set(), alike = [];
    const below = node => {
        if (!node) return '';
        if (!behind.has(node)) {
            const { backgroundColor, opacity } = getComputedStyle(node);
            behind.set(node, below(node.parentElement) + backgroundColor + opacity);
        }
        return behind.get(node);
    };
    for (const leaf of document.querySelectorAll(selector)) {
        if (!leaf.checkVisibility()) continue;
        const { color, fontSize, fontWeight } = getComputedStyle(leaf);
        const look = [color, fontSize, fontWeight, below(leaf)].join();
        if (seen.has(look)) alike.push(leaf);
        seen.add(look);
    }
    alike.forEach(leaf => leaf.remove());
}"""


#: What of formulas, code, tables and figures begins left of the page.
BEGINS_OUTSIDE = """() => [...document.querySelectorAll('article :is(.base, pre, table, img)')]
    .filter(box => box.checkVisibility() && box.getBoundingClientRect().left < 0)
    .map(box => box.parentElement.textContent.slice(0, 80))"""


@dataclass
class Visit:
    """What was seen while one page was open in one mode."""

    errors: list[str] = field(default_factory=list)  # of the console, and failed requests
    foreign: list[str] = field(default_factory=list)  # addresses on other hosts
    files: set[str] = field(default_factory=set)  # what it asked for of this one, without queries
    violations: list[str] = field(default_factory=list)  # found by axe, whatever their impact
    overflow: int = 0  # pixels by which the page is wider than the screen
    cut: list[str] = field(default_factory=list)  # what begins left of it, where nobody can scroll


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of the built pages; builds them first when they are not current."""
    base = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        base = base.parent  # the workers of one run share it: the first to come builds
    with FileLock(base / "book.lock"):
        failed, done = base / "book.failed", base / "book.done"
        if not failed.exists() and not done.exists():
            command = [sys.executable, ROOT / "tools" / "build.py"]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            (failed if built.returncode else done).write_text(built.stdout + built.stderr)
    if failed.exists():
        pytest.exit(f"the book does not build\n{failed.read_text()}", returncode=1)
    return HTML


@pytest.fixture(scope="session")
def site(book: Path) -> Iterator[str]:
    """The address at which the book is served."""
    with serve.served(book) as address:
        yield address


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    """An empty page of a fresh context."""
    context = browser.new_context(base_url=site, **MODES["light"])
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="session")
def tab_sets():
    """`tab_sets(page)`: the tab sets of which not every panel stands right below its label."""
    wrong = """sets => sets.filter(set => {
        const parts = [...set.querySelectorAll(':scope > label')].flatMap(
            label => [label, document.getElementById(label.getAttribute('aria-controls'))]
        );
        const boxes = parts.map(part => part.getBoundingClientRect());
        return !parts.every(part => part.checkVisibility() && part.textContent.trim())
            || boxes.some((box, i) => box.height < 10 || (i && box.top < boxes[i - 1].bottom - 1));
    }).map(set => set.textContent.slice(0, 200))"""
    return lambda page: page.locator(".sd-tab-set").evaluate_all(wrong)


@pytest.fixture(scope="session")
def visit(browser: Browser, site: str):
    """`visit(document, mode)` opens a page once, however many tests ask what was seen."""
    axe = Axe()

    def violations(page: Page, mode: str) -> list[dict]:
        # Without preload: axe would fetch the style sheets again, from addresses that do not exist.
        options = {"resultTypes": ["violations"], "preload": False}
        found = []
        page.evaluate(ONE_OF_EACH_LOOK, "pre span:not(:has(*))")  # words of code: thousands
        if mode != "dark":  # which changes colours only
            rules = {"rules": {"color-contrast": {"enabled": False}}}
            found += axe.run(page, options=options | rules).response["violations"]
        # Then the colours, which take most of axe's time.
        page.evaluate(ONE_OF_EACH_LOOK, "article :not(:has(*))")
        contrast = axe.run(page, options=options | {"runOnly": ["color-contrast"]})
        return found + contrast.response["violations"]

    @functools.cache
    def context(mode: str) -> BrowserContext:
        """One window for all pages of a mode: each window costs an interface of its own."""
        made = browser.new_context(base_url=site, **MODES[mode])
        made.set_default_timeout(PATIENCE)
        made.new_page()  # stays: a window closes with its last page
        return made

    @functools.cache
    def look(document: str, mode: str) -> Visit:
        seen = Visit()
        page = context(mode).new_page()
        page.on(
            "console",
            lambda m: seen.errors.append(f"{m.text} {m.location}") if m.type == "error" else None,
        )
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("requestfailed", lambda request: seen.errors.append(f"failed: {request.url}"))
        page.on("request", lambda request: note(request.url))

        def note(url: str) -> None:
            if url.startswith(site):
                seen.files.add(urlsplit(url).path.lstrip("/"))
            elif not url.startswith(("data:", "blob:")):
                seen.foreign.append(url)

        page.goto(f"/{document}.html", wait_until="networkidle")
        # Folded solutions and dropdowns are part of the page too.
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        seen.overflow = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        seen.cut = page.evaluate(BEGINS_OUTSIDE)
        for violation in violations(page, mode):
            where = [node["html"][:160] for node in violation["nodes"][:3]]
            seen.violations.append(f"{violation['id']} ×{len(violation['nodes'])}: {where}")
        page.close()
        return seen

    return look
