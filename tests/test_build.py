"""The tools that build the book, tried on a tiny one: it fails when it must, and is never stale."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import bootstrap
import chromium
import executed
import fresh
from fresh import ROOT

# One process builds the tiny book, whatever the number of workers.
pytestmark = pytest.mark.xdist_group("build")

CLAIMS = """
- {id: A1.1, kind: claim, article: 1, chapter: one, statement: "Six", correction: "It is."}
- {id: A1.2, kind: claim, article: 1, chapter: two, statement: "Seven", correction: "Later."}
"""
VERDICT = 'from gradlab.claims import verdict\n\nverdict("A1.1", supported=True)'
FRAMEWORKS = [('print("in PyTorch")', ["pytorch"]), ('print("in TensorFlow")', ["tensorflow"])]


class TinyBook:
    """A copy of the book's settings and tools around one notebook and one helper."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("_config.yml", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, root)
        for name in ("tools", "book/_ext", "book/_templates", "book/assets"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        (root / "notebooks").mkdir()
        (root / "src").mkdir()
        toc = "format: jb-book\nroot: book/intro\nchapters:\n- file: notebooks/one\n"
        (root / "_toc.yml").write_text(toc + "- file: book/claims\n- file: book/articles\n")
        (root / "book/references.bib").write_text("")
        (root / "book/claims.yml").write_text(CLAIMS)
        (root / "book/intro.md").write_text("# Tiny\n\n{claim}`A1.1` and $x^2$.\n")
        (root / "book/claims.md").write_text("# Claims\n\n```{claims-ledger}\n```\n")
        article = "```{claims-ledger}\n:article: 1\n```\n"
        words = "{verdict}`A1.1`, {verdict}`A1.2`.\n"
        (root / "book/articles.md").write_text(f"# Articles\n\n{words}\n{article}")
        self.helper("def number():\n    return 41\n")
        self.notebook()

    def helper(self, source: str) -> None:
        """Write the module that the notebook imports."""
        (self.root / "src/tinyhelper.py").write_text(source)

    def notebook(self, verdict: str = VERDICT, *more: str) -> None:
        """Write the notebook: the helper's number, a pair of tabs, a verdict, more cells."""
        count = "from tinyhelper import number\n\nprint(f'the number is {number()}')"
        sources = [(count, []), *FRAMEWORKS, (verdict, []), *((source, []) for source in more)]
        cells = [nbformat.v4.new_markdown_cell("# One", id="title")]
        for index, (source, tags) in enumerate(sources):
            cell = nbformat.v4.new_code_cell(source, id=f"cell-{index}", metadata={"tags": tags})
            cells.append(cell)
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(book, self.root / "notebooks/one.ipynb")

    def build(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`make book`."""
        path = os.pathsep.join([str(self.root / "src"), str(ROOT / "src")])
        command = [sys.executable, "tools/build.py", *options]
        environment = {**os.environ, "PYTHONPATH": path}
        environment.pop("GRADLAB_SEED", None)
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )

    def page(self, name: str = "notebooks/one") -> str:
        return (self.root / f"_build/html/{name}.html").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> TinyBook:
    """The tiny book, built once."""
    book = TinyBook(tmp_path_factory.mktemp("tiny"))
    result = book.build()
    assert result.returncode == 0, result.stdout + result.stderr
    return book


@pytest.fixture
def book(built) -> TinyBook:
    """The tiny book, put right again after a test that broke it."""
    yield built
    built.helper("def number():\n    return 41\n")
    built.notebook()


# ---------------------------------------------------------------------------------------------
# The build


def test_pages_show_results_tabs_and_verdicts(book):
    assert "the number is 41" in book.page()
    assert book.page().count("sd-tab-set ") == 1
    assert re.search('<div [^>]*class="verdict verdict-supported"', book.page())
    assert "1 of 2 statements" in re.sub("<[^>]+>", "", book.page("book/claims"))
    assert 'href="claims.html#claim-A1.1"' in book.page("book/intro")
    ledger = json.loads((book.root / "_build/ledger.json").read_text())
    assert ledger == {
        "A1.1": {"verdict": "supported", "chapter": "one", "notebook": "notebooks/one.ipynb"}
    }


def test_other_pages_take_their_words_from_the_ledger(book):
    page = book.page("book/articles")
    link = r'<a [^>]*href="claims.html#claim-{}"[^>]*>\s*<span class="[^"]*badge-{}">{}</span></a>'
    assert re.search(link.format("A1.1", "supported", "supported"), page)
    assert re.search(link.format("A1.2", "open", "open"), page)
    words = [re.sub("<[^>]+>", "", item) for item in re.findall("<li><p>.*?</p>", page, re.S)]
    assert [" ".join(item.split()) for item in words] == ["supported 1: A1.1", "open 1: A1.2"]
    book.notebook(VERDICT.replace("supported=", "refuted="))
    assert book.build().returncode == 0
    again = book.page("book/articles")
    assert re.search(link.format("A1.1", "refuted", "refuted"), again)


def test_a_word_of_no_claim_fails_the_build(book):
    page = book.root / "book/articles.md"
    before = page.read_text()
    page.write_text(before.replace("A1.2", "A7.7"))
    try:
        result = book.build()
    finally:
        page.write_text(before)
    assert result.returncode != 0
    assert "no claim 'A7.7'" in result.stdout + result.stderr


def test_nothing_changed_nothing_executed(book):
    before = executed.record_of(book.root / "notebooks/one.ipynb", executed.cache_of(book.root))
    result = book.build()
    assert result.returncode == 0, result.stdout
    assert "nothing to execute" in result.stdout
    after = executed.record_of(book.root / "notebooks/one.ipynb", executed.cache_of(book.root))
    assert before.created == after.created


def test_a_changed_helper_changes_the_page(book):
    book.helper("def number():\n    return 42\n")
    result = book.build()
    assert result.returncode == 0, result.stdout
    assert "the number is 42" in book.page()


def test_a_failing_helper_fails_the_build_and_names_the_cell(book):
    book.helper('def number():\n    raise ValueError("broken on purpose")\n')
    result = book.build()
    assert result.returncode != 0
    said = result.stderr
    assert "notebooks/one.ipynb, code cell 1 (cell 2 of the notebook)" in said
    assert "ValueError: broken on purpose" in said
    assert "from tinyhelper import number" in said
    assert "tinyhelper.py" in said


def test_a_wrong_page_fails_every_build_not_only_the_first(book):
    no_verdict = "print('undecided')"
    unlabelled = "import matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()"
    book.notebook(no_verdict, unlabelled)
    for _ in range(2):
        result = book.build()
        assert result.returncode != 0
        assert "A1.1: no verdict, although its chapter one exists" in result.stdout
        assert "has no alt text" in result.stdout


# ---------------------------------------------------------------------------------------------
# What counts as stale


def test_the_fingerprint_sees_code_claims_pins_and_seed(tmp_path, monkeypatch):
    monkeypatch.delenv("GRADLAB_SEED", raising=False)
    (tmp_path / "src/deep").mkdir(parents=True)
    (tmp_path / "book").mkdir()
    seen = {fresh.fingerprint(tmp_path)}
    for name in ("src/deep/a.py", "src/a.mplstyle", "book/claims.yml", "constraints.txt"):
        (tmp_path / name).write_text("one")
        seen.add(fresh.fingerprint(tmp_path))
    monkeypatch.setenv("GRADLAB_SEED", "3")
    seen.add(fresh.fingerprint(tmp_path))
    assert len(seen) == 6
    (tmp_path / "src/deep/__pycache__").mkdir()
    (tmp_path / "src/deep/__pycache__/a.pyc").write_text("compiled")
    (tmp_path / "README.md").write_text("prose")
    assert fresh.fingerprint(tmp_path) in seen


def test_stale_results_are_dropped_once(tmp_path):
    (tmp_path / "src").mkdir()
    assert not fresh.drop_stale(tmp_path)
    (tmp_path / "_build/.jupyter_cache").mkdir()
    (tmp_path / "_build/html").mkdir()
    assert not fresh.drop_stale(tmp_path)
    (tmp_path / "src/a.py").write_text("new")
    assert fresh.drop_stale(tmp_path)
    assert not (tmp_path / "_build/.jupyter_cache").exists()
    assert (tmp_path / "_build/html").exists()
    assert not fresh.drop_stale(tmp_path)


# ---------------------------------------------------------------------------------------------
# The framework tabs


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ("pt", [{"pytorch": 1, "tensorflow": 1}]),
        ("ppt", [{"pytorch": 2, "tensorflow": 1}]),
        ("p.t", []),
        ("pp", []),
        ("ptpt", [{"pytorch": 1, "tensorflow": 1}] * 2),
        ("tp.pt", [{"pytorch": 1, "tensorflow": 1}] * 2),
    ],
)
def test_runs_of_neighbours_become_tabs(cells, expected, monkeypatch):
    from docutils import nodes

    monkeypatch.syspath_prepend(str(ROOT / "book/_ext"))
    import framework_tabs

    names = {"p": "tag_pytorch", "t": "tag_tensorflow", ".": "cell"}
    children = [nodes.container(nb_element="cell_code", classes=[names[c]]) for c in cells]
    found = framework_tabs.runs(children)
    assert [{name: len(group) for name, group in run.items()} for run in found] == expected


def test_headings_become_exercises_with_a_solution(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "book/_ext"))
    import exercises

    one = ["### Exercise\n<!-- ex-one -->\n\nOne and one?", "### Solution", "Two.", None]
    two = ["### Exercise\n<!-- ex-two -->\n\nTwo and two?", "### Solution", None]
    cells = [
        {"cell_type": "markdown" if text else "code", "source": text or "1 + 1"}
        for text in ["## Exercises", *one, *two]
    ]
    found = ["".join(cell["source"]) for cell in exercises.boxes(cells)]
    box, start, end = exercises.EXERCISE_BOX, exercises.SOLUTION_START, exercises.SOLUTION_END
    assert found == [
        *("## Exercises", box.format("ex-one", "One and one?")),
        *(start.format("ex-one"), "Two.", "1 + 1", end),
        *(box.format("ex-two", "Two and two?"), start.format("ex-two"), "1 + 1", end),
    ]


# ---------------------------------------------------------------------------------------------
# What is missing is said in a sentence


def test_an_old_python_is_told_so(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    monkeypatch.setattr(bootstrap, "FOUND", "3.9")
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer.* is Python 3\.9.*PYTHON="):
        bootstrap.check_python()


@pytest.mark.parametrize(
    ("pip_says", "expected"),
    [
        ("Retrying after NewConnectionError\nNo matching distribution found", "no network"),
        ("ERROR: No matching distribution found for torch==2.13.0", "has no version for Python"),
        ("ERROR: No space left on device", "pip failed"),
    ],
)
def test_a_failing_pip_is_explained(monkeypatch, capsys, pip_says, expected):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, stdout=pip_says)

    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    with pytest.raises(SystemExit, match=expected):
        bootstrap.install("python")
    assert pip_says in capsys.readouterr().out


def test_no_chromium_is_told_so(monkeypatch):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(chromium.NoChromium, match=r"apt-get install chromium.*CHROMIUM="):
        chromium.find()
    monkeypatch.setenv("CHROMIUM", "/no/such/program")
    with pytest.raises(chromium.NoChromium, match="/no/such/program"):
        chromium.find()


def test_make_alone_prints_help():
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("book", "test", "lab", "check", "outputs", "clean"):
        assert f"make {target} " in result.stdout
