"""The convolutional network of `gradlab train` in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gradlab.convnet import ConvNetSpec
from gradlab.mlp import check_weights


class ConvNet(nn.Module):
    """The network of a `ConvNetSpec`.

    Args:
        spec: the network.
        weights: as `gradlab.convnet.initial_weights` gives them.
        dtype: of the parameters.

    Shapes:
        input (samples, features), output (samples, classes): logits.
    """

    def __init__(
        self,
        spec: ConvNetSpec,
        weights: Mapping[str, np.ndarray],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        first, second = spec.channels
        self.conv0 = nn.Conv1d(1, first, 3, padding=1, dtype=dtype)
        self.conv1 = nn.Conv1d(first, second, 3, padding=1, dtype=dtype)
        self.hidden = nn.Linear(spec.features * second, spec.hidden, dtype=dtype)
        self.output = nn.Linear(spec.hidden, spec.classes, dtype=dtype)
        self.spec = spec
        load_weights(self, weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(F.relu(self.conv0(x[:, None]))))
        return self.output(F.relu(self.hidden(x.flatten(1))))


def _turned(spec: ConvNetSpec, name: str, array: np.ndarray) -> np.ndarray:
    """From our orientation to PyTorch's, which has the fan-out first and the taps last."""
    if name == "hidden.weight":  # its inputs: (feature, channel) here, (channel, feature) there
        array = array.reshape(spec.features, spec.channels[1], -1)
        return array.transpose(2, 1, 0).reshape(spec.hidden, -1)
    return array.T


def load_weights(model: ConvNet, weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into a model, in place.

    Raises:
        ValueError: a missing, unexpected or misshapen array; the message names each.
    """
    check_weights(weights, model.spec.shapes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            turned = _turned(model.spec, name, np.asarray(weights[name]))
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(turned)))


def get_weights(model: ConvNet) -> dict[str, np.ndarray]:
    """The model's weights as arrays; the inverse of `load_weights`."""
    spec, found = model.spec, {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().cpu().numpy()
        if name == "hidden.weight":
            array = array.reshape(spec.hidden, spec.channels[1], spec.features)
            found[name] = array.transpose(2, 1, 0).reshape(-1, spec.hidden).copy()
        else:
            found[name] = array.T.copy()
    return found
