"""The book's networks in Keras."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf
from keras import activations

from gradlab import mlp


# TensorFlow's own kernels for these two hold a constant in float32, which limits a float64
# network to an accuracy of 1e-9.  (Keras's leak is 0.2 by default; 0.01 is PyTorch's.)
def _leaky_relu(x: tf.Tensor) -> tf.Tensor:
    return tf.where(x > 0, x, tf.constant(0.01, x.dtype) * x)


def _gelu(x: tf.Tensor) -> tf.Tensor:
    return x * (1 + tf.math.erf(x / tf.cast(np.sqrt(2), x.dtype))) / 2


ACTIVATIONS: dict[str, Callable] = {
    "linear": activations.linear,
    "relu": activations.relu,
    "leaky_relu": _leaky_relu,
    "tanh": activations.tanh,
    "sigmoid": activations.sigmoid,
    "gelu": _gelu,
    "silu": activations.silu,
    "softplus": activations.softplus,
    "elu": activations.elu,
    "selu": activations.selu,
}
"""Keras's functions for the names of `gradlab.theory.activation_names`."""

# Our name of a parameter's last part, by the kind of layer, in Keras's terms.
_PARTS = {"weight": "kernel", "bias": "bias"}
_NORM_PARTS = {"scale": "gamma", "shift": "beta"}


class MLP(keras.Model):
    """The network of a `gradlab.mlp.MLPSpec`.

    Args:
        spec: the network.
        seed: of the initial weights, which equal PyTorch's and NumPy's for the same seed.
        dtype: of the parameters.

    Shapes:
        input (samples, features), output (samples, classes): logits.
    """

    def __init__(self, spec: mlp.MLPSpec, seed: int = 0, dtype: str = "float32") -> None:
        super().__init__(dtype=dtype)
        self.spec = spec
        for name, (fan_in, fan_out) in zip(mlp.layer_names(spec), spec.sizes, strict=True):
            dense = keras.layers.Dense(fan_out, use_bias=spec.bias, name=name, dtype=dtype)
            dense.build((None, fan_in))
            setattr(self, "_output_layer" if name == "output" else name, dense)
            if spec.normalization and name != "output":
                norm = _normalization(spec, epsilon=mlp.EPSILON, name=f"{name}_norm", dtype=dtype)
                norm.build((None, fan_out))
                setattr(self, f"{name}_norm", norm)
        self.built = True
        load_weights(self, mlp.initial_weights(spec, seed))

    def call(self, x, training: bool = False):
        """Logits of a batch; `training` matters to batch normalisation."""
        spec, activate = self.spec, ACTIVATIONS[self.spec.activation]
        for layer in range(spec.depth):
            z = getattr(self, f"hidden{layer}")(x)
            if spec.normalization:
                z = getattr(self, f"hidden{layer}_norm")(z, training=training)
            branch = activate(z)
            x = x + spec.skip * branch if spec.has_skip(layer) else branch
        return self.output_layer(x)

    @property
    def output_layer(self) -> keras.layers.Layer:
        """The linear output layer (Keras keeps the name `output` for itself)."""
        return self._output_layer


def _normalization(spec: mlp.MLPSpec, **given: object) -> keras.layers.Layer:
    match spec.normalization:
        case "batch":
            return keras.layers.BatchNormalization(**given)
        case "layer":
            return keras.layers.LayerNormalization(**given)
    return keras.layers.GroupNormalization(spec.groups, **given)


def _parameters(model: MLP) -> dict[str, keras.Variable]:
    """The model's trainable variables under the names that both frameworks share."""
    named = {}
    for name in mlp.layer_names(model.spec):
        layer = model.output_layer if name == "output" else getattr(model, name)
        for ours, theirs in _PARTS.items():
            named[f"{name}.{ours}"] = getattr(layer, theirs)
        for ours, theirs in _NORM_PARTS.items():
            named[f"{name}.{ours}"] = getattr(getattr(model, f"{name}_norm", None), theirs, None)
    return {name: variable for name, variable in named.items() if variable is not None}


def load_weights(model: MLP, weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into a model, in place.

    Args:
        model: an `MLP`.
        weights: as `gradlab.mlp.initial_weights` or `get_weights` of either framework give them.

    Raises:
        ValueError: a missing, unexpected or misshapen array; the message names each.
    """
    variables = _parameters(model)
    mlp.check_weights(weights, {name: tuple(v.shape) for name, v in variables.items()})
    for name, variable in variables.items():
        variable.assign(weights[name])


def get_weights(model: MLP) -> dict[str, np.ndarray]:
    """The model's weights as arrays; the inverse of `load_weights`."""
    return {name: variable.numpy() for name, variable in _parameters(model).items()}


def gradients(model: MLP, x: np.ndarray, y: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Cross-entropy loss and its gradients, in training mode.

    It does not touch the running statistics of batch normalisation.

    Args:
        model: an `MLP`.
        x: (samples, features).
        y: (samples,), class numbers.

    Returns:
        The loss, and a dict from name to gradient, shaped like `get_weights`.
    """
    variables = _parameters(model)
    inputs = tf.convert_to_tensor(x, dtype=model.output_layer.kernel.dtype)
    labels = tf.cast(y, tf.int64)
    statistics = [(variable, variable.numpy()) for variable in model.non_trainable_variables]
    with tf.GradientTape() as tape:
        logits = model(inputs, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    for variable, value in statistics:
        variable.assign(value)
    grads = tape.gradient(loss, [variable.value for variable in variables.values()])
    return float(loss), {name: grad.numpy() for name, grad in zip(variables, grads, strict=True)}
