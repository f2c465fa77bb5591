"""Why a training step of a Keras model fails."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gradlab.diagnosis import LARGE_GRADIENT, OUT_OF_RANGE, Diagnosis, judge, tried_enough
from gradlab.keras import _optimizer
from gradlab.keras._curvature import flat, hessian_product
from gradlab.keras._state import float64, untouched, widen
from gradlab.keras._tracing import Trace, finite, norm, source_line
from gradlab.lanczos import largest_eigenvalue, start_near
from gradlab.measurements import (
    Curvature,
    Float64,
    Measurements,
    OptimizerFacts,
    Raised,
    TensorFacts,
    which_matter,
)

_NARROW = (tf.float32, tf.float16, tf.bfloat16)

Loss = Callable[[keras.Model, Any], Any]


def diagnose(
    model: keras.Model,
    loss_fn: Loss,
    batch: Any,
    *,
    optimizer: keras.Optimizer | None = None,
) -> Diagnosis:
    """Measure one training step, and say what is wrong with it.

    The step runs eagerly.  Model, optimiser and random generators are left as they were found, to
    the bit, even if the step raises; a model that was not built is built.

    Args:
        model: in the state in which the step fails.
        loss_fn: from model and batch to the loss, shape ().  It decides about `training=True`.
        batch: whatever `loss_fn` takes: a tensor, an array, a tuple or dict of them.
        optimizer: what the step is taken with.  Without it nothing is said about the step's size.

    Returns:
        The diagnosis; what could not be measured is in its `notes`.

    Raises:
        TypeError: `model`, `loss_fn` or `optimizer` is no Keras model, function, optimiser, or the
            loss is no number.
        ValueError: the loss has more than one element, or it is called inside a `tf.function`.

    Example:
        >>> import tensorflow as tf
        >>> from gradlab.keras import keras
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        >>> root = lambda model, x: tf.reduce_sum(tf.sqrt(model(x)))
        >>> diagnose(model, root, tf.zeros((1, 1))).kind
        'singularity'
    """
    _check(model, loss_fn, optimizer)
    return judge(_measure(model, loss_fn, batch, optimizer=optimizer))


def _check(model: Any, loss_fn: Any, optimizer: Any) -> None:
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a keras.Model or a layer, got {type(model).__name__}")
    if not callable(loss_fn) or isinstance(loss_fn, keras.layers.Layer):
        raise TypeError(
            "loss_fn must be a function of model and batch that returns the loss, got "
            f"{type(loss_fn).__name__}"
        )
    if optimizer is not None and not isinstance(optimizer, keras.Optimizer):
        raise TypeError(f"optimizer must be a keras.Optimizer, got {type(optimizer).__name__}")
    if not tf.executing_eagerly():
        raise ValueError("diagnose cannot be called inside a tf.function: it runs the step eagerly")


def _measure(
    model: keras.Model, loss_fn: Loss, batch: Any, *, optimizer: keras.Optimizer | None = None
) -> Measurements:
    """What `diagnose` judges; the same arguments and errors."""
    own_loss, notes = loss_fn, []

    def loss_fn(model: keras.Model, batch: Any) -> Any:
        return own_loss(model, _copied(batch))

    @contextmanager
    def noted(what: str) -> Iterator[None]:
        """A measurement that fails becomes a note."""
        try:
            yield
        except Exception as error:
            notes.append(f"{what} ({_message(error)}).")

    if not all(layer.built for layer in model._flatten_layers()):
        unchanged = untouched(model, optimizer, own_loss, batch, building=True)
        _build(lambda: loss_fn(model, batch), unchanged)
    with untouched(model, optimizer, own_loss, batch) as start_over:
        variables = model.trainable_variables
        result: dict[str, Any] = {
            "framework": "Keras",
            "dtype": variables[0].dtype if variables else keras.config.floatx(),
            "loss": math.nan,
        }
        with noted("The batch and the parameters could not be read"):
            result["tensors"] = tuple(_tensors(model, batch))
        trace = Trace(model, batch)
        drawn = _random_states()
        try:
            trace.run(lambda: loss_fn(model, batch))
        except Exception as error:
            raised = _raised(trace, error, batch)
            return Measurements(**result, raised=raised, notes=tuple(notes))
        trace.loss = _scalar(trace.loss)
        result["dtype"] = trace.narrowest() or result["dtype"]
        trace.random |= drawn != _random_states()
        result["loss"] = float(trace.loss)
        if not math.isfinite(result["loss"]):
            with noted("Where the loss stopped being finite is not known"):
                result["forward"] = trace.forward_event()
                if not any(facts.not_finite for facts in result.get("tensors", ())):
                    result["origin"] = trace.origin
        try:
            trace.differentiate()
        except Exception as error:
            notes.append(f"The loss could not be differentiated ({_message(error)}).")
            return Measurements(**result, notes=tuple(notes))
        named = [
            (v.path, g) for v, g in zip(variables, trace.gradients, strict=True) if g is not None
        ]
        result["gradients"] = tuple((name, norm(g)) for name, g in named)
        if not named:
            notes.append("The loss does not depend on any trainable variable.")
        sound = all(math.isfinite(size) for _, size in result["gradients"])
        if not sound and math.isfinite(result["loss"]):
            with noted("Where the gradient stopped being finite is not known"):
                result["backward"] = trace.backward_event()
        if sound and named:
            result["norm_overflows"] = not finite(tf.linalg.global_norm([g for _, g in named]))
        with noted("The signal was not followed through the layers"):
            result["layers"], result["jump"] = trace.uses_and_jump()
            if sound:
                result["chain"] = trace.chain(
                    max((size for _, size in result["gradients"]), default=0)
                )
        if sound and any(use.signal == 0 for use in result.get("layers", ())):
            with noted("Whether the signal comes back after a step is not known"):
                start_over()
                result["revives"] = _revives(model, loss_fn, batch, trace)
        with noted("Whether large numbers matter is not known"):
            result["tensors"] = _which_matter(model, loss_fn, batch, result, start_over)
        with noted("The step could not be taken in float64"):
            start_over()
            result["float64"] = _in_float64(model, loss_fn, batch, trace)
        sound = sound and math.isfinite(result["loss"])
        del trace
        if optimizer is None:
            return Measurements(**result, notes=tuple(notes))

        def step() -> tf.Tensor:
            return tf.convert_to_tensor(loss_fn(model, batch))

        with noted("The optimiser's settings could not be read"):
            result["optimizer"] = _optimizer.facts(optimizer)
        if sound and named:
            with noted("The curvature could not be measured"):
                start_over()
                result["curvature"] = _curvature(step, variables, optimizer, result["optimizer"])
            with noted("The optimiser could not be tried"):
                start_over()
                known = result.get("optimizer"), result.get("curvature")
                result["trial"] = _optimizer.trial(
                    optimizer, step, variables, lambda losses: tried_enough(losses, *known)
                )
            with noted("Whether the loss is a sum or a mean is not known"):
                result["summed"] = _summed(model, loss_fn, batch, result["loss"], start_over)
        return Measurements(**result, notes=tuple(notes))


def _copied(batch: Any) -> Any:
    """The batch, its containers and arrays copied: a loss function may change what it is given."""
    return keras.tree.map_structure(
        lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch
    )


def _build(step: Callable[[], Any], unchanged: AbstractContextManager) -> None:
    """Let the first step create the model's variables, and leave them as they were created."""
    created: list[tuple[tf.Variable, np.ndarray]] = []

    def creator(create: Callable, **options: Any) -> tf.Variable:
        variable = create(**options)
        created.append((variable, variable.numpy()))
        return variable

    with suppress(Exception), unchanged, tf.variable_creator_scope(creator):
        step()  # if it raises, it will raise again where it is looked at
    for variable, value in created:
        variable.assign(value)


def _random_states() -> tuple:
    _, words, position, *_ = np.random.get_state()  # noqa: NPY002
    return random.getstate(), words.tobytes(), position


def _scalar(loss: Any) -> tf.Tensor:
    """The loss as a tensor, or the error that says what it is instead."""
    if isinstance(loss, keras.KerasTensor) or loss is None:
        raise TypeError(f"loss_fn must return the loss, a number, got {type(loss).__name__}")
    try:
        tensor = loss if isinstance(loss, tf.Tensor) else tf.convert_to_tensor(loss)
    except (TypeError, ValueError) as error:
        raise TypeError(f"loss_fn must return a number, got {type(loss).__name__}") from error
    if not (tensor.dtype.is_floating or tensor.dtype.is_integer):
        raise TypeError(f"loss_fn must return a number, got a tensor of {tensor.dtype.name}")
    if tensor.shape.rank:
        raise ValueError(
            f"loss_fn must return a single number, got shape {tuple(tensor.shape)}: take the mean"
        )
    return tensor


def _message(error: BaseException) -> str:
    """Class and message of an exception, without TensorFlow's brackets."""
    text = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:\w+\] name:.*", "", str(error)).strip()
    text = re.sub(r"\s*Arguments received by .*", "", text, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text)
    return f"{type(error).__name__}: {text[:300]}"


# ---------------------------------------------------------------------------------------------
# What was given


def _facts(name: str, role: str, value: Any) -> TensorFacts | None:
    values = value._numpy() if hasattr(value, "_numpy") else np.asarray(value)
    if values.dtype.kind in "iub":
        values, integer = values.astype(np.int64), True
    elif values.dtype.kind == "f" or values.dtype.name == "bfloat16":
        integer = False
        if values.dtype.itemsize < 4:
            values = values.astype(np.float32)
    else:
        return None
    kept = values if integer else values[np.isfinite(values)]
    low, high = (float(kept.min()), float(kept.max())) if kept.size else (0.0, 0.0)
    bad = int(values.size - kept.size)
    masks = values <= -1e4
    if role == "batch" and not integer and masks.any() and np.all(masks ^ (values == 0)):
        low, high, bad = 0.0, 0.0, 0  # an additive mask
    return TensorFacts(
        name, role, int(values.size), bad, max(abs(low), abs(high)), low, high, integer
    )


def _tensors(model: keras.Model, batch: Any) -> Iterator[TensorFacts]:
    for path, leaf in keras.tree.flatten_with_path(batch):
        if tf.is_tensor(leaf) or isinstance(leaf, (np.ndarray, np.generic, float, tf.Variable)):
            if isinstance(leaf, (tf.SparseTensor, tf.RaggedTensor)):
                leaf = leaf.values if isinstance(leaf, tf.SparseTensor) else leaf.flat_values
            found = _facts(_batch_name(path), "batch", leaf)
            if found is not None:
                yield found
    for role, variables in (
        ("parameter", model.trainable_variables),
        ("buffer", model.non_trainable_variables),
    ):
        for variable in variables:
            if variable.dtype != "string" and "seed_generator_state" not in variable.path:
                found = _facts(variable.path, role, variable.value.numpy())
                if found is not None:
                    yield found


def _which_matter(
    model: keras.Model,
    loss_fn: Loss,
    batch: Any,
    result: dict[str, Any],
    start_over: Callable[[], None],
) -> tuple[TensorFacts, ...]:
    """Of the tensors with large numbers, whether scaling them down to 1 changes the step."""
    total = math.hypot(*(size for _, size in result["gradients"]))
    bad = not (math.isfinite(total) and math.isfinite(result["loss"]))
    own = {v.path: v for v in model.variables}
    large = [f for f in result["tensors"] if f.largest >= OUT_OF_RANGE and not f.integer]

    def helps(names: set[str]) -> bool:
        if not bad and total <= LARGE_GRADIENT:
            return False
        start_over()
        sizes = {facts.name: facts.largest for facts in large if facts.name in names}
        leaves = [
            leaf / sizes[name] if (name := _batch_name(path)) in sizes else leaf
            for path, leaf in keras.tree.flatten_with_path(batch)
        ]
        for name in sizes.keys() & own.keys():
            own[name].assign(own[name].value / sizes[name])
        with tf.GradientTape() as tape:
            loss = _scalar(loss_fn(model, keras.tree.pack_sequence_as(batch, leaves)))
        weights = [v.value for v in model.trainable_variables]
        slopes = [g for g in tape.gradient(loss, weights) if g is not None]
        now = math.hypot(*(norm(g) for g in slopes)) if np.isfinite(float(loss)) else math.nan
        return math.isfinite(now) and (bad or now < total / 1000)

    return which_matter(result["tensors"], large, helps)


def _raised(trace: Trace, error: Exception, batch: Any) -> Raised:
    """What is known of an operation that raised: TensorFlow names it at the end of its message."""
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.insert(0, (traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    named = re.findall(r"\[Op:(\w+)\]", str(error))
    integers, by_value = (), False
    if named and (call := _innermost_call([frame for frame, _ in frames])):
        function, arguments = call
        if re.search(r"is not in \[|outside the valid range|out of (range|bounds)", str(error)):
            integers = tuple(_indices(arguments, batch))
        else:
            tame = {key: _tame(value) for key, value in arguments.items()}
            by_value = _runs(lambda: function(**tame))
    line = source_line((frame.f_code.co_filename, number) for frame, number in frames)
    place = trace.place(trace.failed_in, named[-1] if named else "", line)
    return Raised(place, _message(error), integers, by_value=by_value)


def _innermost_call(frames: list) -> tuple[Callable, dict] | None:
    """The operation that raised, as a function, and its arguments, from TensorFlow's own frame."""
    for frame in frames:
        code = frame.f_code
        if "/ops/gen_" in code.co_filename.replace("\\", "/"):
            names = code.co_varnames[: code.co_argcount]
            return frame.f_globals[code.co_name], {name: frame.f_locals[name] for name in names}
    return None


def _indices(arguments: dict, batch: Any) -> Iterator[TensorFacts]:
    """Facts of the tensors of integers among some arguments, under their names in the batch."""
    known = list(keras.tree.flatten_with_path(batch))
    for leaf in tf.nest.flatten(list(arguments.values())):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype") or leaf.dtype == tf.resource:
            continue
        values = np.asarray(leaf)
        if values.dtype.kind in "iu" and values.ndim:
            same = (path for path, other in known if np.array_equal(np.asarray(other), values))
            path = next(same, None)
            name = "an integer tensor" if path is None else _batch_name(path)
            yield _facts(name, "batch", values)


def _batch_name(path: tuple) -> str:
    return "batch" + "".join(f"[{key!r}]" for key in path)


def _tame(leaf: Any) -> Any:
    """Numbers between 0.1 and 0.9, as a positive definite matrix if square; others as they are."""
    if not tf.is_tensor(leaf) or not leaf.dtype.is_floating:
        return leaf
    numbers = np.random.default_rng(0).uniform(0.1, 0.9, leaf.shape)
    if numbers.ndim >= 2 and numbers.shape[-1] == numbers.shape[-2]:
        numbers = (numbers + np.swapaxes(numbers, -1, -2)) / 2
        numbers = numbers + numbers.shape[-1] * np.eye(numbers.shape[-1])
    return tf.constant(numbers, leaf.dtype)


def _runs(function: Callable[[], Any]) -> bool:
    try:
        function()
    except Exception:
        return False
    return True


# ---------------------------------------------------------------------------------------------
# The step, otherwise


def _revives(model: keras.Model, loss_fn: Loss, batch: Any, trace: Trace) -> bool:
    """Whether the signal reaches every weight after a few small steps down the gradient."""
    silent = math.inf
    while True:
        strongest: dict[str, float] = {}
        for use in trace.uses_and_jump()[0]:
            strongest[use.parameter] = max(use.signal, strongest.get(use.parameter, 0.0))
        before, silent = silent, sum(signal == 0 for signal in strongest.values())
        if silent == 0 or silent >= before:
            return silent == 0
        known = zip(trace.variables, trace.gradients, strict=True)
        pairs = [(v.value, g) for v, g in known if g is not None]
        slope = math.hypot(*(norm(g) for _, g in pairs))
        size = math.hypot(*(norm(v) for v, _ in pairs))
        if slope == 0:
            return False
        for variable, gradient in pairs:
            variable.assign_sub(gradient * (0.01 * (size + 1) / slope))
        trace = _traced(model, loss_fn, batch)


def _traced(model: keras.Model, loss_fn: Loss, batch: Any) -> Trace:
    trace = Trace(model, batch).run(lambda: loss_fn(model, batch))
    trace.loss = _scalar(trace.loss)
    trace.differentiate()
    return trace


def _in_float64(model: keras.Model, loss_fn: Loss, batch: Any, trace: Trace) -> Float64:
    try:
        with float64(model):
            again = _traced(model, loss_fn, widen(batch))
        narrow = (t for op in again.ops for t in op.outputs if t.dtype in _NARROW)
        if any(again.signal(t) is not None for t in narrow):
            raise TypeError("not all of it is float64")
        again.random |= trace.random
    except Exception:
        # The user's code asks for another format: the same operations, then, one by one.
        again = trace.in_float64()
    layers = again.uses_and_jump()[0]
    pairs = [
        (g.numpy().astype(np.float64), g64.numpy())
        for g, g64 in zip(trace.gradients, again.gradients, strict=True)
        if g is not None and g64 is not None
    ]
    total = math.hypot(*(norm(tf.constant(g64)) for _, g64 in pairs))
    difference, lost = None, 0.0
    if math.isfinite(total) and all(np.isfinite(g).all() for g, _ in pairs):
        if total and not again.random:
            difference = math.hypot(*(norm(tf.constant(g - g64)) for g, g64 in pairs)) / total
        there = sum(np.count_nonzero(g64) for _, g64 in pairs)
        lost = sum(np.count_nonzero((g == 0) & (g64 != 0)) for g, g64 in pairs) / max(there, 1)
    return Float64(
        loss=float(again.loss),
        total=total,
        finite=math.isfinite(float(again.loss)) and math.isfinite(total),
        difference=difference,
        lost=float(lost),
        layers=layers,
    )


def _curvature(
    step: Callable[[], tf.Tensor],
    variables: list[keras.Variable],
    optimizer: keras.Optimizer,
    facts: OptimizerFacts,
) -> Curvature | None:
    scale: np.ndarray | float = 1.0
    if facts.method == "adam":
        if not facts.steps:
            return None  # its denominators are those of the first gradient: the trial will tell
        found = _optimizer.denominators(optimizer, variables)
        if found is None:
            return None
        scale = np.concatenate([np.ravel(d) for d in found]) ** -0.5
    product, slopes = hessian_product(step, [v.value for v in variables])
    gradient = flat(slopes)
    if isinstance(scale, np.ndarray):
        scale = scale.astype(gradient.dtype)
    start = start_near(gradient * scale)
    value, vector, settled = largest_eigenvalue(lambda v: product(v * scale) * scale, start)
    ends = np.cumsum([math.prod(v.shape) for v in variables])[:-1]
    shares = [float(part @ part) for part in np.split(vector, ends)]
    return Curvature(value, facts.method == "adam", variables[int(np.argmax(shares))].path, settled)


def _summed(
    model: keras.Model, loss_fn: Loss, batch: Any, whole: float, start_over: Callable[[], None]
) -> bool | None:
    """Whether the loss of the batch is the sum of its halves' losses, not their mean."""
    leaves = tf.nest.flatten(batch)
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in leaves}
    if len(lengths) != 1 or None in lengths or not leaves:
        return None
    (length,) = lengths
    if length < 2 or length % 2:
        return None
    parts = []
    for half in (slice(None, length // 2), slice(length // 2, None)):
        start_over()
        parts.append(float(loss_fn(model, tf.nest.map_structure(lambda t, h=half: t[h], batch))))
    total = sum(parts)
    if not math.isfinite(total) or total == 0:
        return None
    closer = abs(whole - total), abs(whole - total / 2)
    if min(closer) > 0.1 * abs(total):
        return None
    return closer[0] < closer[1]


__all__ = ["Diagnosis", "diagnose"]
