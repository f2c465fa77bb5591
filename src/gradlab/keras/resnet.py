"""A bottleneck ResNet in Keras, at any width, with and without skips."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from gradlab import mlp
from gradlab import resnet as plan

__all__ = [
    "ResNet",
    "block_gradients",
    "get_weights",
    "gradients",
    "load_weights",
    "recalibrate",
]


class ResNet(keras.Model):
    """The network of a `gradlab.resnet.ResNetSpec`.

    Args:
        spec: the network.
        seed: of the initial weights, which equal PyTorch's; None leaves Keras's own draw, which is
            quicker at full size.

    Shapes:
        input (samples, height, width, channels); output (samples, classes): logits.
    """

    def __init__(self, spec: plan.ResNetSpec, seed: int | None = 0) -> None:
        super().__init__()
        self.spec, self.blocks = spec, plan.blocks(spec)
        self.convs, self.norms = {}, {}
        for conv in plan.convolutions(spec):
            layer = keras.layers.Conv2D(
                conv.fan[1], conv.kernel, conv.stride, padding="valid", use_bias=False
            )
            layer.build((None, None, None, conv.fan[0]))
            self.convs[conv.name] = layer
            if spec.normalization:
                first = "zeros" if spec.zero_scale and conv.name.endswith("conv2") else "ones"
                norm = keras.layers.BatchNormalization(
                    momentum=1 - spec.momentum, epsilon=spec.epsilon, gamma_initializer=first
                )
                norm.build((None, None, None, conv.fan[1]))
                self.norms[conv.name] = norm
        self.head = keras.layers.Dense(spec.classes)
        self.head.build((None, plan.features(spec)))
        self.built = True
        if seed is not None:
            load_weights(self, plan.initial_weights(spec, seed))

    def call(self, x, training: bool = False):
        """Logits of a batch; `training` chooses batch or running statistics."""
        return self._forward(x, training)

    def _forward(self, x: tf.Tensor, training: bool, record: list | None = None) -> tf.Tensor:
        # `record` receives every block's input and the last block's output.  (Keras would hand a
        # copy of the list to `call`.)
        x = self._activate(self._convolve(plan.stem(self.spec), x, training))
        if self.spec.stem == "large":
            x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=x.dtype.min)
            x = tf.nn.max_pool2d(x, 3, 2, "VALID")
        for block in self.blocks:
            if record is not None:
                record.append(x)
            branch = x
            for number, conv in enumerate(block.convs):
                branch = self._convolve(
                    conv, self._activate(branch) if number else branch, training
                )
            if self.spec.skip:
                branch += self._convolve(block.project, x, training) if block.project else x
            x = self._activate(branch)
        if record is not None:
            record.append(x)
        return self.head(tf.reduce_mean(x, (1, 2)))

    def _convolve(self, conv: plan.Conv, x: tf.Tensor, training: bool) -> tf.Tensor:
        # With a stride, Keras's padding="same" would pad one side more than the other.
        if side := conv.kernel // 2:
            x = tf.pad(x, [[0, 0], [side, side], [side, side], [0, 0]])
        x = self.convs[conv.name](x)
        return self.norms[conv.name](x, training=training) if self.spec.normalization else x

    def _activate(self, x: tf.Tensor) -> tf.Tensor:
        return tf.nn.leaky_relu(x, self.spec.slope) if self.spec.slope else tf.nn.relu(x)


def _parameters(model: ResNet) -> dict[str, keras.Variable]:
    """The model's trainable variables under the names that both frameworks share."""
    found = {}
    for name in plan.shapes(model.spec):
        layer, part = name.rsplit(".", 1)
        if part in ("scale", "shift"):
            found[name] = getattr(model.norms[layer], {"scale": "gamma"}.get(part, "beta"))
        else:
            owner = model.head if layer == "output" else model.convs[layer]
            found[name] = getattr(owner, {"weight": "kernel"}.get(part, "bias"))
    return found


def load_weights(model: ResNet, weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into a model, in place; running statistics stay as they are.

    Args:
        model: a `ResNet`.
        weights: as `gradlab.resnet.initial_weights` or `get_weights` of either framework give them.

    Raises:
        ValueError: a missing, unexpected or misshapen array; the message names each.
    """
    mlp.check_weights(weights, plan.shapes(model.spec))
    for name, variable in _parameters(model).items():
        variable.assign(weights[name])


def get_weights(model: ResNet) -> dict[str, np.ndarray]:
    """The model's weights as arrays; the inverse of `load_weights`."""
    return {name: variable.numpy() for name, variable in _parameters(model).items()}


def _differentiate(model: ResNet, x: np.ndarray, y: np.ndarray, which: str) -> tuple:
    """Loss, and its derivatives by "parameters" or "blocks", in training mode, nothing changed."""
    record, statistics = [], [(v, v.numpy()) for v in model.non_trainable_variables]
    inputs = tf.convert_to_tensor(x, dtype=model.head.kernel.dtype)
    with tf.GradientTape() as tape:
        logits = model._forward(inputs, True, record)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(y, tf.int64), logits)
        loss = tf.reduce_mean(losses)
    for variable, value in statistics:
        variable.assign(value)
    variables = [variable.value for variable in _parameters(model).values()]
    return loss, tape.gradient(loss, variables if which == "parameters" else record)


def gradients(model: ResNet, x: np.ndarray, y: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Cross-entropy loss and its gradients, in training mode.

    It does not touch the running statistics.

    Args:
        model: a `ResNet`.
        x: (samples, height, width, channels).
        y: (samples,), class numbers.

    Returns:
        The loss, and a dict from name to gradient, shaped like `get_weights`.
    """
    loss, grads = _differentiate(model, x, y, "parameters")
    names = plan.shapes(model.spec)
    return float(loss), {name: grad.numpy() for name, grad in zip(names, grads, strict=True)}


def block_gradients(model: ResNet, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Norms of dL/d(block input) in training mode, over all samples, pixels and channels.

    Args:
        model: a `ResNet`.
        x: (samples, height, width, channels).
        y: (samples,), class numbers.

    Returns:
        (blocks + 1,): for each block's input, and last for the last block's output.
    """
    _, grads = _differentiate(model, x, y, "blocks")
    return np.array([np.linalg.norm(grad.numpy().astype(float)) for grad in grads])


def recalibrate(model: ResNet, x: np.ndarray, batch_size: int = 128) -> None:
    """Replace the running statistics by means over one pass, in place; no weight changes.

    Args:
        model: a `ResNet` with normalisation.
        x: (samples, height, width, channels), training inputs.  Samples beyond the last full batch
            are left out.
        batch_size: at least 2, at most the number of samples.

    Raises:
        ValueError: a batch size out of range, or a model without normalisation.
    """
    if not model.spec.normalization:
        raise ValueError("recalibrate needs normalization='batch', got None")
    if not 2 <= batch_size <= len(x):
        raise ValueError(f"batch_size must be between 2 and {len(x)}, got {batch_size!r}")
    starts = range(0, len(x) - batch_size + 1, batch_size)
    for number, start in enumerate(starts):
        for norm in model.norms.values():
            norm.momentum = number / (number + 1)  # a plain mean over all batches
        model(x[start : start + batch_size], training=True)
    for norm in model.norms.values():
        norm.momentum = 1 - model.spec.momentum
