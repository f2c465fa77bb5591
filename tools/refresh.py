"""Would the newest versions do?  Resolve them afresh, then check, build and test with them.

    python3 tools/refresh.py                 # everything: as long as a first `make book test`
    python3 tools/refresh.py --steps         # resolve only, install nothing: minutes
    python3 tools/refresh.py --steps book    # resolve, then `make book` alone

Works on a copy of the checkout in a scratch folder and changes neither the checkout nor its .venv.
constraints.txt is left out, so that pip takes the newest version of everything that the ranges in
pyproject.toml allow; `make` then installs exactly those in the copy.  What comes of it lies in
_build/refresh: constraints.txt, summary.md (old -> new, and which steps passed) and a log for each
step.  To accept it, copy that constraints.txt over the old one.

On Linux set PIP_EXTRA_INDEX_URL as README.md says, with a GPU too: the pins name nothing of
PyTorch's CUDA build, and a set of versions with parts of it is refused.  Use the Python that the
pins were made with, 3.11.  The exit status is 1 when a step failed.  Needs nothing but the standard
library.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("check", "book", "test")  # as .ci/run does
LEFT_OUT = (".git", ".venv", "_build", "__pycache__", "*.egg-info", ".*_cache", "node_modules")
TAIL = 40  # lines of a failed step's log that the summary shows

Pins = dict[str, str]


def canonical(name: str) -> str:
    """A project's name as pip compares it, without extras and versions: PyYAML>=6 -> pyyaml."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name.strip()).group()).lower()


def read_pins(text: str) -> Pins:
    """Name, as written, to version."""
    lines = (line.strip() for line in text.splitlines())
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def header(text: str) -> str:
    """The comment at the top of a constraints file."""
    lines = text.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[:first])


def write_pins(pins: Pins, comment: str) -> str:
    """A constraints file, in the order of `pip freeze`."""
    lines = (f"{name}=={pins[name]}\n" for name in sorted(pins, key=str.lower))
    return comment + "".join(lines)


def resolved(report: dict) -> Pins:
    """The versions in pip's installation report, apart from the book's own.

    Without the local part: PyTorch's 2.13.0+cpu becomes 2.13.0, as any index has it.
    """
    packages = (item["metadata"] for item in report["install"])
    pins = {package["name"]: package["version"].split("+")[0] for package in packages}
    return {name: version for name, version in pins.items() if name != "gradlab"}


def named(project: dict) -> set[str]:
    """What pyproject.toml asks for by name, in any extra."""
    extras = project.get("optional-dependencies", {}).values()
    wanted = [*project.get("dependencies", ()), *(name for extra in extras for name in extra)]
    return {canonical(name) for name in wanted}


def changes(old: Pins, new: Pins) -> list[tuple[str, str, str]]:
    """(name, old, new) of what differs; an empty version where there is none."""
    before = {canonical(name): (name, version) for name, version in old.items()}
    after = {canonical(name): (name, version) for name, version in new.items()}
    rows = []
    for key in sorted(before | after):
        name = (after.get(key) or before[key])[0]
        was, now = before.get(key, ("", ""))[1], after.get(key, ("", ""))[1]
        if was != now:
            rows.append((name, was, now))
    return rows


def summary(
    rows: list[tuple[str, str, str]], direct: set[str], results: dict[str, tuple[bool, str]]
) -> str:
    """What to report, in Markdown.

    Args:
        rows: of `changes`.
        direct: names that pyproject.toml asks for; they come first.
        results: step to (passed, its log).
    """
    words = [f"`make {step}` {'passed' if passed else '**failed**'}"
             for step, (passed, _) in results.items()]  # fmt: skip
    lines = ["# Newest versions", "", ", ".join(words) + "." if words else "Nothing was run.", ""]
    if rows:
        lines += ["| package | pinned | newest | asked for by |", "| --- | --- | --- | --- |"]
        for name, was, now in sorted(rows, key=lambda row: canonical(row[0]) not in direct):
            asked = "pyproject.toml" if canonical(name) in direct else "another package"
            lines.append(f"| {name} | {was or 'none'} | {now or 'none'} | {asked} |")
    else:
        lines.append("Every pin is the newest version.")
    for step, (passed, log) in results.items():
        if not passed:
            tail = "\n".join(log.rstrip().splitlines()[-TAIL:])
            lines += ["", f"The end of `make {step}`:", "", f"~~~~text\n{tail}\n~~~~"]
    return "\n".join(lines) + "\n"


def resolve(book: Path, scratch: Path) -> Pins:
    """Ask pip for the newest versions that the book's ranges allow, installing none.

    Raises:
        RuntimeError: pip found no set of versions, or one for NVIDIA's graphics cards.
    """
    venv.create(scratch / "pip", with_pip=True)
    python = scratch / "pip" / "bin" / "python"
    report = scratch / "report.json"
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--prefer-binary", "--report", report, "--editable", ".[test]"]
    done = subprocess.run(command, cwd=book, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip found no set of versions:\n{done.stdout}{done.stderr}")
    pins = resolved(json.loads(report.read_text(encoding="utf-8")))
    if any(name.startswith("nvidia-") for name in pins):
        raise RuntimeError(
            f"pip chose the CUDA build of torch {pins.get('torch')}, whose parts the book does not "
            "pin. Name an index with its CPU build in PIP_EXTRA_INDEX_URL, as README.md says."
        )
    return pins


def run_step(step: str, book: Path, log: Path) -> tuple[bool, str]:
    """`make step` in the copy: whether it passed, and what it said, which `log` keeps."""
    command = ["make", "--no-print-directory", step, f"PYTHON={sys.executable}"]
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            command, cwd=book, stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode == 0, log.read_text(encoding="utf-8")


def say(text: str) -> None:
    """Progress, apart from the summary."""
    print(text, file=sys.stderr, flush=True)


def refresh(root: Path, out: Path, scratch: Path, steps: list[str]) -> bool:
    """Resolve, run the steps, write the results into `out`; whether every step passed."""
    book = scratch / "book"
    shutil.copytree(root, book, ignore=shutil.ignore_patterns(*LEFT_OUT))
    before = (root / "constraints.txt").read_text(encoding="utf-8")
    say("Resolving the newest versions")
    new = resolve(book, scratch)
    after = write_pins(new, header(before))
    (book / "constraints.txt").write_text(after, encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    (out / "constraints.txt").write_text(after, encoding="utf-8")

    results = {}
    for step in steps:
        log = out / f"{step}.log"
        say(f"make {step}; what it says goes to {log}")
        results[step] = run_step(step, book, log)
        say(f"make {step} {'passed' if results[step][0] else 'failed'}")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    report = summary(changes(read_pins(before), new), named(project), results)
    (out / "summary.md").write_text(report, encoding="utf-8")
    print(report)
    return all(passed for passed, _ in results.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", nargs="*", choices=STEPS, default=list(STEPS), help="of make; none resolves only"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "_build" / "refresh")
    parser.add_argument("--root", type=Path, default=ROOT, help="another book")
    parser.add_argument(
        "--scratch",
        type=Path,
        help="an empty folder to work in and keep, of 5 GB; else a temporary",
    )
    arguments = parser.parse_args()
    root, out = arguments.root.resolve(), arguments.output.resolve()
    try:
        if arguments.scratch:
            arguments.scratch.mkdir(parents=True, exist_ok=True)
            passed = refresh(root, out, arguments.scratch.resolve(), arguments.steps)
        else:
            with tempfile.TemporaryDirectory(prefix="refresh-") as folder:
                passed = refresh(root, out, Path(folder), arguments.steps)
    except RuntimeError as error:
        sys.exit(f"\n{error}")
    say(f"Written to {out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
