"""Deep residual networks, many at once, in TensorFlow.  `gradlab.torch.residual` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from gradlab.mlp import EPSILON
from gradlab.residual import ResidualSpec, check_alike

__all__ = ["gradient_norms", "network"]


def network(specs: Sequence[ResidualSpec]) -> Callable:
    """The networks of several specifications as one function, for `sweep.fit`.

    Args:
        specs: one per member; they may differ in skip, scale, factor, gain and initialization.

    Returns:
        A function of weights, as `gradlab.residual.stacked_weights` gives them, and inputs
        (members, batch, features) that returns logits (members, batch, classes).  Its graph is a
        loop over the blocks, so that a hundred are traced as fast as one.

    Raises:
        ValueError: see `gradlab.residual.check_alike`.
    """
    block, readout = _parts(specs)

    def forward(weights: Mapping[str, tf.Tensor], x: tf.Tensor) -> tf.Tensor:
        stacked = (
            tf.transpose(weights["blocks"], (1, 2, 0, 3, 4)),  # (blocks, matrices, members, …)
            tf.transpose(weights["factor"])[..., None, None],
        )
        h = tf.foldl(lambda h, arrays: block(h, *arrays), stacked, x @ weights["stem"])
        return readout(h, weights)

    return forward


def gradient_norms(
    specs: Sequence[ResidualSpec], weights: Mapping[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Norms of the gradient of the mean cross-entropy with respect to every h.

    Args:
        specs: one per member.
        weights: from `gradlab.residual.stacked_weights`.
        x: inputs (batch, features), for all members.
        y: classes (batch,).

    Returns:
        (members, blocks + 1) norms over the batch, h₀ first.
    """
    block, readout = _parts(specs)
    w = {name: tf.constant(array) for name, array in weights.items()}
    h = [tf.cast(x, w["stem"].dtype) @ w["stem"]]
    with tf.GradientTape() as tape:
        tape.watch(h[0])
        for number in range(specs[0].blocks):
            matrices = tf.unstack(w["blocks"][:, number], axis=1)
            h.append(block(h[-1], matrices, w["factor"][:, number, None, None]))
        logits = readout(h[-1], w)
        classes = tf.broadcast_to(y, logits.shape[:2])
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(classes, logits)
        loss = tf.reduce_sum(tf.reduce_mean(each, -1))
    grads = tape.gradient(loss, h)
    squares = [tf.reduce_sum(tf.square(tf.cast(g, tf.float64)), (1, 2)) for g in grads]
    return tf.sqrt(tf.stack(squares, 1)).numpy()


def _parts(specs: Sequence[ResidualSpec]) -> tuple[Callable, Callable]:
    """One block as a function of h, its matrices and its factor, and the output layer."""
    check_alike(specs)
    kind, matrices = specs[0].normalization, specs[0].matrices
    numbers = [(spec.skip, spec.scale, spec.factor is not None) for spec in specs]
    skip, scale, learnt = np.array(numbers, float).T[..., None, None]  # (members, 1, 1) each

    def block(h: tf.Tensor, weights: Sequence[tf.Tensor], factor: tf.Tensor) -> tf.Tensor:
        z = _normalize(h, 2) if kind == "layer" else h
        for matrix in range(matrices):
            z = tf.nn.relu(z) @ weights[matrix]
            z = _normalize(z, 1) if kind == "batch" else z
        factor = tf.where(learnt > 0, factor, tf.stop_gradient(factor))
        return tf.cast(skip, h.dtype) * h + tf.cast(scale, h.dtype) * factor * z

    def readout(h: tf.Tensor, weights: Mapping[str, tf.Tensor]) -> tf.Tensor:
        h = _normalize(h, 2) if kind == "layer" else h
        return tf.nn.relu(h) @ weights["readout"]

    return block, readout


def _normalize(z: tf.Tensor, axis: int) -> tf.Tensor:
    mean, variance = tf.nn.moments(z, axis, keepdims=True)
    return (z - mean) * tf.math.rsqrt(variance + tf.cast(EPSILON, z.dtype))
