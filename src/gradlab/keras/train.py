"""The part of `gradlab train` that trains in TensorFlow."""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from gradlab.convnet import ConvNetSpec
from gradlab.diagnosis import Diagnosis
from gradlab.history import GradientHistory
from gradlab.keras import convnet, models
from gradlab.keras.diagnose import diagnose
from gradlab.keras.probe import GradientProbe
from gradlab.training import BadOption, Options, Part, Problem, processes

_POLICIES = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}
_AT_ONCE = 4096  # samples that are evaluated together


@keras.saving.register_keras_serializable("gradlab")
class _Table(keras.optimizers.schedules.LearningRateSchedule):
    """A rate for every step."""

    def __init__(self, rates: np.ndarray) -> None:
        self.rates = tf.constant(rates, tf.float32)

    def __call__(self, step):
        return tf.gather(self.rates, tf.minimum(tf.cast(step, tf.int32), len(self.rates) - 1))


def _optimizer(options: Options, rates: np.ndarray) -> keras.optimizers.Optimizer:
    given = {"learning_rate": _Table(rates), "global_clipnorm": options.clip_norm}
    match options.optimizer:
        case "adam":
            return keras.optimizers.Adam(epsilon=1e-8, **given)
        case "rmsprop":
            # Keras's ε stands inside the root: this is PyTorch's 1e-8 outside.
            return keras.optimizers.RMSprop(rho=0.99, epsilon=1e-16, **given)
    momentum = 0.0 if options.optimizer == "sgd" else 0.9
    return keras.optimizers.SGD(
        momentum=momentum, nesterov=options.optimizer == "nesterov", **given
    )


class _Hooks(keras.callbacks.Callback):
    """Calls the run after every step and every epoch."""

    def __init__(self, after_step: Callable, after_epoch: Callable) -> None:
        super().__init__()
        self.after_step, self.after_epoch = after_step, after_epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.after_step()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.after_epoch(epoch)


class Trainer:
    """A network, its optimiser and its data.

    Args:
        options: of the run.
        problem: what is trained.

    Raises:
        BadOption: started by `torchrun`, which starts processes for PyTorch.
    """

    def __init__(self, options: Options, problem: Problem) -> None:
        if processes()[1] > 1:
            raise BadOption(
                "torchrun starts processes that PyTorch connects; with --framework tensorflow each "
                "of them would train alone. Start one process, or use --framework torch"
            )
        self.options, self.problem, self.rank = options, problem, 0
        dtype = _POLICIES.get(options.precision, options.precision)
        if isinstance(problem.spec, ConvNetSpec):
            self.names, self.model = convnet, convnet.ConvNet(problem.spec, problem.weights, dtype)
        else:
            self.names, self.model = models, models.MLP(problem.spec, dtype=dtype)
            models.load_weights(self.model, problem.weights)
        optimizer = _optimizer(options, problem.rates)
        if options.precision == "float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        self.optimizer = optimizer
        self.model.compile(optimizer, self._summed_loss, auto_scale_loss=False)
        optimizer.build(self.model.trainable_variables)
        self.probe = GradientProbe(
            capacity=min(max(1000, problem.steps_per_epoch), 10_000),
            on_nonfinite=options.on_nonfinite,
        )
        #: Whether a step may be left out; to see which was costs some operations a step.
        self._leaves_out = options.on_nonfinite == "skip" or options.precision == "float16"
        #: Losses and samples of the steps that were taken, and of the last step.
        self._taken, self._last = (
            tf.Variable(tf.zeros(2, tf.float64), trainable=False) for _ in range(2)
        )
        self._before = tf.Variable(tf.zeros((), tf.int64), trainable=False)
        self._evaluate = tf.function(self._sums, reduce_retracing=True)

    @property
    def history(self) -> GradientHistory:
        """What the probe recorded."""
        return self.probe.history

    def _each_loss(self, y: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """The loss of every sample."""
        if logits.dtype != tf.float64:
            logits = tf.cast(logits, tf.float32)
        y = tf.reshape(tf.cast(y, tf.int64), (-1,))
        if self.options.loss == "cross-entropy":
            return tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        wanted = tf.one_hot(y, logits.shape[1], dtype=logits.dtype)
        return tf.reduce_sum(tf.square(logits - wanted), axis=1)

    def _summed_loss(self, y: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """The loss of every sample in a training step, whose sum is kept."""
        losses = self._each_loss(y, logits)
        total = tf.reduce_sum(tf.cast(losses, tf.float64))
        seen = tf.stack([total, tf.cast(tf.size(losses), tf.float64)])
        if self._leaves_out:
            self._settle()  # the step before this one
            self._last.assign(seen)
        else:
            self._taken.assign_add(seen)
        return losses

    def _settle(self) -> None:
        """Count the last step if it was taken: the optimiser counts no other."""
        done = tf.cast(self.optimizer.iterations.value, tf.int64)
        self._taken.assign_add(tf.where(done > self._before, self._last, tf.zeros_like(self._last)))
        self._before.assign(done)

    def _mean_loss(self) -> float:
        """Mean loss over the samples of the steps that were taken since the last call, or NaN."""
        if self._leaves_out:
            self._settle()
        total, samples = self._taken.numpy()
        self._taken.assign(tf.zeros_like(self._taken))
        return float(total / samples) if samples else math.nan

    def _dataset(self, first: int, last: int) -> tf.data.Dataset:
        """The batches of epochs first to last − 1, one after the other."""
        x, y = tf.constant(self.problem.train.x), tf.constant(self.problem.train.y)
        shape = y.shape

        def rows(epoch: tf.Tensor) -> tf.data.Dataset:
            order = tf.numpy_function(self.problem.order, [epoch], tf.int64, stateful=False)
            return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(order, shape)).batch(
                self.options.batch_size
            )

        batches = tf.data.Dataset.range(first, last).flat_map(rows)
        return batches.map(lambda here: (tf.gather(x, here), tf.gather(y, here))).prefetch(4)

    def fit(
        self,
        first: int,
        last: int,
        after_step: Callable[[], object],
        after_epoch: Callable[[int, float], object],
    ) -> None:
        """Train epochs first to last − 1.

        Args:
            first, last: epochs, from 0.
            after_step: called after every step.
            after_epoch: called with the epoch and its mean loss over the steps that were taken.

        Raises:
            FloatingPointError: the probe's, with on_nonfinite="raise".
        """
        if first == last:
            return
        self._before.assign(tf.cast(self.optimizer.iterations.value, tf.int64))
        self.model.fit(
            self._dataset(first, last),
            initial_epoch=first,
            epochs=last,
            steps_per_epoch=self.problem.steps_per_epoch,
            shuffle=False,
            verbose=0,
            callbacks=[
                self.probe,
                _Hooks(after_step, lambda epoch: after_epoch(epoch, self._mean_loss())),
            ],
        )

    def _sums(self, x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        logits = self.model(x, training=False)
        right = tf.equal(tf.argmax(logits, 1), y)
        return tf.reduce_sum(self._each_loss(y, logits)), tf.math.count_nonzero(right)

    def evaluate(self, part: Part) -> tuple[float, float]:
        """Mean loss and accuracy.

        Args:
            part: any samples.
        """
        total = right = 0.0
        for start in range(0, len(part.y), _AT_ONCE):
            here = slice(start, start + _AT_ONCE)
            loss, hits = self._evaluate(tf.constant(part.x[here]), tf.constant(part.y[here]))
            total, right = total + float(loss), right + int(hits)
        return total / len(part.y), right / len(part.y)

    def state(self) -> tuple[dict[str, np.ndarray], dict]:
        """All numbers that training goes on from.

        Returns:
            Name to array, and the rest as JSON holds it.
        """
        arrays = {f"model.{k}": v for k, v in self.names.get_weights(self.model).items()}
        for place, variable in enumerate(self.optimizer.variables):
            arrays[f"optimizer.{place}"] = np.asarray(variable.numpy())
        return arrays, {}

    def restore(self, arrays: dict[str, np.ndarray], record: dict) -> None:
        """The inverse of `state`.

        Raises:
            KeyError, ValueError: arrays that do not fit the network or the optimiser.
        """
        prefix = "model."
        self.names.load_weights(
            self.model, {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
        )
        for place, variable in enumerate(self.optimizer.variables):
            variable.assign(arrays[f"optimizer.{place}"])

    def diagnose(self, rows: np.ndarray) -> Diagnosis:
        """What `gradlab.keras.diagnose` says of a step.

        Args:
            rows: the training samples of its batch.
        """
        batch = tf.constant(self.problem.train.x[rows]), tf.constant(self.problem.train.y[rows])

        def loss_fn(model: keras.Model, batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            x, y = batch
            return tf.reduce_mean(self._each_loss(y, model(x, training=True)))

        return diagnose(self.model, loss_fn, batch, optimizer=self.optimizer)
