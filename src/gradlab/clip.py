"""Gradient clipping in NumPy: what `gradlab.torch.clip` and `gradlab.keras.clip` are equal to.

Every function takes a list of gradients and returns new ones with the global norm before clipping;
nothing is changed in place.  All of them keep one rule: **if any gradient holds an inf or a NaN,
all come back as they were**, and the norm that is returned is inf or NaN.  Clipping bounds a
length, and such a gradient has none; scaling it would spread the NaN, and bounding it would hide
it.  Whoever takes the step must look at the norm first.

Lengths are computed so that no square overflows or underflows.  A `None` stands for a parameter
without gradient and comes back as `None`.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence

import numpy as np

Gradients = Sequence[np.ndarray | None]
Clipped = tuple[list[np.ndarray | None], float]


def global_norm(gradients: Gradients) -> float:
    """Euclidean norm over all gradients together.

    Args:
        gradients: arrays of any shapes and floating types, or None.

    Returns:
        √Σg², 0 for no gradient at all; inf or NaN only if an entry is.
    """
    return float(_norm(np.array([_norm(_wide(g)) for g in gradients if g is not None])))


def by_value(gradients: Gradients, limit: float) -> Clipped:
    """Cut every component to [−limit, limit], each for itself (Mikolov 2012).

    Args:
        gradients: arrays, or None.
        limit: > 0.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a limit that is not > 0.

    Example:
        >>> by_value([np.array([3.0, -4.0]), None], 3.5)
        ([array([ 3. , -3.5]), None], 5.0)
    """
    check_threshold("limit", limit)
    return _each(gradients, lambda g: np.clip(g, -limit, limit).astype(g.dtype))


def by_norm(gradients: Gradients, max_norm: float) -> Clipped:
    """Shorten every gradient that is longer than `max_norm` to it, each by its own norm.

    Keras calls it `clipnorm`.  The direction of the whole changes when some are shortened and
    others not.

    Args:
        gradients: arrays, or None.
        max_norm: > 0.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a threshold that is not > 0.
    """
    check_threshold("max_norm", max_norm)
    return _each(gradients, lambda g: _shorten(g, _norm(_wide(g)), max_norm))


def by_global_norm(gradients: Gradients, max_norm: float | Callable[[float], float]) -> Clipped:
    """Shorten all gradients by one factor, to a global norm of at most `max_norm`.

    Algorithm 1 of Pascanu et al. 2013; the direction stays.

    Args:
        gradients: arrays, or None.
        max_norm: > 0, or what chooses it when it is called with the norm, such as `AutoClip`.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a threshold that is not > 0.

    Example:
        >>> by_global_norm([np.array([3.0]), np.array([4.0])], 1.0)
        ([array([0.6]), array([0.8])], 5.0)
    """
    norm = global_norm(gradients)
    max_norm = max_norm(norm) if callable(max_norm) else max_norm
    check_threshold("max_norm", max_norm)
    return [None if g is None else _shorten(g, norm, max_norm) for g in gradients], norm


def adaptive(
    gradients: Gradients,
    weights: Sequence[np.ndarray],
    factor: float = 0.01,
    *,
    floor: float = 1e-3,
    unit_axis: int | Sequence[int] = -1,
) -> Clipped:
    """Shorten each unit's gradient to at most `factor` times the norm of the unit's weights.

    Adaptive gradient clipping, AGC (Brock et al. 2021): a unit is one output of a layer, with all
    the weights that lead to it; a vector (biases) or a scalar counts as one unit.  The authors
    leave the last linear layer out: leave it out of the lists.

    Args:
        gradients: arrays, or None.
        weights: one array per gradient, of its shape.
        factor: λ, > 0.
        floor: a unit's weights count as at least this long, so that those at zero can move; > 0.
        unit_axis: the axis that numbers the units, one for all or one per gradient.  The last for
            matrices (fan_in, fan_out), as here and in Keras; 0 for PyTorch's Linear and Conv.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a factor or floor that is not > 0, or weights that do not fit the gradients.
    """
    check_threshold("factor", factor)
    check_threshold("floor", floor)
    axes = check_units([g if g is None else g.shape for g in gradients],
                       [w.shape for w in weights], unit_axis)  # fmt: skip
    norm = global_norm(gradients)
    if not math.isfinite(norm):
        return list(gradients), norm
    clipped = []
    for g, w, axis in zip(gradients, weights, axes, strict=True):
        if g is None:
            clipped.append(None)
            continue
        others = tuple(i for i in range(g.ndim) if g.ndim < 2 or i != axis % g.ndim)
        limit = factor * np.maximum(_norm(_wide(w), others), floor)
        clipped.append(_shorten(g, _norm(_wide(g), others), limit))
    return clipped, norm


class AutoClip:
    """Choose the threshold as a percentile of all norms so far (Seetharaman et al. 2020).

    Give it to `by_global_norm` in place of a number.  Norms that are not finite are left out: one
    would stay among the norms for good.

    Args:
        percentile: 0 to 100; a low one clips nearly every step.

    Raises:
        ValueError: a percentile out of its range.

    Example:
        >>> choose = AutoClip(50)
        >>> [choose(norm) for norm in (1.0, 3.0, float("nan"), 100.0)]
        [1.0, 2.0, 2.0, 3.0]
    """

    def __init__(self, percentile: float = 10.0) -> None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be between 0 and 100, got {percentile!r}")
        self.percentile = percentile
        self._norms: list[float] = []  # ascending

    def __call__(self, norm: float) -> float:
        """Take in one step's norm; the threshold for this step, inf before the first norm."""
        if math.isfinite(norm):
            insort(self._norms, float(norm))
        if not self._norms:
            return math.inf
        place = self.percentile / 100 * (len(self._norms) - 1)
        below = self._norms[math.floor(place)]
        between = place - math.floor(place)
        # A threshold of exactly 0 would stop training for good: the smallest number will do.
        chosen = below + between * (self._norms[math.ceil(place)] - below)
        return max(chosen, math.ulp(0.0))

    def state_dict(self) -> dict:
        """What to save with a checkpoint: plain numbers."""
        return {"percentile": self.percentile, "norms": list(self._norms)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state."""
        self.percentile, self._norms = state["percentile"], sorted(state["norms"])


class ZClip:
    """Clip only norms that stand out from a running mean by `z` standard deviations (Kumar 2025).

    After `warmup` norms their mean μ and variance σ² start the running averages.  From then on a
    norm of z-score s = (norm − μ)/σ > `z` is cut to μ + z²/s·σ, the further out the harder; the
    averages then take in what was left of it.  Give it to `by_global_norm` in place of a number.
    Norms that are not finite are left out: one would make both averages NaN for good.

    Args:
        z: > 0.
        decay: weight of the past in the running averages, in [0, 1).
        warmup: norms before the first clip, ≥ 2.
        max_norm: a threshold that holds at every step, warm-up included.  The authors' program
            has 1.0 here, so that it clips ordinary steps too; the default here is none.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        z: float = 2.5,
        *,
        decay: float = 0.97,
        warmup: int = 25,
        max_norm: float = math.inf,
    ) -> None:
        check_threshold("z", z)
        check_threshold("max_norm", max_norm)
        if not (0 <= decay < 1 and warmup >= 2):
            raise ValueError(
                f"expected 0 ≤ decay < 1 and warmup ≥ 2, got decay={decay!r}, warmup={warmup!r}"
            )
        self.z, self.decay, self.warmup, self.max_norm = z, decay, warmup, max_norm
        self._first: list[float] = []
        self.mean = self.variance = math.nan  # until the warm-up is over

    def __call__(self, norm: float) -> float:
        """Take in one step's norm; the threshold for this step, inf where it need not be cut."""
        if not math.isfinite(norm):
            return self.max_norm
        norm, limit = float(norm), math.inf
        if len(self._first) < self.warmup:
            self._first.append(norm)
            if len(self._first) == self.warmup:
                self.mean, self.variance = np.mean(self._first).item(), np.var(self._first).item()
            return self.max_norm
        spread = math.sqrt(self.variance)
        if norm - self.mean > self.z * spread > 0:
            limit = self.mean + self.z**2 * spread * (spread / (norm - self.mean))
        kept = min(norm, limit)
        self.mean += (1 - self.decay) * (kept - self.mean)
        self.variance += (1 - self.decay) * ((kept - self.mean) ** 2 - self.variance)
        return max(min(limit, self.max_norm), math.ulp(0.0))

    def state_dict(self) -> dict:
        """What to save with a checkpoint: plain numbers."""
        return {"first": list(self._first), "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state."""
        self._first = list(state["first"])
        self.mean, self.variance = state["mean"], state["variance"]


# ---------------------------------------------------------------------------------------------
# What the two frameworks' modules share


def check_threshold(name: str, value: object) -> None:
    """Refuse a number that is not > 0; what is no number (a tensor in a graph) passes.

    Raises:
        ValueError: naming the argument and what came.
    """
    if isinstance(value, int | float | np.number) and not value > 0:
        raise ValueError(f"{name} must be > 0, got {value!r}")


def check_units(
    gradients: Sequence[tuple[int, ...] | None],
    weights: Sequence[tuple[int, ...]],
    unit_axis: int | Sequence[int],
) -> list[int]:
    """The unit axis of each gradient of `adaptive`, once the shapes are seen to fit.

    Args:
        gradients: their shapes, None for no gradient.
        weights: their shapes.
        unit_axis: one for all or one per gradient.

    Raises:
        ValueError: naming the shapes that came.
    """
    axes = [unit_axis] * len(gradients) if isinstance(unit_axis, int) else list(unit_axis)
    if not len(gradients) == len(weights) == len(axes):
        raise ValueError(
            f"got {len(gradients)} gradients, {len(weights)} weights and {len(axes)} unit axes; "
            "expected as many of each"
        )
    for gradient, weight, axis in zip(gradients, weights, axes, strict=True):
        if gradient is not None and tuple(gradient) != tuple(weight):
            raise ValueError(
                f"a gradient of shape {tuple(gradient)} came with weights of shape {tuple(weight)}"
            )
        if len(weight) > 1 and not -len(weight) <= axis < len(weight):
            raise ValueError(f"unit_axis {axis} is no axis of weights of shape {tuple(weight)}")
    return axes


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _norm(array: np.ndarray, axes: tuple[int, ...] | None = None) -> np.ndarray:
    """√Σx² over the axes (None: all), which stay with length 1; scaled before it is squared."""
    largest = np.abs(array).max(axis=axes, keepdims=axes is not None, initial=0.0)
    usable = np.isfinite(largest) & (largest > 0)
    scaled = array / np.where(usable, largest, 1.0)
    with np.errstate(over="ignore"):
        squares = np.sum(scaled * scaled, axis=axes, keepdims=axes is not None)
    return np.where(usable, largest, 1.0) * np.sqrt(squares)


def _shorten(gradient: np.ndarray, norm: np.ndarray, limit: np.ndarray | float) -> np.ndarray:
    """The gradient times limit/norm where its norm exceeds the limit and is finite."""
    too_long = np.isfinite(norm) & (norm > limit)
    if not np.any(too_long):
        return gradient.copy()
    # Divided first: limit / norm may be too small for a float.
    shorter = _wide(gradient) / np.where(too_long, norm, 1.0) * np.where(too_long, limit, 1.0)
    return shorter.astype(gradient.dtype)


def _each(gradients: Gradients, clip: Callable[[np.ndarray], np.ndarray]) -> Clipped:
    norm = global_norm(gradients)
    if not math.isfinite(norm):
        return list(gradients), norm
    return [None if g is None else clip(g) for g in gradients], norm
