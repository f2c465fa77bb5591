"""L-BFGS for Keras, which has none, by SciPy's.  `gradlab.torch.lbfgs` is its twin."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from scipy import optimize

from gradlab.lbfgs import NO_PROGRESS, LBFGSResult, Recorder, Stop, check_arguments


def minimize(
    model: keras.Model,
    loss_fn: Callable[[], tf.Tensor],
    *,
    max_evaluations: int,
    history: int = 10,
    tolerance: float = 1e-6,
    on_evaluation: Callable[[int, float, float], object] | None = None,
    progress: bool = False,
) -> LBFGSResult:
    """Lower a loss by L-BFGS (SciPy's "L-BFGS-B" over one flat float64 vector).

    At the end, also after an interruption, the trainable variables are those of the best
    evaluation.  Nothing else that `loss_fn` changes, such as running statistics, is put back.

    Args:
        model: its trainable variables are changed, whatever their shapes and precision; those that
            the loss does not depend on stay.
        loss_fn: returns the loss, a scalar, of the model as it is now.  It must not vary by itself:
            the same data at every call, and no dropout.  A `tf.function` is faster.
        max_evaluations: budget: how often the loss and its gradient may be computed.
        history: number of pairs of step and gradient change kept, two vectors each as long as the
            parameters together.
        tolerance: the run ends when no component of the gradient is larger.
        on_evaluation: called after every evaluation with its number from 0, loss and gradient norm.
        progress: whether to show a progress bar over the evaluations.

    Returns:
        An `LBFGSResult`.  A loss or gradient that is not finite ends the run; the message says so.

    Raises:
        ValueError: a model without trainable variables, a loss that is no scalar, a budget or a
            history below 1, or a negative tolerance.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
        >>> (kernel,) = model.trainable_variables
        >>> def loss():
        ...     return tf.reduce_sum(tf.square(kernel - 2.0))
        >>> result = minimize(model, loss, max_evaluations=20)
        >>> result.converged, kernel.numpy().round(5).tolist()
        (True, [[2.0], [2.0], [2.0]])
    """
    check_arguments(history, tolerance)
    recorder = Recorder(max_evaluations, on_evaluation, progress)
    variables = model.trainable_variables
    if not variables:
        raise ValueError(f"{type(model).__name__} has no trainable variable; is it built?")
    shapes = [tuple(v.shape) for v in variables]
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])

    def assign(flat: np.ndarray) -> None:
        for variable, part, shape in zip(variables, np.split(flat, ends[:-1]), shapes, strict=True):
            variable.assign(part.reshape(shape))

    def flatten(arrays: list) -> np.ndarray:
        return np.concatenate([np.ravel(array).astype(np.float64) for array in arrays])

    def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
        recorder.check_budget()
        assign(flat)
        with tf.GradientTape() as tape:
            loss = loss_fn()
        if loss.shape.num_elements() != 1:
            raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}, expected a scalar")
        grads = tape.gradient(
            loss, [v.value for v in variables], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        grad = flatten([tf.convert_to_tensor(g).numpy() for g in grads])
        value = float(tf.reshape(loss, ()))
        largest = float(np.abs(grad).max())
        recorder.record(value, float(np.linalg.norm(grad)), largest, flat.copy)
        return value, grad

    initial, message = flatten([v.numpy() for v in variables]), NO_PROGRESS
    try:
        optimize.minimize(
            evaluate,
            initial.copy(),
            method="L-BFGS-B",
            jac=True,
            options={
                "maxcor": history,
                "gtol": tolerance,
                "ftol": 0.0,
                "maxfun": max_evaluations + 1,  # the recorder ends the run, on the evaluation
                "maxiter": max_evaluations + 1,
            },
        )
    except Stop as stop:
        message = str(stop)
    finally:
        assign(initial if recorder.point is None else recorder.point)
    return recorder.result(message, tolerance)
