"""The library's page: every module stands in its list and in its reference, once."""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "gradlab"


def public_modules() -> Counter[str]:
    paths = [path for folder in ("", "torch", "keras") for path in (SOURCE / folder).glob("*.py")]
    names = [path.relative_to(SOURCE.parent).with_suffix("") for path in paths]
    return Counter(".".join(name.parts) for name in names if not name.name.startswith("_"))


def test_every_module_is_listed_and_documented_once():
    page = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    modules = public_modules()
    assert len(modules) > 50
    assert Counter(re.findall(r"^\.\. automodule:: (gradlab\S*)$", page, re.MULTILINE)) == modules
    assert Counter(re.findall(r"^### (gradlab\S*)$", page, re.MULTILINE)) == modules
    rows = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    assert Counter(re.findall(r"\{py:mod\}`(gradlab[^`]*)`", rows)) == modules


def test_every_line_of_the_list_says_what_for():
    page = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| {py:mod}")]
    told = [row.strip("|").split("|")[-1].strip() for row in rows]
    assert all(told)
    assert len(set(told)) == len(told)


def test_no_attribute_is_documented_as_if_it_began_with_a_type():
    """Sphinx's Napoleon reads "Settings: what they do" below an assignment as type and text."""
    found = []
    for path in SOURCE.rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for before, after in itertools.pairwise(body):
            if (
                isinstance(before, ast.Assign | ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(getattr(after.value, "value", None), str)
                and re.match(r"[^`:]*: ", after.value.value.splitlines()[0])
            ):
                found.append(f"{path.name}: {after.value.value.splitlines()[0]}")
    assert not found
