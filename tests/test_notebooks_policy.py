"""What every notebook of the book keeps to, checked without running it."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

import executed
from fresh import ROOT

NOTEBOOKS = executed.notebooks(ROOT)
ids = [path.stem for path in NOTEBOOKS]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)

#: The verdict cells, whose outputs git keeps and nbval compares.
KEPT = {"nbval-check-output", "keep_output"}
DRAWS = ("plot.", "plt.", ".plot(", "heatmap(", "to_jshtml", ".figure(", "subplots(", "imshow(")


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", ()))


def code_lines(cell: nbformat.NotebookNode) -> list[str]:
    lines = (line.strip() for line in cell.source.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_every_notebook_is_in_the_table_of_contents():
    assert sorted((ROOT / "notebooks").glob("*.ipynb")) == sorted(NOTEBOOKS)


@every_notebook
def test_is_small_enough_to_be_read(path):
    cells = code_cells(path)
    lines = sum(len(code_lines(cell)) for cell in cells)
    assert len(cells) <= 25, f"{len(cells)} code cells"
    assert lines <= 200, f"{lines} lines of code"


@every_notebook
def test_starts_with_the_setup(path):
    first = code_cells(path)[0]
    assert "setup()" in first.source
    assert "gradlab" in first.source


@every_notebook
def test_every_cell_is_executed(path):
    for cell in code_cells(path):
        assert "skip-execution" not in tags(cell), cell.source
        assert "raises-exception" not in tags(cell), cell.source


@every_notebook
def test_keeps_no_outputs_but_the_checked_ones(path):
    for cell in code_cells(path):
        if tags(cell) & KEPT:
            assert tags(cell) >= KEPT, f"{cell.source!r} needs both tags {sorted(KEPT)}"
            assert cell.outputs, f"{cell.source!r} has no output to check: make outputs"
        else:
            assert not cell.outputs, f"{cell.source!r} has stored outputs: make outputs"


@every_notebook
def test_verdict_cells_are_checked(path):
    for cell in code_cells(path):
        if "verdict(" in cell.source:
            assert tags(cell) >= {"verdict", *KEPT}, cell.source


@every_notebook
def test_every_figure_has_alt_text_and_a_caption(path):
    for cell in code_cells(path):
        options = cell.metadata.get("mystnb", {})
        if shows_figure(cell):
            assert len(options.get("image", {}).get("alt", "")) >= 20, cell.source
            assert options.get("figure", {}).get("caption"), cell.source


def shows_figure(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell draws, and does not only define a function that would."""
    passive = (" ", "\t", "def ", "class ", "import ", "from ", "#")
    active = [line for line in cell.source.splitlines() if not line.startswith(passive)]
    return any(word in line for line in active for word in DRAWS)


@every_notebook
def test_exercises_are_plain_cells_with_a_folded_solution(path, monkeypatch):
    """The form that book/_ext/exercises.py states."""
    monkeypatch.syspath_prepend(str(ROOT / "book/_ext"))
    import exercises

    cells = nbformat.read(path, as_version=4).cells
    texts = [cell.source if cell.cell_type == "markdown" else "" for cell in cells]
    assert any(exercises.EXERCISE.match(text) for text in texts), "no exercise"
    for place, text in enumerate(texts):
        assert not re.search(r"\{(exercise|solution)(-start|-end)?\}", text), text
        if re.search(r"^### Exercise", text, re.MULTILINE):
            assert exercises.EXERCISE.match(text), f"starts not as an exercise does: {text}"
            assert texts[place + 1] == exercises.SOLUTION, f"no cell with its solution: {text}"
        if re.search(r"^### Solution", text, re.MULTILINE):
            assert exercises.EXERCISE.match(texts[place - 1]), f"solution of what? {text}"
            folded = cells[place].metadata.get("jp-MarkdownHeadingCollapsed")
            assert folded, f"fold the solution {cells[place].id} in JupyterLab"


@every_notebook
def test_carries_no_tool_s_metadata(path):
    notebook = nbformat.read(path, as_version=4)
    assert "jupytext" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"


def test_outputs_are_stripped():
    if not NOTEBOOKS:
        pytest.skip("no notebooks")
    command = [
        Path(sys.executable).with_name("nbstripout"),
        "--verify",
        "--keep-count",
        "--keep-id",
    ]
    command += ["--extra-keys", "metadata.language_info.version", *NOTEBOOKS]
    subprocess.run(command, check=True)


def test_table_of_contents_names_files_that_exist():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    for name in executed.documents(toc):
        assert [*ROOT.glob(f"{name}.md"), *ROOT.glob(f"{name}.ipynb")], name
