"""The multilayer perceptron of the book: its specification and its initial weights, in NumPy.

PyTorch, Keras and NumPy build the same network from an `MLPSpec`, and load the same weights:
a dict from name to array, with matrices of shape (fan_in, fan_out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gradlab import theory

NORMALIZATIONS = (None, "batch", "layer", "group")
INITIALIZATIONS = ("normal", "orthogonal", "zeros")
EPSILON = 1e-5
"""ε of the normalisation layers, the same on both sides (the frameworks' defaults differ)."""


@dataclass(frozen=True)
class MLPSpec:
    """What network to build.

    The network is `depth` hidden layers and a linear output layer.  A hidden layer is
    `activation(normalization(x @ weight + bias))`, to which `skip` adds its own input, scaled:
    `x + skip · layer(x)`, wherever both have the same width.

    Attributes:
        features: input width.
        classes: output width.
        width: width of every hidden layer.
        depth: number of hidden layers, ≥ 0.
        activation: a name that `theory.activation` knows.
        gain: standard deviation of a hidden layer's weights × √fan-in; None takes the
            activation's critical gain (√2 for ReLU).
        output_gain: the same for the output layer.
        initialization: "normal", "orthogonal" (gain × orthonormal) or "zeros".
        normalization: None, "batch", "layer" or "group", before the activation.
        skip: None for no skip connections, else the factor on the layer's branch.
        bias: whether layers have biases; they start at 0.
        groups: number of groups that the units of a layer form under "group" normalisation.

    Raises:
        ValueError: a field out of its range; the message names it.
    """

    features: int
    classes: int
    width: int = 64
    depth: int = 2
    activation: str = "relu"
    gain: float | None = None
    output_gain: float = 1.0
    initialization: str = "normal"
    normalization: str | None = None
    skip: float | None = None
    bias: bool = True
    groups: int = 4

    def __post_init__(self) -> None:
        for name, least in (("features", 1), ("classes", 1), ("width", 1), ("depth", 0)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.activation not in theory.activation_names():
            raise ValueError(
                f"activation must be one of {theory.activation_names()}, got {self.activation!r}"
            )
        if self.gain is not None and not self.gain >= 0:
            raise ValueError(f"gain must be a number ≥ 0 or None, got {self.gain!r}")
        for name, allowed in (
            ("normalization", NORMALIZATIONS),
            ("initialization", INITIALIZATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not isinstance(self.groups, int | np.integer) or self.groups < 1:
            raise ValueError(f"groups must be an integer of at least 1, got {self.groups!r}")
        if self.normalization == "group" and self.width % self.groups:
            raise ValueError(
                f"groups must divide the width, got {self.groups} groups of {self.width} units"
            )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(fan_in, fan_out) of every linear layer, the output layer last."""
        widths = [self.features, *[self.width] * self.depth, self.classes]
        return list(pairwise(widths))

    def has_skip(self, layer: int) -> bool:
        """Whether hidden layer number `layer` adds its input."""
        fan_in, fan_out = self.sizes[layer]
        return self.skip is not None and fan_in == fan_out


def layer_names(spec: MLPSpec) -> list[str]:
    """Names of the linear layers: "hidden0", "hidden1", …, "output"."""
    return [*(f"hidden{i}" for i in range(spec.depth)), "output"]


def orthogonal(fan_in: int, fan_out: int, seed: int | np.random.Generator = 0) -> np.ndarray:
    """A random matrix whose singular values are all 1 (Saxe et al. 2014).

    Args:
        fan_in, fan_out: its shape.
        seed: a seed, or a generator to draw from.

    Returns:
        (fan_in, fan_out), float64: the shorter side's rows or columns are orthonormal, and the draw
        is uniform over all such matrices.
    """
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.normal(size=(max(fan_in, fan_out), min(fan_in, fan_out))))
    q = q * np.sign(np.diag(r))  # makes the draw uniform
    return q if fan_in >= fan_out else q.T


def _matrix(spec: MLPSpec, shape: tuple[int, int], gain: float, rng) -> np.ndarray:
    fan_in, fan_out = shape
    if spec.initialization == "zeros":
        return np.zeros(shape)
    if spec.initialization == "orthogonal":
        return gain * orthogonal(fan_in, fan_out, rng)
    return rng.normal(size=(max(shape), min(shape))).reshape(shape) * gain / np.sqrt(fan_in)


def initial_weights(spec: MLPSpec, seed: int | np.random.Generator = 0) -> dict[str, np.ndarray]:
    """Random initial weights of a network, float64.

    Args:
        spec: the network.
        seed: a seed, or a generator to draw from.

    Returns:
        "hidden0.weight" (fan_in, fan_out), "hidden0.bias" (fan_out,), for a normalised layer
        "hidden0.scale" and "hidden0.shift" (fan_out,), and so on to "output.bias".
    """
    rng = np.random.default_rng(seed)
    gain = theory.critical_gain(spec.activation) if spec.gain is None else spec.gain
    weights: dict[str, np.ndarray] = {}
    for name, shape in zip(layer_names(spec), spec.sizes, strict=True):
        is_output = name == "output"
        weights[f"{name}.weight"] = _matrix(
            spec, shape, spec.output_gain if is_output else gain, rng
        )
        if spec.bias:
            weights[f"{name}.bias"] = np.zeros(shape[1])
        if spec.normalization and not is_output:
            weights[f"{name}.scale"] = np.ones(shape[1])
            weights[f"{name}.shift"] = np.zeros(shape[1])
    return weights


def fit_variances(
    names: Iterable[str],
    measure: Callable[[str], float],
    scale: Callable[[str, float], None],
    *,
    variance: float = 1.0,
    tolerance: float = 0.01,
    iterations: int = 10,
) -> dict[str, float]:
    """Layer by layer, scale the weights until the output has a given variance.

    This is the loop of `lsuv_` in `gradlab.torch.initialize` and `gradlab.keras.initialize`.

    Args:
        names: the layers, in the order in which a batch meets them.
        measure: a layer's name to the variance of its output.
        scale: multiplies a layer's weights by a number.
        variance: what each output shall have, > 0.
        tolerance: accepted relative error, > 0.
        iterations: most times that one layer is scaled, ≥ 1.

    Returns:
        Name to the variance that the layer ended with.

    Raises:
        ValueError: a number out of range, or a variance that is 0 or not finite.
    """
    for name, value in (("variance", variance), ("tolerance", tolerance)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations!r}")
    fitted = {}
    for name in names:
        for attempt in range(iterations + 1):
            measured = measure(name)
            if not (np.isfinite(measured) and measured > 0):
                raise ValueError(
                    f"the output of {name!r} has variance {measured} on this batch: "
                    "no factor on its weights can mend that"
                )
            if abs(measured / variance - 1) <= tolerance or attempt == iterations:
                break
            scale(name, float(np.sqrt(variance / measured)))
        fitted[name] = measured
    return fitted


def stacked_weights(spec: MLPSpec, seeds: Iterable[int]) -> list[np.ndarray]:
    """The matrices of several networks, one per seed, stacked for `sweep.train`.

    Args:
        spec: the network; it must have no biases and no normalisation.
        seeds: one per member.

    Returns:
        One float32 array (members, fan_in, fan_out) per layer.

    Raises:
        ValueError: a specification whose weights are more than matrices.
    """
    if spec.bias or spec.normalization:
        raise ValueError(
            "stacked networks have matrices only: expected bias=False and normalization=None, got "
            f"bias={spec.bias!r} and normalization={spec.normalization!r}"
        )
    members = [initial_weights(spec, seed).values() for seed in seeds]
    return [np.stack(layer).astype(np.float32) for layer in zip(*members, strict=True)]


def check_weights(weights: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise a ValueError that names every array which is missing, unexpected or misshapen."""
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {np.shape(weights[name])}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and np.shape(weights[name]) != shape
    ]
    if problems:
        raise ValueError("these weights do not fit the network: " + "; ".join(problems))
