"""Links that lead nowhere: in the book's own files at once, to other hosts on request.

    python tools/links.py                        # every page and notebook, offline: in `make check`
    python tools/links.py README.md book/api.md  # these files only
    python tools/links.py --external             # asks every other host that a file names: weekly

The build finds broken links between pages too, but late, and it does not see README.md,
CONTRIBUTING.md and CHANGELOG.md.  The outside check hands every address to Sphinx's linkcheck on a
page of its own, so that no notebook runs.  The exit status is 1 when a link is broken.  A host that
turns programs away (401, 403, 429), as some publishers do, is listed and breaks nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "book/*.md", "notebooks/*.ipynb")
#: What else names other hosts.
SOURCES = (*PAGES, "*.cff", "*.toml", "_config.yml", "environment.yml", "book/*.bib", "src/**/*.py")

ADDRESS = re.compile(r"https?://[^\s<>\"'`\\{}|^]+")
DOI = re.compile(r"^\s*doi\s*=\s*[{\"]([^}\"]+)", re.MULTILINE | re.IGNORECASE)
EPRINT = re.compile(r"^\s*eprint\s*=\s*[{\"]([^}\"]+)", re.MULTILINE | re.IGNORECASE)
TURNED_AWAY = re.compile(r"\b(401|403|429)\b|[Uu]nauthorized|[Ff]orbidden|Too Many Requests")


def files(root: Path, patterns: tuple[str, ...] = PAGES) -> list[Path]:
    """The files below `root` that the patterns name, each once."""
    return sorted({path for pattern in patterns for path in root.glob(pattern)})


def text_of(path: Path, *, code: bool = False) -> str:
    """A file's text; of a notebook its Markdown, and with `code` its code cells too."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(c.source for c in cells if code or c.cell_type == "markdown")


def targets(markdown: str) -> Iterator[str]:
    """What a Markdown text's links and images point at, also inside directives, not in code."""

    def walk(tokens: list[Token]) -> Iterator[str]:
        for token in tokens:
            if token.type == "fence" and token.info.startswith("{"):
                yield from targets(token.content)
            for key in ("href", "src"):
                if target := token.attrGet(key):
                    yield str(target)
            yield from walk(token.children or [])

    yield from walk(MarkdownIt().parse(markdown))


def broken(path: Path) -> list[str]:
    """The targets in one page or notebook that name a file that is not there."""
    found = []
    for target in targets(text_of(path)):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc or not parts.path:
            continue  # another host, or a heading of the same page
        if not (path.parent / unquote(parts.path)).exists():
            found.append(target)
    return found


def addresses(text: str) -> set[str]:
    """Every address of another host in a text, without the punctuation that follows it."""
    found = {match.group() for match in ADDRESS.finditer(text)}
    found |= {f"https://doi.org/{doi}" for doi in DOI.findall(text)}
    found |= {f"https://arxiv.org/abs/{number}" for number in EPRINT.findall(text)}
    return {address for address in map(trimmed, found) if is_public(address)}


def trimmed(address: str) -> str:
    """An address without what belongs to the sentence around it: `(see https://a.org/b_(c)).`"""
    while address:
        if address[-1] in ".,;:!?*" or any(
            address[-1] == right and address.count(right) > address.count(left)
            for left, right in ("()", "[]")
        ):
            address = address[:-1]
        elif "](" in address:  # [https://a.org](https://a.org)
            address = address.split("](")[0]
        else:
            break
    return address


def is_public(address: str) -> bool:
    """Whether an address names a host of the Internet, and is no stand-in like https://..."""
    host = urlsplit(address).hostname or ""
    return "." in host.strip(".") and not host.startswith(("localhost", "127."))


def verdicts(output: str) -> dict[str, tuple[str, str]]:
    """Address to (fine, moved, turned away or broken; why), from linkcheck's output.json.

    The file has one JSON object a line.
    """
    kinds = {"redirected": "moved", "broken": "broken", "timeout": "broken"}
    found = {}
    for record in map(json.loads, output.splitlines()):
        kind = kinds.get(record["status"], "fine")
        why = f"{record.get('code') or ''} {record['info']}".strip()
        if kind == "broken" and TURNED_AWAY.search(why):
            kind = "turned away"
        found[record["uri"]] = (kind, why)
    return found


def ask(wanted: list[str]) -> dict[str, tuple[str, str]]:
    """Let Sphinx's linkcheck ask for every address; see `verdicts`.

    Raises:
        RuntimeError: it left an address out.
    """
    with tempfile.TemporaryDirectory() as folder:
        page = "# Links\n\n" + "".join(f"- <{address}>\n" for address in wanted)
        Path(folder, "index.md").write_text(page, encoding="utf-8")
        command = [sys.executable, "-m", "sphinx", "-q", "-C", "-b", "linkcheck"]
        for option in (
            "extensions=myst_parser",
            "linkcheck_anchors=0",
            "linkcheck_retries=3",
            "linkcheck_timeout=30",
            "linkcheck_report_timeouts_as_broken=1",
        ):
            command += ["-D", option]
        # Its exit status says that some link is broken; output.json says which.
        done = subprocess.run(
            [*command, folder, f"{folder}/out"], capture_output=True, text=True, check=False
        )
        output = Path(folder, "out", "output.json")
        found = verdicts(output.read_text(encoding="utf-8")) if output.is_file() else {}
    if left_out := set(wanted) - set(found):
        raise RuntimeError(f"linkcheck did not ask for {sorted(left_out)}:\n{done.stderr}")
    return found


def check_outside(paths: list[Path]) -> int:
    """Ask for every address that the files name, print what is not fine; 1 when one is broken."""
    where: dict[str, list[str]] = {}
    for path in paths:
        for address in sorted(addresses(text_of(path, code=True))):
            where.setdefault(address, []).append(shown(path))
    if not where:
        print("no address of another host")
        return 0
    print(f"Asking for {len(where)} addresses", file=sys.stderr, flush=True)
    found = ask(sorted(where))
    for kind in ("broken", "turned away", "moved"):
        rows = sorted(address for address in where if found[address][0] == kind)
        print(f"\n{len(rows)} {kind}" + ":" * bool(rows))
        for address in rows:
            print(f"  {address}\n    in {', '.join(where[address])}: {found[address][1]}")
    return int(any(found[address][0] == "broken" for address in where))


def shown(path: Path) -> str:
    """A file's name below the book's folder, or the whole path of one elsewhere."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="pages or notebooks; none takes all")
    parser.add_argument("--external", action="store_true", help="ask other hosts instead")
    arguments = parser.parse_args()
    if arguments.external:
        return check_outside(arguments.files or files(ROOT, SOURCES))
    status = 0
    for path in arguments.files or files(ROOT):
        for target in broken(path):
            print(f"{shown(path)}: no such file: {target}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
