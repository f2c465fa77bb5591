"""The book's figures: one style, colours with one meaning each, and the few plots that recur."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradlab.history import GradientHistory

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
    present: np.ndarray | None = None,
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
        present: (steps, layers), bool; where there was no gradient at all, the cell is white.

    Raises:
        ValueError: norms of another number of dimensions, or names that do not fit.
    """
    from matplotlib.colors import ListedColormap

    norms = np.asarray(norms, dtype=float)
    if norms.ndim != 2:
        raise ValueError(f"norms must be (steps, layers), got shape {norms.shape}")
    if names is not None and len(names) != norms.shape[1]:
        raise ValueError(f"{len(names)} names for {norms.shape[1]} layers")
    from matplotlib.ticker import MaxNLocator

    first, last = (0, len(norms) - 1) if steps is None else (steps[0], steps[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.log10(norms.T)  # (layers, steps)
    low, high = limits or _finite_range(decades)
    drawn = np.where(np.isneginf(decades), low, decades)
    axis.set_facecolor(COLORS["failed"])
    place = {
        "extent": (first - 0.5, last + 0.5, 0.5, norms.shape[1] + 0.5),
        "origin": "lower",
        "aspect": "auto",
    }
    image = axis.imshow(np.ma.masked_invalid(drawn), vmin=low, vmax=high, **place)
    if present is not None and not np.all(present):
        absent = np.ma.masked_where(np.transpose(present), np.zeros(drawn.shape))
        axis.imshow(absent, cmap=ListedColormap(["white"]), **place)
    axis.grid(False)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axis.set_xlabel("step")
    axis.set_ylabel("layer")
    if names is not None:
        apart = -(-len(names) // 40)  # more labels than 40 overlap
        axis.set_yticks(range(1, len(names) + 1, apart), names[::apart])
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


def history(
    gradient_history: GradientHistory, axis: Axes | None = None, **keywords: object
) -> Axes:
    """Draw a `GradientHistory` as parameter × step.

    White is a parameter without gradient and grey a gradient that is not finite.  Above the picture
    a cross marks a step with such a gradient and a triangle one that was skipped; the first bad
    parameter of the first bad step has a circle, and the title names both.

    Args:
        gradient_history: what a probe recorded.
        axis: where to draw; None makes a figure as high as the number of parameters needs.
        keywords: passed on to `heatmap`.

    Returns:
        The axis drawn into.
    """
    import matplotlib.pyplot as plt

    seen, names = gradient_history, gradient_history.names
    if axis is None:
        _, axis = plt.subplots(figsize=(7.2, 2.5 + 0.2 * min(len(names), 40)))
    if len(seen.steps) == 0:
        axis.text(0.5, 0.5, "no step recorded", ha="center", transform=axis.transAxes)
        return axis
    given = {"steps": seen.steps, "names": _short(names), "present": seen.present}
    heatmap(axis, seen.norms, **(given | keywords))
    axis.set_ylabel("")
    if max(map(len, given["names"])) > 24:
        axis.tick_params(axis="y", labelsize=7)
    bad = seen.first_nonfinite
    if bad is not None:
        title = f"first non-finite gradient: step {bad.step}, {bad.name}"
        if len(title) > 72:  # as wide as the figure
            title = title.replace(f", {bad.name}", f",\n{bad.name}")
        if bad.step < seen.steps[0]:
            title += ", before the steps shown"
        else:
            axis.axvline(bad.step - 0.5, color="white", linestyle=":", linewidth=1.5)
            row = np.searchsorted(seen.steps, bad.step)
            lost = seen.present[row] & ~np.isfinite(seen.norms[row])
            for color, width in (("black", 3.6), ("white", 1.6)):  # seen on every colour
                circle = {"mfc": "none", "mec": color, "mew": width, "ms": 9, "clip_on": False}
                axis.plot(bad.step, np.argmax(lost) + 1, "o", zorder=4, **circle)
        axis.set_title(title, fontsize=8 if "\n" in title else 10, pad=12)
    _mark_steps(axis, seen)
    return axis


def _mark_steps(axis: Axes, seen: GradientHistory) -> None:
    """Mark skipped and bad steps above a picture, and explain below it what occurs in it."""
    from matplotlib import transforms
    from matplotlib.patches import Patch

    lost = (seen.present & ~np.isfinite(seen.norms)).any(axis=1)
    # Triangles are open and crosses small, so that a step may have both.
    marks = (
        ("not finite", lost, {"marker": "x", "ms": 3.5, "color": COLORS["prediction"]}),
        ("skipped", seen.skipped, {"marker": "v", "ms": 8, "color": COLORS["highlight"]}),
    )
    entries = []
    for label, steps, style in marks:
        if steps.any():
            entries += axis.plot(
                seen.steps[steps],
                np.ones(steps.sum()),
                linestyle="",
                mfc="none",
                clip_on=False,
                transform=axis.get_xaxis_transform()
                + transforms.ScaledTranslation(0, 5 / 72, axis.figure.dpi_scale_trans),
                label=f"{label} ({steps.sum()})",
                **style,
            )
    if not seen.present.all():
        entries.append(Patch(fc="white", ec=COLORS["failed"], label="no gradient"))
    if entries:
        below = transforms.ScaledTranslation(0, -0.42, axis.figure.dpi_scale_trans)
        axis.legend(
            handles=entries,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            bbox_transform=axis.transAxes + below,
            ncols=len(entries),
            frameon=False,
            borderaxespad=0,
            handletextpad=0.4,
            fontsize=9,
        )


def _short(names: list[str], width: int = 40) -> list[str]:
    """Long names lose what all share, then their beginning: the picture needs room."""
    parts = [re.split(r"(?<=[./])", name) for name in names]
    while (
        max(len("".join(p)) for p in parts) > width
        and len({p[0] for p in parts}) == 1
        and min(map(len, parts)) > 1
    ):
        parts = [p[1:] for p in parts]
    short = ["".join(p) for p in parts]
    return [n if len(n) <= width else "…" + n[1 - width :] for n in short]
