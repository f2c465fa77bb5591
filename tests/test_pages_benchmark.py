"""The benchmark of the pages: what it reads of a report, medians, server, complaints."""

import gzip
import importlib.util
import subprocess
import sys
import urllib.request

import pytest

from fresh import ROOT

SCRIPT = ROOT / "benchmarks/pages.py"
spec = importlib.util.spec_from_file_location("pages_benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def report(performance, **audits):
    """A report of Lighthouse, as far as it is read."""
    times = dict.fromkeys(benchmark.TIMES, 10.0)
    return {
        "categories": {
            "performance": {"score": performance, "auditRefs": [{"id": "slow"}]},
            "accessibility": {"score": 0.995, "auditRefs": [{"id": "contrast"}, {"id": "alt"}]},
            "best-practices": {"score": 1, "auditRefs": []},
            "seo": {"score": 0.9, "auditRefs": [{"id": "description"}]},
        },
        "audits": {name: {"score": 1, "numericValue": time} for name, time in times.items()}
        | {"slow": {"score": 0}, "contrast": {"score": 1}, "alt": {"score": None}}
        | {"description": {"score": 1}}
        | {name: {"score": score} for name, score in audits.items()},
    }


def test_a_report_gives_scores_and_the_faults_that_are_none_of_speed():
    found = benchmark.read(report(0.97, description=0, contrast=0))
    assert (found["performance"], found["accessibility"], found["seo"]) == (97, 100, 90)
    assert found["faults"] == ["contrast", "description"]
    assert benchmark.read(report(0.5))["faults"] == []


def test_the_median_counts_and_every_fault():
    runs = [benchmark.read(report(p, alt=a)) for p, a in ((0.9, None), (0.99, 0), (0.95, None))]
    found = benchmark.summary(runs)
    assert (found["performance"], found["lowest"], found["highest"]) == (95, 90, 99)
    assert found["faults"] == ["alt"]
    assert "95 (90-99)" in benchmark.row("book/intro", "mobile", found)


def test_text_is_sent_compressed_and_pictures_are_not(tmp_path):
    (tmp_path / "a.html").write_text("<p>" * 1000)
    (tmp_path / "a.png").write_bytes(b"\x89PNG" * 100)
    with benchmark.served(tmp_path) as site:
        page = urllib.request.urlopen(f"{site}/a.html")
        assert page.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(page.read()) == b"<p>" * 1000
        picture = urllib.request.urlopen(f"{site}/a.png")
        assert "Content-Encoding" not in picture.headers
        assert picture.read() == b"\x89PNG" * 100


def test_the_longest_chapter_is_the_largest_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="make book"):
        benchmark.longest_chapter(tmp_path)
    (tmp_path / "notebooks").mkdir()
    for name, size in (("a", 10), ("b", 30), ("c", 20)):
        (tmp_path / "notebooks" / f"{name}.html").write_text("x" * size)
    assert benchmark.longest_chapter(tmp_path) == "notebooks/b"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--runs", "0"], "at least 1, got 0"),
        (["book/none"], "has no page book/none.html"),
        ([], "make book"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path, arguments, complaint):
    command = [sys.executable, SCRIPT, "--html", tmp_path, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr
