"""Initial weights fitted to the data, in Keras.  `gradlab.torch.initialize` is its twin."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from keras import layers as kl

from gradlab import mlp

_LAYERS = (kl.Dense, kl.Conv1D, kl.Conv2D, kl.Conv3D)


def lsuv_(
    model: keras.Model,
    x: tf.Tensor,
    *,
    variance: float = 1.0,
    tolerance: float = 0.01,
    iterations: int = 10,
    orthogonal: bool = True,
    seed: int = 0,
) -> dict[str, float]:
    """Layer-sequential unit variance: scale each layer's weights until its output has variance 1.

    In the order in which a batch meets the dense and convolutional layers, make the weights
    orthogonal, then divide them by the standard deviation of the layer's output, before any
    activation (Mishkin and Matas 2016).  Biases stay.  A layer that is used several times is fitted
    at its first use, and one that the batch never meets is left as it is.

    The passes are made in training mode, in which batch normalisation uses the batch.  Running
    statistics and random state are afterwards what they were.

    Args:
        model: any model; `Dense` and `Conv1D` to `Conv3D` within it are fitted, in place.
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
    if not model.built:
        model(x)
    layers = {}
    for layer in model._flatten_layers():
        if isinstance(layer, _LAYERS):
            name = layer.name if layer.name not in layers else layer.path
            layers[name] = layer
    weights = {name: layer.kernel.numpy() for name, layer in layers.items()}
    activations = {name: layer.activation for name, layer in layers.items()}
    states = [(variable, variable.numpy()) for variable in model.non_trainable_variables]
    variances: dict[str, float] = {}

    def noting(name: str, activation):
        def activate(z: tf.Tensor) -> tf.Tensor:
            variances.setdefault(name, float(tf.math.reduce_variance(tf.cast(z, tf.float64))))
            return activation(z)

        return activate

    def measure(name: str) -> float:
        variances.clear()
        model(x, training=True)
        return variances.get(name, np.nan)

    def scale(name: str, factor: float) -> None:
        layers[name].kernel.assign(layers[name].kernel * factor)

    for name, layer in layers.items():  # Keras has no hooks; an activation sees the output first
        layer.activation = noting(name, activations[name] or keras.activations.linear)
    try:
        measure("")
        order = list(variances)
        if not order:
            raise ValueError(
                f"there is nothing to fit: this batch met no Dense or Conv layer of the "
                f"{type(model).__name__}"
            )
        rng = np.random.default_rng(seed)
        for name in order if orthogonal else ():
            shape = layers[name].kernel.shape  # (height, width, in, out)
            matrix = mlp.orthogonal(int(np.prod(shape[:-1])), shape[-1], rng)
            layers[name].kernel.assign(matrix.reshape(shape))
        return mlp.fit_variances(
            order, measure, scale, variance=variance, tolerance=tolerance, iterations=iterations
        )
    except BaseException:
        for name, kernel in weights.items():
            layers[name].kernel.assign(kernel)
        raise
    finally:
        for name, layer in layers.items():
            layer.activation = activations[name]
        for variable, value in states:
            variable.assign(value)
