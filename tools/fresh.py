"""No stale number: drop every cached result when something that it depends on has changed.

The execution cache of Jupyter Book knows a notebook by the source of its cells alone.  Change a
helper that the cells import, and it would show yesterday's numbers.  So everything else that a
result depends on goes into one fingerprint, kept beside the results.

`tools/build.py` calls `drop_stale` before it executes anything.  As a Sphinx extension this module
does the same for a plain `jupyter-book build .`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from gradlab.notebook import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent

#: What every kernel of the book runs with.
KERNEL_ENVIRONMENT = ENVIRONMENT | {
    # Figures go into the page, also when the build was started by something that has no display.
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    # A frozen debugger warning on Python 3.11 and later would land in the page.
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}

#: Where results live, below `_build`: executed cells, and the pages read from them.
RESULTS = (".jupyter_cache", ".doctrees", "jupyter_execute", "executed")


def inputs(root: Path) -> Iterator[Path]:
    """Every file, apart from the notebooks, that a cell's output may depend on."""
    for path in sorted((root / "src").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path):
            yield path
    yield from sorted((root / "benchmarks" / "data").glob("*.json"))
    for name in ("book/claims.yml", "constraints.txt", "pyproject.toml"):
        if (root / name).is_file():
            yield root / name


def fingerprint(root: Path = ROOT) -> str:
    """One hash of the inputs, the Python version and the base seed."""
    digest = hashlib.sha256()
    digest.update(f"{platform.python_version()} {os.environ.get('GRADLAB_SEED', '0')}".encode())
    for path in inputs(root):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def drop_stale(root: Path = ROOT) -> bool:
    """Drop every result under `_build` that other inputs produced.

    Returns:
        Whether there was something to drop.
    """
    build = root / "_build"
    stamp = build / "fingerprint"
    now = fingerprint(root)
    if stamp.is_file() and stamp.read_text() == now:
        return False
    dropped = False
    for name in RESULTS:
        if (build / name).exists():
            dropped = True
            shutil.rmtree(build / name)
    build.mkdir(exist_ok=True)
    stamp.write_text(now)
    return dropped


def setup(app) -> dict[str, bool]:
    """Sphinx's hook: runs before the environment of an earlier build is read."""
    os.environ.update(KERNEL_ENVIRONMENT)
    root = Path(app.srcdir)
    drop_stale(root)

    # A page's warnings are given once, when it is read: a second build would not repeat them, and
    # pass.  So what a build with warnings, or a killed one, has read is read again.
    unfinished = root / "_build" / "unfinished"
    if unfinished.exists():
        shutil.rmtree(root / "_build" / ".doctrees", ignore_errors=True)
    unfinished.touch()

    def finish(app, exception) -> None:
        if exception is None and not app._warncount:
            unfinished.unlink(missing_ok=True)

    app.connect("build-finished", finish, priority=999)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
