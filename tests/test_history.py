"""What a probe records: the ring, norms that are no ordinary numbers, and the file."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from gradlab import plot
from gradlab.history import GradientHistory, NonFinite, Recorder, ring_order


def recorded(steps: int = 5, capacity: int = 10, names=None, **extra) -> Recorder:
    """Step i of parameters a and b has norms i + 1 and 10 (i + 1)."""
    recorder = Recorder(["a", "b"], capacity, names)
    for i in range(steps):
        norms = np.array([i + 1.0, 10 * (i + 1.0)])
        recorder.add(norms, np.array([True, True]), clipped_total=float(i), **extra)
    return recorder


def row(*norms: float, present: list[bool] | None = None) -> GradientHistory:
    """A history of one step."""
    recorder = Recorder([f"p{i}" for i in range(len(norms))], 1)
    present = np.array(present or [True] * len(norms))
    recorder.add(np.array(norms), present, clipped_total=0.0)
    return recorder.history()


# -- the ring ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "order", "numbers"),
    [
        (0, [], []),
        (2, [0, 1], [0, 1]),
        (3, [0, 1, 2], [0, 1, 2]),
        (4, [1, 2, 0], [1, 2, 3]),
        (8, [2, 0, 1], [5, 6, 7]),
    ],
)
def test_ring_is_read_oldest_first(count, order, numbers):
    got = ring_order(count, 3)
    np.testing.assert_array_equal(got[0], order)
    np.testing.assert_array_equal(got[1], numbers)


@pytest.mark.parametrize(("steps", "kept"), [(0, 0), (3, 3), (4, 4), (5, 4), (11, 4)])
def test_past_its_capacity_it_keeps_the_last_steps_in_order(steps, kept):
    history = recorded(steps, capacity=4).history()
    expected = np.arange(steps - kept, steps)
    np.testing.assert_array_equal(history.steps, expected)
    np.testing.assert_array_equal(history.norms[:, 0], expected + 1)
    np.testing.assert_array_equal(history.norms[:, 1], 10 * (expected + 1))
    np.testing.assert_array_equal(history.clipped_total, expected)
    assert history.steps.dtype == np.int64
    assert history.present.dtype == history.skipped.dtype == bool


def test_the_first_bad_step_outlives_its_row():
    recorder = Recorder(["a", "b", "c"], 2)
    here = np.array([True, True, True])
    recorder.add(np.ones(3), here, clipped_total=1.0)
    recorder.add(np.array([1, np.inf, np.nan]), here, clipped_total=1.0)
    recorder.add(np.array([np.nan, 1, 1]), here, clipped_total=1.0)
    for _ in range(5):
        recorder.add(np.ones(3), here, clipped_total=1.0)
    history = recorder.history()
    assert history.first_nonfinite == NonFinite(1, "b")
    assert np.isfinite(history.norms).all()


def test_a_missing_gradient_is_not_a_bad_one():
    history = row(1.0, np.nan, present=[True, False])
    assert history.first_nonfinite is None
    assert history.total.tolist() == [1.0]


def test_update_ratios_belong_to_their_step_and_are_overwritten_with_it():
    recorder = Recorder(["a"], 2)
    for i in range(4):
        recorder.add(np.ones(1), np.array([True]), clipped_total=1.0)
        if i in (0, 3):
            recorder.set_update_ratios(np.array([float(i)]))
    np.testing.assert_array_equal(recorder.history().update_ratios, [[np.nan], [3]])
    assert recorded().history().update_ratios is None


def test_activations_of_some_steps_only():
    recorder = Recorder(["a"], 5, activation_names=["f", "g"])
    nan = np.nan
    for seen in (nan, [1.0, 2.0], nan, [nan, 3.0]):
        recorder.add(np.ones(1), np.array([True]), clipped_total=1.0, activations=seen)
    history = recorder.history()
    assert history.activation_names == ["f", "g"]
    np.testing.assert_array_equal(history.activations, [[nan, nan], [1, 2], [nan, nan], [nan, 3]])
    assert recorded().history().activations is None


def test_a_history_is_a_copy():
    recorder = recorded()
    history = recorder.history()
    history.norms[:] = 0
    history.names.append("c")
    assert recorder.history().norms[0, 0] == 1
    assert recorder.history().names == ["a", "b"]


def test_capacity_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Recorder(["a"], 0)


# -- totals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200, 1e-308])
def test_total_neither_overflows_nor_underflows(scale):
    with np.errstate(all="raise", under="ignore"):
        total = row(3 * scale, 4 * scale).total
    assert total[0] == pytest.approx(5 * scale, rel=1e-12)


@pytest.mark.parametrize(
    ("norms", "total"),
    [((0.0, 0.0), 0), ((1.0, np.nan), np.nan), ((1.0, np.inf), np.inf), ((np.nan, 1e200), np.nan)],
)
def test_total_of_what_is_no_number(norms, total):
    np.testing.assert_equal(row(*norms).total[0], total)


def test_shapes_that_do_not_fit_are_named():
    history = recorded().history()
    with pytest.raises(ValueError, match=r"norms has shape \(5, 3\), expected \(5, 2\)"):
        replace(history, norms=np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"present has shape \(4, 2\)"):
        replace(history, present=np.ones((4, 2), bool))


# -- the file ------------------------------------------------------------------------------------


def full() -> GradientHistory:
    recorder = recorded(6, capacity=4, names=["layer"], activations=[2.0], skipped=True)
    recorder.seen = "gradients after the loop's own clipping"
    recorder.add(np.array([np.nan, np.inf]), np.array([False, True]), clipped_total=np.inf)
    recorder.set_update_ratios(np.array([0.1, 1e-300]))
    return recorder.history()


@pytest.mark.parametrize("history", [full(), recorded(0).history(), recorded(3).history()])
def test_what_is_saved_is_what_is_loaded(history, tmp_path):
    path = history.save(tmp_path / "run.npz")
    assert path == tmp_path / "run.npz"
    loaded = GradientHistory.load(str(path))
    for field in fields(GradientHistory):
        np.testing.assert_equal(getattr(loaded, field.name), getattr(history, field.name))
    assert loaded.norms.dtype == np.float64
    assert isinstance(loaded.first_nonfinite, NonFinite | None)
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_without_suffix_is_kept(tmp_path):
    path = recorded().history().save(str(tmp_path / "run"))
    assert path.name == "run"
    assert len(GradientHistory.load(path).steps) == 5


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_no_rubbish(failing, tmp_path, monkeypatch):
    path = recorded(2).history().save(tmp_path / "run.npz")
    before = path.read_bytes()

    def broken(target, *arguments, **keywords):
        if failing == "write":
            target.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(*((np, "savez") if failing == "write" else (os, "replace")), broken)
    with pytest.raises(OSError, match="no space left"):
        recorded(5).history().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        recorded().history().save(tmp_path / "nowhere" / "run.npz")


def rubbish() -> dict[str, object]:
    return {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("step,norm\n"),
        "a cut zip": lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
        "half a history": lambda path: path.write_bytes(
            recorded().history().save(path).read_bytes()[:700]
        ),
        "an array": lambda path: np.save(path.open("wb"), np.zeros(3)),
        "other arrays": lambda path: np.savez(path.open("wb"), x=np.zeros(3)),
        "other metadata": lambda path: np.savez(path.open("wb"), about=np.array("[1, 2]")),
        "no JSON": lambda path: np.savez(path.open("wb"), about=np.array("{")),
    }


@pytest.mark.parametrize("kind", rubbish())
def test_what_is_no_history_is_a_value_error_that_names_the_file(kind, tmp_path):
    path = tmp_path / "run.npz"
    rubbish()[kind](path)
    with pytest.raises(ValueError, match=r"run\.npz is no saved GradientHistory"):
        GradientHistory.load(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        GradientHistory.load(tmp_path / "run.npz")


# -- plain values --------------------------------------------------------------------------------


def test_plain_values_go_through_json():
    back = json.loads(json.dumps(full().to_dict()))
    assert back["first_nonfinite"] == [6, "b"]
    assert [step["step"] for step in back["steps"]] == [3, 4, 5, 6]
    assert back["steps"][0] == {
        "step": 3,
        "skipped": True,
        "grad_norm/a": 4.0,
        "grad_norm/b": 40.0,
        "grad_norm/total": pytest.approx(np.hypot(4, 40)),
        "grad_norm/clipped_total": 3.0,
    }
    last = back["steps"][-1]
    assert "grad_norm/a" not in last  # it had no gradient
    assert last["grad_norm/b"] == last["grad_norm/total"] == np.inf
    assert last["update_ratio/b"] == 1e-300
    json.dumps(recorded(0).history().to_dict())


# -- the picture ---------------------------------------------------------------------------------


def pixels(history: GradientHistory, cells, **keywords) -> list[tuple[int, ...]]:
    """The colours that are drawn at these (step, row), rows counting from 1."""
    axis = history.plot(**keywords)
    axis.figure.set_dpi(100)
    axis.figure.canvas.draw()
    drawn = np.asarray(axis.figure.canvas.buffer_rgba())
    at = axis.transData.transform(np.array(cells, float)).astype(int)
    colors = [tuple(int(v) for v in drawn[len(drawn) - 1 - y, x, :3]) for x, y in at]
    plt.close(axis.figure)
    return colors


def eventful() -> GradientHistory:
    """Parameter b comes late, c is lost at step 4, and step 6 is skipped."""
    recorder = Recorder(["a", "b", "c"], 20)
    for step in range(10):
        present = np.array([True, step >= 3, True])
        norms = np.where(present, [1.0, 2.0, np.nan if step in (4, 6) else 3.0], np.nan)
        recorder.add(norms, present, clipped_total=1.0, skipped=step == 6)
    return recorder.history()


def test_no_gradient_is_white_and_a_bad_one_grey():
    # Aside from the middle of the first bad cell, where a circle stands.
    absent, bad, other, healthy = pixels(eventful(), [(1, 2), (4.4, 3.3), (6, 3), (1, 1)])
    grey = tuple(round(255 * v) for v in to_rgb(plot.COLORS["failed"]))
    assert absent == (255, 255, 255)
    assert bad == other == grey
    assert healthy not in (absent, bad)


def test_skipped_and_bad_steps_are_marked_and_explained():
    axis = eventful().plot()
    lines = {line.get_label(): list(line.get_xdata()) for line in axis.lines}
    assert lines["not finite (2)"] == [4, 6]
    assert lines["skipped (1)"] == [6]
    circles = [line for line in axis.lines if line.get_marker() == "o"]
    assert all(line.get_xydata().tolist() == [[4, 3]] for line in circles)
    assert len(circles) > 0
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["not finite (2)", "skipped (1)", "no gradient"]
    assert axis.get_title() == "first non-finite gradient: step 4, c"
    assert recorded().history().plot().get_legend() is None
    plt.close("all")


@pytest.mark.parametrize("styled", [False, True])
@pytest.mark.parametrize(("parameters", "steps"), [(1, 1), (1, 1000), (3, 2), (2000, 1000)])
def test_any_size_is_drawn_without_a_warning(parameters, steps, styled, recwarn):
    if styled:
        plot.use_style()
    name = "network/block_{0}/attention_{0}/a_projection/kernel"
    recorder = Recorder([name.format(i) for i in range(parameters)], steps)
    for step in range(steps):
        norms = np.full(parameters, 10.0 ** (step % 5))
        norms[-1] = np.nan if step == steps // 2 else 1.0
        recorder.add(norms, np.ones(parameters, bool), clipped_total=1.0)
    axis = recorder.history().plot()
    axis.figure.canvas.draw()
    bounds = axis.get_window_extent()
    assert bounds.width > 0.4 * axis.figure.bbox.width  # names leave room for the picture
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert 1 <= len(labels) <= 40
    assert max(map(len, labels)) <= 50
    np.testing.assert_array_equal(axis.get_xticks() % 1, 0)  # no half steps
    assert not recwarn.list
    plt.close(axis.figure)
