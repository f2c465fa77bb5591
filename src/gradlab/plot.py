"""The book's figures: one style, colours with one meaning each, and the few plots that recur."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "prediction": "#000000",
    "torch": "#c8500a",
    "tensorflow": "#1f6fb2",
    "numpy": "#3f7f3f",
    "failed": "#9a9a9a",
    "highlight": "#8b2f8b",
}
"""A colour means one thing through the whole book."""

FRAMEWORKS = {"torch": "PyTorch", "tensorflow": "TensorFlow", "numpy": "NumPy"}
"""How the keys of `COLORS` are spelt in a figure."""


def use_style() -> None:
    """Apply the book's matplotlib style."""
    import matplotlib.pyplot as plt

    plt.style.use(resources.files("gradlab") / "gradlab.mplstyle")


def label_line(axis: Axes, x: float, y: float, text: str, color: str, **keywords: object) -> None:
    """Write a label beside a line, in its colour: read at once, where a legend is looked up.

    Args:
        axis: where to write.
        x, y: position in data coordinates.
        text: the label.
        color: the line's colour.
        keywords: passed on to `Axes.annotate`, `xytext` (offset in points) among them.
    """
    keywords = {"xytext": (5, 0), "va": "center", "fontsize": 9} | keywords
    axis.annotate(text, (x, y), textcoords="offset points", color=color, **keywords)


def heatmap(
    axis: Axes,
    norms: np.ndarray,
    *,
    steps: np.ndarray | None = None,
    names: list[str] | None = None,
    limits: tuple[float, float] | None = None,
    colorbar: bool = True,
) -> None:
    """Draw log₁₀ of gradient norms, layer × step; what is not finite is grey.

    Vertical stripes mean growth along time (the step is too large), horizontal bands growth along
    the layers (the gradient itself explodes).

    Args:
        axis: where to draw.
        norms: (steps, layers), ≥ 0.  A norm of 0 is drawn as the smallest colour.
        steps: the steps' numbers; None counts from 0.
        names: the layers' names, drawn beside the rows; None numbers them from 1.
        limits: the colour scale's ends in decades; None takes the data's own.
        colorbar: whether to add the scale.

    Raises:
        ValueError: norms of another number of dimensions, or names that do not fit.
    """
    norms = np.asarray(norms, dtype=float)
    if norms.ndim != 2:
        raise ValueError(f"norms must be (steps, layers), got shape {norms.shape}")
    if names is not None and len(names) != norms.shape[1]:
        raise ValueError(f"{len(names)} names for {norms.shape[1]} layers")
    first, last = (0, len(norms) - 1) if steps is None else (steps[0], steps[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.log10(norms.T)  # (layers, steps)
    low, high = limits or _finite_range(decades)
    drawn = np.where(np.isneginf(decades), low, decades)
    axis.set_facecolor(COLORS["failed"])
    image = axis.imshow(
        np.ma.masked_invalid(drawn),
        extent=(first - 0.5, last + 0.5, 0.5, norms.shape[1] + 0.5),
        vmin=low,
        vmax=high,
        origin="lower",
        aspect="auto",
    )
    axis.grid(False)
    axis.set_xlabel("step")
    axis.set_ylabel("layer")
    if names is not None:
        axis.set_yticks(range(1, len(names) + 1), names)
    if colorbar:
        axis.figure.colorbar(image, ax=axis, label="log₁₀ gradient norm", pad=0.02)


def _finite_range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high - low > 0.1 else (low - 0.5, high + 0.5)


def dots(
    axis: Axes,
    labels: Sequence[str],
    groups: Mapping[str, Sequence[np.ndarray]],
    *,
    failed_at: float | None = None,
) -> None:
    """Draw one row per setting, from the top, and one dot per seed.

    Args:
        axis: where to draw.
        labels: the settings' names, written beside the rows.
        groups: key of `COLORS` to one array of measurements per label.  Groups stand above each
            other within a row, except "prediction", a black bar across it.
        failed_at: where to put a failed run, a NaN: a grey cross.  None leaves it out.

    Raises:
        ValueError: a group that has not one array per label.
    """
    for name, rows in groups.items():
        if len(rows) != len(labels):
            raise ValueError(f"group {name!r} has {len(rows)} rows for {len(labels)} labels")
    measured = [name for name in groups if name != "prediction"]
    for number, name in enumerate(measured):
        shift = 0.4 * ((number + 0.5) / len(measured) - 0.5)
        for row, values in enumerate(groups[name]):
            values = np.atleast_1d(np.asarray(values, float))
            height = row + shift + 0.14 * np.linspace(-1, 1, len(values)) / len(measured)
            lost = np.isnan(values)
            axis.plot(values[~lost], height[~lost], "o", color=COLORS[name], alpha=0.7, ms=4)
            if failed_at is not None:
                at = np.full(lost.sum(), failed_at)
                axis.plot(at, height[lost], "x", color=COLORS["failed"])
    for row, value in enumerate(groups.get("prediction", ())):
        axis.plot([value, value], [row - 0.38, row + 0.38], color=COLORS["prediction"], zorder=3)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")


def history(gradient_history, axis: Axes | None = None, **keywords: object) -> Axes:
    """Draw a `GradientHistory` as parameter × step, its first non-finite step marked.

    Args:
        gradient_history: what a probe recorded.
        axis: where to draw; None makes a figure as high as the number of parameters needs.
        keywords: passed on to `heatmap`.

    Returns:
        The axis drawn into.
    """
    import matplotlib.pyplot as plt

    names = gradient_history.names
    if axis is None:
        _, axis = plt.subplots(figsize=(7.2, 1.2 + 0.22 * min(len(names), 40)))
    if len(gradient_history.steps) == 0:
        axis.text(0.5, 0.5, "no step recorded", ha="center", transform=axis.transAxes)
        return axis
    shown = names if len(names) <= 40 else None  # more labels than that overlap
    heatmap(axis, gradient_history.norms, steps=gradient_history.steps, names=shown, **keywords)
    axis.set_ylabel("" if shown else "parameter")
    bad = gradient_history.first_nonfinite
    if bad is not None:
        if bad.step >= gradient_history.steps[0]:
            axis.axvline(bad.step - 0.5, color="white", linestyle=":", linewidth=1.5)
        axis.set_title(f"first non-finite gradient: step {bad.step}, {bad.name}")
    return axis
