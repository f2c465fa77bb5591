"""Many small networks trained at once, in TensorFlow.  `gradlab.torch.sweep` is its twin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from gradlab.sweep import SweepResult, check, judge

_ACTIVATIONS = {"relu": tf.nn.relu, "tanh": tf.tanh, "linear": tf.identity}


def train(
    weights: Sequence[np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    *,
    lr: float | np.ndarray,
    steps: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    activation: str = "relu",
    loss: str = "cross_entropy",
    output_scale: float = 1.0,
    x_test: np.ndarray | None = None,
    y_test: np.ndarray | None = None,
    record_layers: bool = False,
) -> SweepResult:
    """Train a stack of multilayer perceptrons without biases by minibatch gradient descent.

    A member's arithmetic never meets another's: one that overflows leaves the rest as they were.
    The arrays passed in are not changed.

    Args:
        weights: one array (members, fan_in, fan_out) per layer, all float32 or all float64, which
            is then the precision of the training.
        x: inputs, shape (n, features) for all members or (members, n, features).
        y: integer classes, shape (n,) or (members, n); for "mse" targets, shape (n, outputs) or
            (members, n, outputs).
        lr: learning rate, one for all or one per member.
        steps: number of updates.
        batch_size: examples per minibatch, drawn with replacement.
        seed: of the minibatches; the same seed gives both frameworks the same ones.
        activation: "relu", "tanh" or "linear", after every layer but the last.
        loss: "cross_entropy" of softmax outputs, or "mse", half the squared distance to the
            target; both averaged over the minibatch.
        output_scale: a constant that multiplies the outputs before the loss; it is not trained.
        x_test, y_test: the examples that the accuracy is measured on; None takes `x` and `y`.
        record_layers: whether to keep the gradient norm of each layer's pre-activation.

    Returns:
        A `SweepResult`.

    Raises:
        ValueError: an argument whose shape or value does not fit.

    Example:
        >>> w = [np.ones((2, 3, 3), "float32"), np.ones((2, 3, 2), "float32")]
        >>> x, y = np.eye(3), np.array([0, 1, 0])
        >>> train(w, x, y, lr=[0.1, 1e30], steps=5).failed.tolist()
        [False, True]
    """
    problem = check(
        weights, x, y, lr=lr, steps=steps, batch_size=batch_size, seed=seed,
        activation=activation, loss=loss, x_test=x_test, y_test=y_test,
    )  # fmt: skip
    w, losses, grad_norms, delta_norms, outputs = _train(
        tuple(map(tf.constant, problem.weights)),
        *map(tf.constant, (problem.x, problem.y, problem.x_rows, problem.y_rows, problem.lr)),
        tf.constant(problem.x_test),
        tf.constant(output_scale, problem.x.dtype),
        activation=activation,
        loss=loss,
        record_layers=record_layers,
    )
    return judge(
        problem,
        losses.numpy(),
        grad_norms.numpy(),
        delta_norms.numpy() if record_layers else None,
        [weight.numpy() for weight in w],
        outputs.numpy(),
    )


@tf.function
def _train(w, x, y, x_rows, y_rows, lr, x_test, scale, *, activation, loss, record_layers):
    """The whole training as one graph, so that Python is left once and not once a step."""
    steps = tf.shape(x_rows)[0]
    losses = tf.TensorArray(x.dtype, steps)
    grad_norms, delta_norms = tf.TensorArray(tf.float64, steps), tf.TensorArray(tf.float64, steps)
    for step in tf.range(steps):
        with tf.GradientTape() as tape:
            tape.watch(w)
            z = [*_pre_activations(w, tf.gather(x, x_rows[step]), _ACTIVATIONS[activation])]
            loss_of_each = _LOSSES[loss](scale * z[-1], tf.gather(y, y_rows[step]))  # (members,)
        grads = tape.gradient(loss_of_each, [*w, *z] if record_layers else [*w])
        norms = tf.stack([_norm(grad) for grad in grads], -1)  # (members, layers [+ layers])
        losses = losses.write(step, loss_of_each)
        grad_norms = grad_norms.write(step, tf.norm(norms[:, : len(w)], axis=-1))
        delta_norms = delta_norms.write(step, norms[:, len(w) :])
        w = tuple(weight - lr * grad for weight, grad in zip(w, grads, strict=False))
    *_, outputs = _pre_activations(w, x_test, _ACTIVATIONS[activation])
    return w, losses.stack(), grad_norms.stack(), delta_norms.stack(), outputs


def _pre_activations(w, x, act) -> Iterator[tf.Tensor]:
    """Every layer's input to its activation, shape (members, batch, fan_out); the last: logits."""
    z = x @ w[0]
    yield z
    for weight in w[1:]:
        z = act(z) @ weight
        yield z


def _cross_entropy(logits: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(classes, logits)
    return tf.reduce_mean(each, -1)


def _half_square(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.reduce_sum(tf.square(outputs - targets), -1), -1) / 2


_LOSSES = {"cross_entropy": _cross_entropy, "mse": _half_square}


def _norm(stack: tf.Tensor) -> tf.Tensor:
    """Norm of each member's matrix, summed in float64: float32 squares overflow beyond 1e19."""
    return tf.norm(tf.cast(stack, tf.float64), axis=(1, 2))
