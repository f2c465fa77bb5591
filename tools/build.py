"""`make book`: execute the notebooks that need it, side by side, then build the pages."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import executed
import fresh
from execute import ANSI, NotebookFailed, execute_all


def build_pages(root: Path) -> int:
    """Run Jupyter Book, warnings as errors; its log is shown only when it fails.

    Returns:
        Its exit status.
    """
    log = root / "_build" / "jupyter-book.log"
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", ".", "-W", "-n", "--keep-going"]
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(
            command,
            cwd=root,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NO_COLOR": "1"},
            check=False,
        ).returncode
    if status:
        lines = ANSI.sub("", log.read_text(encoding="utf-8")).splitlines()
        telling = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL): |rror:", line)]
        print("\n".join(lines[-30:]))
        if telling:
            print("\nThe book was not built.  Warnings count as errors:")
            print("\n".join(f"  {line}" for line in telling))
        print(f"\nThe whole log: {log}")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=fresh.ROOT, help="another book")
    parser.add_argument("--execute", action="store_true", help="execute only, build no page")
    arguments = parser.parse_args()
    root = arguments.root.resolve()

    os.environ.update(fresh.KERNEL_ENVIRONMENT)
    if fresh.drop_stale(root):
        print("The code, the claims, the pins or the seed changed: every result is computed anew.")
    paths = executed.notebooks(root)
    try:
        execute_all(paths, root)
    except NotebookFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    if arguments.execute:
        return 0

    print("Building the pages", flush=True)
    start = time.perf_counter()
    if status := build_pages(root):
        return status
    print(f"Built in {time.perf_counter() - start:.0f} s, no warnings.\n")
    cache = executed.cache_of(root)
    for path in paths:
        seconds = executed.record_of(path, cache).data["execution_seconds"]
        print(f"  {path.relative_to(root)!s:44} executed in {seconds:5.1f} s")
    print(f"\nThe first page: {(root / '_build/html/index.html').as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
