"""The plan of a bottleneck ResNet, for both frameworks: its layers, their shapes, initial weights.

`ResNetSpec()` has ResNet-50's layers (He et al. 2016) at an eighth of its width, with a first layer
for 8×8 pixels; `ResNetSpec.full()` is ResNet-50 itself.  The same convolutions can be had without
skips, without normalisation and with a leak, so that each part's share can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXPANSION = 4
"""A bottleneck block's output has this many times as many channels as its 3×3 convolution."""


@dataclass(frozen=True)
class ResNetSpec:
    """What network to build.

    A block is three convolutions: 1×1 down to few channels (with the stage's stride), 3×3, 1×1 up
    to four times as many.  Each is followed by batch normalisation; the activation comes after the
    first, after the second, and after the sum of the third with the block's input.  Where the
    shapes differ, a normalised 1×1 convolution (a projection) fits the input to the sum.

    Attributes:
        classes: outputs.
        channels: of the input images.
        width: channels of the first stage's 3×3 convolutions; each stage doubles them.
        blocks: blocks of each stage.
        stem: "small", a 3×3 convolution, or "large", 7×7 with stride 2 and a maximum over 3×3 with
            stride 2: ResNet-50's own, for images of 224×224 (and of 32×32 at the least).
        skip: whether a block adds its input.  Without, there are no projections either.
        normalization: "batch" or None.
        slope: of the activation for negative inputs; 0 is ReLU.
        zero_scale: whether the last normalisation of each block starts with scale 0, so that every
            block of a stage but the first starts as the identity (Goyal et al. 2017).
        momentum: share of the newest batch in the running statistics.  0.1 is PyTorch's default,
            0.01 is what Keras's default, 0.99, means.
        epsilon: added to the variance.

    Raises:
        ValueError: a field out of its range; the message names it.
    """

    classes: int = 10
    channels: int = 1
    width: int = 8
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    stem: str = "small"
    skip: bool = True
    normalization: str | None = "batch"
    slope: float = 0.0
    zero_scale: bool = False
    momentum: float = 0.1
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name, numbers in (
            ("classes", [self.classes]),
            ("channels", [self.channels]),
            ("width", [self.width]),
            ("blocks", self.blocks or [0]),
        ):
            if not all(isinstance(n, int | np.integer) and n >= 1 for n in numbers):
                got = getattr(self, name)
                raise ValueError(f"{name} must be made of integers of at least 1, got {got!r}")
        for name, allowed in (("stem", ("small", "large")), ("normalization", ("batch", None))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, low, high in (("slope", 0, 1), ("momentum", 0, 1)):
            if not low <= getattr(self, name) <= high:
                got = getattr(self, name)
                raise ValueError(f"{name} must be a number from {low} to {high}, got {got!r}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be a number > 0, got {self.epsilon!r}")
        if self.zero_scale and not (self.skip and self.normalization):
            raise ValueError(
                "zero_scale needs skip=True and normalization='batch': without them a scale of 0 "
                f"blocks the signal; got skip={self.skip!r}, normalization={self.normalization!r}"
            )

    @classmethod
    def full(cls, classes: int = 1000, channels: int = 3, **changes: object) -> ResNetSpec:
        """ResNet-50 as published: width 64 and the large stem."""
        return cls(**{"classes": classes, "channels": channels, "width": 64, "stem": "large"}
                   | changes)  # fmt: skip


@dataclass(frozen=True)
class Conv:
    """One convolution, without bias, padded so that stride 1 keeps the size.

    Attributes:
        name: of its weights, "stage1.block0.conv2".
        kernel: side of its square kernel.
        fan: channels in and out.
        stride: step from one output pixel to the next.
    """

    name: str
    kernel: int
    fan: tuple[int, int]
    stride: int = 1


@dataclass(frozen=True)
class Block:
    """Three convolutions and, where the shapes differ and there are skips, a projection."""

    convs: tuple[Conv, Conv, Conv]
    project: Conv | None


def stem(spec: ResNetSpec) -> Conv:
    """The first convolution."""
    kernel, stride = (7, 2) if spec.stem == "large" else (3, 1)
    return Conv("stem", kernel, (spec.channels, spec.width), stride)


def blocks(spec: ResNetSpec) -> list[Block]:
    """The blocks, from the first to the last."""
    plan, fan_in = [], spec.width
    for stage, number in enumerate(spec.blocks):
        inner = spec.width * 2**stage
        outer = EXPANSION * inner
        for index in range(number):
            name = f"stage{stage}.block{index}"
            stride = 2 if stage and not index else 1
            convs = (
                Conv(f"{name}.conv0", 1, (fan_in, inner), stride),
                Conv(f"{name}.conv1", 3, (inner, inner)),
                Conv(f"{name}.conv2", 1, (inner, outer)),
            )
            fits = fan_in == outer and stride == 1
            project = None if fits else Conv(f"{name}.project", 1, (fan_in, outer), stride)
            plan.append(Block(convs, project if spec.skip else None))
            fan_in = outer
    return plan


def convolutions(spec: ResNetSpec) -> list[Conv]:
    """Every convolution, in the order of the plan."""
    found = [stem(spec)]
    for block in blocks(spec):
        found += [*block.convs, *([block.project] if block.project else [])]
    return found


def depth(spec: ResNetSpec) -> int:
    """Weighted layers on the way through the blocks, which give a ResNet its number.

    The stem, three a block and the output layer; projections lie beside the way and do not count.

    Example:
        >>> depth(ResNetSpec.full())
        50
    """
    return 2 + 3 * sum(spec.blocks)


def features(spec: ResNetSpec) -> int:
    """Channels that the output layer reads, each a mean over the pixels."""
    return EXPANSION * spec.width * 2 ** (len(spec.blocks) - 1)


def shapes(spec: ResNetSpec) -> dict[str, tuple[int, ...]]:
    """Name to shape of every parameter; kernels are (height, width, in, out), as in Keras."""
    found: dict[str, tuple[int, ...]] = {}
    for conv in convolutions(spec):
        found[f"{conv.name}.weight"] = (conv.kernel, conv.kernel, *conv.fan)
        if spec.normalization:
            found[f"{conv.name}.scale"] = found[f"{conv.name}.shift"] = conv.fan[1:]
    found["output.weight"] = (features(spec), spec.classes)
    found["output.bias"] = (spec.classes,)
    return found


def parameters(spec: ResNetSpec) -> int:
    """Number of trainable numbers.

    Example:
        >>> parameters(ResNetSpec.full())
        25557032
    """
    return sum(int(np.prod(shape)) for shape in shapes(spec).values())


def initial_weights(spec: ResNetSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """He's initial weights (He et al. 2015), the same for both frameworks.

    Every layer draws from a generator of its own, so that networks which differ in their skips, in
    their normalisation or in their activation's slope share the draws of the layers they share.

    Args:
        spec: the network.
        seed: of the draw.

    Returns:
        Name to float32 array, shaped and ordered as in `shapes`.  Kernels are normal with standard
        deviation √(2/((1 + slope²)·fan-in)); the output layer's weights have 1/√fan-in.
    """
    names = [conv.name for conv in convolutions(ResNetSpec(blocks=spec.blocks))]
    weights = {}
    for name, shape in shapes(spec).items():
        layer, part = name.rsplit(".", 1)
        if part == "weight":
            number = len(names) if layer == "output" else names.index(layer)
            rng = np.random.default_rng([seed, number])
            gain = 1.0 if layer == "output" else np.sqrt(2 / (1 + spec.slope**2))
            deviation = gain / np.sqrt(np.prod(shape[:-1]))
            weights[name] = (deviation * rng.standard_normal(shape)).astype(np.float32)
        else:
            zero = part != "scale" or (spec.zero_scale and layer.endswith("conv2"))
            weights[name] = np.full(shape, 0 if zero else 1, np.float32)
    return weights


def images(x: np.ndarray, *, enlarge: int = 1, channels: int = 1) -> np.ndarray:
    """Rows of pixels as square images.

    Args:
        x: (samples, side²).
        enlarge: repeat every pixel this many times in both directions.
        channels: copies of the image, for networks that expect colours.

    Returns:
        (samples, side·enlarge, side·enlarge, channels), channels last, as in Keras.

    Raises:
        ValueError: rows that are no squares.
    """
    side = int(np.sqrt(x.shape[-1]))
    if x.ndim != 2 or side**2 != x.shape[1]:
        raise ValueError(f"expected (samples, side²), got shape {x.shape}")
    image = x.reshape(-1, side, side, 1).repeat(enlarge, 1).repeat(enlarge, 2)
    return image.repeat(channels, 3)
