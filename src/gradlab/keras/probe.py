"""Watch the gradients of `model.fit` from a callback."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from gradlab.history import GradientHistory, NonFinite, ring_order

ON_NONFINITE = ("record", "skip", "raise")


class NonFiniteGradientError(FloatingPointError):
    """A gradient held an inf or a NaN, and the probe was asked to raise.

    Attributes:
        step: the optimiser step that was about to be taken.
        parameter: path of the first variable with a bad gradient.
        module: path of the layer that owns it.
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
    gradient = tf.cast(gradient, tf.float64)
    largest = tf.reduce_max(tf.abs(gradient))
    scale = tf.where((largest > 0) & tf.math.is_finite(largest), largest, 1)
    return scale * tf.norm(gradient / scale)


def gradient_norms(gradients: list[tf.Tensor]) -> tf.Tensor:
    """L2 norm of each gradient, (gradients,), float64; usable inside a graph and under XLA.

    Only when a norm reads inf, NaN or next to 0 are all of them computed again, in float64 and
    scaled, so that no square overflows or underflows.
    """
    if not gradients:
        return tf.zeros((0,), tf.float64)
    dense = [_values(g) for g in gradients]
    fast = tf.stack([tf.cast(tf.norm(g), tf.float64) for g in dense])
    suspicious = tf.reduce_any(~(fast > _TINY) | ~tf.math.is_finite(fast))
    return tf.cond(
        suspicious,
        lambda: tf.stack([_exact_norm(g) for g in dense]),
        lambda: fast,
    )


class GradientProbe(keras.callbacks.Callback):
    """Record the gradient norm of every trainable variable at every optimiser step.

    It is a callback::

        model.fit(x, y, callbacks=[probe := GradientProbe()])
        probe.history.plot()

    The probe stands in front of `optimizer.apply`: it sees gradients before the optimiser's own
    `clipnorm`, `global_clipnorm` or `clipvalue`.  It works in compiled graphs, `jit_compile=True`
    included, and with a custom `train_step` that uses the model's optimiser.

    Args:
        capacity: steps kept; older ones are overwritten.
        update_ratio_every: every so many steps, also record ‖Δw‖/‖w‖ of every variable; 0 never.
        on_nonfinite: what to do when a gradient holds an inf or NaN: "record" it, "skip" the step
            (weights and optimiser state stay as they are), or "raise": skip it inside the graph,
            then raise when the batch ends.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        *,
        capacity: int = 1000,
        update_ratio_every: int = 0,
        on_nonfinite: str = "record",
    ) -> None:
        super().__init__()
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {ON_NONFINITE}, got {on_nonfinite!r}")
        if update_ratio_every < 0:
            raise ValueError(f"update_ratio_every must be ≥ 0, got {update_ratio_every!r}")
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity!r}")
        self.capacity, self.on_nonfinite = capacity, on_nonfinite
        self.update_ratio_every = update_ratio_every
        self._names: list[str] = []
        self._ring: dict[str, tf.Variable] = {}
        self._optimizer: keras.optimizers.Optimizer | None = None

    # -- attaching -----------------------------------------------------------------------------

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Called by `fit`: put the probe in front of the optimiser and retrace the step."""
        self._detach()  # from a fit that an exception ended before its time
        if self._ring:
            self._ring["raised"].assign([-1, -1])
        self._optimizer = self.model.optimizer
        self._apply = self._optimizer.apply
        self._optimizer.apply = self._watched_apply
        self.model.make_train_function(force=True)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Called by `fit`: leave the optimiser and the model as they were."""
        self._detach()

    def _detach(self) -> None:
        if self._optimizer is not None:
            vars(self._optimizer).pop("apply", None)  # the class's own method shows again
            self._optimizer = None
            self.model.make_train_function(force=True)

    def _make_ring(self, names: list[str]) -> None:
        """Variables that the compiled step writes to; nothing is read until someone asks."""
        if self._ring and names == self._names:
            return  # a second fit goes on recording
        self._names = names
        rows, columns = self.capacity, len(names)

        def variable(shape: tuple[int, ...], dtype: tf.DType, value: float = 0) -> tf.Variable:
            return tf.Variable(tf.fill(shape, tf.cast(value, dtype)), trainable=False)

        self._ring = {
            "norms": variable((rows, columns), tf.float64, np.nan),
            "present": variable((rows, columns), tf.bool),
            "skipped": variable((rows,), tf.bool),
            "count": variable((), tf.int64),
            "first_nonfinite": variable((2,), tf.int64, -1),  # step and column
            "raised": variable((2,), tf.int64, -1),  # the same for this fit alone
        }
        if self.update_ratio_every:
            self._ring["update_ratios"] = variable((rows, columns), tf.float64, np.nan)

    # -- at each step, in the graph ------------------------------------------------------------

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
        norms = tf.tensor_scatter_nd_update(
            tf.fill((len(self._names),), tf.constant(np.nan, tf.float64)),
            np.reshape(columns, (-1, 1)).astype(np.int32),
            gradient_norms(list(live.values())),
        )
        present = tf.constant(np.isin(np.arange(len(self._names)), columns))
        bad = present & ~tf.math.is_finite(norms)
        where = tf.stack([step, tf.argmax(tf.cast(bad, tf.int32))])
        for key in ("first_nonfinite", "raised"):
            is_first = tf.reduce_any(bad) & (ring[key][0] < 0)
            ring[key].assign(tf.where(is_first, where, ring[key]))
        skip = tf.reduce_any(bad) & (self.on_nonfinite != "record")
        if self.on_nonfinite == "raise":
            # With steps_per_execution, steps may follow before Python hears of the bad one.
            skip |= ring["raised"][0] >= 0
        for key, value in (("norms", norms), ("present", present), ("skipped", skip)):
            ring[key].scatter_nd_update(row, value[None])
        ring["count"].assign_add(1)

        def apply() -> tf.Tensor:
            self._apply(grads, trainable_variables)
            return tf.fill((len(self._names),), tf.constant(np.nan, tf.float64))

        def apply_and_compare() -> tf.Tensor:
            watched = self.model.trainable_variables
            before = [tf.identity(v.value) for v in watched]
            apply()
            moved = gradient_norms([v.value - old for v, old in zip(watched, before, strict=True)])
            size = gradient_norms(before)
            return tf.where(size > 0, moved / size, tf.constant(np.nan, tf.float64))

        def leave() -> tf.Tensor:
            return tf.fill((len(self._names),), tf.constant(np.nan, tf.float64))

        step_fn = apply
        if self.update_ratio_every:
            due = step % self.update_ratio_every == 0

            def step_fn() -> tf.Tensor:
                return tf.cond(due, apply_and_compare, apply)

        ratios = step_fn() if self.on_nonfinite == "record" else tf.cond(skip, leave, step_fn)
        if self.update_ratio_every:
            ring["update_ratios"].scatter_nd_update(row, ratios[None])

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Called by `fit`: raise for a step that the graph has already held back."""
        if self.on_nonfinite != "raise":
            return
        step, index = self._ring["raised"].numpy()
        if step >= 0:
            path = self._names[index]
            self._detach()
            raise NonFiniteGradientError(int(step), path, path.rpartition("/")[0])

    # -- what was seen -------------------------------------------------------------------------

    @property
    def history(self) -> GradientHistory:
        """What has been recorded so far."""
        if not self._ring:
            raise RuntimeError("nothing recorded yet: pass this probe to fit(callbacks=[...])")
        count = int(self._ring["count"].numpy())
        order, steps = ring_order(count, self.capacity)
        step, index = self._ring["first_nonfinite"].numpy()
        rows = {
            key: self._ring[key].numpy()[order]
            for key in ("norms", "present", "skipped", "update_ratios")
            if key in self._ring
        }
        return GradientHistory(
            steps=steps,
            names=list(self._names),
            first_nonfinite=NonFinite(int(step), self._names[index]) if step >= 0 else None,
            **rows,
        )

    def save(self, path: str | Path) -> Path:
        """Write the history to an .npz file; see `GradientHistory.save`."""
        return self.history.save(path)
