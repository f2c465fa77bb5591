"""What all tests share: quiet frameworks, the build tools, both frameworks' names, a browser."""

import importlib
import os
import sys
from pathlib import Path

# Before any framework is imported: it reads these once.
os.environ.update(
    OMP_NUM_THREADS="1",
    TF_NUM_INTRAOP_THREADS="1",
    TF_NUM_INTEROP_THREADS="1",
    TF_CPP_MIN_LOG_LEVEL="3",
    TF_ENABLE_ONEDNN_OPTS="0",
    MPLBACKEND="Agg",
)

import pytest

# The build tools are scripts and no package, and so are the extensions of the pages.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "book" / "_ext")]


@pytest.fixture(autouse=True)
def figures_as_they_were():
    """What a test does to matplotlib's settings ends with it."""
    import matplotlib

    with matplotlib.rc_context():
        yield


@pytest.fixture(scope="session", params=["torch", "keras"])
def side(request):
    """`gradlab.torch`, then `gradlab.keras`: the same names, so the same tests."""
    return importlib.import_module(f"gradlab.{request.param}")


@pytest.fixture(scope="session")
def browser():
    """A fresh Chromium."""
    from playwright.sync_api import sync_playwright

    import chromium

    try:
        program = chromium.find()
    except chromium.NoChromium as error:
        pytest.exit(str(error), returncode=1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(chromium.FLAGS))
        yield browser
        browser.close()
