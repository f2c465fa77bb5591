"""The convolutional network of `gradlab train` in Keras."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np

from gradlab.convnet import ConvNetSpec
from gradlab.mlp import check_weights


class ConvNet(keras.Model):
    """The network of a `ConvNetSpec`.

    Args:
        spec: the network.
        weights: as `gradlab.convnet.initial_weights` gives them.
        dtype: of the layers, a type or a policy such as "mixed_float16".

    Shapes:
        input (samples, features), output (samples, classes): logits.
    """

    def __init__(
        self, spec: ConvNetSpec, weights: Mapping[str, np.ndarray], dtype: str = "float32"
    ) -> None:
        super().__init__(dtype=dtype)
        self.spec = spec
        first, second = spec.channels
        given = {"activation": "relu", "dtype": dtype}
        self.conv0 = keras.layers.Conv1D(first, 3, padding="same", name="conv0", **given)
        self.conv1 = keras.layers.Conv1D(second, 3, padding="same", name="conv1", **given)
        self.hidden = keras.layers.Dense(spec.hidden, name="hidden", **given)
        self.logits = keras.layers.Dense(spec.classes, name="output", dtype=dtype)
        self(keras.ops.zeros((1, spec.features)))
        load_weights(self, weights)

    def call(self, x):
        x = self.conv1(self.conv0(x[..., None]))
        return self.logits(self.hidden(keras.ops.reshape(x, (-1, x.shape[1] * x.shape[2]))))


def _variables(model: ConvNet) -> dict[str, keras.Variable]:
    """The model's variables under the names that both frameworks share."""
    layers = {
        "conv0": model.conv0,
        "conv1": model.conv1,
        "hidden": model.hidden,
        "output": model.logits,
    }
    named = {}
    for name, layer in layers.items():
        named[f"{name}.weight"], named[f"{name}.bias"] = layer.kernel, layer.bias
    return named


def load_weights(model: ConvNet, weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into a model, in place.

    Raises:
        ValueError: a missing, unexpected or misshapen array; the message names each.
    """
    check_weights(weights, model.spec.shapes)
    for name, variable in _variables(model).items():
        variable.assign(np.asarray(weights[name]).astype(variable.dtype))


def get_weights(model: ConvNet) -> dict[str, np.ndarray]:
    """The model's weights as arrays; the inverse of `load_weights`."""
    return {name: variable.numpy() for name, variable in _variables(model).items()}
