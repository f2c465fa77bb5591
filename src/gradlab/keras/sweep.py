"""Many small networks trained at once, in TensorFlow.  `gradlab.torch.sweep` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from gradlab.keras.models import ACTIVATIONS
from gradlab.mlp import EPSILON
from gradlab.sweep import Measured, Problem, Setting, adds_input, trainer
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
    loss, grad_norm, delta_norm, update_norm, weight_norm = (
        np.concatenate(pieces) for pieces in zip(*measured, strict=True)
    )
    outputs = outputs_of(w, tf.constant(problem.x_test), numbers).numpy()
    alike = problem.x_test is problem.x
    return Measured(
        loss=loss,
        grad_norm=grad_norm,
        delta_norm=delta_norm if setting.record_layers else None,
        update_norm=update_norm if setting.record_updates else None,
        weight_norm=weight_norm if setting.record_updates else None,
        weights=[weight.numpy() for weight in w],
        outputs=outputs,
        train_outputs=outputs if alike else outputs_of(w, tf.constant(problem.x), numbers).numpy(),
    )


@lru_cache(maxsize=16)
def _graph(function: Callable, setting: Setting, shapes: tuple) -> Callable:
    """A function of this module as a graph, for one setting and one stack of networks.

    One graph for all would be traced for each of them: TensorFlow warns of it, and keeps them all.
    """
    return tf.function(partial(function, setting), reduce_retracing=True)


def _steps(setting, w, kept, x, y, x_rows, y_rows, rates, draws, before, numbers):
    """Many steps as one graph, so that Python is left once and not once a step."""
    layers, steps = len(w), tf.shape(x_rows)[0]
    losses = tf.TensorArray(x.dtype, steps)
    grad_norms, delta_norms, update_norms, weight_norms = (
        tf.TensorArray(tf.float64, steps) for _ in range(4)
    )
    for step in tf.range(steps):
        with tf.GradientTape() as tape:
            tape.watch(w)
            z = [*_pre_activations(setting, w, tf.gather(x, x_rows[step]), numbers, draws[step])]
            scaled = tf.cast(setting.output_scale, x.dtype) * z[-1]
            loss_of_each = _LOSSES[setting.loss](scaled, tf.gather(y, y_rows[step]))  # (members,)
        grads = tape.gradient(loss_of_each, [*w, *z] if setting.record_layers else [*w])
        norms = _norms(grads)  # (members, layers [+ layers])
        losses = losses.write(step, loss_of_each)
        grad_norms = grad_norms.write(step, tf.norm(norms[:, :layers], axis=-1))
        delta_norms = delta_norms.write(step, norms[:, layers:])
        changes, kept = move(
            setting.plan, numbers, rates[step], tf.cast(before + step + 1, x.dtype), w,
            grads[:layers], kept, _FUNCTIONS,
        )  # fmt: skip
        if setting.record_updates:
            update_norms = update_norms.write(step, tf.norm(_norms(changes), axis=-1))
            weight_norms = weight_norms.write(step, tf.norm(_norms(w), axis=-1))
        w = tuple(weight + change for weight, change in zip(w, changes, strict=True))
    norms = losses, grad_norms, delta_norms, update_norms, weight_norms
    recorded = setting.record_updates
    return (
        w,
        kept,
        *(n.stack() for n in norms[:3]),
        *(n.stack() if recorded else tf.zeros((steps, 0), tf.float64) for n in norms[3:]),
    )


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
    *_, outputs = _pre_activations(setting, w, x, numbers)
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
