"""Do the verdicts stand when the base seed changes?  Executes the notebooks under other seeds.

    .venv/bin/python benchmarks/verdict_seeds.py            # seeds 1 to 5, every notebook
    .venv/bin/python benchmarks/verdict_seeds.py 02 -s 6 7  # seeds 6 and 7, notebooks named *02*

Prints one row per claim and one column per seed; seed 0 is the book's own.  Nothing is written to
the build.  The exit status is 1 when a verdict differs from seed 0's or an experiment does not
decide.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradlab import claims

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import executed  # noqa: E402
import fresh  # noqa: E402
from execute import NotebookFailed, execute  # noqa: E402


def verdicts(path: Path) -> dict[str, str]:
    """The words that one notebook gives under the seed now in `GRADLAB_SEED`."""
    try:
        notebook, _ = execute(path, ROOT, threading.Event())
    except NotebookFailed as failure:
        print(f"\n{failure}\n", file=sys.stderr)
        return {}
    return dict(claims.verdicts_in(notebook))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of notebook names; none takes all")
    parser.add_argument("-s", "--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    arguments = parser.parse_args()
    paths = [
        path
        for path in executed.notebooks(ROOT)
        if not arguments.names or any(name in path.stem for name in arguments.names)
    ]
    if not paths:
        parser.error(f"no notebook of _toc.yml is named like {arguments.names}")

    os.environ.update(fresh.KERNEL_ENVIRONMENT)
    seeds = [0, *(seed for seed in arguments.seeds if seed != 0)]
    words: dict[int, dict[str, str]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for seed in seeds:
            print(f"seed {seed}", flush=True)
            os.environ["GRADLAB_SEED"] = str(seed)  # kernels inherit it: one seed at a time
            found = pool.map(verdicts, paths)
            words[seed] = {claim: word for notebook in found for claim, word in notebook.items()}

    everyone = [c for c in claims.load() if any(c in w for w in words.values())]
    print("\nclaim   " + "".join(f"{f'seed {seed}':14}" for seed in seeds))
    changed = []
    for claim in everyone:
        row = [words[seed].get(claim, "undecided") for seed in seeds]
        if len(set(row)) > 1:
            changed.append(claim)
        print(f"{claim:8}" + "".join(f"{word:14}" for word in row) + "  <-" * (claim in changed))
    missing = [c.id for c in claims.load().values()
               if c.chapter in {p.stem for p in paths} and c.id not in everyone]  # fmt: skip
    print(f"\n{len(everyone) - len(changed)} of {len(everyone)} verdicts stand under every seed."
          + (f" Never decided: {missing}." if missing else ""))  # fmt: skip
    return 1 if changed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
