"""How good the built pages are to a phone and to a desktop: Lighthouse's scores, several times.

    python benchmarks/pages.py                                   # the longest chapter, 5 times each
    python benchmarks/pages.py notebooks/06_clipping book/claims --runs 3
    python benchmarks/pages.py --json pages.json

Needs `make book` first, Chromium, and npm, which fetches Lighthouse the first time.  The pages are
served with gzip, as hosts of books serve them; Lighthouse imitates a slow phone and its network by
calculation, so the scores depend on this machine's speed: the load is printed, and what is scored
is the median.  Progress goes to stderr, the table to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import chromium  # noqa: E402
from serve import served  # noqa: E402

LIGHTHOUSE = "lighthouse@12.8.2"
CATEGORIES = ("performance", "accessibility", "best-practices", "seo")
TIMES = {
    "first-contentful-paint": "first paint ms",
    "largest-contentful-paint": "largest ms",
    "total-blocking-time": "blocked ms",
    "cumulative-layout-shift": "shift",
}


def longest_chapter(html: Path) -> str:
    """The document of the chapter whose page is the largest file."""
    pages = (html / "notebooks").glob("*.html")
    page = max(pages, key=lambda path: path.stat().st_size, default=None)
    if page is None:
        raise FileNotFoundError(f"no chapter below {html}: run `make book` first")
    return f"notebooks/{page.stem}"


def score(url: str, form: str, browser: str) -> dict:
    """One run of Lighthouse.

    Args:
        url: the page's address.
        form: `mobile` or `desktop`.
        browser: path of a Chromium.

    Returns:
        Category and timing by name: scores from 0 to 100, milliseconds, `faults` the names of the
        audits outside performance that failed.

    Raises:
        RuntimeError: Lighthouse failed; the message holds what it said.
    """
    with tempfile.TemporaryDirectory(prefix="pages-benchmark-") as folder:
        report = Path(folder, "report.json")
        command = ["npx", "--yes", LIGHTHOUSE, url, "--quiet", "--output=json"]
        command += [f"--output-path={report}", f"--only-categories={','.join(CATEGORIES)}"]
        command += [f"--chrome-flags=--headless {' '.join(chromium.FLAGS)}"]
        if form == "desktop":
            command.append("--preset=desktop")
        environment = {**os.environ, "CHROME_PATH": browser}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not report.is_file():
            raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stdout}{done.stderr}")
        found = json.loads(report.read_text(encoding="utf-8"))
    return read(found)


def read(report: dict) -> dict:
    """What a report of Lighthouse says; see `score`."""
    categories, audits = report["categories"], report["audits"]
    numbers = {name: round(100 * categories[name]["score"]) for name in CATEGORIES}
    numbers |= {name: audits[name]["numericValue"] for name in TIMES}
    rest = {ref["id"] for name in CATEGORIES[1:] for ref in categories[name]["auditRefs"]}
    faults = sorted(name for name in rest if audits[name]["score"] not in (None, 1))
    return numbers | {"faults": faults}


def summary(runs: Sequence[dict]) -> dict:
    """Medians of several runs, and of performance the lowest and highest too."""
    medians = {name: statistics.median(r[name] for r in runs) for name in (*CATEGORIES, *TIMES)}
    performance = [run["performance"] for run in runs]
    return medians | {
        "lowest": min(performance),
        "highest": max(performance),
        "faults": sorted({fault for run in runs for fault in run["faults"]}),
    }


def row(document: str, form: str, found: dict) -> str:
    scores = " ".join(f"{found[name]:>13.0f}" for name in CATEGORIES[1:])
    times = [
        f"{found[name]:.3f}" if name.endswith("shift") else f"{found[name]:.0f}" for name in TIMES
    ]
    spread = f"{found['performance']:.0f} ({found['lowest']}-{found['highest']})"
    numbers = " ".join(f"{text:>14}" for text in times)
    return f"{document:36} {form:8} {spread:>13} {scores} {numbers}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("documents", nargs="*", help="as notebooks/06_clipping")
    parser.add_argument("--runs", type=int, default=5, help="of each page and form (default 5)")
    parser.add_argument("--html", type=Path, default=ROOT / "_build" / "html", help="another book")
    parser.add_argument("--json", type=Path, help="write every run into this file")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs takes a number of at least 1, got {arguments.runs}")
    html = arguments.html.resolve()
    try:
        documents = arguments.documents or [longest_chapter(html)]
        browser = chromium.find()
    except (FileNotFoundError, chromium.NoChromium) as error:
        parser.error(str(error))
    for document in documents:
        if not (html / f"{document}.html").is_file():
            parser.error(f"{html} has no page {document}.html; a document is named as in _toc.yml")

    scores = " ".join(f"{name:>13}" for name in CATEGORIES[1:])
    times = " ".join(f"{name:>14}" for name in TIMES.values())
    print(f"{LIGHTHOUSE}, {os.cpu_count()} cores, median of {arguments.runs}")
    print(f"{'page':36} {'as':8} {'performance':>13} {scores} {times}", flush=True)
    every = []
    with served(html) as site:
        for document in documents:
            for form in ("mobile", "desktop"):
                runs = []
                for number in range(arguments.runs):
                    load = os.getloadavg()[0]
                    runs.append(score(f"{site}/{document}.html", form, browser) | {"load": load})
                    print(
                        f"{document} {form} {number + 1}/{arguments.runs}: "
                        f"{runs[-1]['performance']}, load {load:.1f}",
                        file=sys.stderr,
                        flush=True,
                    )
                found = summary(runs)
                print(row(document, form, found), flush=True)
                if found["faults"]:
                    print(f"    faults: {', '.join(found['faults'])}", flush=True)
                every.append({"page": document, "as": form, "runs": runs})
    loads = [run["load"] for entry in every for run in entry["runs"]]
    print(f"load of the last minute, before each run: {min(loads):.1f} to {max(loads):.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
