"""The figures: that they show the right cell in the right place, and survive odd histories."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from gradlab import plot
from gradlab.history import Recorder


@pytest.fixture
def axis():
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def history(steps: int, parameters: int = 3, bad: dict | None = None, capacity: int = 100):
    recorder = Recorder([f"layer{i}.weight" for i in range(parameters)], capacity)
    for step in range(steps):
        norms = (bad or {}).get(step, np.full(parameters, 10.0**step))
        recorder.add(norms, np.ones(parameters, bool), clipped_total=1.0)
    return recorder.history()


def image(axis) -> np.ma.MaskedArray:
    return axis.images[0].get_array()


def test_heatmap_shows_decades_layer_by_step(axis):
    norms = np.array([[1.0, 10.0, 100.0], [1e3, 1e4, 1e5]])  # 2 steps, 3 layers
    plot.heatmap(axis, norms, steps=np.array([7, 8]), names=["a", "b", "c"])
    np.testing.assert_allclose(image(axis), [[0, 3], [1, 4], [2, 5]])
    assert axis.images[0].get_extent() == [6.5, 8.5, 0.5, 3.5]  # layers count from 1
    assert axis.images[0].get_clim() == (0, 5)
    assert axis.images[0].origin == "lower"  # without the style, too
    assert [t.get_text() for t in axis.get_yticklabels()] == ["a", "b", "c"]


def test_what_is_no_number_is_grey_and_zero_is_the_smallest_colour(axis):
    plot.heatmap(axis, np.array([[1.0, 0.0, np.nan, np.inf]]))
    assert image(axis).mask.ravel().tolist() == [False, False, True, True]
    low, _ = axis.images[0].get_clim()
    assert image(axis)[1, 0] == low
    assert axis.get_facecolor()[:3] == pytest.approx((0x9A / 255,) * 3)


def test_limits_and_colour_bar(axis):
    plot.heatmap(axis, np.ones((2, 2)), limits=(-3, 4), colorbar=False)
    assert axis.images[0].get_clim() == (-3, 4)
    assert axis.figure.axes == [axis]


@pytest.mark.parametrize(
    ("norms", "names", "message"),
    [
        (np.ones(3), None, r"\(steps, layers\), got shape \(3,\)"),
        (np.ones((2, 3)), ["a"], "1 names for 3 layers"),
    ],
)
def test_heatmap_names_bad_arguments(axis, norms, names, message):
    with pytest.raises(ValueError, match=message):
        plot.heatmap(axis, norms, names=names)


@pytest.mark.parametrize("parameters", [1, 3, 60])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_history_is_drawn_by_parameter_and_step(steps, parameters):
    axis = history(steps, parameters).plot()
    assert image(axis).shape == (parameters, steps)
    axis.figure.canvas.draw()
    plt.close(axis.figure)


def test_no_step_is_said_and_not_drawn(axis):
    history(0).plot(axis)
    assert not axis.images
    assert axis.texts[0].get_text() == "no step recorded"
    axis.figure.canvas.draw()


def test_nothing_but_nan(axis):
    history(2, bad={0: np.full(3, np.nan), 1: np.full(3, np.nan)}).plot(axis)
    assert image(axis).mask.all()
    axis.figure.canvas.draw()


def test_the_first_bad_step_is_marked_and_named(axis):
    history(5, bad={2: np.array([1, np.inf, np.nan])}).plot(axis)
    assert axis.get_title() == "first non-finite gradient: step 2, layer1.weight"
    assert axis.lines[0].get_xdata()[0] == 1.5
    assert axis.get_xlim() == (-0.5, 4.5)


def test_a_bad_step_that_was_overwritten_stretches_nothing(axis):
    history(50, bad={2: np.full(3, np.nan)}, capacity=10).plot(axis)
    assert axis.get_xlim() == (39.5, 49.5)
    assert "step 2" in axis.get_title()


def test_each_role_has_a_colour_of_its_own():
    assert len(set(plot.COLORS.values())) == len(plot.COLORS)
    assert set(plot.FRAMEWORKS) <= set(plot.COLORS)


def test_the_style_is_applied():
    with plt.rc_context():
        plt.rcdefaults()
        before = dict(plt.rcParams)
        plot.use_style()
        assert dict(plt.rcParams) != before


def test_a_label_stands_at_its_point_in_its_colour(axis):
    plot.label_line(axis, 2.0, 3.0, "PyTorch", plot.COLORS["torch"], xytext=(0, 9))
    label = axis.texts[0]
    assert label.xy == (2.0, 3.0)
    assert (label.get_text(), label.get_color()) == ("PyTorch", plot.COLORS["torch"])


def test_dots_put_every_seed_in_its_row_and_failed_ones_aside(axis):
    groups = {
        "torch": [np.array([1.0, 2.0]), np.array([3.0, np.nan])],
        "tensorflow": [np.array([1.5]), np.array([np.nan])],
        "prediction": [1.2, 3.4],
    }
    plot.dots(axis, ["calm", "wild"], groups, failed_at=9.0)
    at = {"o": [], "x": [], "None": []}
    for line in axis.lines:
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            at[line.get_marker()].append((x, round(y)))
    assert sorted(at["o"]) == [(1.0, 0), (1.5, 0), (2.0, 0), (3.0, 1)]
    assert at["x"] == [(9.0, 1), (9.0, 1)]
    assert sorted(at["None"]) == [(1.2, 0), (1.2, 0), (3.4, 1), (3.4, 1)]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["calm", "wild"]
    assert axis.yaxis_inverted()  # the first setting stands at the top


def test_dots_want_one_array_per_label(axis):
    with pytest.raises(ValueError, match="'torch' has 1 rows for 2 labels"):
        plot.dots(axis, ["calm", "wild"], {"torch": [np.ones(3)]})
