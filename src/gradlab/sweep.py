"""Many small networks trained at once: what both frameworks' `sweep.train` share.

A *member* is one network with its own weights, learning rate and minibatches.  All members have
the same shape, so that one stacked matrix product serves them all: forty networks cost little more
than one.  This module holds the arguments' checks, the minibatches and the result; the training
itself is in `gradlab.torch.sweep` and `gradlab.keras.sweep`, under one name and signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

ACTIVATIONS = ("relu", "tanh", "linear")
LOSSES = ("cross_entropy", "mse")


@dataclass(frozen=True)
class SweepResult:
    """What a sweep measured.  "Step t" means before the t-th update, counted from 0.

    Attributes:
        loss: mean minibatch loss, shape (steps, members).
        grad_norm: Euclidean norm of the gradient over all weights, shape (steps, members).
        delta_norm: Euclidean norm over the minibatch of the gradient of the mean loss with respect
            to each layer's pre-activation, shape (steps, members, layers); None unless recorded.
        accuracy: share of the test examples (of the training examples when no test set is given)
            that the trained member classifies right, shape (members,); NaN for a failed member and
            for a regression.
        failed: whether the loss, a gradient or a weight stopped being finite, shape (members,).
        first_nonfinite: the first step at which that showed, shape (members,); -1 if never.
        weights: the trained weights, one array (members, fan_in, fan_out) per layer.
    """

    loss: np.ndarray
    grad_norm: np.ndarray
    delta_norm: np.ndarray | None
    accuracy: np.ndarray
    failed: np.ndarray
    first_nonfinite: np.ndarray
    weights: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Problem:
    """The checked arguments of a sweep, as arrays of one floating dtype."""

    weights: tuple[np.ndarray, ...]  # (members, fan_in, fan_out) each
    x: np.ndarray  # (rows, features): all members' examples below each other, unless shared
    y: np.ndarray  # (rows,) classes or (rows, outputs) targets, likewise
    x_rows: np.ndarray  # (steps, members, batch) int64: the rows of x in each minibatch
    y_rows: np.ndarray  # the same rows of y, which may be stacked when x is shared
    lr: np.ndarray  # (members, 1, 1)
    x_test: np.ndarray  # (n_test, features) or (members, n_test, features)
    y_test: np.ndarray

    @property
    def members(self) -> int:
        return len(self.weights[0])


def minibatches(n: int, members: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Indices of every minibatch, drawn uniformly with replacement.

    Args:
        n: number of training examples.
        members, steps, batch_size: the shape wanted.
        seed: of NumPy's generator, so that both frameworks see the same examples.

    Returns:
        int64 array, shape (steps, members, batch_size), values in [0, n).
    """
    return np.random.default_rng(seed).integers(n, size=(steps, members, batch_size))


def check(
    weights: Sequence[np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    *,
    lr: float | np.ndarray,
    steps: int,
    batch_size: int,
    seed: int,
    activation: str,
    loss: str,
    x_test: np.ndarray | None,
    y_test: np.ndarray | None,
) -> Problem:
    """The arguments of `train`, checked and turned into arrays.  See there for their meaning.

    Raises:
        ValueError: an argument whose shape or value does not fit; the message says what came and
            what was expected.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {ACTIVATIONS}")
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is none of {LOSSES}")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    weights = _check_weights(weights)
    dtype = weights[0].dtype
    members, features = weights[0].shape[:2]
    outputs = weights[-1].shape[2]
    x, y = _check_data("x", x, "y", y, dtype, members, features, outputs, loss)
    if (x_test is None) != (y_test is None):
        raise ValueError("x_test and y_test belong together, got only one of them")
    if x_test is None:
        x_test, y_test = x, y
    else:
        names = ("x_test", x_test, "y_test", y_test)
        x_test, y_test = _check_data(*names, dtype, members, features, outputs, loss)
    lr = np.asarray(lr, dtype)
    if lr.shape not in ((), (members,)):
        raise ValueError(f"lr has shape {lr.shape}, expected a number or ({members},)")
    n = x.shape[-2]
    rows = minibatches(n, members, steps, batch_size, seed)
    stacked_rows = rows + n * np.arange(members)[:, None]
    tail = () if loss == "cross_entropy" else (outputs,)
    return Problem(
        weights=weights,
        x=x.reshape(-1, features),
        y=y.reshape(-1, *tail),
        x_rows=stacked_rows if x.ndim == 3 else rows,
        y_rows=stacked_rows if y.ndim == 2 + len(tail) else rows,
        lr=np.broadcast_to(lr, (members,))[:, None, None].copy(),
        x_test=x_test,
        y_test=y_test,
    )


def _check_weights(weights: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    weights = tuple(map(np.asarray, weights))
    shapes = [w.shape for w in weights]
    if not weights or any(len(shape) != 3 for shape in shapes):
        raise ValueError(
            f"weights have shapes {shapes}, expected one (members, fan_in, fan_out) array a layer"
        )
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"weights have shapes {shapes}, expected the same number of members")
    for number, (before, after) in enumerate(pairwise(shapes), 1):
        if before[2] != after[1]:
            raise ValueError(
                f"layer {number} has fan_in {after[1]}, expected {before[2]}: the fan_out of the "
                f"layer before it (shapes {shapes})"
            )
    dtypes = {w.dtype for w in weights}
    if dtypes not in ({np.dtype(np.float32)}, {np.dtype(np.float64)}):
        raise ValueError(f"weights are {sorted(map(str, dtypes))}, expected all float32 or float64")
    return weights


def _check_data(
    x_name: str,
    x: np.ndarray,
    y_name: str,
    y: np.ndarray,
    dtype: np.dtype,
    members: int,
    features: int,
    outputs: int,
    loss: str,
) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype), np.asarray(y)
    n = x.shape[-2] if x.ndim >= 2 else 0
    if n == 0 or x.shape not in ((n, features), (members, n, features)):
        raise ValueError(
            f"{x_name} has shape {x.shape}, expected (n, {features}) or ({members}, n, {features})"
        )
    tail = () if loss == "cross_entropy" else (outputs,)
    if y.shape not in ((n, *tail), (members, n, *tail)):
        raise ValueError(
            f"{y_name} has shape {y.shape}, expected {(n, *tail)} or {(members, n, *tail)} "
            f"for loss {loss!r} and {n} rows of {x_name}"
        )
    if loss == "mse":
        return x, y.astype(dtype)
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{y_name} is {y.dtype}, expected integer classes for 'cross_entropy'")
    if y.min() < 0 or y.max() >= outputs:
        raise ValueError(
            f"{y_name} runs from {y.min()} to {y.max()}, expected classes 0 to {outputs - 1}: "
            "the last layer's fan_out"
        )
    return x, y.astype(np.int64)


def judge(
    problem: Problem,
    loss: np.ndarray,
    grad_norm: np.ndarray,
    delta_norm: np.ndarray | None,
    weights: Sequence[np.ndarray],
    outputs: np.ndarray,
) -> SweepResult:
    """The result of a sweep, from what a framework measured.

    Args:
        problem: what was trained.
        loss, grad_norm, delta_norm: as in `SweepResult`.
        weights: the trained weights.
        outputs: the trained members' outputs on the test set, shape (members, n_test, outputs).
    """
    bad = ~(np.isfinite(loss) & np.isfinite(grad_norm))  # (steps, members)
    bad[-1] |= ~np.all([np.isfinite(w).all((1, 2)) for w in weights], axis=0)
    failed = bad.any(0)
    accuracy = np.full(problem.members, np.nan)
    if np.issubdtype(problem.y_test.dtype, np.integer):
        right = (outputs.argmax(-1) == problem.y_test).mean(-1)
        accuracy = np.where(failed, np.nan, right)
    return SweepResult(
        loss=loss,
        grad_norm=grad_norm,
        delta_norm=delta_norm,
        accuracy=accuracy,
        failed=failed,
        first_nonfinite=np.where(failed, bad.argmax(0), -1),
        weights=tuple(weights),
    )
