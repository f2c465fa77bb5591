"""JupyterLab as `make lab` starts it, on a copy of the notebooks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Browser
from reader import Lab, Run

from fresh import ROOT

START = 180  # seconds for the server to come up


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-notebook",
        action="store_true",
        help="run all notebooks of the book in JupyterLab, not three: most of an hour",
    )


@pytest.fixture(scope="session")
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The JupyterLab of `make lab`, on a copy: a reader's run changes files."""
    home = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "book", "benchmarks/data"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns(".*"))
    for path in (home / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":  # whatever is there afterwards was made there
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, path)
    arguments = ["--no-browser"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--allow-root")
    # The recipe of `make lab` itself; the environment that it would first install is this one.
    command = ["make", "-f", ROOT / "Makefile", "-o", ".venv/installed", "lab"]
    command += [f"BIN={Path(sys.executable).parent}", f"LAB_ARGS={' '.join(arguments)}"]
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data"}
    own |= {"JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    environment = {**os.environ, **{name: str(home / folder) for name, folder in own.items()}}
    environment.pop("MPLBACKEND", None)  # the tests' own
    log = home / "log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            command,
            cwd=home,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Lab(home / "notebooks", *_answer(server, home / "runtime", log), browser)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def _answer(server: subprocess.Popen, runtime: Path, log: Path) -> tuple[str, str]:
    """Address and token of the server, once it answers.

    Raises:
        RuntimeError: it ended, or said nothing for `START` seconds.
    """
    end = time.monotonic() + START
    while server.poll() is None and time.monotonic() < end:
        for path in runtime.glob("jpserver-*.json"):
            try:
                info = json.loads(path.read_text())
                urllib.request.urlopen(f"{info['url']}api", timeout=5).close()
            except (OSError, ValueError):
                continue
            return info["url"], info["token"]
        time.sleep(0.2)
    raise RuntimeError(f"`make lab` did not start JupyterLab; it printed\n{log.read_text()}")


@pytest.fixture(scope="session")
def run(lab: Lab, name: str) -> Run:
    """What became of a notebook: it runs once, however many tests ask, and also where it fails."""
    return lab.run(name)
