"""Products of a loss's Hessian with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from gradlab.lanczos import Product


def flat(tensors: Sequence[tf.Tensor]) -> np.ndarray:
    """All elements in one vector, in float64 unless that would take long."""
    size = sum(int(tf.size(t)) for t in tensors)
    kind = np.float64 if size < 2**16 else np.float32
    return np.concatenate([np.ravel(t.numpy()).astype(kind) for t in tensors])


def _split(vector: np.ndarray, like: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    ends = np.cumsum([int(tf.size(t)) for t in like])[:-1]
    parts = zip(np.split(vector, ends), like, strict=True)
    return [tf.constant(part.reshape(t.shape), t.dtype) for part, t in parts]


def _gradient(step: Callable[[], tf.Tensor], variables: list) -> list[tf.Tensor]:
    with tf.GradientTape() as tape:
        loss = step()
    found = tape.gradient(loss, variables, unconnected_gradients="zero")
    return [tf.convert_to_tensor(g) for g in found]


def hessian_product(
    step: Callable[[], tf.Tensor], variables: list
) -> tuple[Product, list[tf.Tensor]]:
    """The map v ↦ Hv, and the gradient.

    By differentiating the backward pass, which is recorded once; where an operation has no second
    derivative, from two gradients: (∇L(w + εv) − ∇L(w − εv)) / 2ε.

    Args:
        step: gives the loss, the same each time.
        variables: TensorFlow's, what to differentiate by.
    """
    with tf.GradientTape(persistent=True) as tape:
        slopes = _gradient(step, variables)

    def product(v: np.ndarray) -> np.ndarray:
        try:
            found = tape.gradient(
                slopes, variables, output_gradients=_split(v, slopes), unconnected_gradients="zero"
            )
        except (LookupError, NotImplementedError, tf.errors.UnimplementedError, ValueError):
            found = []
        image = flat([tf.convert_to_tensor(h) for h in found]) if found else np.zeros(1)
        # Some operations without a second derivative pass for constants.
        return image if image.any() else _by_difference(step, variables, slopes, v)

    return product, slopes


def _by_difference(
    step: Callable[[], tf.Tensor], variables: list, like: list, v: np.ndarray
) -> np.ndarray:
    here = [variable.numpy() for variable in variables]
    size = np.linalg.norm(flat([tf.constant(w) for w in here])) or 1.0
    epsilon = 1e-3 * size / np.linalg.norm(v)
    ends = []
    try:
        for sign in (1, -1):
            for variable, w, x in zip(variables, here, _split(v, like), strict=True):
                variable.assign(w + sign * epsilon * x.numpy())
            ends.append(flat(_gradient(step, variables)))
    finally:
        for variable, w in zip(variables, here, strict=True):
            variable.assign(w)
    return (ends[0] - ends[1]) / (2 * epsilon)
