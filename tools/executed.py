"""The executed notebooks of this build: one door to Jupyter Book's execution cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import yaml
from jupyter_cache import get_cache

CACHE = Path("_build/.jupyter_cache")


def documents(toc: object) -> Iterator[str]:
    """The documents that a table of contents names, in its order."""
    if isinstance(toc, dict):
        for key, value in toc.items():
            if key in ("file", "root"):
                yield str(value)
            else:
                yield from documents(value)
    elif isinstance(toc, list):
        for item in toc:
            yield from documents(item)


def notebooks(root: Path) -> list[Path]:
    """The notebooks of `_toc.yml`, in its order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    paths = (root / f"{name.removesuffix('.ipynb')}.ipynb" for name in documents(toc))
    return [path for path in paths if path.is_file()]


def cache_of(root: Path):
    """Jupyter Book's execution cache of the book in `root`."""
    return get_cache(str(root / CACHE))


def record_of(path: Path, cache):
    """The cache's record of a notebook as it stands, or None when it was not executed."""
    try:
        return cache.match_cache_notebook(nbformat.read(path, as_version=4))
    except KeyError:
        return None


def result_file(record, cache) -> Path:
    """The file in which the cache keeps what a notebook's execution gave."""
    return Path(cache.path) / "executed" / record.hashkey / "base.ipynb"


def executed(path: Path, cache) -> nbformat.NotebookNode:
    """The notebook with the outputs of its execution.

    Raises:
        KeyError: it was not executed.
    """
    _, notebook = cache.merge_match_into_notebook(nbformat.read(path, as_version=4))
    return notebook
