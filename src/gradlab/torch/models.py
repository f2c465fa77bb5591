"""The book's networks in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gradlab import mlp

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
}
"""PyTorch's functions for the names of `gradlab.theory.activation_names`."""

# Our name of a parameter's last part, by the kind of layer, in PyTorch's terms.
_PARTS = {"weight": "weight", "bias": "bias"}
_NORM_PARTS = {"scale": "weight", "shift": "bias"}


class MLP(nn.Module):
    """The network of a `gradlab.mlp.MLPSpec`.

    Args:
        spec: the network.
        seed: of the initial weights, which equal Keras's and NumPy's for the same seed.
        dtype: of the parameters.

    Shapes:
        input (samples, features), output (samples, classes): logits.
    """

    def __init__(
        self, spec: mlp.MLPSpec, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.spec = spec
        for name, (fan_in, fan_out) in zip(mlp.layer_names(spec), spec.sizes, strict=True):
            setattr(self, name, nn.Linear(fan_in, fan_out, bias=spec.bias, dtype=dtype))
            if spec.normalization and name != "output":
                setattr(self, f"{name}_norm", _normalization(spec, fan_out, dtype))
        load_weights(self, mlp.initial_weights(spec, seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spec, activate = self.spec, ACTIVATIONS[self.spec.activation]
        for layer in range(spec.depth):
            z = getattr(self, f"hidden{layer}")(x)
            if spec.normalization:
                z = getattr(self, f"hidden{layer}_norm")(z)
            branch = activate(z)
            x = x + spec.skip * branch if spec.has_skip(layer) else branch
        return self.output(x)


def _normalization(spec: mlp.MLPSpec, units: int, dtype: torch.dtype) -> nn.Module:
    given = {"eps": mlp.EPSILON, "dtype": dtype}
    match spec.normalization:
        case "batch":
            return nn.BatchNorm1d(units, **given)
        case "layer":
            return nn.LayerNorm(units, **given)
    return nn.GroupNorm(spec.groups, units, **given)


def _parameters(model: MLP) -> dict[str, nn.Parameter]:
    """The model's parameters under the names that both frameworks share."""
    named = {}
    for layer in mlp.layer_names(model.spec):
        for ours, theirs in _PARTS.items():
            named[f"{layer}.{ours}"] = getattr(getattr(model, layer), theirs)
        for ours, theirs in _NORM_PARTS.items():
            norm = getattr(model, f"{layer}_norm", None)
            named[f"{layer}.{ours}"] = getattr(norm, theirs, None)
    return {name: parameter for name, parameter in named.items() if parameter is not None}


def _ours(name: str, value: torch.Tensor) -> np.ndarray:
    """As an array in our orientation: matrices are (fan_in, fan_out), PyTorch's are (out, in)."""
    array = value.detach().cpu().numpy()
    return (array.T if name.endswith(".weight") else array).copy()


def load_weights(model: MLP, weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into a model, in place.

    Args:
        model: an `MLP`.
        weights: as `gradlab.mlp.initial_weights` or `get_weights` of either framework give them.

    Raises:
        ValueError: a missing, unexpected or misshapen array; the message names each.
    """
    parameters = _parameters(model)
    mlp.check_weights(weights, {name: _ours(name, p).shape for name, p in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            array = np.asarray(weights[name])
            parameter.copy_(torch.from_numpy(array.T if name.endswith(".weight") else array))


def get_weights(model: MLP) -> dict[str, np.ndarray]:
    """The model's weights as arrays; the inverse of `load_weights`."""
    return {name: _ours(name, parameter) for name, parameter in _parameters(model).items()}


def gradients(model: MLP, x: np.ndarray, y: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Cross-entropy loss and its gradients, in training mode.

    It touches neither `.grad` nor the running statistics of batch normalisation.

    Args:
        model: an `MLP`.
        x: (samples, features).
        y: (samples,), class numbers.

    Returns:
        The loss, and a dict from name to gradient, shaped like `get_weights`.
    """
    parameters = _parameters(model)
    inputs = torch.as_tensor(x, dtype=model.output.weight.dtype)
    was_training = model.training
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = torch.func.functional_call(model, buffers, inputs)
    model.train(was_training)
    loss = F.cross_entropy(logits, torch.as_tensor(y, dtype=torch.long))
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), {
        name: _ours(name, grad) for name, grad in zip(parameters, grads, strict=True)
    }
