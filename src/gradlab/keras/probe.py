"""Watch the gradients of `model.fit` from a callback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from gradlab.history import (
    AddScalar,
    GradientHistory,
    NonFinite,
    Outlet,
    check_options,
    ring_order,
)


class NonFiniteGradientError(FloatingPointError):
    """A gradient held an inf or a NaN, and the probe was asked to raise.

    Attributes:
        step: the optimiser step that was about to be taken.
        parameter: path of the first variable with a bad gradient.
        module: path of the layer that owns it, and its class.
    """

    def __init__(self, step: int, parameter: str, module: str) -> None:
        self.step, self.parameter, self.module = step, parameter, module
        super().__init__(
            f"step {step}: the gradient of {parameter} (layer {module}) is not finite. "
            "The step was not taken: the weights are those of the step before."
        )


# Below this, squares of float32 numbers may have lost digits, or all of them, to underflow.
_TINY = 1e-15


def _values(gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    if isinstance(gradient, tf.IndexedSlices):
        # Rows may repeat: the gradient of a row is the sum of its slices.  (tf.unique would do,
        # but its result has no fixed shape, which XLA requires.)
        order = tf.argsort(gradient.indices)
        rows = tf.gather(gradient.indices, order)
        places = tf.cumsum(tf.cast(tf.concat([[False], rows[1:] != rows[:-1]], 0), tf.int32))
        gradient = tf.math.unsorted_segment_sum(
            tf.gather(gradient.values, order), places, tf.size(rows)
        )
    gradient = tf.convert_to_tensor(gradient)
    return tf.cast(gradient, tf.float32) if gradient.dtype.size < 4 else gradient


def _exact_norm(gradient: tf.Tensor) -> tf.Tensor:
    """L2 norm whose square may neither overflow nor underflow, float64."""
    largest = tf.reduce_max(tf.abs(gradient))
    scale = tf.where((largest > 0) & tf.math.is_finite(largest), largest, tf.ones_like(largest))
    half = tf.nn.l2_loss(gradient / scale)
    return tf.cast(scale, tf.float64) * tf.sqrt(2 * tf.cast(half, tf.float64))


def gradient_norms(gradients: list[tf.Tensor]) -> tf.Tensor:
    """L2 norm of each gradient, (gradients,), float64; usable inside a graph and under XLA.

    Only when a norm reads inf, NaN or next to 0 are all of them computed again, of scaled numbers
    whose squares neither overflow nor underflow.
    """
    if not gradients:
        return tf.zeros((0,), tf.float64)
    dense = [_values(g) for g in gradients]
    # One operation per gradient, and the rest on all of them: each costs microseconds of its own.
    halves = [tf.nn.l2_loss(g) for g in dense]  # Σ x² / 2
    if len({h.dtype for h in halves}) > 1:
        halves = [tf.cast(h, tf.float64) for h in halves]
    fast = tf.sqrt(2 * tf.cast(tf.stack(halves), tf.float64))
    suspicious = ~tf.reduce_all((fast > _TINY) & tf.math.is_finite(fast))

    def exact(fast: tf.Tensor, *dense: tf.Tensor) -> tf.Tensor:
        return tf.stack([_exact_norm(g) for g in dense])

    if tf.executing_eagerly():
        return exact(fast, *dense) if suspicious else fast
    # What tf.cond makes too, but it has the branches inlined, with a switch for every gradient
    # that runs at each step whichever branch is taken.
    inputs = [fast, *dense]
    signature = [tf.TensorSpec(t.shape, t.dtype) for t in inputs]
    then, otherwise = (
        tf.function(branch, autograph=False).get_concrete_function(*signature)
        for branch in (exact, lambda fast, *dense: tf.identity(fast))
    )
    norms = tf.raw_ops.StatelessIf(
        cond=suspicious, input=inputs, Tout=[tf.float64], then_branch=then, else_branch=otherwise
    )[0]
    return tf.ensure_shape(norms, fast.shape)


def _total(norms: tf.Tensor) -> tf.Tensor:
    """√Σ norm² in one pass."""
    return tf.sqrt(2 * tf.nn.l2_loss(norms))


def _clipped_total(optimizer: keras.optimizers.Optimizer, norms: tf.Tensor, grads: list):
    """The total norm that the optimiser's own clipping leaves.

    Args:
        optimizer: the one that clips.
        norms: (gradients,), float64, their norms.
        grads: the gradients, without loss scale.
    """
    total = _total(norms)
    # In the order in which Keras asks for them: it obeys the first.
    if optimizer.clipnorm:
        clipped = _total(tf.minimum(norms, tf.cast(optimizer.clipnorm, tf.float64)))
    elif optimizer.global_clipnorm:
        clipped = tf.minimum(total, tf.cast(optimizer.global_clipnorm, tf.float64))
    elif optimizer.clipvalue:
        limit = optimizer.clipvalue
        clipped = _total(
            gradient_norms([tf.clip_by_value(_values(g), -limit, limit) for g in grads])
        )
    else:
        return total
    return tf.where(tf.math.is_finite(total), clipped, total)


def _leaves(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that hold no others, each once; a recurrent layer counts as one."""
    inner = layer._flatten_layers(include_self=False, recursive=False)
    if not inner or isinstance(layer, keras.layers.RNN):
        return [] if isinstance(layer, keras.layers.InputLayer) else [layer]
    return list({id(leaf): leaf for part in inner for leaf in _leaves(part)}.values())


def _owner(model: keras.Model, variable: keras.Variable) -> str:
    """The class of the layer that a variable belongs to."""
    for layer in model._flatten_layers():
        if any(v is variable for v in layer._trainable_variables):
            return type(layer).__name__
    return type(model).__name__


def _writes(writer: object) -> AddScalar:
    """How to hand a number to one of TensorFlow's writers, or to one of TensorBoard's shape."""
    if callable(getattr(writer, "add_scalar", None)):
        return writer.add_scalar
    if not isinstance(writer, tf.summary.SummaryWriter):
        raise TypeError(
            "a writer comes from tf.summary.create_file_writer or has a method "
            f"add_scalar(tag, value, step), got {type(writer).__name__}"
        )
    # What tf.summary.scalar writes, which itself needs TensorBoard installed.
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = "scalars"

    def add_scalar(tag: str, value: float, step: int) -> None:
        with writer.as_default():
            tf.summary.write(tag, tf.constant(value, tf.float32), step=step, metadata=metadata)

    return add_scalar


class GradientProbe(keras.callbacks.Callback):
    """Record the gradient norm of every trainable variable at every optimiser step.

    It is a callback::

        model.fit(x, y, callbacks=[probe := GradientProbe()])
        probe.history.plot()

    The probe stands in front of `optimizer.apply`: it sees gradients before the optimiser's own
    `clipnorm`, `global_clipnorm` or `clipvalue`, and computes the total that these leave.  It works
    in compiled graphs, `jit_compile=True` included, and with a custom `train_step` that uses the
    model's optimiser.  With `gradient_accumulation_steps`, each batch counts as a step.

    Norms are without the loss scale of a `LossScaleOptimizer` or `loss_scale_factor`.  Steps that a
    LossScaleOptimizer leaves out are recorded as skipped; they are its way to find a scale, so none
    of them raises.

    A fit that an exception ends, a Ctrl-C for instance, leaves the probe attached until the model
    is next trained, with the same probe, another one or none.

    Args:
        capacity: steps kept; older ones are overwritten.
        activations: also record the largest absolute output of every leaf layer in `train_step`.
        update_ratio_every: every so many steps, also record ‖Δw‖/‖w‖ of every variable; 0 never.
        on_nonfinite: what to do when a gradient holds an inf or NaN: "record" it, "skip" the step
            (weights and optimiser state stay as they are), or "raise": skip it inside the graph,
            then raise when the batch ends.
        save_to: an .npz file that is replaced every `save_every` steps and when the fit ends, so
            that a run that is killed leaves its history.

    Raises:
        ValueError: an argument out of range.
        FileNotFoundError: `save_to` lies in no folder.
    """

    def __init__(
        self,
        *,
        capacity: int = 1000,
        activations: bool = False,
        update_ratio_every: int = 0,
        on_nonfinite: str = "record",
        save_to: str | Path | None = None,
        save_every: int = 100,
    ) -> None:
        super().__init__()
        check_options(
            capacity=capacity, update_ratio_every=update_ratio_every, on_nonfinite=on_nonfinite
        )
        self.capacity, self.on_nonfinite = capacity, on_nonfinite
        self.activations, self.update_ratio_every = activations, update_ratio_every
        self._outlet = Outlet(save_to, save_every)
        self._names: list[str] = []
        self._layer_names: list[str] = []
        self._seen = ""
        self._ring: dict[str, tf.Variable] = {}
        self._optimizer: keras.optimizers.Optimizer | None = None
        self._layers: list[keras.layers.Layer] = []
        self._largest: tf.Variable | None = None
        self._in_step = False

    # -- attaching -----------------------------------------------------------------------------

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Called by `fit`: put the probe in front of the optimiser and retrace the step."""
        if self._ring:
            self._ring["raised"].assign([-1, -1])
        model = self.model
        self._optimizer = model.optimizer
        self._apply = self._optimizer.apply
        self._optimizer.apply = self._watched_apply
        if self.activations:
            self._watch_layers()
        model.make_train_function(force=True)
        # `fit` and `train_on_batch` begin with this call: what an exception left is put right then.
        # (Through `vars`: Keras would track what is assigned to a model.)
        make = model.make_train_function

        def make_train_function(force: bool = False) -> None:
            if not force:
                self._detach()
            make(force=force)

        vars(model)["make_train_function"] = make_train_function

    def on_train_end(self, logs: dict | None = None) -> None:
        """Called by `fit`: leave the optimiser and the model as they were."""
        self._detach()
        if self._ring:
            self._outlet.save(self._history)

    def _detach(self) -> None:
        # The classes' own methods show again, for all probes of this fit at once.
        vars(self._optimizer).pop("apply", None)
        for name in ("make_train_function", "train_step"):
            vars(self.model).pop(name, None)
        for layer in self._layers:
            vars(layer).pop("call", None)
        self.model.make_train_function(force=True)

    def _watch_layers(self) -> None:
        """Let each leaf layer keep its largest output in a variable: it may run in a loop."""
        self._layers = _leaves(self.model)
        self._largest = tf.Variable(tf.fill((len(self._layers),), -1.0), trainable=False)
        train_step = self.model.train_step

        def watched_step(*args: object, **kwargs: object) -> object:
            self._in_step = True  # and not in an evaluation, while this is traced
            try:
                return train_step(*args, **kwargs)
            finally:
                self._in_step = False

        vars(self.model)["train_step"] = watched_step
        for place, layer in enumerate(self._layers):
            vars(layer)["call"] = self._watched_call(layer.call, place)

    def _watched_call(self, call: Callable, place: int) -> Callable:
        @functools.wraps(call)
        def watched(*args: object, **kwargs: object) -> object:
            outputs = call(*args, **kwargs)
            if self._in_step:
                for tensor in keras.tree.flatten(outputs):
                    if isinstance(tensor, tf.Tensor) and tensor.dtype.is_floating:
                        before = self._largest[place]
                        largest = tf.cast(tf.reduce_max(tf.abs(tensor)), tf.float32)
                        # XLA's maxima pass over NaNs.
                        lost = tf.reduce_any(tf.math.is_nan(tensor)) | tf.math.is_nan(before)
                        largest = tf.where(lost, np.float32(np.nan), tf.maximum(largest, before))
                        self._largest.scatter_nd_update([[place]], [largest])
            return outputs

        return watched

    def _make_ring(self, names: list[str]) -> None:
        """Variables that the compiled step writes to; nothing is read until someone asks."""
        layers = [layer.path for layer in self._layers]
        if self._ring and (names, layers) == (self._names, self._layer_names):
            return  # a second fit goes on recording
        self._names, self._layer_names = names, layers
        rows, columns = self.capacity, len(names)

        def variable(shape: tuple[int, ...], dtype: tf.DType, value: float = 0) -> tf.Variable:
            return tf.Variable(tf.fill(shape, tf.cast(value, dtype)), trainable=False)

        self._ring = {
            # Per step: norms, -1 for no gradient; the total after clipping; whether skipped.
            "rows": variable((rows, columns + 2), tf.float64),
            "count": variable((), tf.int64),
            "first_nonfinite": variable((2,), tf.int64, -1),  # step and column
            "raised": variable((2,), tf.int64, -1),  # the same for this fit alone
        }
        if self.activations:
            self._ring["activations"] = variable((rows, len(self._layers)), tf.float32, np.nan)
        if self.update_ratio_every:
            self._ring["update_ratios"] = variable((rows, columns), tf.float64, np.nan)

    # -- at each step, in the graph ------------------------------------------------------------

    @property
    def _scaling(self) -> bool:
        return isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer)

    def _loss_scale(self) -> tf.Tensor | float | None:
        if self._scaling:
            return tf.identity(self._optimizer.dynamic_scale.value)
        return self._optimizer.loss_scale_factor

    def _watched_apply(self, grads: list, trainable_variables: list | None = None) -> None:
        variables = (
            self.model.trainable_variables if trainable_variables is None else trainable_variables
        )
        with tf.init_scope():  # outside the graph that is being traced, and once
            self._make_ring([v.path for v in self.model.trainable_variables])
            if not self._optimizer.built:
                # Inside a branch of the graph, the optimiser could not create its variables.
                self._optimizer.build(variables)
        ring, step = self._ring, tf.identity(self._ring["count"])
        row = tf.reshape(step % self.capacity, (1, 1))
        # By identity: two layers of one name in different places have variables of one path.
        place = {id(v): i for i, v in enumerate(self.model.trainable_variables)}
        live = {
            place[id(v)]: g
            for g, v in zip(grads, variables, strict=True)
            if g is not None and id(v) in place
        }
        columns = list(live)
        live_norms, scale = gradient_norms(list(live.values())), self._loss_scale()
        if scale is not None:
            live_norms /= tf.cast(scale, tf.float64)
        self._seen = "gradients before the optimiser's own clipping" + (
            "" if scale is None else ", divided by the loss scale"
        )
        norms = live_norms
        if columns != list(range(len(self._names))):
            norms = tf.tensor_scatter_nd_update(
                -tf.ones((len(self._names),), tf.float64),
                np.reshape(columns, (-1, 1)).astype(np.int32),
                live_norms,
            )
        bad = tf.cast(~tf.math.is_finite(norms), tf.int32)
        column = tf.argmax(bad)
        any_bad = bad[column] > 0
        where = tf.stack([step, column])
        raising = self.on_nonfinite == "raise" and not self._scaling
        for key in ("first_nonfinite", "raised")[: 1 + raising]:
            before = tf.identity(ring[key])
            ring[key].assign(tf.where(any_bad & (before[0] < 0), where, before))
        if self._scaling:
            # It skips by itself, on all gradients that it is given, and must see them to lower
            # its scale.
            left_out = ~self._optimizer.check_finite(grads)
            skip = tf.constant(False)
        else:
            skip = any_bad if self.on_nonfinite != "record" else tf.constant(False)
            if raising:
                # With steps_per_execution, steps may follow before Python hears of the bad one.
                skip |= ring["raised"][0] >= 0
            left_out = skip
        clipper = self._optimizer.inner_optimizer if self._scaling else self._optimizer
        unscaled = [g if scale is None else _values(g) / scale for g in live.values()]
        clipped = _clipped_total(clipper, live_norms, unscaled)
        numbers = tf.concat([norms, [clipped, tf.cast(left_out, tf.float64)]], 0)
        ring["rows"].scatter_nd_update(row, numbers[None])
        if self.activations:
            largest = tf.identity(self._largest)
            largest = tf.where(largest == -1, np.float32(np.nan), largest)
            ring["activations"].scatter_nd_update(row, largest[None])
            self._largest.assign(tf.fill(largest.shape, -1.0))
        ring["count"].assign_add(1)

        def apply() -> tf.Tensor:
            self._apply(grads, trainable_variables)
            return leave()

        def apply_and_compare() -> tf.Tensor:
            watched = self.model.trainable_variables
            before = [tf.identity(v.value) for v in watched]
            apply()
            moved = gradient_norms([v.value - old for v, old in zip(watched, before, strict=True)])
            size = gradient_norms(before)
            measured = (size > 0) & ~left_out
            return tf.where(measured, moved / size, tf.constant(np.nan, tf.float64))

        def leave() -> tf.Tensor:
            return tf.fill((len(self._names),), tf.constant(np.nan, tf.float64))

        step_fn = apply
        if self.update_ratio_every:
            due = step % self.update_ratio_every == 0

            def step_fn() -> tf.Tensor:
                return tf.cond(due, apply_and_compare, apply)

        always = self.on_nonfinite == "record" or self._scaling
        ratios = step_fn() if always else tf.cond(skip, leave, step_fn)
        if self.update_ratio_every:
            ring["update_ratios"].scatter_nd_update(row, ratios[None])

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Called by `fit`: raise for a step that the graph has already held back."""
        if self._outlet.used:
            self._outlet.publish(int(self._ring["count"].numpy()), self._history)
        if self.on_nonfinite != "raise":
            return
        step, index = self._ring["raised"].numpy()
        if step >= 0:
            path = self._names[index]
            self._detach()
            layer = path.rpartition("/")[0]
            kind = _owner(self.model, self.model.trainable_variables[index])
            raise NonFiniteGradientError(int(step), path, f"{layer}: {kind}")

    # -- what was seen -------------------------------------------------------------------------

    @property
    def history(self) -> GradientHistory:
        """What has been recorded so far."""
        if not self._ring:
            raise RuntimeError("nothing recorded yet: pass this probe to fit(callbacks=[...])")
        return self._history()

    def _history(self, since: int = 0) -> GradientHistory:
        count = int(self._ring["count"].numpy())
        order, steps = ring_order(count, self.capacity, since)
        step, index = self._ring["first_nonfinite"].numpy()
        optional = {
            key: tf.gather(self._ring[key], order).numpy()
            for key in ("activations", "update_ratios")
            if key in self._ring
        }
        rows = tf.gather(self._ring["rows"], order).numpy()
        norms = rows[:, :-2]
        present = norms != -1
        return GradientHistory(
            steps=steps,
            names=list(self._names),
            norms=np.where(present, norms, np.nan),
            present=present,
            clipped_total=rows[:, -2],
            skipped=rows[:, -1] == 1,
            first_nonfinite=NonFinite(int(step), self._names[index]) if step >= 0 else None,
            activation_names=list(self._layer_names),
            seen=self._seen,
            **optional,
        )

    def save(self, path: str | Path) -> Path:
        """Write the history to an .npz file; see `GradientHistory.save`."""
        return self.history.save(path)

    def log_to(self, writer: object, every: int = 1) -> GradientProbe:
        """Send every `every`-th step's numbers to a writer as well, when their batch ends.

        Args:
            writer: from `tf.summary.create_file_writer`, or anything with
                `add_scalar(tag, value, step)`.  Tags are `grad_norm/<variable>`,
                `grad_norm/total` and, where measured, `grad_norm/clipped_total` and
                `update_ratio/<variable>`.
            every: ≥ 1.

        Returns:
            The probe itself.
        """
        self._outlet.log_to(_writes(writer), every)
        return self
