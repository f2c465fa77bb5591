"""Forecasting a price from its past: windows, a split in time, scales, and the baseline to beat.

A *window* is a stretch of past values, its *target* the value that follows.  Everything that is
fitted is fitted on the first days only, and everything that is reported is in the price's own unit:
a loss in scaled units cannot be compared between scales, nor with a baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("raw", "standard", "returns")
"""What `prepare` can make of prices."""

CELLS = {"LSTM": 4, "RNN": 1}
"""Recurrent layers, and how many blocks of units each has.  An LSTM has three gates and a
candidate, a simple recurrent layer, here with ReLU, only its units."""

METHODS = ("Adam", "L-BFGS")
"""What `fit` can train with."""


@dataclass(frozen=True)
class Task:
    """Windows of a series of prices, their targets, and which of them may be used for what.

    Attributes:
        x: the windows, oldest value first, float32, (windows, length).
        y: the value that follows each, float32, (windows,).
        days: index of each target among the prices, (windows,), ascending.
        train: bool mask of the windows whose targets are on the first days, (windows,).
        validation: the same of the days after them.
        test: the same of the last days.
        prices: as given, float64, (days,).
        kind: one of `KINDS`.
        shift: what every value had subtracted.
        scale: what it was then divided by.
    """

    x: np.ndarray
    y: np.ndarray
    days: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    prices: np.ndarray
    kind: str
    shift: float
    scale: float

    @property
    def actual(self) -> np.ndarray:
        """The price on each target's day, (windows,)."""
        return self.prices[self.days]

    @property
    def persistence(self) -> np.ndarray:
        """The baseline, which is the price of the day before each target, (windows,)."""
        return self.prices[self.days - 1]

    @property
    def unchanged(self) -> np.ndarray:
        """What a model has to say for `persistence`, in the units of `y`, (windows,)."""
        if self.kind == "returns":
            return np.full_like(self.y, -self.shift / self.scale)
        return self.x[:, -1]

    def dollars(self, outputs: np.ndarray) -> np.ndarray:
        """What a model's outputs say about the price.

        Args:
            outputs: one per window, in the units of `y`, (..., windows).

        Returns:
            Prices, float64, of the same shape.

        Raises:
            ValueError: another number of outputs than windows.
        """
        outputs = np.asarray(outputs, dtype=np.float64)
        if outputs.shape[-1:] != self.y.shape:
            raise ValueError(
                f"need one output for each of the {len(self.y)} windows, got shape {outputs.shape}"
            )
        values = outputs * self.scale + self.shift
        return self.persistence * np.exp(values) if self.kind == "returns" else values


def windows(values: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a series into windows of the past and the values that follow them.

    Args:
        values: (days,).
        length: values in a window.

    Returns:
        windows, oldest value first, (days − length, length), and targets, (days − length,): window
        number i is `values[i : i + length]`, its target `values[i + length]`.

    Raises:
        ValueError: a series that is not one-dimensional, or too short for a window and its target.

    Example:
        >>> x, y = windows(np.arange(5), 3)
        >>> x.tolist(), y.tolist()
        ([[0, 1, 2], [1, 2, 3]], [3, 4])
    """
    values = np.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"expected one series, shape (days,), got shape {values.shape}")
    if not 1 <= length < len(values):
        raise ValueError(
            f"length must be between 1 and {len(values) - 1}, so that {len(values)} values hold a "
            f"window and its target; got {length!r}"
        )
    return np.lib.stride_tricks.sliding_window_view(values[:-1], length), values[length:]


def prepare(
    prices: np.ndarray,
    kind: str = "standard",
    *,
    length: int = 20,
    shares: tuple[float, float] = (0.7, 0.1),
    fit_days: int | None = None,
) -> Task:
    """Make a forecasting task of a series of prices, cut in time.

    Args:
        prices: ascending in time, > 0, (days,).
        kind: "raw" (prices as they are), "standard" (shifted and scaled to mean 0 and standard
            deviation 1) or "returns" (logarithms of the ratio of one price to the one before,
            shifted and scaled likewise).
        length: values in a window.
        shares: of all days, the first that train and the next that validate; the rest test.
        fit_days: shift and scale are those of this many first days; None takes the training days.
            More of them let the future leak into the past.

    Raises:
        ValueError: an unknown kind, prices that are not positive and finite or do not vary, shares
            or a window that leave a part without a target, or fit_days out of range.
    """
    prices = np.asarray(prices, dtype=np.float64)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if prices.ndim != 1 or not (np.isfinite(prices) & (prices > 0)).all():
        raise ValueError("prices must be one series of finite numbers > 0")
    first = 1 if kind == "returns" else 0  # a return needs the price before it
    ends = [round(len(prices) * share) for share in np.cumsum(shares)]
    if len(shares) != 2 or not first + length < ends[0] < ends[1] < len(prices):
        raise ValueError(
            f"{len(prices)} prices, windows of {length} and shares {shares} leave a part without a "
            "target; shares are those of training and validation and add up to less than 1"
        )
    fit_days = ends[0] if fit_days is None else fit_days
    if not first + 2 <= fit_days <= len(prices):
        raise ValueError(
            f"fit_days must be between {first + 2} and {len(prices)}, got {fit_days!r}"
        )
    values = np.diff(np.log(prices)) if kind == "returns" else prices
    shift, scale = 0.0, 1.0
    if kind != "raw":
        past = values[: fit_days - first]
        shift, scale = float(past.mean()), float(past.std())
        if not past.max() > past.min():
            raise ValueError(f"the first {fit_days} prices give no scale: they do not vary")
    x, y = windows((values - shift) / scale, length)
    days = np.arange(len(y)) + first + length
    train, later = days < ends[0], days >= ends[1]
    return Task(
        x=x.astype(np.float32),
        y=y.astype(np.float32),
        days=days,
        train=train,
        validation=~train & ~later,
        test=later,
        prices=prices,
        kind=kind,
        shift=shift,
        scale=scale,
    )


def initial_weights(cell: str, hidden: int, seed: int) -> list[np.ndarray]:
    """Random weights of a recurrent layer that reads one number a step, and of its linear read-out.

    All are uniform between ±1/√hidden, which is what PyTorch does for both layers.

    Args:
        cell: one of `CELLS`.
        hidden: number of units.
        seed: of the draw.

    Returns:
        Five float32 arrays, in Keras's order and layout: kernel (1, blocks · hidden), recurrent
        kernel (hidden, blocks · hidden), bias (blocks · hidden,), read-out (hidden, 1), its bias
        (1,).  The blocks of an LSTM are input gate, forget gate, candidate, output gate: both
        frameworks' order.

    Raises:
        ValueError: an unknown cell, or no unit.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {[*CELLS]}, got {cell!r}")
    if hidden < 1:
        raise ValueError(f"hidden must be at least 1, got {hidden!r}")
    wide, rng = CELLS[cell] * hidden, np.random.default_rng(seed)
    shapes = ((1, wide), (hidden, wide), (wide,), (hidden, 1), (1,))
    return [rng.uniform(-(hidden**-0.5), hidden**-0.5, s).astype(np.float32) for s in shapes]


def cell_of(weights: Sequence[np.ndarray]) -> tuple[str, int]:
    """Which layer these weights belong to, and how many units it has.

    Raises:
        ValueError: shapes that are not those of `initial_weights`.
    """
    shapes = [tuple(np.shape(w)) for w in weights]
    for cell, blocks in CELLS.items():
        hidden = shapes[1][0] if len(shapes) == 5 and len(shapes[1]) == 2 else 0
        wide = blocks * hidden
        if hidden and shapes == [(1, wide), (hidden, wide), (wide,), (hidden, 1), (1,)]:
            return cell, hidden
    raise ValueError(f"expected the five arrays of initial_weights(), got shapes {shapes}")


@dataclass(frozen=True)
class Fit:
    """One training run: what `gradlab.torch.forecast.fit` and its twin return.

    Attributes:
        loss: mean squared error over the training windows at every evaluation, in the units of the
            targets, (evaluations,).  Evaluation 0 is that of the initial weights.
        outputs: what the network then said for every window that does not train, (evaluations,
            windows); NaN for those that do.
    """

    loss: np.ndarray
    outputs: np.ndarray

    def forecast(self, task: Task) -> np.ndarray:
        """Forecasts in dollars, by the evaluation with the smallest RMSE on the validation days.

        Returns:
            (windows,), NaN for the windows that train.  Evaluations that are not finite are passed
            over; if all are, it is the first.
        """
        dollars, days = task.dollars(self.outputs), task.validation
        error = rmse(dollars[:, days], task.actual[days])
        return dollars[np.where(np.isfinite(error), error, np.inf).argmin()]


def collect(task: Task, notes: Sequence[tuple[float, np.ndarray]]) -> Fit:
    """A `Fit` of (loss, outputs for the windows that do not train) at every evaluation."""
    outputs = np.full((len(notes), len(task.y)), np.nan, np.float32)
    outputs[:, ~task.train] = [later for _, later in notes]
    return Fit(np.array([loss for loss, _ in notes], float), outputs)


def check_fit(method: str, evaluations: int, batch_size: int | None = None) -> None:
    """Raise a ValueError for an unknown method, a budget below 1 or minibatches that cannot be."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations!r}")
    if batch_size is not None and (method == "L-BFGS" or batch_size < 1):
        raise ValueError(
            f"batch_size must be at least 1 and L-BFGS takes none, got {batch_size!r} for {method}"
        )


def minibatches(count: int, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The numbers below count in random order, cut into minibatches of a size, the last smaller."""
    return np.split(rng.permutation(count), range(size, count, size))


def rmse(forecast: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Root of the mean squared error over the last axis, in the unit of the arguments.

    Args:
        forecast: (..., days).
        actual: (days,), or of the forecast's shape.

    Raises:
        ValueError: shapes that do not fit.  (Broadcasting a column against a row would compare
            every day with every other.)
    """
    forecast, actual = np.asarray(forecast, float), np.asarray(actual, float)
    if actual.shape not in (forecast.shape, forecast.shape[-1:]):
        raise ValueError(f"forecast {forecast.shape} and actual {actual.shape} do not fit")
    return np.sqrt(((forecast - actual) ** 2).mean(-1))


def relative_range(
    forecast: np.ndarray, baseline: np.ndarray, actual: np.ndarray, *, stretches: int = 10
) -> tuple[float, float]:
    """RMSE of a forecast over that of a baseline, give or take the luck of the days.

    The difference of the squared errors is averaged over stretches of successive days, because a
    forecast that errs does so the same way for many days.  Its mean over them, less and plus two
    standard errors of that mean, gives the two ends.

    Args:
        forecast: (days,), ascending in time.
        baseline: (days,).
        actual: (days,).
        stretches: how many, at least 2; of equal length to a day.

    Returns:
        The lower end, at least 0, and the upper one.

    Raises:
        ValueError: shapes that do not fit, fewer days than stretches or fewer stretches than 2, or
            a baseline without error.
    """
    square = rmse(baseline, actual) ** 2
    if np.ndim(square) or np.shape(forecast) != np.shape(actual) or not square > 0:
        raise ValueError(
            f"need three series of one shape, and a baseline that errs; got {np.shape(forecast)}, "
            f"{np.shape(baseline)} and {np.shape(actual)}, with an RMSE of {np.sqrt(square)}"
        )
    if not 2 <= stretches <= len(actual):
        raise ValueError(f"stretches must be between 2 and {len(actual)}, got {stretches!r}")
    worse = (np.subtract(forecast, actual) ** 2 - np.subtract(baseline, actual) ** 2) / square
    means = [part.mean() for part in np.array_split(worse, stretches)]
    luck = 2 * np.std(means, ddof=1) / np.sqrt(stretches)
    low, high = np.sqrt(np.maximum(0, 1 + np.mean(means) + luck * np.array([-1, 1])))
    return float(low), float(high)


def feed_back(
    predict: Callable[[np.ndarray], np.ndarray], starts: np.ndarray, steps: int
) -> np.ndarray:
    """Forecast many steps ahead with a model of one step: each forecast joins the window.

    Args:
        predict: maps windows (n, length) to the next values (n,).
        starts: windows that hold nothing but the past, (n, length).
        steps: how far.

    Returns:
        (n, steps), in the units of the windows.

    Raises:
        ValueError: starts that are no windows, or forecasts of another shape than (n,).

    Example:
        >>> feed_back(lambda x: 2 * x[:, -1], np.array([[0.0, 1.0]]), 3).tolist()
        [[2.0, 4.0, 8.0]]
    """
    known = np.array(starts)
    if known.ndim != 2:
        raise ValueError(f"starts must be windows, shape (n, length), got shape {known.shape}")
    ahead = []
    for _ in range(steps):
        value = np.asarray(predict(known))
        if value.shape != known.shape[:1]:
            raise ValueError(
                f"predict must return one value a window, shape {known.shape[:1]}, got "
                f"{value.shape}"
            )
        ahead.append(value)
        known = np.concatenate([known[:, 1:], value[:, None].astype(known.dtype)], axis=1)
    return np.stack(ahead, axis=1)
