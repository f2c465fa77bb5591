"""Initial weights fitted to the data, in PyTorch.  `gradlab.keras.initialize` is its twin."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from gradlab import mlp

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def lsuv_(
    model: nn.Module,
    x: torch.Tensor,
    *,
    variance: float = 1.0,
    tolerance: float = 0.01,
    iterations: int = 10,
    orthogonal: bool = True,
    seed: int = 0,
) -> dict[str, float]:
    """Layer-sequential unit variance: scale each layer's weights until its output has variance 1.

    In the order in which a batch meets the linear and convolutional layers, make the weights
    orthogonal, then divide them by the standard deviation of the layer's output, before any
    activation (Mishkin and Matas 2016).  Biases stay.  A layer that is used several times is fitted
    at its first use, and one that the batch never meets is left as it is.

    The passes are made in training mode, in which batch normalisation uses the batch.  Modes,
    running statistics and random state are afterwards what they were.

    Args:
        model: any module; `Linear` and `Conv1d` to `Conv3d` within it are fitted, in place.
        x: a batch, the model's only argument.
        variance: what every layer's output shall have, > 0.
        tolerance: accepted relative error of the variance.
        iterations: most times that one layer is scaled.
        orthogonal: whether to replace the weights by orthogonal ones first.
        seed: of the orthogonal weights.

    Returns:
        Name of each fitted layer to the variance of its output, in order of use.

    Raises:
        ValueError: a number out of range, no layer to fit, or a layer whose output has no finite
            variance above 0 (the message names it); the model is then as it was.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    variances: dict[str, float] = {}

    def note(name: str):
        def hook(module: nn.Module, _: object, output: torch.Tensor) -> None:
            variances.setdefault(name, output.double().var(correction=0).item())

        return hook

    def measure(name: str) -> float:
        variances.clear()
        with torch.random.fork_rng():
            model(x)
        return variances.get(name, np.nan)

    def scale(name: str, factor: float) -> None:
        layers[name].weight *= factor

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    model.train()
    try:
        measure("")
        order = list(variances)
        if not order:
            raise ValueError(
                f"there is nothing to fit: this batch met no Linear or Conv layer of the "
                f"{type(model).__name__}"
            )
        rng = np.random.default_rng(seed)
        for name in order if orthogonal else ():
            _make_orthogonal(layers[name].weight, rng)
        return mlp.fit_variances(
            order, measure, scale, variance=variance, tolerance=tolerance, iterations=iterations
        )
    except BaseException:
        for name, weight in weights.items():
            layers[name].weight.copy_(weight)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def _make_orthogonal(weight: torch.Tensor, rng: np.random.Generator) -> None:
    """Orthogonal weights, equal to Keras's, whose kernels are (…, fan-in, fan-out)."""
    out, *rest = weight.shape  # (out, in, height, width)
    inputs, *window = rest
    matrix = mlp.orthogonal(int(np.prod(rest)), out, rng).reshape(*window, inputs, out)
    kernel = torch.from_numpy(np.moveaxis(matrix, (-1, -2), (0, 1)).copy())
    weight.copy_(kernel)
