"""Execute notebooks into Jupyter Book's cache, as many at a time as there are cores.

Jupyter Book executes one after another, and says which cell failed only in a traceback.  Filling
its cache first does both better; the build that follows finds every result there.
"""

from __future__ import annotations

import copy
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

import executed

TIMEOUT = 300  # seconds a cell
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class NotebookFailed(RuntimeError):
    """A cell of a notebook failed; the message says which, and why."""


def execute_all(paths: list[Path], root: Path) -> int:
    """Execute the notebooks that have no result in the cache.

    Args:
        paths: notebooks.
        root: the book's folder, whose cache is filled.

    Returns:
        How many were executed.

    Raises:
        NotebookFailed: a cell failed.  Notebooks that succeeded keep their results.
    """
    cache = executed.cache_of(root)
    todo = [path for path in paths if executed.record_of(path, cache) is None]
    if not todo:
        print(f"{len(paths)} notebooks, nothing to execute")
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(len(todo), cores or 1)
    print(f"Executing {len(todo)} of {len(paths)} notebooks, {workers} at a time", flush=True)
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(execute, path, root, stop): path for path in todo}
        # The cache is one SQLite file: only this thread writes to it.
        failure = None
        for job in as_completed(jobs):
            if error := job.exception():
                stop.set()  # let the running notebooks end, start no other
                failure = failure or error
            elif (result := job.result()) is not None:
                notebook, seconds = result
                uri = str(jobs[job])
                bundle = CacheBundleIn(notebook, uri, data={"execution_seconds": seconds})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
                cache.add_nb_to_project(uri)
    if failure:
        raise failure
    return len(todo)


def execute(
    path: Path, root: Path, stop: threading.Event
) -> tuple[nbformat.NotebookNode, float] | None:
    """Execute one notebook in its own folder; None when `stop` was set before it began."""
    if stop.is_set():
        return None
    name = path.relative_to(root).as_posix()
    notebook = nbformat.read(path, as_version=4)
    kernelspec = copy.deepcopy(notebook.metadata.get("kernelspec"))
    print(f"  {name:44} …", flush=True)
    start = time.perf_counter()
    current: dict[str, int] = {}
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        record_timing=False,  # timestamps in the cells would change what the cache knows them by
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else each kernel warns of plain TCP
        on_cell_start=lambda cell, cell_index: current.update(index=cell_index),
    )
    log = root / "_build" / "kernels" / f"{path.stem}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The kernel's cells have their own stderr; what the frameworks' C++ says goes to a file.
        with log.open("w") as stderr:
            client.execute(stderr=stderr)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise NotebookFailed(explain(name, notebook, current.get("index", 0), error)) from error
    seconds = time.perf_counter() - start
    notebook.metadata["kernelspec"] = kernelspec  # as written: it is part of the cache's key
    print(f"  {name:44} {seconds:5.1f} s", flush=True)
    return notebook, seconds


def explain(name: str, notebook: nbformat.NotebookNode, index: int, error: Exception) -> str:
    """One message: notebook, cell, its first line, the error, the end of its traceback."""
    cell = notebook.cells[index]
    number = sum(c.cell_type == "code" for c in notebook.cells[: index + 1])
    first = next(iter(cell.source.strip().splitlines()), "")
    traceback = [line for output in cell.get("outputs", ()) if output.output_type == "error"
                 for line in ANSI.sub("", "\n".join(output.traceback)).splitlines()]  # fmt: skip
    if isinstance(error, CellExecutionError):
        what = f"{error.ename}: {error.evalue}"
    elif isinstance(error, CellTimeoutError):
        what = f"it took longer than {TIMEOUT} s"
    else:
        what = "its kernel died; was there enough memory?"
    tail = "\n".join(f"    {line}" for line in traceback[-20:])
    return (
        f"{name}, code cell {number} (cell {index + 1} of the notebook) failed: {what}\n"
        f"  its first line: {first}\n{tail}"
    )
