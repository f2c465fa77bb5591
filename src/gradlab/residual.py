"""Deep fully connected residual networks: specification, initial weights and predicted growth.

With n blocks and φ the ReLU, a network reads its input through a matrix, h₀ = x·W_in, applies

    h ← skip·h + scale·factor·branch(h),        branch(h) = φ(h)·W

n times, and gives the logits φ(h)·W_out.  `skip` and `scale` are constants and `factor` a number
per block that may be learnt.  A `ResidualSpec` says which; `gradlab.torch.residual` and
`gradlab.keras.residual` build the networks of several specifications at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradlab import theory
from gradlab.mlp import EPSILON, orthogonal

NORMALIZATIONS = (None, "batch", "layer")
INITIALIZATIONS = ("normal", "looks_linear", "fixup")
_SHARED = ("features", "classes", "width", "depth", "matrices", "normalization")


@dataclass(frozen=True)
class ResidualSpec:
    """What network to build.

    Attributes:
        features: input width.
        classes: output width.
        width: of every h.
        depth: number of blocks' matrices in all; with `matrices` = 2 there are depth/2 blocks.
        skip: factor on the block's own input; 0 makes a plain network.
        scale: a constant factor on every branch.
        factor: None, or the first value of a learnt factor on every branch, one number per block.
        gain: standard deviation of the blocks' weights × √width; √2 is He's for ReLU.
        normalization: None; "batch" normalises what each matrix of a branch returns, as ResNets do;
            "layer" normalises what the branch and the output layer read, as pre-LN transformers
            do.  Neither has a learnt scale and shift.
        matrices: in a branch, 1 or 2; with 2 it is φ(φ(h)·W₁)·W₂.
        initialization: "normal"; "looks_linear", mirrored orthogonal matrices with which a ReLU
            network computes a rotation at first (Balduzzi et al. 2017; gain has no say, no skip);
            "fixup", W₁ divided by √blocks and W₂ zero (Zhang et al. 2019, whose scalar biases and
            multipliers we leave out; two matrices).

    Raises:
        ValueError: a field out of its range; the message names it.
    """

    features: int
    classes: int
    width: int = 64
    depth: int = 100
    skip: float = 1.0
    scale: float = 1.0
    factor: float | None = None
    gain: float = 2**0.5
    normalization: str | None = None
    matrices: int = 1
    initialization: str = "normal"

    def __post_init__(self) -> None:
        for name in ("features", "classes", "width", "depth"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name, allowed in (
            ("normalization", NORMALIZATIONS),
            ("initialization", INITIALIZATIONS),
            ("matrices", (1, 2)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.depth % self.matrices:
            raise ValueError(f"matrices must divide depth, got {self.matrices} and {self.depth}")
        if self.initialization == "fixup" and self.matrices != 2:
            raise ValueError(f"initialization 'fixup' needs matrices=2, got {self.matrices}")
        if self.initialization == "looks_linear":
            if self.width % 2:
                raise ValueError(f"'looks_linear' needs an even width, got {self.width}")
            if self.skip:
                raise ValueError(
                    f"'looks_linear' is for networks without skips, got skip={self.skip!r}"
                )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.depth // self.matrices


def initial_weights(spec: ResidualSpec, seed: int | np.random.Generator = 0) -> dict:
    """Random initial weights of one network, float64.

    Returns:
        "stem" (features, width), "blocks" (blocks, matrices, width, width), "factor" (blocks,) and
        "readout" (width, classes).  Without a learnt factor, "factor" is 1.
    """
    rng, width = np.random.default_rng(seed), spec.width
    shape = (spec.blocks, spec.matrices, width, width)
    stem = rng.normal(size=(spec.features, width)) / np.sqrt(spec.features)
    blocks = rng.normal(size=shape) * spec.gain / np.sqrt(width)
    readout = rng.normal(size=(width, spec.classes)) / np.sqrt(width)
    if spec.initialization == "fixup":
        blocks[:, 0] /= np.sqrt(spec.blocks)
        blocks[:, 1] = 0
    if spec.initialization == "looks_linear":
        half = width // 2
        turns = np.stack([orthogonal(half, half, rng) for _ in range(spec.depth)])
        blocks = np.block([[turns, -turns], [-turns, turns]]).reshape(shape)
        stem[:, half:] = -stem[:, :half]
    factor = np.full(spec.blocks, 1.0 if spec.factor is None else spec.factor)
    return {"stem": stem, "blocks": blocks, "factor": factor, "readout": readout}


def stacked_weights(
    specs: Sequence[ResidualSpec], seeds: Iterable[int], dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Initial weights of several networks, one per specification and seed, for `sweep.fit`.

    Args:
        specs: one per member.
        seeds: as many; members with equal seeds and settings start at equal weights.
        dtype: "float32" or "float64".

    Returns:
        As `initial_weights`, each array with a leading axis of members.

    Raises:
        ValueError: see `check_alike`; or not as many seeds as specifications.
    """
    check_alike(specs)
    seeds = list(seeds)
    if len(seeds) != len(specs):
        raise ValueError(f"{len(specs)} specifications need as many seeds, got {len(seeds)}")
    members = [initial_weights(*pair) for pair in zip(specs, seeds, strict=True)]
    stacks = {name: np.stack([w[name] for w in members]) for name in members[0]}
    return {name: stack.astype(dtype, copy=False) for name, stack in stacks.items()}


def check_alike(specs: Sequence[ResidualSpec]) -> None:
    """Raise a ValueError unless all specifications can share one stack of arrays and one graph."""
    for name in _SHARED:
        values = {getattr(spec, name) for spec in specs}
        if len(values) != 1:
            raise ValueError(
                f"stacked networks must have the same {name}, got {sorted(map(str, values))}"
            )


def predicted_growth(
    spec: ResidualSpec, q0: float | np.ndarray = 1.0, batch: int | None = None
) -> float:
    """‖∂L/∂h₀‖ / ‖∂L/∂h_n‖ at initialisation in a wide network, from mean-field arguments.

    A branch whose weights have variance g²/width passes on g²/2 of the squared gradient.  The part
    that takes the skip adds to it, for the two are uncorrelated at first.  So a block multiplies
    the squared norm by skip² + (scale·factor)²·g²/2.  A normalised branch divides by the variance
    of what it reads: with a skip this is q₀ and what all blocks before have added, and the growth
    is a power of the depth (Yang and Schoenholz 2017).

    Args:
        spec: the network.
        q0: mean square of h₀; under layer normalisation it may be one per sample, (samples,).
        batch: samples that batch normalisation sees; None takes infinitely many.

    Returns:
        The ratio of the norms; its square is a mean over initial weights (and over samples).

    Raises:
        ValueError: a normalised branch that has two matrices or looks linear at first, for which no
            formula is here.

    Example:
        >>> predicted_growth(ResidualSpec(64, 10, depth=20))
        1024.0
    """
    power = spec.gain**2 / 2  # what a matrix and a ReLU leave of a mean square, either way
    strength = (spec.scale * (1.0 if spec.factor is None else spec.factor)) ** 2
    if spec.initialization == "looks_linear":
        if spec.normalization:
            raise ValueError(f"no prediction for 'looks_linear' with {spec.normalization} norm")
        return float(strength ** (spec.blocks / 2))  # a rotation, times a number
    if spec.normalization is None:
        through = 0.0 if spec.initialization == "fixup" else strength * power**spec.matrices
        return float((spec.skip**2 + through) ** (spec.blocks / 2))
    if spec.matrices == 2:
        raise ValueError("no prediction for normalised branches of two matrices")
    if spec.normalization == "batch":
        added, passed = 1.0, theory.normalization_growth("batch", "relu", batch) ** 2
    else:
        added, passed = power, power * theory.normalization_growth("layer", "relu") ** 2
    q, product = np.asarray(q0, float), 1.0
    for _ in range(spec.blocks):
        product = product * (spec.skip**2 + strength * passed / q)
        q = spec.skip**2 * q + strength * added
    return float(np.sqrt(np.mean(product)))


def variants(depth: int, *, features: int = 64, classes: int = 10, width: int = 64) -> dict:
    """The book's eleven networks of one depth and width, by name.

    "ReZero" is SkipInit too: in blocks without normalisation they differ in name only
    (Bachlechner et al. 2021; De and Smith 2020).  "zero γ" has one γ per block, not per unit.

    Returns:
        Name to `ResidualSpec`.
    """
    settings = {
        "plain, Glorot": {"skip": 0.0, "gain": 1.0},
        "plain, He": {"skip": 0.0},
        "plain, looks linear": {"skip": 0.0, "initialization": "looks_linear"},
        "plain, batch norm": {"skip": 0.0, "normalization": "batch"},
        "skip": {},
        "skip, batch norm": {"normalization": "batch"},
        "skip, layer norm": {"normalization": "layer"},
        "skip, scaled": {"scale": depth**-0.5},
        "skip, zero γ": {"normalization": "batch", "factor": 0.0},
        "ReZero": {"factor": 0.0},
        "Fixup": {"matrices": 2, "initialization": "fixup"},
    }
    return {
        name: ResidualSpec(features, classes, width, depth, **setting)
        for name, setting in settings.items()
    }


def alike(specs: Mapping[str, ResidualSpec], most: int | None = None) -> list[list[str]]:
    """The names, grouped so that each group can share one stack of arrays and one graph.

    Args:
        specs: what to group, by name.
        most: names in a group; None for no limit.  Smaller groups train in less memory and take
            somewhat longer.

    Returns:
        Groups of names; every name is in one of them.

    Raises:
        ValueError: `most` is less than 1.
    """
    if most is not None and most < 1:
        raise ValueError(f"most must be at least 1 or None, got {most!r}")
    groups: dict[tuple, list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault(tuple(getattr(spec, field) for field in _SHARED), []).append(name)
    size = most or max(len(specs), 1)
    return [g[first : first + size] for g in groups.values() for first in range(0, len(g), size)]


def stretched(spec: ResidualSpec, r: float) -> ResidualSpec:
    """The same network with every block's result times r.

    Without normalisation n blocks then multiply h_n and the Jacobian from h₀ to h_n by rⁿ, and all
    directions stay.
    """
    return replace(spec, skip=r * spec.skip, scale=r * spec.scale)


def cosines(
    specs: Sequence[ResidualSpec], weights: Mapping[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    """Cosines between the h of different samples after the last block.

    Args:
        specs: one per member.
        weights: from `stacked_weights`.
        x: inputs (samples, features), for all members; batch normalisation takes them for a batch.

    Returns:
        (members, pairs), one for each pair of different samples.
    """
    check_alike(specs)
    kind = specs[0].normalization
    keep, times = np.array([(spec.skip, spec.scale) for spec in specs]).T[..., None, None]
    h = x @ weights["stem"]  # (members, samples, width)
    for block in range(specs[0].blocks):
        z = _normalize(h, 2) if kind == "layer" else h
        for matrix in range(specs[0].matrices):
            z = np.maximum(z, 0) @ weights["blocks"][:, block, matrix]
            z = _normalize(z, 1) if kind == "batch" else z
        h = keep * h + times * weights["factor"][:, block, None, None] * z
    h = h / np.linalg.norm(h, axis=2, keepdims=True)
    first, second = np.triu_indices(len(x), 1)
    return (h @ h.transpose(0, 2, 1))[:, first, second]


def _normalize(z: np.ndarray, axis: int) -> np.ndarray:
    variance = z.var(axis, keepdims=True)
    return (z - z.mean(axis, keepdims=True)) / np.sqrt(variance + EPSILON)
