"""What passes on main reaches the branch that the pages and Colab's notebooks come from."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml

import run_button
from fresh import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/book.yml").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
PUBLISH = WORKFLOW["jobs"]["publish"]
(STEP,) = (step for step in PUBLISH["steps"] if "run" in step)


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
    return done.stdout.decode()


def test_only_a_push_to_main_that_passed_is_published():
    assert WORKFLOW[True]["push"] == {"branches": [CONFIG["repository"]["branch"]]}
    assert PUBLISH["if"] == "github.event_name == 'push'"
    assert PUBLISH["needs"] == "book"
    assert ".ci/run" in [step.get("run") for step in WORKFLOW["jobs"]["book"]["steps"]]


def test_only_publishing_may_write():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    allowed = {name for name, job in WORKFLOW["jobs"].items() if "permissions" in job}
    assert allowed == {"publish"}
    assert PUBLISH["permissions"] == {"contents": "write"}


def test_what_is_published_is_what_was_built_and_tested():
    steps = [*WORKFLOW["jobs"]["book"]["steps"], *PUBLISH["steps"]]
    given = {step["uses"].partition("@")[0]: step["with"] for step in steps if "with" in step}
    up, down = given["actions/upload-artifact"], given["actions/download-artifact"]
    assert up["path"] == "_build/html"
    assert up["name"] == down["name"]
    assert down["path"] == STEP["working-directory"]


def test_the_branch_holds_the_latest_pages_where_colab_looks_for_them(tmp_path):
    server, html = tmp_path / "server", tmp_path / "html"
    git(tmp_path, "init", "--quiet", "--bare", str(server))
    branch = STEP["env"]["BRANCH"]
    assert branch == run_button.PUBLISHED
    variables = {**os.environ, "SERVER": server.as_uri(), "BRANCH": branch, "GITHUB_SHA": "abc"}
    for chapter in ("01_old", "02_new"):
        pages = html / chapter
        (pages / "notebooks").mkdir(parents=True)
        (pages / "_static").mkdir()
        (pages / "_static" / "style.css").touch()
        (pages / "notebooks" / f"{chapter}.ipynb").write_text("{}")
        subprocess.run(["bash", "-e", "-c", STEP["run"]], cwd=pages, env=variables, check=True)
    colab = run_button.control("notebooks/02_new", "https://github.com/a/b", "main")
    path = re.search(f'/a/b/blob/{branch}/([^"]+)"', colab).group(1)
    assert git(server, "show", f"{branch}:{path}") == "{}"
    files = git(server, "ls-tree", "-r", "--name-only", branch).split()
    assert files == [".nojekyll", "_static/style.css", "notebooks/02_new.ipynb"]
    assert git(server, "rev-list", "--count", branch).strip() == "1"
