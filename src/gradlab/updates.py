"""How a step moves the weights: penalties, clipping and update rules, written once.

`Update` says what to do; `move` does it, on PyTorch's tensors or TensorFlow's alike: the
arithmetic is the same, and the few functions whose names differ come in as `Functions`.
`gradlab.torch.sweep` and `gradlab.keras.sweep` train with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

RULES = ("sgd", "momentum", "nesterov", "rmsprop", "adam")
CLIPS = (None, "norm", "layer", "value", "adaptive")

Number = float | Sequence[float] | np.ndarray
Array = Any
"""A tensor of either framework."""


@dataclass(frozen=True)
class Update:
    """How each step moves the weights w, given the gradient g of the loss.

    First the penalties' gradients are added to g, then it is clipped, then the rule turns it into a
    step.  Every number is one for all members of a sweep, or an array of one for each.

    Attributes:
        rule: "sgd", "momentum" (Polyak's heavy ball: v ← βv + g, w ← w − lr·v), "nesterov"
            (w ← w − lr·(g + βv)), "rmsprop" or "adam".
        momentum: β of momentum and Nesterov, β₁ of Adam; in [0, 1).
        beta2: decay of the mean of squares, in Adam and RMSprop; in [0, 1).
        epsilon: ε of Adam and RMSprop, added to the root, as PyTorch does.
        l1, l2: strength of the penalties l1·Σ|w| and l2/2·Σw².
        weight_decay: decoupled decay (Loshchilov and Hutter 2019): w loses lr·weight_decay·w.
        clip: None, "norm" (of all weights together), "layer" (each matrix by its own norm),
            "value" (each entry) or "adaptive" (each unit's weights by their own norm, Brock et
            al. 2021).
        threshold: the largest norm, size, or ratio to max(‖w‖, 0.001), that clipping leaves.
        schedule: factors of the learning rate, shape (steps,) or (steps, members); None: all 1.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """

    rule: str = "sgd"
    momentum: Number = 0.9
    beta2: Number = 0.999
    epsilon: Number = 1e-8
    l1: Number = 0.0
    l2: Number = 0.0
    weight_decay: Number = 0.0
    clip: str | None = None
    threshold: Number = np.inf
    schedule: Sequence[float] | np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("rule", RULES), ("clip", CLIPS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in NUMBERS:
            value = np.asarray(getattr(self, name), dtype=float)
            below_one = name in ("momentum", "beta2")
            if value.ndim > 1 or not (value >= 0).all() or (below_one and not (value < 1).all()):
                allowed = "in [0, 1)" if below_one else "≥ 0"
                raise ValueError(
                    f"{name} must be {allowed}, one number or one per member, got "
                    f"{getattr(self, name)!r}"
                )
        if self.clip is not None and not (np.asarray(self.threshold) > 0).all():
            raise ValueError(f"threshold must be > 0, got {self.threshold!r}")
        if self.clip is None and not np.isinf(self.threshold).all():
            raise ValueError(
                f"threshold is {self.threshold!r}, but nothing is clipped: clip must be one of "
                f"{CLIPS[1:]}"
            )

    def plan(self) -> Plan:
        """What has to be computed, without the numbers."""
        return Plan(
            self.rule,
            self.clip,
            *(bool(np.any(getattr(self, name))) for name in ("l1", "l2", "weight_decay")),
        )

    def numbers(self, members: int, dtype: np.dtype) -> dict[str, np.ndarray]:
        """Every number as an array (members, 1, 1), ready to multiply stacked matrices.

        Raises:
            ValueError: an array that does not hold one number per member.
        """
        return {name: per_member(name, getattr(self, name), members, dtype) for name in NUMBERS}

    def rates(self, lr: Number, steps: int, members: int, dtype: np.dtype) -> np.ndarray:
        """The learning rate of every step, shape (steps, members or 1, 1, 1).

        Raises:
            ValueError: a learning rate or a schedule whose shape does not fit.
        """
        lr = per_member("lr", lr, members, dtype)
        if self.schedule is None:
            return np.broadcast_to(lr, (steps, *lr.shape))
        schedule = np.asarray(self.schedule, dtype)
        if schedule.shape not in ((steps,), (steps, members)):
            raise ValueError(
                f"schedule has shape {schedule.shape}, expected ({steps},) or ({steps}, {members})"
            )
        return lr * schedule.reshape(steps, -1, 1, 1)


NUMBERS = tuple(
    field.name for field in fields(Update) if field.name not in ("rule", "clip", "schedule")
)


def per_member(name: str, value: Number, members: int, dtype: np.dtype) -> np.ndarray:
    """One number for all, or one each, as an array (members, 1, 1)."""
    array = np.asarray(value, dtype)
    if array.shape not in ((), (members,)):
        raise ValueError(f"{name} has shape {array.shape}, expected a number or ({members},)")
    return np.broadcast_to(array, (members,))[:, None, None].copy()


class Plan(NamedTuple):
    """Which parts of an `Update` are in use; it is fixed when a graph is traced."""

    rule: str
    clip: str | None
    l1: bool
    l2: bool
    weight_decay: bool


class Functions(NamedTuple):
    """What the frameworks spell differently."""

    sign: Callable[[Array], Array]
    sqrt: Callable[[Array], Array]
    between: Callable[[Array, Array, Array], Array]
    """An array, a lower and an upper bound of each entry."""
    at_least: Callable[[Array, float], Array]
    norm: Callable[[Array, tuple[int, ...]], Array]
    """Euclidean norm over some axes, which stay with length 1, in float64."""
    cast: Callable[[Array, Array], Array]
    """The first array in the precision of the second."""


def memory(plan: Plan, weights: Sequence[Array], zeros_like: Callable) -> tuple:
    """The rule's memory before the first step: for each weight one, two or no arrays of zeros."""
    kept = {"sgd": 0, "momentum": 1, "nesterov": 1, "rmsprop": 1, "adam": 2}[plan.rule]
    return tuple(tuple(zeros_like(w) for w in weights) for _ in range(kept))


def move(
    plan: Plan,
    numbers: dict[str, Array],
    rate: Array,
    count: Array,
    weights: Sequence[Array],
    gradients: Sequence[Array],
    kept: tuple,
    f: Functions,
) -> tuple[list[Array], tuple]:
    """One step.

    Args:
        plan, numbers: of an `Update`.
        rate: this step's learning rate, (members, 1, 1).
        count: number of this step, from 1, as a float.
        weights, gradients: one (members, fan_in, fan_out) array per layer.
        kept: the rule's memory.
        f: the framework's functions.

    Returns:
        The weights' changes, to be added to them, and the new memory.
    """
    n = numbers
    gradients = [_penalised(plan, n, w, g, f) for w, g in zip(weights, gradients, strict=True)]
    gradients = _clipped(plan.clip, n["threshold"], weights, gradients, f)
    beta, beta2, epsilon = n["momentum"], n["beta2"], n["epsilon"]
    if plan.rule == "sgd":
        steps = gradients
    elif plan.rule in ("momentum", "nesterov"):
        v = tuple(beta * v + g for v, g in zip(kept[0], gradients, strict=True))
        kept = (v,)
        ahead = plan.rule == "nesterov"
        steps = [g + beta * v for v, g in zip(v, gradients, strict=True)] if ahead else v
    else:
        squares = tuple(
            beta2 * s + (1 - beta2) * g * g for s, g in zip(kept[-1], gradients, strict=True)
        )
        if plan.rule == "rmsprop":
            kept = (squares,)
            steps = [g / (f.sqrt(s) + epsilon) for g, s in zip(gradients, squares, strict=True)]
        else:
            means = tuple(
                beta * m + (1 - beta) * g for m, g in zip(kept[0], gradients, strict=True)
            )
            kept = (means, squares)
            # What the means lack because they began at 0.
            correct, correct2 = 1 - beta**count, 1 - beta2**count
            steps = [
                (m / correct) / (f.sqrt(s / correct2) + epsilon)
                for m, s in zip(means, squares, strict=True)
            ]
    changes = [-rate * step for step in steps]
    if plan.weight_decay:
        decay = rate * n["weight_decay"]
        changes = [c - decay * w for c, w in zip(changes, weights, strict=True)]
    return changes, kept


def _penalised(plan: Plan, n: dict[str, Array], w: Array, g: Array, f: Functions) -> Array:
    if plan.l1:
        g = g + n["l1"] * f.sign(w)
    if plan.l2:
        g = g + n["l2"] * w
    return g


def _clipped(
    clip: str | None,
    threshold: Array,
    weights: Sequence[Array],
    gradients: Sequence[Array],
    f: Functions,
) -> Sequence[Array]:
    if clip is None:
        return gradients
    if clip == "value":
        return [f.between(g, -threshold, threshold) for g in gradients]
    norms = [f.norm(g, (1,) if clip == "adaptive" else (1, 2)) for g in gradients]
    limits = [f.cast(threshold, norm) for norm in norms]
    if clip == "adaptive":
        sizes = [f.at_least(f.norm(w, (1,)), 1e-3) for w in weights]
        limits = [limit * size for limit, size in zip(limits, sizes, strict=True)]
    if clip == "norm":
        norms = [f.sqrt(sum(norm * norm for norm in norms))] * len(norms)
    # Divided by how far the norm is above its limit: by exactly 1 where it is not.
    return [
        g / f.at_least(f.cast(norm / limit, g), 1.0)
        for g, norm, limit in zip(gradients, norms, limits, strict=True)
    ]
