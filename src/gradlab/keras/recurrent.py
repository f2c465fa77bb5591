"""Recurrent networks for `sweep.fit`, in TensorFlow.  `gradlab.torch.recurrent` is its twin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from gradlab.recurrent import CELLS

__all__ = ["error_norms", "network", "states"]

Weights = dict[str, tf.Tensor]


def network(cell: str, *, truncate: int | None = None) -> Callable[[Weights, tf.Tensor], object]:
    """A network that reads a sequence and answers after its last step.

    Args:
        cell: a name of `gradlab.recurrent.CELLS`.
        truncate: how many of the last steps the gradient travels back through (truncated
            backpropagation through time); None takes all.  The outputs do not depend on it.

    Returns:
        A function of the weights (see `gradlab.recurrent`) and the inputs (members, batch, steps,
        inputs), which returns the outputs (members, batch, outputs).

    Raises:
        ValueError: an unknown cell, or `truncate` below 1.
    """
    _check(cell, truncate)

    def outputs(weights: Weights, x: tf.Tensor) -> tf.Tensor:
        if truncate is None:
            state = _last(cell, weights, x)
        else:
            cut = tf.maximum(tf.shape(x)[2] - truncate, 0)
            state = tf.stop_gradient(_last(cell, weights, x[:, :, :cut]))
            state = _last(cell, weights, x[:, :, cut:], state)
        h = state[..., : weights["readout"].shape[1]]  # an LSTM's state has a second half
        return h @ weights["readout"] + weights["readout_bias"][:, None]

    return outputs


def states(
    cell: str,
    weights: Weights,
    x: tf.Tensor,
    state: tf.Tensor | None = None,
) -> tf.Tensor:
    """The state after every step.

    Args:
        cell: a name of `gradlab.recurrent.CELLS`.
        weights: see `gradlab.recurrent`.
        x: inputs, (members, batch, steps, inputs).
        state: what to start from; None: zeros.

    Returns:
        (steps, members, batch, state).  The state is h; an LSTM's is h and, beside it, the cell's
        memory.

    Raises:
        ValueError: an unknown cell.
    """
    _check(cell)
    step, u = _STEPS[cell], weights["recurrent"]
    elements = _from_input(weights, x)
    state = _start(cell, weights, x) if state is None else state
    return tf.scan(lambda s, a: step(a, s, u), elements, state)


def error_norms(
    cell: str, weights: dict[str, np.ndarray], x: np.ndarray, error: np.ndarray
) -> np.ndarray:
    """Norm of a loss's derivative with respect to the state after every step.

    Args:
        cell, weights, x: as in `states`, as NumPy arrays.
        error: the derivative with respect to the last h, (members, batch, width).

    Returns:
        float64 array (steps, members): the norm over the whole batch; an LSTM's counts the memory's
        half as well.  The last row is the norm of `error`.

    Raises:
        ValueError: an unknown cell.
    """
    _check(cell)
    w, x, error = {k: tf.constant(a) for k, a in weights.items()}, *map(tf.constant, (x, error))
    step, elements = _STEPS[cell], _from_input(w, x)
    before = tf.concat([_start(cell, w, x)[None], states(cell, w, x)[:-1]], 0)
    if cell == "lstm":  # nothing is asked of the last memory
        error = tf.concat([error, tf.zeros_like(error)], -1)

    @tf.function  # one step back at a time: a tape over all of them would keep every number
    def back(a: tf.Tensor, state: tf.Tensor, error: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(state)
            after = step(a, state, w["recurrent"])
        return tape.gradient(after, state, error)

    norms = []
    for t in reversed(range(x.shape[2])):
        norms.append(np.linalg.norm(error.numpy().astype(float).reshape(len(error), -1), axis=1))
        error = back(elements[t], before[t], error) if t else error
    return np.stack(norms[::-1])


def _check(cell: str, truncate: int | None = None) -> None:
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {tuple(CELLS)}, got {cell!r}")
    if truncate is not None and truncate < 1:
        raise ValueError(f"truncate must be at least 1, got {truncate!r}")


def _from_input(weights: Weights, x: tf.Tensor) -> tf.Tensor:
    """What the inputs add before the activation, (steps, members, batch, gates·width)."""
    first = tf.transpose(x, (2, 0, 1, 3))
    return first @ weights["input"] + weights["bias"][:, None]


def _start(cell: str, weights: Weights, x: tf.Tensor) -> tf.Tensor:
    width = weights["recurrent"].shape[1] * (2 if cell == "lstm" else 1)
    return tf.zeros((tf.shape(x)[0], tf.shape(x)[1], width), x.dtype)


def _last(cell: str, weights: Weights, x: tf.Tensor, state: tf.Tensor | None = None) -> tf.Tensor:
    """The last state alone: a loop inside the graph, so that a long sequence is one step of it."""
    step, u, steps = _STEPS[cell], weights["recurrent"], tf.shape(x)[2]
    elements = _from_input(weights, x)
    _, state = tf.while_loop(
        lambda t, _: t < steps,
        lambda t, s: (t + 1, step(elements[t], s, u)),
        (tf.constant(0), _start(cell, weights, x) if state is None else state),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None, None])),
        maximum_iterations=steps,
    )
    return state


def _plain(phi: Callable) -> Callable:
    return lambda a, h, u: phi(a + h @ u)


def _lstm(a: tf.Tensor, state: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    h, c = tf.split(state, 2, -1)
    i, f, g, o = tf.split(a + h @ u, 4, -1)
    c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
    return tf.concat([tf.sigmoid(o) * tf.tanh(c), c], -1)


def _gru(a: tf.Tensor, h: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
    (ar, az, an), (hr, hz, hn) = tf.split(a, 3, -1), tf.split(h @ u, 3, -1)
    z = tf.sigmoid(az + hz)
    return z * h + (1 - z) * tf.tanh(an + tf.sigmoid(ar + hr) * hn)


_STEPS = {
    "linear": _plain(lambda z: z),
    "relu": _plain(tf.nn.relu),
    "tanh": _plain(tf.tanh),
    "lstm": _lstm,
    "gru": _gru,
}
