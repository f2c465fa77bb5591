"""Many small networks trained at once, in TensorFlow.  `gradlab.torch.sweep` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from gradlab.keras.models import ACTIVATIONS
from gradlab.mlp import EPSILON
from gradlab.sweep import (
    Measured,
    Problem,
    Setting,
    adds_input,
    check_outputs,
    evaluated,
    fitter,
    shares,
    trainer,
)
from gradlab.updates import Functions, memory, move

_NORMALIZED_AXIS = {"batch": 1, "layer": 2}


def _norm(stack: tf.Tensor, axes: tuple[int, ...] = (1, 2)) -> tf.Tensor:
    """Norm of each member's matrix, summed in float64: float32 squares overflow beyond 1e19."""
    squares = tf.square(tf.cast(stack, tf.float64))
    return tf.sqrt(tf.reduce_sum(squares, axes, keepdims=True))


_FUNCTIONS = Functions(
    sign=tf.sign,
    sqrt=tf.sqrt,
    between=tf.clip_by_value,
    at_least=lambda a, number: tf.maximum(a, tf.cast(number, a.dtype)),
    norm=_norm,
    cast=lambda a, like: tf.cast(a, like.dtype),
)

#: Into how many pieces a training is cut to show its progress; each leaves the graph once.
_PIECES = 20


def _train(problem: Problem) -> Measured:
    setting, steps = problem.setting, len(problem.rates)
    w = tuple(map(tf.constant, problem.weights))
    kept = memory(setting.plan, w, tf.zeros_like)
    x, y = tf.constant(problem.flat_x()), tf.constant(problem.flat_y())
    numbers = {name: tf.constant(array) for name, array in problem.numbers.items()}
    shapes = tuple(array.shape for array in problem.weights)
    run, outputs_of = (_graph(function, setting, shapes) for function in (_steps, _outputs))
    size = -(-steps // _PIECES) if problem.progress else steps
    names: list[str] = []
    if setting.network is not None:
        tried, _, notes = _forward(setting, w, tf.gather(x, problem.x_rows[0]), numbers)
        check_outputs(problem, tried.shape)
        names = sorted(notes)
    measured = []
    with tqdm(total=steps, unit="step", disable=not problem.progress) as bar:
        for start in range(0, steps, size):
            here = slice(start, start + size)
            of_step = problem.x_rows, problem.y_rows, problem.rates, problem.draws
            by_step = [array[here] for array in of_step]
            w, kept, *norms = run(
                w, kept, x, y, *map(tf.constant, by_step), tf.constant(start), numbers
            )
            measured.append([norm.numpy() for norm in norms])
            bar.update(len(by_step[0]))
    loss, grad_norm, delta_norm, update_norm, weight_norm, array_norm, noted = (
        np.concatenate(pieces) for pieces in zip(*measured, strict=True)
    )

    def of_share(x: np.ndarray, share: slice) -> tf.Tensor:
        own = {name: number[share] for name, number in numbers.items()}
        inputs = tf.constant(x if x.ndim == 2 else x[share])
        return outputs_of(tuple(weight[share] for weight in w), inputs, own)

    def evaluate(x: np.ndarray) -> np.ndarray:
        if setting.network is None:
            return np.concatenate([of_share(x, share) for share in shares(w, x.shape[-2])])
        pieces = [outputs_of(w, tf.constant(x[rows]), numbers) for rows in evaluated(len(x))]
        return np.concatenate(pieces, 1)[:, : len(x)]

    outputs = evaluate(problem.x_test)
    alike = problem.x_test is problem.x
    return Measured(
        loss=loss,
        grad_norm=grad_norm,
        delta_norm=delta_norm if setting.record_layers else None,
        update_norm=update_norm if setting.record_updates else None,
        weight_norm=weight_norm if setting.record_updates else None,
        array_norm=array_norm if setting.record_arrays else None,
        noted={name: noted[..., number] for number, name in enumerate(names)},
        weights=[weight.numpy() for weight in w],
        outputs=outputs,
        train_outputs=outputs if alike else evaluate(problem.x),
    )


@lru_cache(maxsize=4)
def _graph(function: Callable, setting: Setting, shapes: tuple) -> Callable:
    """A function of this module as a graph, for one setting and one stack of networks.

    One graph for all would be traced for each of them: TensorFlow warns of it, and keeps them all.
    """
    return tf.function(partial(function, setting), reduce_retracing=True)


def _steps(setting, w, kept, x, y, x_rows, y_rows, rates, draws, before, numbers):
    """Many steps as one graph, so that Python is left once and not once a step."""
    layers, steps = len(w), tf.shape(x_rows)[0]
    losses, noted = (tf.TensorArray(w[0].dtype, steps) for _ in range(2))
    grad_norms, delta_norms, update_norms, weight_norms, array_norms = (
        tf.TensorArray(tf.float64, steps) for _ in range(5)
    )
    loss = _LOSSES.get(setting.loss, setting.loss)
    for step in tf.range(steps):
        with tf.GradientTape() as tape:
            tape.watch(w)
            inputs = tf.gather(x, x_rows[step])
            outputs, z, notes = _forward(setting, w, inputs, numbers, draws[step])
            scaled = tf.cast(setting.output_scale, outputs.dtype) * outputs
            loss_of_each = loss(scaled, tf.gather(y, y_rows[step]))  # (members,)
        of = [*w, *z] if setting.record_layers else [*w]
        zero = tf.UnconnectedGradients.ZERO
        grads = tape.gradient(loss_of_each, of, unconnected_gradients=zero)
        norms = _norms(grads)  # (members, layers [+ layers])
        losses = losses.write(step, loss_of_each)
        grad_norms = grad_norms.write(step, tf.norm(norms[:, :layers], axis=-1))
        delta_norms = delta_norms.write(step, norms[:, layers:])
        if setting.record_arrays:
            array_norms = array_norms.write(step, norms[:, :layers])
        if setting.network is not None:
            noted = noted.write(step, _together(notes, loss_of_each))
        changes, kept = move(
            setting.plan, numbers, rates[step], tf.cast(before + step + 1, w[0].dtype), w,
            grads[:layers], kept, _FUNCTIONS,
        )  # fmt: skip
        if setting.record_updates:
            update_norms = update_norms.write(step, tf.norm(_norms(changes), axis=-1))
            weight_norms = weight_norms.write(step, tf.norm(_norms(w), axis=-1))
        w = tuple(weight + change for weight, change in zip(w, changes, strict=True))
    recorded = {
        losses: True,
        grad_norms: True,
        delta_norms: True,
        update_norms: setting.record_updates,
        weight_norms: setting.record_updates,
        array_norms: setting.record_arrays,
        noted: setting.network is not None,
    }
    return (
        w,
        kept,
        *(n.stack() if is_on else tf.zeros((steps, 0), n.dtype) for n, is_on in recorded.items()),
    )


def _together(notes: dict[str, tf.Tensor], loss_of_each: tf.Tensor) -> tf.Tensor:
    """What a network noted, in the order of the names, (members, notes)."""
    if not notes:
        return tf.zeros((loss_of_each.shape[0], 0), loss_of_each.dtype)
    return tf.stack([tf.cast(notes[name], loss_of_each.dtype) for name in sorted(notes)], -1)


def _forward(
    setting: Setting,
    w: Sequence[tf.Tensor],
    x: tf.Tensor,
    numbers: dict[str, tf.Tensor],
    draws: tf.Tensor | None = None,
) -> tuple[tf.Tensor, Sequence[tf.Tensor], dict[str, tf.Tensor]]:
    """A minibatch's outputs, every layer's own, and what the network noted."""
    if setting.network is not None:
        outputs, notes = setting.network(w, x, tf.reshape)
        return outputs, (), notes
    z = [*_pre_activations(setting, w, x, numbers, draws)]
    return z[-1], z, {}


def _pre_activations(
    setting: Setting,
    w: Sequence[tf.Tensor],
    x: tf.Tensor,
    numbers: dict[str, tf.Tensor],
    draws: tf.Tensor | None = None,
) -> Iterator[tf.Tensor]:
    """Every matrix product's result, shape (members, batch, fan_out); the last: logits.

    Units are dropped where there are draws, (batch, hidden units).
    """
    act, used = ACTIVATIONS[setting.activation], 0
    if setting.activation == "leaky_relu":
        act = partial(_leaky_relu, slope=numbers["slope"])
    for layer, weight in enumerate(w):
        z = x @ weight
        yield z
        if layer + 1 == len(w):
            return
        if setting.normalization:
            axis = _NORMALIZED_AXIS[setting.normalization]
            mean, variance = tf.nn.moments(z, axis, keepdims=True)
            z = (z - mean) * tf.math.rsqrt(variance + tf.cast(EPSILON, z.dtype))
        branch = act(z)
        if setting.dropout and draws is not None:
            used, first = used + z.shape[-1], used
            kept = tf.cast(draws[:, first:used], z.dtype) >= numbers["dropout"]
            branch = branch * tf.cast(kept, z.dtype) / (1 - numbers["dropout"])
        skips = adds_input(setting, w, layer)
        x = x + tf.cast(setting.skip, z.dtype) * branch if skips else branch


def _leaky_relu(z: tf.Tensor, slope: tf.Tensor) -> tf.Tensor:
    """The slope of `tf.nn.leaky_relu` is one number, and here every member's own."""
    return tf.where(z > 0, z, slope * z)


def _outputs(setting, w, x, numbers):
    if setting.network is not None:
        x = tf.broadcast_to(x, (w[0].shape[0], *x.shape))
    outputs, _, _ = _forward(setting, w, x, numbers)
    return outputs


def _cross_entropy(logits: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(classes, logits)
    return tf.reduce_mean(each, -1)


def _half_square(outputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.reduce_sum(tf.square(outputs - targets), -1), -1) / 2


_LOSSES = {"cross_entropy": _cross_entropy, "mse": _half_square}


def _norms(stacks: Sequence[tf.Tensor]) -> tf.Tensor:
    """Norm of every member's every matrix, (members, matrices)."""
    return tf.stack([_norm(stack)[:, 0, 0] for stack in stacks], -1)


train = trainer(_train, __name__)
fit = fitter(_train, __name__)
