"""The hooks before a commit: each runs a pinned program that exists, with the project's options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fresh import ROOT

CONFIG = ROOT / ".pre-commit-config.yaml"
HOOKS = {
    hook["id"]: hook
    for repository in yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["repos"]
    for hook in repository["hooks"]
}
every_hook = pytest.mark.parametrize("name", sorted(HOOKS))


def command(name: str) -> list[str]:
    """A hook's command, with the programs of the environment that runs this test."""
    program, *options = shlex.split(HOOKS[name]["entry"])
    if program.startswith(".venv/bin/"):
        program = str(Path(sys.executable).with_name(Path(program).name))
    return [program, *options]


def run(name: str, *files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command(name), *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_pre_commit_itself_accepts_the_configuration():
    clientlib = pytest.importorskip("pre_commit.clientlib", reason="make installs pre-commit")
    assert clientlib.load_config(str(CONFIG))["repos"]


def test_versions_stand_in_one_place():
    repositories = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    assert {hook["language"] for hook in HOOKS.values()} == {"system"}
    assert not any("additional_dependencies" in hook for hook in HOOKS.values())


@every_hook
def test_the_program_of_a_hook_is_pinned_and_there(name):
    program, *options = shlex.split(HOOKS[name]["entry"])
    if program != "sh":
        assert program.startswith(".venv/bin/")
        assert Path(command(name)[0]).is_file()
        known = f"{Path(program).name}=="
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        assert program.endswith("/python") or any(pin.startswith(known) for pin in pinned)
    for script in (option for option in options if option.endswith(".py")):
        assert (ROOT / script).is_file()


def test_the_hooks_strip_what_make_strips():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    strip = shlex.split(re.search(r"^STRIP := (.*)$", makefile, re.MULTILINE).group(1))
    assert strip[0] == "$(BIN)/nbstripout"
    assert shlex.split(HOOKS["nbstripout"]["entry"])[1:] == strip[1:]


def test_what_make_checks_the_hooks_check():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE).group(1)
    checked = {line.split()[0].replace("$(STRIP)", "nbstripout") for line in recipe.splitlines()}
    programs = {shlex.split(hook["entry"])[0] for hook in HOOKS.values()}
    assert {Path(name).name for name in checked} == {Path(name).name for name in programs} - {"sh"}


def test_a_large_file_is_refused(tmp_path):
    small, large = tmp_path / "a small file", tmp_path / "a large file"
    small.write_bytes(bytes(400_000))
    large.write_bytes(bytes(600_000))
    assert run("large-files", small).returncode == 0
    refused = run("large-files", small, large)
    assert refused.returncode == 1
    assert refused.stdout == f"{large}\n"


def test_nothing_that_is_in_the_book_is_refused():
    tracked = [path for path in (ROOT / "book").rglob("*") if path.is_file()]
    assert run("large-files", *tracked).returncode == 0


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("ruff", "a.py", "import os\nl = lambda: print\n"),
        ("ruff-format", "a.py", "x  =  1\n"),
        ("codespell", "a.md", "It says t" + "eh wrong word.\n"),
        ("links", "a.md", "[a](gone.md)\n"),
    ],
)
def test_a_hook_refuses_what_it_must(name, file, content, tmp_path):
    path = tmp_path / file
    path.write_text(content)
    done = run(name, path)
    # ruff format mends and exits with 0: pre-commit fails a hook that changed a file.
    assert done.returncode != 0 or path.read_text() != content, done.stdout + done.stderr
