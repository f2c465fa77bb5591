"""How long the notebooks take: cold, warm, one chapter changed, as ratios to one after another.

    .venv/bin/python benchmarks/build.py                        # every chapter: hours
    .venv/bin/python benchmarks/build.py 01_ 03b --json it.json # notebooks whose names hold these
    .venv/bin/python benchmarks/build.py --chapters-only        # the table of chapters alone

Runs on a scratch copy, so that the checkout's results stay, and only what executes notebooks:
building pages comes on top.  First each notebook runs on its own, one after another.  That is the
serial cold build, and gives the table of chapters: seconds, processor seconds of the kernel and of
the processes that it waited for, and the peak memory of the largest of these.  Then `make book`'s
own executor runs: cold, with as many notebooks at a time as there are cores; warm, with nothing
changed; and after a change of one chapter, the one of median length.

The floor is the same, with notebooks that hold only the imports and the setup: a kernel's start and
what it loads, which no chapter can go below.  Run this on a quiet machine.  Progress goes to
stderr, the tables to stdout.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import executed  # noqa: E402
import fresh  # noqa: E402
from execute import NotebookFailed, execute, execute_all  # noqa: E402

LEFT_OUT = (".git", ".venv", "_build", "__pycache__", "*.egg-info", ".*_cache", "node_modules")
MIB = 2**20


@dataclass
class Run:
    """One notebook in a kernel of its own."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass
class Phase:
    """One way to execute all the notebooks."""

    name: str
    executed: int  # how many of them
    seconds: float
    floor_seconds: float  # the same with the imports alone


# ---------------------------------------------------------------------------------------------
# Pure parts


def chosen(paths: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The notebooks whose names hold one of `names`; all of them where there is none."""
    return [path for path in paths if not names or any(name in path.stem for name in names)]


def imports(source: str) -> str:
    """A cell's imports and its call of the setup, in their order, and nothing else."""
    kept = (
        node
        for node in ast.parse(TransformerManager().transform_cell(source)).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Assign | ast.Expr) and ast.unparse(node).endswith("setup()"))
    )
    return "\n".join(map(ast.unparse, kept))


def only_imports(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook of one cell: the imports of another one's cells."""
    found = (imports(cell.source) for cell in notebook.cells if cell.cell_type == "code")
    cell = nbformat.v4.new_code_cell("\n".join(filter(None, found)), id="imports")
    return nbformat.v4.new_notebook(cells=[cell], metadata=notebook.metadata)


def changed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with a comment more in its last code cell: it has to be executed again."""
    cell = next(cell for cell in reversed(notebook.cells) if cell.cell_type == "code")
    cell.source += "\n# changed"
    return notebook


def median_of(runs: dict[str, Run]) -> str:
    """The notebook of median length; of an even number the shorter of the two."""
    order = sorted(runs, key=lambda name: runs[name].seconds)
    return order[(len(order) - 1) // 2]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns: the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            f"{text:<{width}}" if i == 0 else f"{text:>{width}}"
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def chapters_table(runs: dict[str, Run], floors: dict[str, Run]) -> str:
    """One row a chapter, and their sum; of peaks the largest."""
    head = ("chapter", "seconds", "imports", "CPU s", "imports", "beyond", "peak MiB", "imports")

    def row(name: str, run: Run, floor: Run) -> tuple[str, ...]:
        numbers = (run.seconds, floor.seconds, run.cpu_seconds, floor.cpu_seconds)
        beyond = run.cpu_seconds - floor.cpu_seconds
        peaks = (run.peak_bytes / MIB, floor.peak_bytes / MIB)
        return (name, *(f"{n:.1f}" for n in (*numbers, beyond)), *(f"{n:.0f}" for n in peaks))

    rows = [row(name, runs[name], floors[name]) for name in runs]
    return table(head, [*rows, row("all", total(runs), total(floors))])


def total(runs: dict[str, Run]) -> Run:
    """Times added; of peaks the largest."""
    every = runs.values()
    return Run(
        sum(run.seconds for run in every),
        sum(run.cpu_seconds for run in every),
        max(run.peak_bytes for run in every),
    )


def phases_table(phases: Sequence[Phase]) -> str:
    """Each phase's time over that of the first, and its imports' share of it."""
    head = ("execution", "notebooks", "seconds", "ratio", "imports s", "imports ratio", "share")
    serial = phases[0].seconds
    rows = [
        (
            phase.name,
            str(phase.executed),
            f"{phase.seconds:.1f}",
            f"{phase.seconds / serial:.3f}",
            f"{phase.floor_seconds:.1f}",
            f"{phase.floor_seconds / serial:.3f}",
            f"{phase.floor_seconds / phase.seconds:.0%}" if phase.executed else "",
        )
        for phase in phases
    ]
    return table(head, rows)


# ---------------------------------------------------------------------------------------------
# Measuring


def say(text: str) -> None:
    """Progress, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, str | int]:
    """What the times were measured on and with."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    found: dict[str, str | int] = {
        "processor": processor,
        "cores": cores(),
        "memory MiB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for name in ("torch", "tensorflow", "ipykernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cores() -> int:
    """How many notebooks the executor runs at a time, when there are enough."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_one(path: Path, root: Path) -> Run:
    """Execute one notebook in this process, which has had no other child: see `alone`."""
    with contextlib.redirect_stdout(sys.stderr):
        _, seconds = execute(path, root, threading.Event())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * unit)


def alone(path: Path, root: Path) -> Run:
    """Execute one notebook in a process of its own, so that what its kernel used can be told.

    Raises:
        NotebookFailed: a cell failed.
    """
    command = [sys.executable, __file__, "--root", root, "--measure-one", path]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise NotebookFailed(f"{path.name} failed: see above")
    return Run(**json.loads(done.stdout))


def one_after_another(paths: Sequence[Path], root: Path) -> dict[str, Run]:
    runs = {}
    for number, path in enumerate(paths, 1):
        say(f"[{number}/{len(paths)}]")
        runs[path.stem] = alone(path, root)
    return runs


def timed(paths: list[Path], root: Path) -> tuple[int, float]:
    """How many notebooks `make book`'s executor executes, and its seconds."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        count = execute_all(paths, root)
    return count, time.perf_counter() - start


def by_the_executor(paths: list[Path], root: Path, median: str) -> list[tuple[str, int, float]]:
    """(phase, notebooks executed, seconds): cold, warm and with the median chapter changed."""
    # The cache's files are made beforehand: once in the life of a checkout.
    executed.cache_of(root).list_cache_records()
    cold = timed(paths, root)
    warm = timed(paths, root)
    path = next(path for path in paths if path.stem == median)
    nbformat.write(changed(nbformat.read(path, as_version=4)), path)
    edited = timed(paths, root)
    workers = min(len(paths), cores())
    return [
        (f"cold, {workers} at a time", *cold),
        ("warm", *warm),
        (f"{median} changed", *edited),
    ]


def measure(root: Path, names: Sequence[str], *, chapters_only: bool) -> dict:
    """Everything, on copies of the book in `root`: runs, floors and phases.

    Prints the table of chapters.

    Raises:
        NotebookFailed: a cell failed.
        ValueError: no notebook has such a name.
    """
    with tempfile.TemporaryDirectory(prefix="build-benchmark-") as folder:
        whole, floor = Path(folder, "whole"), Path(folder, "imports")
        for copy in (whole, floor):
            shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
            (copy / "_build").mkdir()
        paths = chosen(executed.notebooks(whole), names)
        if not paths:
            raise ValueError(f"no notebook of _toc.yml is named like {list(names)}")
        floors = [floor / path.relative_to(whole) for path in paths]
        for path in floors:
            nbformat.write(only_imports(nbformat.read(path, as_version=4)), path)

        say("Reading the libraries from disk once")
        alone(floors[0], floor)
        say("The imports, one notebook after another")
        floor_runs = one_after_another(floors, floor)
        say("The notebooks, one after another")
        runs = one_after_another(paths, whole)
        phases = [Phase("serial, cold", len(runs), total(runs).seconds, total(floor_runs).seconds)]
        if not chapters_only:
            median = median_of(runs)
            say("The imports, with the executor")
            floor_phases = by_the_executor(floors, floor, median)
            say("The notebooks, with the executor")
            for whole_phase, (*_, seconds) in zip(
                by_the_executor(paths, whole, median), floor_phases, strict=True
            ):
                phases.append(Phase(*whole_phase, seconds))
    return {"runs": runs, "floors": floor_runs, "phases": phases}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of notebook names; none takes all")
    parser.add_argument("--chapters-only", action="store_true", help="no executor: half the time")
    parser.add_argument("--json", type=Path, help="write machine and numbers into this file")
    parser.add_argument("--root", type=Path, default=ROOT, help="another book")
    parser.add_argument("--measure-one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    os.environ.update(fresh.KERNEL_ENVIRONMENT)
    on = machine()
    try:
        if arguments.measure_one:
            print(json.dumps(asdict(measure_one(arguments.measure_one, arguments.root))))
            return 0
        print(", ".join(f"{key} {value}" for key, value in on.items()), flush=True)
        found = measure(
            arguments.root.resolve(), arguments.names, chapters_only=arguments.chapters_only
        )
    except ValueError as error:
        parser.error(str(error))
    except NotebookFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1

    runs, floors, phases = found["runs"], found["floors"], found["phases"]
    print(f"\n{phases_table(phases)}")
    if arguments.json:
        chapters = [
            {"chapter": name, **asdict(runs[name]), "imports": asdict(floors[name])}
            for name in runs
        ]
        report = {"machine": on, "chapters": chapters, "phases": [asdict(p) for p in phases]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
