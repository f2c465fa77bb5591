"""The small convolutional network that `gradlab train` calls `nn`, and how weights are drawn.

Two convolutions along the features, two dense layers: PyTorch and Keras build it from a
`ConvNetSpec` and load the same weights, a dict from name to array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gradlab.mlp import orthogonal

SCHEMES = ("he", "glorot", "orthogonal", "zeros")
"""How `draw` can fill a weight."""


@dataclass(frozen=True)
class ConvNetSpec:
    """What network to build.

    The features are taken as a signal of one channel.  Two convolutions of three taps (the ends
    padded with zeros), each with a ReLU, then a dense layer with a ReLU and one that gives logits.

    Attributes:
        features: length of the signal.
        classes: output width.
        channels: of the two convolutions.
        hidden: width of the first dense layer.
    """

    features: int
    classes: int
    channels: tuple[int, int] = (16, 32)
    hidden: int = 64

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array by name, (taps, in, out) or (in, out)."""
        first, second = self.channels
        kernels = {
            "conv0": (3, 1, first),
            "conv1": (3, first, second),
            "hidden": (self.features * second, self.hidden),
            "output": (self.hidden, self.classes),
        }
        shapes = {}
        for layer, kernel in kernels.items():
            shapes[f"{layer}.weight"], shapes[f"{layer}.bias"] = kernel, kernel[-1:]
        return shapes


def draw(shape: tuple[int, ...], scheme: str, rng: np.random.Generator) -> np.ndarray:
    """Random initial values of one weight, float64.

    Args:
        shape: (…, fan-in channels, fan-out channels); what comes before counts towards both fans.
        scheme: "he" (standard deviation √(2/fan-in)), "glorot" (√(2/(fan-in + fan-out))),
            "orthogonal" (√2 times orthonormal rows or columns) or "zeros".
        rng: to draw from.

    Raises:
        ValueError: another scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    if scheme == "zeros":
        return np.zeros(shape)
    fan_in = int(np.prod(shape[:-1]))
    if scheme == "orthogonal":
        return np.sqrt(2) * orthogonal(fan_in, shape[-1], rng).reshape(shape)
    fan_out = shape[-1] * int(np.prod(shape[:-2]))
    fans = fan_in if scheme == "he" else fan_in + fan_out
    return rng.normal(0, np.sqrt(2 / fans), shape)


def initial_weights(
    shapes: Mapping[str, tuple[int, ...]], scheme: str, seed: int
) -> dict[str, np.ndarray]:
    """Random initial weights for named shapes: weights by `draw`, scales 1, biases 0.

    Args:
        shapes: name to shape, as `ConvNetSpec.shapes`; names end in ".weight", ".scale" or ".bias".
        scheme: see `draw`.
        seed: of the draw.

    Raises:
        ValueError: a name with another ending.
    """
    unknown = [name for name in shapes if not name.endswith((".weight", ".scale", ".bias"))]
    if unknown:
        raise ValueError(f"names must end in .weight, .scale or .bias, got {', '.join(unknown)}")
    rng = np.random.default_rng(seed)
    return {
        name: draw(shape, scheme, rng)
        if name.endswith(".weight")
        else np.full(shape, float(name.endswith(".scale")))
        for name, shape in shapes.items()
    }
