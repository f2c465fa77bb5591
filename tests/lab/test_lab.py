"""What a reader of `make lab` meets: every notebook runs, and shows what it computed."""

from __future__ import annotations

import nbformat
import pytest
from reader import KINDS

import executed
from fresh import ROOT

#: What runs without `--every-notebook`: short chapters that, between them, use both frameworks and
#: worker processes, and show figures and both kinds of card.
FEW = ("02b_aftermath", "03_diagnosis", "14_many_processes")

#: What the library can show and no chapter does: progress bars, and a table as an output.
BARS = """\
import numpy as np
from IPython.display import HTML, display
from gradlab.notebook import setup
setup()
from gradlab.torch import sweep
w = [np.ones((2, 3, 3), "float32"), np.ones((2, 3, 2), "float32")]
result = sweep.train(w, np.eye(3), np.array([0, 1, 0]), lr=0.1, steps=50, progress=True)
---
display(HTML("<table><tr><td>a cell of a table</td></tr></table>"))
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All notebooks of the table of contents, or a few of them."""
    if "name" in metafunc.fixturenames:
        names = [path.stem for path in executed.notebooks(ROOT)]
        if not metafunc.config.getoption("--every-notebook", default=False):
            names = [name for name in names if name in FEW]
        metafunc.parametrize("name", names, scope="session")


def outputs(cell: nbformat.NotebookNode) -> dict[str, int]:
    """How many outputs of each kind a saved cell has."""
    counts = dict.fromkeys(KINDS, 0)
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        page = data.get("text/html", "")
        counts["figure"] += "image/png" in data
        counts["card"] += 'class="verdict' in page or 'class="diagnosis' in page
        counts["table"] += "<table" in page
        counts["text"] += output.output_type == "stream" or set(data) == {"text/plain"}
    return counts


def test_the_server_has_the_notebooks(lab):
    listed = {entry["path"] for entry in lab.ask("contents")["content"]}
    assert {path.name for path in executed.notebooks(ROOT)} <= listed


def test_the_few_are_chapters():
    assert set(FEW) <= {path.stem for path in executed.notebooks(ROOT)}


def test_every_cell_runs_and_in_its_order(run):
    assert run.dialogs == []
    for number, cell in enumerate(run.code(), 1):
        for output in cell.outputs:
            if output.output_type == "error":
                pytest.fail(f"code cell {number}: {output.ename}: {output.evalue}\n{cell.source}")
        assert cell.execution_count == number, f"code cell {number} did not run:\n{cell.source}"


def test_every_output_can_be_seen(run):
    unseen = [
        f"{kind}: {run.shown[place][kind]} of {count} can be seen below\n{cell.source}"
        for place, cell in enumerate(run.cells)
        for kind, count in outputs(cell).items()
        if run.shown[place][kind] < count
    ]
    assert unseen == []


def test_every_formula_can_be_read(run):
    assert [run.cells[place].source for place in run.misread] == []


def test_every_solution_is_folded(run):
    solutions = [cell for cell in run.cells if cell.source == "### Solution"]
    assert solutions
    assert run.folded == len(solutions)


def test_asks_no_other_host(run):
    assert run.foreign == []


def test_bars_and_tables_can_be_seen(lab):
    cells = [nbformat.v4.new_code_cell(source) for source in BARS.split("---\n")]
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, lab.notebooks / "bars_and_tables.ipynb")
    result = lab.run("bars_and_tables")
    bar, table = result.cells
    (drawn,) = (output.text for output in bar.outputs if output.get("name") == "stderr")
    last = drawn.split("\r")[-1]
    assert last.startswith("100%"), drawn
    assert last.count("\n") == 1, drawn  # the bar moves in its line
    assert result.shown[0]["text"] == 1
    assert outputs(table)["table"] == result.shown[1]["table"] == 1
