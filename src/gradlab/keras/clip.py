"""Gradient clipping in TensorFlow, equal to the NumPy reference in `gradlab.clip`.

The functions work eagerly and inside a `tf.function`::

    gradients = tape.gradient(loss, model.trainable_variables)
    clipped, norm = clip.by_global_norm(gradients, 1.0)
    optimizer.apply(clipped, model.trainable_variables)

If any gradient holds an inf or a NaN, all come back as they were: look at `norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from gradlab.clip import AutoClip, ZClip, check_threshold, check_units
from gradlab.keras.probe import gradient_norms

__all__ = ["AutoClip", "ZClip", "adaptive", "by_global_norm", "by_norm", "by_value", "global_norm"]

Gradients = Sequence["tf.Tensor | tf.IndexedSlices | None"]
Clipped = tuple[list["tf.Tensor | tf.IndexedSlices | None"], tf.Tensor]


def global_norm(gradients: Gradients) -> tf.Tensor:
    """Euclidean norm over all gradients together.

    Args:
        gradients: tensors or IndexedSlices of any floating dtype, or None.

    Returns:
        √Σg², a float64 scalar, 0 for no gradient at all; inf or NaN only if an entry is.
    """
    return _total(gradient_norms([g for g in gradients if g is not None]))


def by_value(gradients: Gradients, limit: float) -> Clipped:
    """Cut every component to [−limit, limit], each for itself (Mikolov 2012).

    Args:
        gradients: tensors, IndexedSlices or None.  Of slices, rows that repeat are summed first.
        limit: > 0.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a limit that is not > 0.
    """
    check_threshold("limit", limit)

    def cut(values: tf.Tensor) -> tf.Tensor:
        bound = _number(limit, values.dtype)
        return tf.clip_by_value(values, -bound, bound)

    return _each(gradients, lambda g, norm: cut, unique=True)


def by_norm(gradients: Gradients, max_norm: float) -> Clipped:
    """Shorten every gradient that is longer than `max_norm` to it, each by its own norm.

    Keras calls it `clipnorm`.  The direction of the whole changes when some are shortened and
    others not.

    Args:
        gradients: tensors, IndexedSlices or None.
        max_norm: > 0.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a threshold that is not > 0.
    """
    check_threshold("max_norm", max_norm)
    return _each(gradients, lambda g, norm: _shortener(norm, max_norm))


def by_global_norm(gradients: Gradients, max_norm: float | Callable[[float], float]) -> Clipped:
    """Shorten all gradients by one factor, to a global norm of at most `max_norm`.

    Algorithm 1 of Pascanu et al. 2013; the direction stays.

    Args:
        gradients: tensors, IndexedSlices or None.
        max_norm: > 0, or what chooses it when it is called with the norm, such as `AutoClip`: a
            step of a graph then leaves it for that call, which XLA does not allow.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a threshold that is not > 0.

    Example:
        >>> clipped, norm = by_global_norm([tf.constant([3.0]), tf.constant([4.0])], 1.0)
        >>> [g.numpy().round(3).tolist() for g in clipped], float(norm)
        ([[0.6], [0.8]], 5.0)
    """
    norm = global_norm(gradients)
    if callable(max_norm):
        choose = max_norm
        max_norm = tf.numpy_function(lambda n: np.float64(choose(float(n))), [norm], tf.float64)
    check_threshold("max_norm", max_norm)
    shorten = _shortener(norm, max_norm)
    return [None if g is None else _on_values(g, shorten) for g in gradients], norm


def adaptive(
    gradients: Gradients,
    weights: Sequence[tf.Tensor | tf.Variable],
    factor: float = 0.01,
    *,
    floor: float = 1e-3,
    unit_axis: int | Sequence[int] = -1,
) -> Clipped:
    """Shorten each unit's gradient to at most `factor` times the norm of the unit's weights.

    Adaptive gradient clipping, AGC (Brock et al. 2021): a unit is one output of a layer, with all
    the weights that lead to it; a vector (biases) or a scalar counts as one unit.  The authors
    leave the last linear layer out: leave it out of the lists.

    Args:
        gradients: tensors, IndexedSlices (which become dense) or None.
        weights: one tensor or variable per gradient, of its shape.
        factor: λ, > 0.
        floor: a unit's weights count as at least this long, so that those at zero can move; > 0.
        unit_axis: the axis that numbers the units, one for all or one per gradient: -1 for the
            kernels (…, in, out) of Dense and Conv, -2 for ConvTranspose.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a factor or floor that is not > 0, or weights that do not fit the gradients.
    """
    check_threshold("factor", factor)
    check_threshold("floor", floor)
    axes = check_units([g if g is None else tuple(g.shape) for g in gradients],
                       [tuple(w.shape) for w in weights], unit_axis)  # fmt: skip
    norm = global_norm(gradients)
    usable = tf.math.is_finite(norm)
    clipped = []
    for g, w, axis in zip(gradients, weights, axes, strict=True):
        if g is None:
            clipped.append(None)
            continue
        g = tf.convert_to_tensor(g)
        wide = tf.cast(g, tf.float64 if g.dtype == tf.float64 else tf.float32)
        rank = wide.shape.rank
        others = [i for i in range(rank) if rank < 2 or i != axis % rank]
        weight = tf.cast(tf.convert_to_tensor(w), wide.dtype)
        limit = _number(factor, wide.dtype) * tf.maximum(
            _unit_norms(weight, others), _number(floor, wide.dtype)
        )
        length = _unit_norms(wide, others)
        longer = usable & (length > limit)
        one = tf.ones_like(length)
        shorter = wide / tf.where(longer, length, one) * tf.where(longer, limit, one)
        clipped.append(tf.where(longer, tf.cast(shorter, g.dtype), g))
    return clipped, norm


def _number(value: float | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A threshold in another precision (tf.cast would take a Python number through float32)."""
    if not tf.is_tensor(value):
        value = tf.constant(value, tf.float64)
    return tf.cast(value, dtype)


def _total(norms: tf.Tensor) -> tf.Tensor:
    """√Σ norm², scaled before it is squared."""
    largest = tf.reduce_max(tf.concat([norms, [0.0]], 0))
    scale = tf.where(tf.math.is_finite(largest) & (largest > 0), largest, tf.ones_like(largest))
    return scale * tf.sqrt(tf.reduce_sum(tf.square(norms / scale)))


def _unit_norms(x: tf.Tensor, axes: list[int]) -> tf.Tensor:
    """√Σx² over the axes, which stay with length 1; scaled before it is squared."""
    largest = tf.reduce_max(tf.abs(x), axes, keepdims=True)
    usable = (largest > 0) & tf.math.is_finite(largest)
    largest = tf.where(usable, largest, tf.ones_like(largest))
    return largest * tf.sqrt(tf.reduce_sum(tf.square(x / largest), axes, keepdims=True))


def _on_values(gradient, change: Callable, unique: bool = False):
    """The gradient with its numbers changed; IndexedSlices stay what they are."""
    if not isinstance(gradient, tf.IndexedSlices):
        return change(tf.convert_to_tensor(gradient))
    values, rows = gradient.values, gradient.indices
    if unique:
        rows, place = tf.unique(rows, out_idx=tf.int32)
        values = tf.math.unsorted_segment_sum(values, place, tf.size(rows))
    return tf.IndexedSlices(change(values), rows, gradient.dense_shape)


def _shortener(norm: tf.Tensor, limit: float | tf.Tensor) -> Callable[[tf.Tensor], tf.Tensor]:
    """Multiplies by limit/norm where the norm exceeds the limit and is finite."""
    limit = _number(limit, tf.float64)
    longer = tf.math.is_finite(norm) & (norm > limit)
    # In two steps, by factors of about one size each: limit / norm may be too small for a float32.
    root = tf.sqrt(limit) / tf.sqrt(tf.where(longer, norm, tf.ones_like(norm)))
    small = root * root < 1e-30
    first, second = tf.where(small, root, root * root), tf.where(small, root, tf.ones_like(root))

    def shorten(values: tf.Tensor) -> tf.Tensor:
        wide = values if values.dtype == tf.float64 else tf.cast(values, tf.float32)
        shorter = wide * tf.cast(first, wide.dtype) * tf.cast(second, wide.dtype)
        return tf.where(longer, tf.cast(shorter, values.dtype), values)

    return shorten


def _each(gradients: Gradients, clip: Callable, *, unique: bool = False) -> Clipped:
    """Change each gradient by what `clip` makes of it and its norm, if all are finite."""
    norms = gradient_norms([g for g in gradients if g is not None])
    norm = _total(norms)
    usable = tf.math.is_finite(norm)
    clipped, place = [], 0
    for g in gradients:
        if g is None:
            clipped.append(None)
            continue
        change = clip(g, norms[place])
        place += 1
        clipped.append(
            _on_values(g, lambda v, change=change: tf.where(usable, change(v), v), unique)
        )
    return clipped, norm
