"""The notebooks that readers run elsewhere, run elsewhere: without the book, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest
import yaml

import executed
import run_button
from fresh import ROOT

# One process fetches the book, whatever the number of workers.
pytestmark = pytest.mark.xdist_group("run anywhere")

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
ADDRESS, BRANCH = CONFIG["repository"]["url"], CONFIG["repository"]["branch"]
SITE = CONFIG["sphinx"]["config"]["ogp_site_url"]
CHAPTERS = {f"notebooks/{path.stem}": path for path in executed.notebooks(ROOT)}
#: A short chapter with both frameworks and two verdicts, which need the list of claims.
SHORT = "notebooks/02b_aftermath"

EXECUTE = """
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read("chapter.ipynb", as_version=4)
NotebookClient(notebook, timeout=300).execute()
nbformat.write(notebook, "executed.ipynb")
"""


def elsewhere(docname: str) -> nbformat.NotebookNode:
    """A chapter as readers get it."""
    notebook = nbformat.read(CHAPTERS[docname], as_version=4)
    return run_button.run_anywhere(notebook, docname, ADDRESS, BRANCH, SITE)


def first_cell() -> str:
    return next(cell.source for cell in elsewhere(SHORT).cells if cell.cell_type == "code")


def verdicts(notebook: nbformat.NotebookNode) -> list[str]:
    """What the verdict cells show, in words."""
    cells = (cell for cell in notebook.cells if "verdict" in cell.metadata.get("tags", ()))
    outputs = (output for cell in cells for output in cell.outputs)
    return [output.data["text/plain"] for output in outputs if "data" in output]


def environment(repository: Path, **more: str) -> dict[str, str]:
    """This process's, in which git finds the book's address at `repository`, and no library is."""
    settings = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | settings | more


def run(python: Path | str, code: str, folder: Path, variables: dict[str, str]):
    """Run code in a fresh process."""
    return subprocess.run(
        [python, "-c", code],
        cwd=folder, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A git repository that holds the files as they are now, on the published branch's source."""
    folder = tmp_path_factory.mktemp("repository") / "book"
    left_out = (".git", ".venv", "_build", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    git = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run([*git, "init", "--quiet", f"--initial-branch={BRANCH}"], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=all"], check=True)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An interpreter of its own that has every package of this one, except the book's library."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    found = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([found, "-c", place], capture_output=True, text=True, check=True).stdout
    # What is listed in a .pth file can be imported, but its own .pth files, such as that of an
    # editable gradlab, are not read.
    packages = "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    Path(site.strip(), "packages_of_the_tests.pth").write_text(packages)
    return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory, python, repository) -> Path:
    """The folder of a reader who has executed a chapter from its first cell to its last."""
    folder = tmp_path_factory.mktemp("reader")
    nbformat.write(elsewhere(SHORT), folder / "chapter.ipynb")
    variables = environment(repository, JUPYTER_DATA_DIR=str(folder / "kernels"))
    before = run(python, "import gradlab", folder, variables)
    assert "No module named 'gradlab'" in before.stderr, "the test would show nothing"
    done = run(python, EXECUTE, folder, variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


# ---------------------------------------------------------------------------------------------
# The first cell, for real


def test_a_chapter_runs_without_the_book_and_gives_its_verdicts(reader):
    notebook = nbformat.read(reader / "executed.ipynb", as_version=4)
    assert len(verdicts(notebook)) == 2
    assert verdicts(notebook) == verdicts(nbformat.read(CHAPTERS[SHORT], as_version=4))
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    said = "".join(out.text for out in first.outputs)
    assert ADDRESS in said  # it did fetch
    assert (reader / "exploding-gradients" / "notebooks").is_dir()


def test_no_package_that_was_there_is_replaced(reader, python):
    installed = {path.name for path in python.parent.parent.rglob("site-packages/*")}
    assert any(name.startswith("__editable__.gradlab") for name in installed)
    assert not installed & {"torch", "tensorflow", "keras", "numpy", "matplotlib"}


def test_the_next_start_finds_everything_without_git_or_network(reader, python, tmp_path):
    code = first_cell() + "\nfrom gradlab.claims import find_registry\nprint(find_registry())"
    unreachable = environment(tmp_path, PATH="", PIP_NO_INDEX="1")
    done = run(python, code, tmp_path, unreachable)  # also from another folder
    expected = reader / "exploding-gradients" / "book" / "claims.yml"
    assert done.stdout.split() == [str(expected.resolve())], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_does_nothing_where_the_book_is_at_hand(tmp_path):
    variables = environment(tmp_path, PYTHONPATH=str(ROOT / "src"), PATH="")
    done = run(sys.executable, first_cell(), tmp_path, variables)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_library_without_the_claims_is_not_enough_and_a_failure_says_what_to_do(tmp_path):
    """As after `pip install git+…`; here git has no repository to clone."""
    library = tmp_path / "site" / "lib" / "gradlab"
    library.mkdir(parents=True)
    (library / "__init__.py").touch()
    variables = environment(tmp_path / "none", PYTHONPATH=str(library.parent))
    done = run(sys.executable, first_cell(), tmp_path, variables)
    assert done.returncode
    last = done.stderr[done.stderr.index("RuntimeError") :]
    assert "could not be fetched: git failed" in last
    assert f"delete {tmp_path / 'exploding-gradients'} if it exists" in last
    assert "fatal" in last  # what git said


# ---------------------------------------------------------------------------------------------
# The copies


def test_two_cells_come_before_the_first_code_cell_and_the_others_stay():
    before = nbformat.read(CHAPTERS[SHORT], as_version=4).cells
    after = elsewhere(SHORT).cells
    new = [cell for cell in after if cell.id not in {cell.id for cell in before}]
    assert [cell.cell_type for cell in new] == ["markdown", "code"]
    position = after.index(new[0])
    assert after[position + 1] is new[1]
    assert after[position + 2].source == before[position].source
    assert all(cell.cell_type == "markdown" for cell in after[:position])
    assert position >= 1  # the title comes first
    assert [cell.id for cell in after if cell not in new] == [cell.id for cell in before]
    assert f"{SITE}{SHORT}.html" in new[0].source


@pytest.mark.parametrize("docname", CHAPTERS)
def test_a_copy_is_valid_and_its_links_lead_to_published_pages(docname):
    copy = elsewhere(docname)
    nbformat.validate(copy)
    json.dumps(copy)
    text = "\n".join(cell.source for cell in copy.cells if cell.cell_type == "markdown")
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    pages = {f"{SITE}{name}.html" for name in executed.documents(toc)}
    found = {link.partition("#")[0] for link in re.findall(r"\]\((https?:[^)]*)\)", text)}
    assert {link for link in found if link.startswith(SITE)} <= pages


def test_links_keep_their_headings_and_other_addresses_stay():
    cell = nbformat.v4.new_markdown_cell(
        "[a](../book/api.md#x-y), [b](01_a.ipynb), [c](#c), [d](https://a.org/d.md), ![e](e.png)"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("1")])
    copy = run_button.run_anywhere(notebook, "notebooks/09_b", ADDRESS, BRANCH, "https://s.org/")
    assert copy.cells[0].source == (
        "[a](https://s.org/book/api.html#x-y), [b](https://s.org/notebooks/01_a.html), "
        "[c](#c), [d](https://a.org/d.md), ![e](e.png)"
    )


def test_a_notebook_without_code_is_refused():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Words")])
    with pytest.raises(ValueError, match="notebooks/words has no code cell"):
        run_button.run_anywhere(notebook, "notebooks/words", ADDRESS, BRANCH, SITE)
