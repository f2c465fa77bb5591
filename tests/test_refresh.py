"""The refresh of the pins: what is resolved, compared and reported, on a small book without pip."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

import refresh
from fresh import ROOT

OLD = "# Every version.\n#   how to\nPyYAML==6.0\nscipy==1.0\ntorch==2.0\n"
REPORT = {
    "install": [
        {"metadata": {"name": "torch", "version": "2.1+cpu"}},
        {"metadata": {"name": "PyYAML", "version": "6.0"}},
        {"metadata": {"name": "new_one", "version": "1.0"}},
        {"metadata": {"name": "gradlab", "version": "0.1.0"}},
    ]
}
PROJECT = """
[project]
name = "gradlab"
dependencies = ["PyYAML>=5"]
optional-dependencies.torch = ["torch"]
"""
MAKEFILE = "check:\n\t@cat constraints.txt\nbook:\n\t@echo broken on purpose; exit 1\n"


def test_reading_and_writing_pins_are_inverse():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = refresh.read_pins(text)
    assert pins["torch"]
    assert refresh.write_pins(pins, refresh.header(text)) == text


def test_the_report_of_pip_becomes_pins():
    assert refresh.resolved(REPORT) == {"torch": "2.1", "PyYAML": "6.0", "new_one": "1.0"}


@pytest.mark.parametrize(
    ("written", "name"),
    [("PyYAML>=6", "pyyaml"), ("sphinx_design", "sphinx-design"), ("a[torch]>=1,<2", "a")],
)
def test_names_are_compared_as_pip_does(written, name):
    assert refresh.canonical(written) == name


def test_changes_are_new_raised_and_gone():
    old = {"pyyaml": "6.0", "scipy": "1.0", "torch": "2.0"}
    assert refresh.changes(old, refresh.resolved(REPORT)) == [
        ("new_one", "", "1.0"),
        ("scipy", "1.0", ""),
        ("torch", "2.0", "2.1"),
    ]
    assert refresh.changes(old, old) == []


def test_the_summary_names_what_is_asked_for_first_and_shows_failures():
    rows = [("a", "1", "2"), ("torch", "2.0", "2.1")]
    log = "\n".join(f"line {number}" for number in range(100))
    results = {"check": (True, "all is well"), "book": (False, log)}
    text = refresh.summary(rows, {"torch"}, results)
    assert "`make check` passed, `make book` **failed**." in text
    assert text.index("| torch | 2.0 | 2.1 | pyproject.toml |") < text.index("| a | 1 | 2 |")
    assert "line 99" in text
    assert f"line {99 - refresh.TAIL}\n" not in text
    assert "all is well" not in text
    assert "Every pin is the newest version" in refresh.summary([], set(), {})


@pytest.fixture
def small_book(tmp_path):
    root = tmp_path / "small"
    (root / ".venv").mkdir(parents=True)
    for name, text in {
        "constraints.txt": OLD,
        "pyproject.toml": PROJECT,
        "Makefile": MAKEFILE,
    }.items():
        (root / name).write_text(text)
    return root


def test_the_steps_see_the_new_pins_and_the_checkout_stays(
    small_book, tmp_path, monkeypatch, capsys
):
    def resolve(book, scratch):
        assert book.is_relative_to(scratch)
        assert not (book / ".venv").exists()
        return refresh.resolved(REPORT)

    monkeypatch.setattr(refresh, "resolve", resolve)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    assert refresh.refresh(small_book, out, scratch / "one", ["check"])
    new = "# Every version.\n#   how to\nnew_one==1.0\nPyYAML==6.0\ntorch==2.1\n"
    assert (out / "constraints.txt").read_text() == (out / "check.log").read_text() == new
    assert (small_book / "constraints.txt").read_text() == OLD
    assert not refresh.refresh(small_book, out, scratch / "two", ["book", "check"])
    said = capsys.readouterr().out
    assert (out / "summary.md").read_text() in said
    assert "`make book` **failed**, `make check` passed." in said
    assert "broken on purpose" in said


def pip_that(monkeypatch, status: int, report: dict, said: str = "") -> None:
    """A pip that ends with a status and a report, and downloads nothing."""

    def run(command, **_):
        report_file = command[command.index("--report") + 1]
        report_file.write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, status, stdout="", stderr=said)

    monkeypatch.setattr(refresh.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(refresh.subprocess, "run", run)


def test_what_pip_reports_is_the_new_set(small_book, tmp_path, monkeypatch):
    pip_that(monkeypatch, 0, REPORT)
    assert refresh.resolve(small_book, tmp_path) == refresh.resolved(REPORT)


def test_a_pip_that_finds_nothing_is_quoted(small_book, tmp_path, monkeypatch):
    pip_that(monkeypatch, 1, {}, "a conflict")
    with pytest.raises(RuntimeError, match="a conflict"):
        refresh.resolve(small_book, tmp_path)


def test_a_build_for_graphics_cards_is_refused(small_book, tmp_path, monkeypatch):
    cuda = {"metadata": {"name": "nvidia-cublas", "version": "13.4"}}
    pip_that(monkeypatch, 0, {"install": [*REPORT["install"], cuda]})
    with pytest.raises(RuntimeError, match=r"CUDA build of torch 2\.1.*PIP_EXTRA_INDEX_URL"):
        refresh.resolve(small_book, tmp_path)


def test_the_steps_are_those_of_the_continuous_integration():
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert tuple(line.split()[1] for line in lines if line.startswith("make ")) == refresh.STEPS


def test_help_comes_without_the_book_s_environment():
    command = [sys.executable, "-I", "-S", str(ROOT / "tools/refresh.py"), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--steps" in said
    assert "changes neither the checkout nor its .venv" in said


# ---------------------------------------------------------------------------------------------
# The weekly workflow


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8"))


def commands(name: str) -> str:
    steps = (step for job in workflow(name)["jobs"].values() for step in job["steps"])
    return "\n".join(step.get("run", "") for step in steps)


def test_every_week_links_and_versions_are_looked_at_and_nothing_is_written():
    weekly = workflow("weekly.yml")
    assert set(weekly[True]) == {"schedule", "workflow_dispatch"}  # YAML reads `on` as true
    minute, hour, day, month, weekday = weekly[True]["schedule"][0]["cron"].split()
    assert (day, month) == ("*", "*")
    assert all(field.isdigit() for field in (minute, hour, weekday))
    assert weekly["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in weekly["jobs"].values())
    ran = commands("weekly.yml")
    assert "tools/links.py --external" in ran
    assert "tools/refresh.py" in ran
    assert "git " not in ran


def test_other_hosts_are_asked_every_week_alone():
    everyday = [commands("book.yml"), *(
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("Makefile", ".ci/run", ".pre-commit-config.yaml")
    )]  # fmt: skip
    assert not any("--external" in text or "linkcheck" in text for text in everyday)


def test_the_workflows_use_one_python_and_every_action_in_one_version():
    files = (ROOT / ".github/workflows").glob("*.yml")
    jobs = [job for file in files for job in workflow(file.name)["jobs"].values()]
    steps = [step for job in jobs for step in job["steps"]]
    actions = {step["uses"] for step in steps if "uses" in step}
    assert len({action.partition("@")[0] for action in actions}) == len(actions), actions
    settings = (step.get("with", {}) for step in steps)
    assert len({given["python-version"] for given in settings if "python-version" in given}) == 1
