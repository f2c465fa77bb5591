"""L-BFGS with a budget: what both frameworks' `lbfgs.minimize` share.

L-BFGS (Liu and Nocedal 1989) keeps its last few steps and the changes of the gradient along them,
estimates the curvature from these pairs, and divides the gradient by the estimate.  It needs one
loss that stays the same from call to call, such as that of all the data.

`gradlab.torch.lbfgs` runs it on PyTorch's own implementation, `gradlab.keras.lbfgs` on SciPy's,
under one name and signature.  This module holds the result and the book-keeping: one evaluation is
one call of the loss together with its gradient, and every one of them counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm


@dataclass(frozen=True)
class LBFGSResult:
    """What a run measured.  Evaluation 0 is that of the initial parameters.

    Attributes:
        loss: of every evaluation, those of the line search included, shape (evaluations,).
        grad_norm: Euclidean norm of the gradient over all parameters, shape (evaluations,).
        best: index of the evaluation whose parameters the model now has: the one with the smallest
            loss among those with a finite loss and gradient; -1 if there is none, and the
            parameters are then the initial ones.
        converged: whether the largest component of the gradient came within the tolerance.
        message: why the run ended.
    """

    loss: np.ndarray
    grad_norm: np.ndarray
    best: int
    converged: bool
    message: str

    @property
    def evaluations(self) -> int:
        """How often loss and gradient were computed, which never exceeds the budget."""
        return len(self.loss)


class Stop(Exception):
    """Ends a run from within the optimiser.  Its text becomes the result's message."""


class Recorder:
    """Counts evaluations, remembers the best point, and ends the run when it has to.

    Args:
        max_evaluations: the budget, ≥ 1.
        on_evaluation: called after every evaluation with its number, loss and gradient norm.
        progress: whether to show a progress bar over the evaluations.

    Raises:
        ValueError: a budget below 1.
    """

    def __init__(
        self,
        max_evaluations: int,
        on_evaluation: Callable[[int, float, float], object] | None = None,
        progress: bool = False,
    ) -> None:
        if max_evaluations < 1:
            raise ValueError(f"max_evaluations must be at least 1, got {max_evaluations!r}")
        self.max_evaluations = max_evaluations
        self.loss: list[float] = []
        self.grad_norm: list[float] = []
        self.best, self.point, self.largest = -1, None, math.inf
        self._on_evaluation = on_evaluation
        self._bar = tqdm(total=max_evaluations, unit="evaluation", disable=not progress)

    def check_budget(self) -> None:
        """Raise `Stop` when no evaluation is left; call it before each."""
        if len(self.loss) >= self.max_evaluations:
            raise Stop(f"the budget of {self.max_evaluations} evaluations is spent")

    def record(
        self, loss: float, grad_norm: float, largest: float, point: Callable[[], Any]
    ) -> None:
        """Note one evaluation.

        Args:
            loss: its value.
            grad_norm: norm of the gradient.
            largest: largest absolute component of the gradient.
            point: returns a copy of the parameters; called if they are the best so far.

        Raises:
            Stop: the loss or the gradient is not finite.
        """
        number = len(self.loss)
        self.loss.append(loss)
        self.grad_norm.append(grad_norm)
        finite = math.isfinite(loss) and math.isfinite(largest)
        if finite and (self.best < 0 or loss < self.loss[self.best]):
            self.best, self.point, self.largest = number, point(), largest
        self._bar.set_postfix(
            {"loss": f"{loss:.3g}", "gradient": f"{grad_norm:.3g}"}, refresh=False
        )
        self._bar.update()
        if self._on_evaluation is not None:
            self._on_evaluation(number, loss, grad_norm)
        if not finite:
            what = "the gradient" if math.isfinite(loss) else "the loss"
            kept = (
                f"the parameters are those of evaluation {self.best}, the best before it"
                if self.best >= 0
                else "the parameters are as they were given"
            )
            raise Stop(f"{what} is not finite at evaluation {number}; {kept}")

    def result(self, message: str, tolerance: float) -> LBFGSResult:
        """The result; `message` says why the optimiser ended, unless it converged."""
        self._bar.close()
        converged = self.best >= 0 and self.largest <= tolerance
        if converged:
            message = f"converged: no component of the gradient exceeds {tolerance:g}"
        return LBFGSResult(
            loss=np.array(self.loss),
            grad_norm=np.array(self.grad_norm),
            best=self.best,
            converged=converged,
            message=message,
        )


def two_loops(gradient: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The gradient divided by the curvature that the pairs tell of (Liu and Nocedal 1989).

    Args:
        gradient: flat, shape (parameters,).
        pairs: (s, y), oldest first: a step, and by how much the gradient changed along it.  Each
            has s·y > 0.

    Returns:
        H⁻¹ times the gradient, for the H that maps the last s to its y and is the BFGS update by
        the pairs of (y·y / s·y) × identity, the last pair's.  The gradient itself without pairs.
    """
    q, factors = np.array(gradient, float), []
    for s, y in reversed(pairs):
        factors.append(s @ q / (s @ y))
        q -= factors[-1] * y
    if pairs:
        s, y = pairs[-1]
        q *= s @ y / (y @ y)
    for (s, y), factor in zip(pairs, reversed(factors), strict=True):
        q += (factor - y @ q / (s @ y)) * s
    return q


def check_arguments(history: int, tolerance: float) -> None:
    """Raise a ValueError for a history below 1 or a negative tolerance."""
    if history < 1:
        raise ValueError(f"history must be at least 1, got {history!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number ≥ 0, got {tolerance!r}")


NO_PROGRESS = (
    "no further progress: the line search found no lower loss, or none that rounding shows"
)
"""The message of a run that ends before its budget and without meeting the tolerance."""
