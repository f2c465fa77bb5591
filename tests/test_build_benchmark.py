"""The benchmark of the build: what it counts as imports, its tables, and a run on a tiny book."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import nbformat
import pytest

import execute
import executed
from fresh import ROOT

SCRIPT = ROOT / "benchmarks/build.py"
spec = importlib.util.spec_from_file_location("build_benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = benchmark  # dataclasses look their module up
spec.loader.exec_module(benchmark)

Run, Phase = benchmark.Run, benchmark.Phase
MIB = 2**20


def test_imports_are_kept_in_order_with_the_setup():
    source = (
        "from gradlab import notebook\n\nseed = notebook.setup()  # style\n\nimport torch\n"
        "x = torch.zeros(3)\n\ndef f():\n    import os\n\nimport numpy as np, math\nnp.zeros(3)\n"
        "%matplotlib inline\nif x:\n    !ls\n"
    )
    assert benchmark.imports(source).splitlines() == [
        "from gradlab import notebook",
        "seed = notebook.setup()",
        "import torch",
        "import numpy as np, math",
    ]


@pytest.mark.parametrize("path", executed.notebooks(ROOT), ids=lambda path: path.stem)
def test_every_notebook_has_a_floor(path):
    floor = benchmark.only_imports(nbformat.read(path, as_version=4))
    assert "setup()" in floor.cells[0].source
    assert len(floor.cells) == 1
    nbformat.validate(floor)


def test_a_changed_notebook_is_unknown_to_the_cache(tmp_path):
    cells = [nbformat.v4.new_code_cell("1"), nbformat.v4.new_markdown_cell("end")]
    notebook = benchmark.changed(nbformat.v4.new_notebook(cells=cells))
    assert [cell.source for cell in notebook.cells] == ["1\n# changed", "end"]


def test_notebooks_are_chosen_by_parts_of_their_names():
    paths = [Path("notebooks/01_a.ipynb"), Path("notebooks/01b_a.ipynb"), Path("b.ipynb")]
    assert benchmark.chosen(paths, []) == paths
    assert benchmark.chosen(paths, ["01_", "01b"]) == paths[:2]
    assert benchmark.chosen(paths, ["zero"]) == []


def test_the_median_is_a_notebook_that_was_run():
    runs = {name: Run(seconds, 0, 0) for name, seconds in zip("abcd", (4, 1, 3, 2), strict=True)}
    assert benchmark.median_of(runs) == "d"
    assert benchmark.median_of({"a": runs["a"]}) == "a"


def test_the_chapters_add_up():
    runs = {"one": Run(10.0, 8.0, 500 * MIB), "two": Run(6.0, 5.5, 900 * MIB)}
    floors = {"one": Run(4.0, 3.0, 400 * MIB), "two": Run(4.0, 3.0, 300 * MIB)}
    lines = benchmark.chapters_table(runs, floors).splitlines()
    assert lines[1].split() == ["one", "10.0", "4.0", "8.0", "3.0", "5.0", "500", "400"]
    assert lines[-1].split() == ["all", "16.0", "8.0", "13.5", "6.0", "7.5", "900", "400"]
    assert len({len(line) for line in lines}) == 1


def test_phases_are_ratios_to_the_serial_one():
    phases = [Phase("serial", 4, 40.0, 10.0), Phase("cold", 4, 20.0, 8.0), Phase("warm", 0, 1.0, 1)]
    lines = [line.split() for line in benchmark.phases_table(phases).splitlines()[1:]]
    assert lines == [
        ["serial", "4", "40.0", "1.000", "10.0", "0.250", "25%"],
        ["cold", "4", "20.0", "0.500", "8.0", "0.200", "40%"],
        ["warm", "0", "1.0", "0.025", "1.0", "0.025"],
    ]


def tiny_book(root: Path, source: str) -> Path:
    (root / "notebooks").mkdir(parents=True)
    toc = "format: jb-book\nroot: intro\nchapters:\n- file: notebooks/one\n- file: notebooks/two\n"
    (root / "_toc.yml").write_text(toc)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for name, code in (("one", source), ("two", "import sys")):
        cells = [nbformat.v4.new_code_cell(code, id="only")]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, root / f"notebooks/{name}.ipynb")
    return root


def run_main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["build.py", *map(str, arguments)])
    monkeypatch.setattr(benchmark.fresh, "KERNEL_ENVIRONMENT", {})
    return benchmark.main()


def test_every_phase_executes_what_it_must_and_the_book_stays(tmp_path, monkeypatch, capsys):
    def without_kernel(path, *_):
        return nbformat.read(path, as_version=4), 0.5

    def alone(path, copy):
        assert copy.name in ("whole", "imports")
        return Run(2.0 if copy.name == "whole" else 0.5, 1.0, 100 * MIB)

    monkeypatch.setattr(execute, "execute", without_kernel)
    monkeypatch.setattr(benchmark, "alone", alone)
    root = tiny_book(tmp_path / "book", "1 + 1")
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    assert run_main(monkeypatch, "--root", root, "--json", tmp_path / "it.json") == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == before
    said = capsys.readouterr()
    assert "serial, cold" in said.out
    assert "[2/2]" in said.err
    report = json.loads((tmp_path / "it.json").read_text())
    assert report["machine"]["cores"] >= 1
    assert [row["chapter"] for row in report["chapters"]] == ["one", "two"]
    assert [phase["executed"] for phase in report["phases"]] == [2, 2, 0, 1]
    assert report["phases"][0]["seconds"] == 4
    assert report["phases"][0]["floor_seconds"] == 1


def test_no_such_notebook_is_said(tmp_path, monkeypatch, capsys):
    root = tiny_book(tmp_path / "book", "1")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--root", root, "three")
    assert "no notebook of _toc.yml is named like ['three']" in capsys.readouterr().err


def test_what_a_kernel_used_is_told(tmp_path):
    work = "import time\n\nblock = b'x' * 600_000_000\ntime.sleep(1)"
    root = tiny_book(tmp_path / "book", work)
    used = benchmark.alone(root / "notebooks/one.ipynb", root)
    assert used.seconds >= 1
    assert 550 * MIB < used.peak_bytes < 2000 * MIB
    assert 0 < used.cpu_seconds < 60


def test_what_fails_is_said(tmp_path, capfd):
    root = tiny_book(tmp_path / "book", "1 / 0")
    with pytest.raises(execute.NotebookFailed, match=r"one\.ipynb"):
        benchmark.alone(root / "notebooks/one.ipynb", root)
    assert "ZeroDivisionError" in capfd.readouterr().err
