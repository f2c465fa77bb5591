"""A recurrent network that forecasts, in Keras.  `gradlab.torch.forecast` is its twin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import keras
import numpy as np
import tensorflow as tf

from gradlab.forecast import Fit, Task, cell_of, check_fit, collect, minibatches
from gradlab.keras import lbfgs

__all__ = ["fit", "mse", "network"]


def network(weights: Sequence[np.ndarray]) -> keras.Model:
    """A recurrent layer, and a linear read-out of its last state.

    Args:
        weights: as `gradlab.forecast.initial_weights` draws them; they tell the kind of layer.

    Returns:
        A model that maps windows (n, length) to the next values (n,).

    Raises:
        ValueError: weights of other shapes.
    """
    cell, hidden = cell_of(weights)
    inputs = keras.Input((None,))
    if cell == "LSTM":
        layer = keras.layers.LSTM(hidden, name="cell")
    else:
        layer = keras.layers.SimpleRNN(hidden, activation="relu", name="cell")
    states = layer(keras.layers.Reshape((-1, 1), name="steps")(inputs))
    outputs = keras.layers.Dense(1, name="read")(states)
    model = keras.Model(inputs, keras.layers.Reshape((), name="value")(outputs), name="network")
    model.set_weights(list(weights))
    return model


def mse(model: keras.Model, batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
    """Mean squared error over a batch of windows (n, length) and targets (n,)."""
    x, y = batch
    return tf.reduce_mean((model(x) - y) ** 2)


def fit(
    task: Task,
    starts: Iterable[Sequence[np.ndarray]],
    method: str,
    *,
    evaluations: int = 70,
    lr: float = 0.1,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[Fit]:
    """Train a network from every start, on all training windows at once.

    Args:
        task: what to learn.
        starts: initial weights of one network each, all of one shape.
        method: "Adam" or "L-BFGS" (`gradlab.keras.lbfgs`).
        evaluations: budget: how often the loss and its gradient over all training windows may be
            computed, those of a line search included.
        lr: Adam's learning rate; L-BFGS has none.
        batch_size: windows in one of Adam's minibatches, None for all.  One pass over the training
            windows, dealt out anew each time, then counts as one evaluation; noted are loss and
            outputs before it.
        seed: of that dealing out.

    Returns:
        One `Fit` per start.

    Raises:
        ValueError: an unknown method, a budget below 1, or a batch size below 1 or for L-BFGS.
    """
    check_fit(method, evaluations, batch_size)
    starts = [list(weights) for weights in starts]
    if not starts:
        return []
    model = network(starts[0])
    batch = tuple(tf.constant(a[task.train]) for a in (task.x, task.y))
    rest = tf.constant(task.x[~task.train])

    @tf.function
    def loss_fn() -> tf.Tensor:
        return mse(model, batch)

    @tf.function
    def later() -> tf.Tensor:
        return model(rest)

    adam = keras.optimizers.Adam(lr, epsilon=1e-8)  # PyTorch's
    adam.build(model.trainable_variables)
    fresh = [v.numpy() for v in adam.variables]

    @tf.function
    def step() -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = mse(model, batch)
        gradient, outputs = tape.gradient(loss, model.trainable_variables), model(rest)
        with tf.control_dependencies([outputs]):
            adam.apply(gradient)
        return loss, outputs

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
    def part(rows: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = mse(model, tuple(tf.gather(a, rows) for a in batch))
        adam.apply(tape.gradient(loss, model.trainable_variables))

    results = []
    for weights in starts:
        model.set_weights(weights)
        for variable, value in zip(adam.variables, fresh, strict=True):
            variable.assign(value)
        notes: list[tuple[float, np.ndarray]] = []
        if method == "L-BFGS":
            lbfgs.minimize(
                model,
                loss_fn,
                max_evaluations=evaluations,
                tolerance=0,
                on_evaluation=lambda _, loss, __, to=notes: to.append((loss, later().numpy())),
            )
        elif batch_size is None:
            notes += [tuple(a.numpy() for a in step()) for _ in range(evaluations)]
        else:
            rng = np.random.default_rng(seed)
            for _ in range(evaluations):
                notes.append((loss_fn().numpy(), later().numpy()))
                for rows in minibatches(len(batch[1]), batch_size, rng):
                    part(rows)
        results.append(collect(task, notes))
    return results
