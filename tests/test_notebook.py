"""What every notebook's first cell does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gradlab import notebook


@pytest.mark.parametrize(("text", "seed"), [(None, 0), ("0", 0), ("17", 17)])
def test_the_seed_comes_from_the_environment(text, seed, monkeypatch):
    monkeypatch.delenv("GRADLAB_SEED", raising=False)
    if text is not None:
        monkeypatch.setenv("GRADLAB_SEED", text)
    assert notebook.base_seed() == seed


@pytest.mark.parametrize("text", ["", "-1", "1.5", "seven", "²"])
def test_a_seed_that_is_none_is_named(text, monkeypatch):
    monkeypatch.setenv("GRADLAB_SEED", text)
    with pytest.raises(ValueError, match=f"GRADLAB_SEED must be an integer.*got {text!r}"):
        notebook.base_seed()


def test_setup_comes_before_the_frameworks_and_imports_none():
    code = (
        "import sys, os; from gradlab.notebook import setup; print(setup());"
        "import matplotlib.pyplot as plt; from gradlab import plot;"
        "before = dict(plt.rcParams); plot.use_style(); assert dict(plt.rcParams) == before;"
        "assert not {'torch', 'tensorflow', 'keras'} & set(sys.modules), 'imported a framework';"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['TF_NUM_INTRAOP_THREADS'],"
        "os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    )
    names = ("OMP_", "TF_", "MKL_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"GRADLAB_SEED": "5", "TF_NUM_INTRAOP_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["5", "1", "2", "3"]  # a thread count that was set stays


def test_setup_after_the_frameworks_still_holds_torch_to_one_thread():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        notebook.setup()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
