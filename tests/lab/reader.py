"""A reader at JupyterLab: opens a notebook, runs all of it, saves it, and looks at every output."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from playwright.sync_api import Browser, Error, Page

PATIENCE = 120_000  # milliseconds for anything on the page; a busy machine is no broken page
LIMIT = 600  # seconds for all cells of a notebook

#: What the status bar says when the notebook has a kernel that answers.
READY = "#jp-bottom-panel :text('| Idle')"

#: JupyterLab's own sign that nothing runs and nothing waits to run.
IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"

#: Cells wait or run, or the first is done already.
STARTED = """() => document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=busy]')
    || [...document.querySelectorAll('.jp-InputPrompt')].some(p => /\\d/.test(p.textContent))"""

#: The elements in which JupyterLab shows each kind of output.
KINDS = {
    "figure": "img",
    "card": ".verdict, .diagnosis",
    "table": "table",
    "text": "pre",
}

#: Of every cell on the page: its place, in how many of its outputs each kind can be seen (a figure
#: painted, a card with its bar), and how many formulas cannot be read.
LOOK = """kinds => [...document.querySelectorAll('.jp-Notebook .jp-Cell')].map(cell => {
    const seen = node => node.checkVisibility() && node.getBoundingClientRect().height >= 8
        && (node.tagName !== 'IMG' || (node.complete && node.naturalWidth > 0))
        && (node.tagName !== 'DIV' || parseFloat(getComputedStyle(node).borderLeftWidth) > 0);
    const outputs = [...cell.querySelectorAll('.jp-OutputArea-output')];
    const count = kind => outputs.filter(o => [...o.querySelectorAll(kind)].some(seen)).length;
    return [
        +cell.dataset.windowedListIndex,
        Object.fromEntries(Object.entries(kinds).map(([name, kind]) => [name, count(kind)])),
        cell.querySelectorAll('mjx-merror, [data-mjx-error]').length,
    ];
})"""

#: Shows the cells that folded headings on the page hide; how many headings did.
UNFOLD = """() => {
    const buttons = [...document.querySelectorAll('.jp-showHiddenCellsButton')];
    const folded = buttons.filter(button => button.checkVisibility());
    folded.forEach(button => button.click());
    return folded.length;
}"""


@dataclass
class Run:
    """What became of one notebook after Run > Run All Cells.

    Attributes:
        cells: all of its cells, as JupyterLab saved them.
        dialogs: the texts of the windows that JupyterLab opened over it.
        folded: headings below which cells were hidden.
        shown: in how many outputs each kind could be seen, by the cell's place.
        misread: places of cells with a formula that JupyterLab cannot read.
        foreign: addresses on other hosts that the page asked for.
    """

    cells: list[nbformat.NotebookNode]
    dialogs: list[str]
    folded: int = 0
    shown: dict[int, dict[str, int]] = field(default_factory=dict)
    misread: set[int] = field(default_factory=set)
    foreign: list[str] = field(default_factory=list)

    def code(self) -> list[nbformat.NotebookNode]:
        """The code cells."""
        return [cell for cell in self.cells if cell.cell_type == "code"]


class Lab:
    """A running JupyterLab on a copy of the notebooks.

    Attributes:
        notebooks: the folder that it opened.
    """

    def __init__(self, notebooks: Path, address: str, token: str, browser: Browser):
        self.notebooks, self._address, self._token = notebooks, address, token
        self._browser = browser

    def ask(self, path: str, method: str = "GET") -> dict | list | None:
        """What the server's own interface answers."""
        request = urllib.request.Request(
            f"{self._address}api/{path}",
            method=method,
            headers={"Authorization": f"token {self._token}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or "null")

    def run(self, name: str) -> Run:
        """Open a notebook, Run > Run All Cells, wait until all is done, save, and look at it all.

        Args:
            name: its file's name without the ending.

        Raises:
            TimeoutError: cells still run after `LIMIT` seconds.
        """
        context = self._browser.new_context(viewport={"width": 1280, "height": 800})
        context.set_default_timeout(PATIENCE)
        page, foreign = context.new_page(), []
        page.on("request", lambda request: foreign.append(request.url))
        try:
            # `reset`: nothing is open but this notebook.
            page.goto(f"{self._address}lab/tree/{name}.ipynb?reset&token={self._token}")
            self._connect(page, name)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.locator("[data-command='runmenu:run-all']").click()
            page.wait_for_function(STARTED)
            dialogs = self._wait(page, name)
            run = Run(self._save(page, name), dialogs)
            self._look(page, run)
            own = (self._address, "data:", "blob:")
            run.foreign = [url for url in foreign if not url.startswith(own)]
        finally:
            context.close()
            # Each kernel holds as much memory as both frameworks.
            for session in self.ask("sessions"):
                self.ask(f"sessions/{session['id']}", "DELETE")
        return run

    def _connect(self, page: Page, name: str) -> None:
        """Wait for the notebook and its kernel, without which a run would only ask for one."""
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        try:
            page.locator(READY).wait_for()
        except Error as error:
            said = page.locator(".jp-Dialog, #jp-bottom-panel").all_inner_texts()
            raise TimeoutError(f"{name}: no kernel. JupyterLab shows {said}") from error
        page.locator(IDLE).wait_for()

    def _wait(self, page: Page, name: str) -> list[str]:
        """Wait for the last cell.

        Returns:
            The texts of the windows that opened instead.
        """
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            page.wait_for_timeout(1000)
            if dialogs := page.locator(".jp-Dialog").all_inner_texts():
                return dialogs
            if page.locator(IDLE).count():
                return []
        done = [cell.execution_count for cell in self._save(page, name) if cell.cell_type == "code"]
        raise TimeoutError(
            f"{name}: after {LIMIT} s in JupyterLab {len(done) - done.count(None)} of {len(done)} "
            "code cells are done. Is the machine busy, or does a cell wait for something?"
        )

    def _save(self, page: Page, name: str) -> list[nbformat.NotebookNode]:
        """Save with the keys a reader would use; the cells that the file then has."""
        path = self.notebooks / f"{name}.ipynb"
        before = path.stat().st_mtime_ns
        page.keyboard.press("Control+s")
        end = time.monotonic() + 60
        while path.stat().st_mtime_ns == before:
            if time.monotonic() > end:
                raise TimeoutError(f"{name}: JupyterLab did not save it within 60 s")
            page.wait_for_timeout(200)
        page.wait_for_timeout(500)  # the whole of it
        return nbformat.read(path, as_version=4).cells

    def _look(self, page: Page, run: Run) -> None:
        """From top to bottom, for JupyterLab draws what is in sight; what is folded is unfolded."""
        panel = page.locator(".jp-WindowedPanel-outer")
        position, height = 0, 1
        while position < height:
            height = panel.evaluate(
                "(p, top) => { p.scrollTop = top; return p.scrollHeight; }", position
            )
            page.wait_for_timeout(200)
            run.folded += page.evaluate(UNFOLD)
            for place, counts, unread in page.evaluate(LOOK, KINDS):
                known = run.shown.setdefault(place, counts)
                run.shown[place] = {kind: max(counts[kind], known[kind]) for kind in KINDS}
                if unread:
                    run.misread.add(place)
            position += 500
