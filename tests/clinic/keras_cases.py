"""Training steps of Keras models that really fail, each beside the step that mends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

L = keras.layers


class Step(NamedTuple):
    """What `diagnose` takes."""

    model: keras.Model
    loss_fn: Callable
    batch: Any
    optimizer: keras.Optimizer | None = None


class Outcome(NamedTuple):
    """What the plain step gave: the loss, and the gradients that exist."""

    loss: float
    grads: list[np.ndarray]

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss)) and all(np.isfinite(g).all() for g in self.grads)

    @property
    def norm(self) -> float:
        return float(np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in self.grads)))


@dataclass(frozen=True)
class Case:
    """A failure.

    Attributes:
        name: which, with the clinic's row.
        make: the failing step.
        symptom: what is wrong with the plain step; None where it raises.
        kind: what the diagnosis must say.
        where: the places it may name; empty for any.
        mended: the step that works; None where there is nothing to mend in the step.
    """

    name: str
    make: Callable[[], Step]
    symptom: Callable[[Outcome], bool] | None
    kind: str
    where: tuple[str, ...] = ()
    mended: Callable[[], Step] | None = None

    @property
    def raises(self) -> bool:
        """Whether the plain step raises."""
        return self.symptom is None


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed).standard_normal(shape).astype("float32")


def labels(n: int, classes: int, seed: int = 1) -> np.ndarray:
    return rng(seed).integers(0, classes, n)


def net(*layers: L.Layer, features: int = 8) -> keras.Sequential:
    return keras.Sequential([keras.Input((features,)), *layers])


def dense(units: int, name: str | None = None, **options: Any) -> L.Dense:
    return L.Dense(units, name=name, **options)


def cross_entropy(model: keras.Model, batch: Any) -> tf.Tensor:
    x, y = batch
    logits = tf.cast(model(x, training=True), keras.config.floatx())
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))


def squares(model: keras.Model, batch: Any) -> tf.Tensor:
    x, y = batch
    return tf.reduce_mean(tf.square(model(x, training=True) - y))


def sgd(rate: float = 0.01, **options: Any) -> keras.optimizers.SGD:
    return keras.optimizers.SGD(rate, **options)


def not_finite_gradient(outcome: Outcome) -> bool:
    return bool(np.isfinite(outcome.loss)) and not outcome.finite


def not_finite_loss(outcome: Outcome) -> bool:
    return not np.isfinite(outcome.loss)


def huge(factor: float) -> Callable[[Outcome], bool]:
    return lambda outcome: outcome.finite and outcome.norm > factor


def on_output(function: Callable[[tf.Tensor], tf.Tensor], x: Any = None, **options: Any) -> Step:
    """A two-layer net, and a loss that is a function of its output (6, 4)."""
    model = net(dense(16, "first", activation="tanh"), dense(4, "last", **options))
    x = normal(6, 8) if x is None else x
    return Step(model, lambda m, batch: function(m(batch)), x, sgd(0.05))


# -- singularities ------------------------------------------------------------------------------


def distance(root: Callable) -> Step:
    model = net(dense(16, "first", activation="tanh"), dense(2, "last", kernel_initializer="zeros"))
    y = normal(6, 2, seed=1)
    y[2] = 0  # met exactly by a layer that begins at 0

    def loss_fn(m, batch):
        return tf.reduce_mean(root(m(batch[0]) - batch[1]))

    return Step(model, loss_fn, (normal(6, 8), y), sgd(0.05))


def unit_vectors(unit: Callable) -> Step:
    model = net(dense(4, "last"))
    x = normal(6, 8)
    x[3] = 0
    y = normal(6, 4, seed=2)
    return Step(
        model,
        lambda m, b: tf.reduce_mean(tf.square(unit(m(b[0])) - b[1])),
        (x, y),
        sgd(0.05),
    )


def spread(deviation: Callable, features: int = 4) -> Step:
    """A layer's output is divided by its deviation over the features."""
    model = net(dense(features, "last"))
    x = normal(6, 8)
    x[1] = 0
    y = normal(6, features, seed=3)

    def loss_fn(m, b):
        z = m(b[0])
        return tf.reduce_mean(tf.square(z - b[1])) + tf.reduce_mean(deviation(z))

    return Step(model, loss_fn, (x, y), sgd(0.05))


def entropy(p_log_p: Callable) -> Step:
    model = net(dense(16, "first", activation="tanh"), dense(5, "last"))
    mask = np.array([0, 0, 0, 0, -1e9], "float32")

    def loss_fn(m, x):
        p = tf.nn.softmax(m(x) + mask)
        return tf.reduce_mean(tf.reduce_sum(p_log_p(p), axis=-1))

    return Step(model, loss_fn, normal(6, 8), sgd(0.1))


def confident(loss: Callable, scale: float = 200.0) -> Step:
    """A net whose logits are (±200, 0), wrong on some samples."""
    model = net(dense(2, "logits", use_bias=False), features=2)
    model.layers[-1].set_weights([np.diag([scale, 0.0]).astype("float32")])
    x = np.array([[1, 0], [1, 1], [-1, 0], [1, -1]], "float32")
    y = np.array([1, 1, 0, 1])
    return Step(model, lambda m, b: tf.reduce_mean(loss(b[1], m(b[0]))), (x, y), sgd(0.1))


def log_of_softmax(y, z):
    return -tf.math.log(tf.gather(tf.nn.softmax(z), y, batch_dims=1))


def from_probabilities(y, z):
    return keras.losses.sparse_categorical_crossentropy(y, tf.nn.softmax(z))


def from_logits(y, z):
    return keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)


def branch(function: Callable) -> Step:
    model = net(dense(16, "first", activation="tanh"), dense(1, "last"))
    model.layers[-1].set_weights([10 * normal(16, 1), np.full(1, 100, "float32")])
    return Step(
        model,
        lambda m, b: tf.reduce_mean(tf.math.log(1 + function(m(b)))),
        normal(6, 8),
        sgd(0.01),
    )


def elu_like(x):
    return tf.where(x <= 0, tf.exp(x), 1 + x)


def elu_like_twice(x):
    return tf.where(x <= 0, tf.exp(tf.where(x <= 0, x, 0.0)), 1 + x)


def sqrt_branch(x):
    x = tf.nn.relu(x) * 0
    return tf.where(x > 0, tf.sqrt(x), 0.0)


class Attention(L.Layer):
    """One head, with an additive mask."""

    def build(self, shape):
        width = shape[-1]
        self.q, self.k, self.v = (L.Dense(width, name=name) for name in "qkv")
        for part in (self.q, self.k, self.v):
            part.build(shape)

    def call(self, x, mask):  # (B, T, C), (B, T)
        scores = tf.matmul(self.q(x), self.k(x), transpose_b=True) / x.shape[-1] ** 0.5
        return tf.matmul(tf.nn.softmax(scores + mask[:, None]), self.v(x))


class Reader(keras.Model):
    def __init__(self):
        super().__init__()
        self.attention = Attention(name="attention")
        self.head = L.Dense(3, name="head")
        self.attention.build((None, 5, 8))
        self.head.build((None, 8))
        self.built = True

    def call(self, inputs):
        x, mask = inputs
        return self.head(tf.reduce_mean(self.attention(x, mask), axis=1))


def attention(padded_row: bool) -> Step:
    mask = np.zeros((4, 5), "float32")
    mask[:, 3:] = -np.inf
    mask[2] = -np.inf if padded_row else 0  # mended: what is not used may look anywhere

    def loss_fn(m, b):
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(b[2], m(b[:2])))

    return Step(Reader(), loss_fn, (normal(4, 5, 8), mask, labels(4, 3)), sgd(0.1))


def ignored(guard: bool, *, all_ignored: bool) -> Step:
    model = net(dense(16, "first", activation="tanh"), dense(3, "last"))
    y = np.full(6, -1) if all_ignored else np.where(np.arange(6) < 3, -1, labels(6, 3))

    def loss_fn(m, b):
        kept = tf.not_equal(b[1], -1)
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(b[1], 0), m(b[0]))
        each = tf.boolean_mask(each, kept)
        if guard:
            return tf.reduce_sum(each) / tf.cast(tf.maximum(tf.size(each), 1), each.dtype)
        return tf.reduce_mean(each)

    return Step(model, loss_fn, (normal(6, 8), y), sgd(0.1))


def one_sample_norm(eps: float, n: int) -> Step:
    model = net(dense(4, "last"))

    def loss_fn(m, b):
        z = m(b[0])
        centred = z - tf.reduce_mean(z, axis=0)
        z = centred / tf.sqrt(tf.reduce_mean(centred**2, axis=0) + eps)
        return tf.reduce_mean(tf.square(z + tf.reduce_sum(m(b[0])) * 0.1 - b[1]))

    return Step(model, loss_fn, (normal(n, 8), normal(n, 4, seed=3)), sgd(0.05))


# -- explosions ---------------------------------------------------------------------------------


def plain(gain: float, depth: int = 20, width: int = 64) -> Step:
    hidden = [
        dense(
            width,
            f"hidden{i}",
            activation="relu",
            kernel_initializer=keras.initializers.RandomNormal(
                stddev=gain * np.sqrt(2 / (width if i else 8)), seed=i
            ),
        )
        for i in range(depth)
    ]
    model = net(*hidden, dense(3, "output"))
    return Step(model, cross_entropy, (normal(32, 8), labels(32, 3)), sgd(1e-3))


class Deep(keras.Model):
    """Blocks of dense, batch norm and ReLU, with or without skips."""

    def __init__(self, depth, *, skip, normalize, last="he_normal", width=64):
        super().__init__()
        self.skip, self.normalize = skip, normalize
        self.stem = L.Dense(width, name="stem")
        self.denses = [
            L.Dense(width, name=f"dense{i}", kernel_initializer=last) for i in range(depth)
        ]
        self.norms = [L.BatchNormalization(name=f"norm{i}") for i in range(depth)]
        self.head = L.Dense(3, name="head")

    def build(self, shape):
        self.stem.build(shape)
        for part in (*self.denses, *self.norms, self.head):
            part.build((None, self.stem.units))

    def call(self, x, training=False):
        x = self.stem(x)
        for dense_, norm in zip(self.denses, self.norms, strict=True):
            z = dense_(x)
            if self.normalize:
                z = norm(z, training=training)
            z = tf.nn.relu(z)
            x = x + z if self.skip else z
        return self.head(x)


def deep(depth: int = 50, rate: float = 1e-3, **options: Any) -> Step:
    model = Deep(depth, **options)
    model.build((None, 8))
    return Step(model, cross_entropy, (normal(64, 8), labels(64, 3)), sgd(rate))


def recurrent(activation: str, deviation: float, steps: int = 200, width: int = 64) -> Step:
    model = keras.Sequential(
        [
            keras.Input((steps, 4)),
            L.SimpleRNN(
                width,
                activation=activation,
                recurrent_initializer=keras.initializers.RandomNormal(stddev=deviation, seed=0),
                name="rnn",
            ),
            dense(1, "head"),
        ]
    )
    return Step(model, squares, (normal(8, steps, 4) * 0.1, normal(8, 1, seed=1)), sgd(1e-3))


# -- steps too large ----------------------------------------------------------------------------


def two_layers(rate: float, scale: float = 1.0, n: int = 32) -> Step:
    model = net(dense(32, "first", activation="relu"), dense(3, "last"))
    return Step(model, cross_entropy, (normal(n, 8), labels(n, 3)), sgd(rate))


def swollen(factor: float) -> Step:
    """All weights times a factor: whichever single one were mended, the step would overflow."""
    step = regression(1e-3, 1.0)
    for variable in step.model.trainable_variables:
        variable.assign(factor * variable.value)
    return step


def regression(rate: float, scale: float) -> Step:
    model = net(dense(32, "first", activation="relu"), dense(1, "last"))
    x = normal(32, 8)
    y = (scale * (2 + x[:, :1])).astype("float32")
    return Step(model, squares, (x, y), sgd(rate))


class Weight(keras.Model):
    """A single number."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.w = self.add_weight(shape=(), initializer=keras.initializers.Constant(value), name="w")
        self.built = True

    def call(self, x):
        return self.w * x


def parabola(rate: float) -> Step:
    return Step(Weight(), lambda m, b: tf.square(m(b)), tf.constant(3.0), sgd(rate))


def summed(reduce: Callable) -> Step:
    model = net(dense(32, "first", activation="relu"), dense(3, "last"))

    def loss_fn(m, b):
        return reduce(tf.nn.sparse_softmax_cross_entropy_with_logits(b[1], m(b[0])))

    return Step(model, loss_fn, (normal(512, 8), labels(512, 3)), sgd(0.1))


# -- number formats -----------------------------------------------------------------------------


def loss_scale(factor: float) -> Step:
    step = two_layers(0.1)
    return step._replace(loss_fn=lambda m, b: factor * cross_entropy(m, b))


def half(scale: float) -> Step:
    model = keras.Sequential(
        [
            keras.Input((8,), dtype="float16"),
            dense(16, "first", activation="relu", dtype="float16"),
            dense(2, "last", dtype="float16"),
        ]
    )

    def loss_fn(m, b):
        return tf.reduce_mean(tf.square(scale * m(b[0]) - b[1]))

    y = (normal(6, 2, seed=1) * scale).astype("float16")
    return Step(model, loss_fn, (normal(6, 8).astype("float16"), y), sgd(1e-2 / scale**2))


def long_product(dtype: str) -> Step:
    model = keras.Sequential([keras.Input((512,), dtype=dtype), dense(1, "dot", dtype=dtype)])
    model.layers[-1].set_weights([np.full((512, 1), 12.0), np.zeros(1)])
    x, y = np.full((4, 512), 12, dtype), np.zeros((4, 1), dtype)
    return Step(model, squares, (x, y), sgd(1e-6))


# -- input --------------------------------------------------------------------------------------


def classes(highest: int) -> Step:
    model = net(dense(16, "first", activation="tanh"), dense(3, "last"))
    y = labels(6, 3)
    y[2] = highest
    return Step(model, cross_entropy, (normal(6, 8), y), sgd(0.1))


def tokens(highest: int) -> Step:
    model = keras.Sequential(
        [keras.Input((4,), dtype="int32"), L.Embedding(10, 8, name="table"), L.Flatten(), dense(3)]
    )
    x = rng().integers(0, 10, (6, 4))
    x[1, 1] = highest
    return Step(model, cross_entropy, (x, labels(6, 3)), sgd(0.1))


def scaled_inputs(scale: float, bad: bool = False) -> Step:
    model = net(dense(32, "first", activation="relu"), dense(1, "last"))
    x = normal(16, 8) * np.float32(scale)
    if bad:
        x[3, 2] = np.nan
    return Step(model, squares, (x, normal(16, 1, seed=1)), sgd(0.01))


root_eps = 1e-6
CASES = [
    Case(
        "1: tf.norm of 0",
        lambda: distance(lambda d: tf.norm(d, axis=-1)),
        not_finite_gradient,
        "singularity",
        ("loss",),
        lambda: distance(lambda d: tf.sqrt(tf.reduce_sum(d * d, axis=-1) + root_eps)),
    ),
    Case(
        "1: sqrt of a sum of squares",
        lambda: distance(lambda d: tf.sqrt(tf.reduce_sum(d**2, axis=-1))),
        not_finite_gradient,
        "singularity",
        ("loss",),
        lambda: distance(lambda d: tf.sqrt(tf.reduce_sum(d**2, axis=-1) + root_eps)),
    ),
    Case(
        "2: l2_normalize of 0",
        lambda: unit_vectors(lambda z: tf.math.l2_normalize(z, axis=-1)),
        huge(1e4),
        "singularity",
        ("loss",),
        lambda: unit_vectors(lambda z: tf.math.l2_normalize(z, axis=-1, epsilon=1e-2)),
    ),
    Case(
        "3: reduce_std of constants",
        lambda: spread(lambda z: tf.math.reduce_std(z, axis=-1)),
        not_finite_gradient,
        "singularity",
        ("loss",),
        lambda: spread(lambda z: tf.sqrt(tf.math.reduce_variance(z, axis=-1) + 1e-3)),
    ),
    Case(
        "3: reduce_std of one element",
        lambda: spread(lambda z: tf.math.reduce_std(z, axis=-1), features=1),
        not_finite_gradient,
        "singularity",
        ("loss",),
        lambda: spread(lambda z: tf.math.reduce_std(z, axis=0), features=1),
    ),
    Case(
        "4: p log p at 0",
        lambda: entropy(lambda p: p * tf.math.log(p)),
        not_finite_loss,
        "singularity",
        ("loss",),
        lambda: entropy(lambda p: tf.math.xlogy(p, p)),
    ),
    Case(
        "5: log of softmax",
        lambda: confident(log_of_softmax),
        not_finite_loss,
        "singularity",
        ("loss",),
        lambda: confident(from_logits),
    ),
    Case(
        "5: cross-entropy of probabilities",
        lambda: confident(from_probabilities),
        lambda outcome: 16 < outcome.loss < 16.2 and outcome.norm == 0,
        "vanishing",
        (),
        lambda: confident(from_logits),
    ),
    Case(
        "6: exp in a branch not taken",
        lambda: branch(elu_like),
        not_finite_gradient,
        "singularity",
        ("loss",),
        lambda: branch(elu_like_twice),
    ),
    Case(
        "7: gain 2",
        lambda: plain(2.0),
        lambda outcome: outcome.finite and outcome.norm > 1e4,
        "explosion",
        (),
        lambda: plain(1.0),
    ),
    Case(
        "8: batch norm, no skips",
        lambda: deep(skip=False, normalize=True),
        huge(100),
        "explosion",
        (),
        lambda: deep(skip=True, normalize=True, depth=10, rate=1e-2),
    ),
    Case(
        "9: residual without normalisation",
        lambda: deep(skip=True, normalize=False),
        huge(1e4),
        "explosion",
        (),
        lambda: deep(skip=True, normalize=False, last="zeros", rate=0.05),
    ),
    Case(
        "10: recurrent ReLU",
        lambda: recurrent("relu", 0.25, steps=400),
        not_finite_loss,
        "explosion",
        (),
        lambda: recurrent("tanh", 0.1, steps=50),
    ),
    Case(
        "10: recurrent tanh",
        lambda: recurrent("tanh", 0.25),
        huge(1e3),
        "explosion",
        (),
        lambda: recurrent("tanh", 0.1, steps=50),
    ),
    Case(
        "11: learning rate 20",
        lambda: two_layers(20.0),
        lambda outcome: outcome.finite and outcome.norm < 10,
        "divergence",
        (),
        lambda: two_layers(0.1),
    ),
    Case(
        "12: (3w)²",
        lambda: parabola(0.112),
        lambda outcome: outcome.finite,
        "divergence",
        (),
        lambda: parabola(0.11),
    ),
    Case(
        "13: targets in thousands",
        lambda: regression(0.1, 3000.0),
        lambda outcome: outcome.finite,
        "divergence",
        (),
        lambda: regression(0.02, 1.0),
    ),
    Case(
        "14: loss summed",
        lambda: summed(tf.reduce_sum),
        huge(10),
        "divergence",
        ("loss",),
        lambda: summed(tf.reduce_mean),
    ),
    Case(
        "15: the norm overflows",
        lambda: loss_scale(1e20),
        huge(1e19),
        "precision",
        (),
        lambda: loss_scale(1.0),
    ),
    Case(
        "several weights that earlier steps ruined",
        lambda: swollen(1e20),
        not_finite_loss,
        "bad input",
        (),
        lambda: swollen(1.0),
    ),
    Case(
        "19: float16, 300²",
        lambda: half(300.0),
        not_finite_loss,
        "precision",
        ("loss",),
        lambda: half(1.0),
    ),
    Case(
        "19: float16, a long product",
        lambda: long_product("float16"),
        not_finite_loss,
        "precision",
        ("dot",),
        lambda: long_product("float32"),
    ),
    Case(
        "20: a fully masked row",
        lambda: attention(True),
        lambda outcome: not outcome.finite,
        "singularity",
        ("attention",),
        lambda: attention(False),
    ),
    Case(
        "21: every target ignored",
        lambda: ignored(False, all_ignored=True),
        not_finite_loss,
        "singularity",
        ("loss",),
        lambda: ignored(True, all_ignored=False),
    ),
    Case(
        "22: label beyond the classes",
        lambda: classes(3),
        None,
        "bad input",
        ("batch",),
        lambda: classes(2),
    ),
    Case(
        "22: token beyond the table",
        lambda: tokens(10),
        None,
        "bad input",
        ("batch",),
        lambda: tokens(9),
    ),
    Case(
        "23: batch norm by hand, one sample",
        lambda: one_sample_norm(0.0, 1),
        lambda outcome: not outcome.finite,
        "singularity",
        ("loss",),
        lambda: one_sample_norm(1e-3, 8),
    ),
    Case(
        "24: inputs of 1e10",
        lambda: scaled_inputs(1e10),
        lambda outcome: outcome.norm > 1e15,
        "bad input",
        ("batch",),
        lambda: scaled_inputs(1.0),
    ),
    Case(
        "24: a NaN in the batch",
        lambda: scaled_inputs(1.0, bad=True),
        not_finite_loss,
        "bad input",
        ("batch",),
        lambda: scaled_inputs(1.0),
    ),
]


# -- operations that are on no list -------------------------------------------------------------


def singular(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[], Step]:
    """The loss is a function of an output that is exactly 0, as at an initialisation with zeros."""
    return lambda: on_output(function, kernel_initializer="zeros")


def _mean(function: Callable) -> Callable:
    return lambda z: tf.reduce_mean(function(z))


def _square_matrix(z: tf.Tensor) -> tf.Tensor:
    return tf.linalg.matmul(z, z, transpose_a=True)  # (4, 4), singular where z is 0


UNSEEN = {
    "asin at 1": singular(_mean(lambda z: tf.asin(1 + z))),
    "acos at 1": singular(_mean(lambda z: tf.acos(tf.cos(z)))),
    "cosine of zeros": singular(
        lambda z: tf.reduce_mean(
            tf.reduce_sum(z * (z + 1), -1) / (tf.norm(z, axis=-1) * tf.norm(z + 1, axis=-1))
        )
    ),
    "log1p(-1)": singular(_mean(lambda z: tf.math.log1p(z - 1))),
    "x / 0": singular(_mean(lambda z: (1 + z) / z)),
    "0 · log 0": singular(_mean(lambda z: z * tf.math.log(z))),
    "pow(0, 0.5)": singular(_mean(lambda z: tf.pow(z, 0.5))),
    "reciprocal": singular(_mean(tf.math.reciprocal)),
    "atan2(0, 0)": singular(_mean(lambda z: tf.atan2(z, 2 * z))),
    "acosh at 1": singular(_mean(lambda z: tf.acosh(1 + z))),
    "atanh at 1": singular(_mean(lambda z: tf.atanh(1 + z))),
    "rsqrt": singular(_mean(tf.math.rsqrt)),
    "logsumexp over −inf": singular(
        lambda z: tf.reduce_mean(tf.reduce_logsumexp(z + tf.constant(-np.inf, z.dtype), axis=-1))
    ),
    "cholesky": singular(lambda z: tf.linalg.trace(tf.linalg.cholesky(_square_matrix(z)))),
    "log of a determinant": singular(lambda z: tf.math.log(tf.linalg.det(_square_matrix(z)))),
    "erfinv at 1": singular(_mean(lambda z: tf.math.erfinv(1 + z))),
    "xdivy": singular(_mean(lambda z: tf.math.xdivy(1 + z, z))),
    "lgamma at 0": singular(_mean(tf.math.lgamma)),
    "keras.ops.norm": singular(lambda z: keras.ops.norm(z)),
    "keras.ops.std": singular(lambda z: keras.ops.std(z)),
}


# -- steps that are in order --------------------------------------------------------------------


def sequence(layer: Callable, steps: int = 100) -> Step:
    model = keras.Sequential([keras.Input((steps, 4)), layer(32), dense(3, "head")])
    return Step(
        model, cross_entropy, (normal(8, steps, 4), labels(8, 3)), keras.optimizers.Adam(1e-3)
    )


def transformer(blocks: int = 4, width: int = 32, mask: bool = False) -> Step:
    tokens_ = keras.Input((12,), dtype="int32")
    x = L.Embedding(50, width)(tokens_)
    for _ in range(blocks):
        z = L.LayerNormalization()(x)
        x = x + L.MultiHeadAttention(4, width // 4)(z, z, use_causal_mask=mask)
        z = L.LayerNormalization()(x)
        x = x + L.Dense(width)(L.Dense(4 * width, activation="gelu")(z))
    x = L.GlobalAveragePooling1D()(L.LayerNormalization()(x))
    model = keras.Model(tokens_, L.Dense(3)(x))
    batch = rng().integers(0, 50, (16, 12)), labels(16, 3)
    return Step(model, cross_entropy, batch, keras.optimizers.Adam(1e-3))


def decoder(deviation: float = 0.02, eps: float = 1e-6, width: int = 64, length: int = 16) -> Step:
    """As GPT begins: small embeddings, so that its normalisations divide by next to nothing."""
    begin = keras.initializers.RandomNormal(stddev=deviation, seed=0)
    tokens_ = keras.Input((length,), dtype="int32")
    x = L.Embedding(100, width, embeddings_initializer=begin)(tokens_)
    for _ in range(3):
        z = L.LayerNormalization(epsilon=eps)(x)
        attend = L.MultiHeadAttention(4, width // 4, kernel_initializer=begin)
        x = x + attend(z, z, use_causal_mask=True)
        z = L.LayerNormalization(epsilon=eps)(x)
        z = L.Dense(4 * width, activation="gelu", kernel_initializer=begin)(z)
        x = x + L.Dense(width, kernel_initializer=begin)(z)
    model = keras.Model(tokens_, L.Dense(100)(L.LayerNormalization(epsilon=eps)(x)))

    def loss_fn(m, b):
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(b[:, 1:], m(b[:, :-1]))
        return tf.reduce_sum(each)

    batch = rng().integers(0, 100, (8, length + 1))
    return Step(model, loss_fn, batch, keras.optimizers.Adam(1e-3))


def augmented() -> Step:
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            L.RandomFlip(),
            L.RandomRotation(0.1),
            L.Conv2D(8, 3),
            L.BatchNormalization(),
            L.GlobalAveragePooling2D(),
            dense(10),
        ]
    )
    batch = 0.01 * normal(8, 32, 32, 3), labels(8, 10)
    return Step(model, cross_entropy, batch, sgd(0.01))


def resnet(blocks: int = 4, channels: int = 16, side: int = 16, n: int = 16) -> Step:
    image = keras.Input((side, side, 3))
    x = L.Conv2D(channels, 3, padding="same")(image)
    for _ in range(blocks):
        z = x
        for _ in range(2):
            z = L.Conv2D(channels, 3, padding="same", use_bias=False)(z)
            z = L.BatchNormalization()(z)
            z = L.ReLU()(z)
        x = x + z
    model = keras.Model(image, L.Dense(10)(L.GlobalAveragePooling2D()(x)))
    batch = normal(n, side, side, 3), labels(n, 10)
    return Step(model, cross_entropy, batch, sgd(0.01, momentum=0.9))


def digits() -> Step:
    from gradlab import data

    split = data.digits()
    x, y = split.x_train[:64].astype("float32"), split.y_train[:64]
    model = net(dense(64, activation="relu"), dense(10), features=x.shape[1])
    return Step(model, cross_entropy, (x, y), keras.optimizers.Adam(1e-3))


def trained(step: Step, steps: int) -> Step:
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = step.loss_fn(step.model, step.batch)
        variables = step.model.trainable_variables
        step.optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
    return step


def converged() -> Step:
    x = normal(64, 8)
    model = net(dense(1, "linear"))
    return trained(Step(model, squares, (x, x @ normal(8, 1, seed=5)), sgd(0.1)), 200)


def embedding() -> Step:
    model = keras.Sequential(
        [
            keras.Input((12,), dtype="int32"),
            L.Embedding(100, 16, mask_zero=True),
            L.GlobalAveragePooling1D(),
            dense(3),
        ]
    )
    return Step(
        model,
        cross_entropy,
        (rng().integers(1, 100, (32, 12)), labels(32, 3)),
        keras.optimizers.RMSprop(1e-3),
    )


def large_loss() -> Step:
    step = two_layers(1e-5)
    return step._replace(loss_fn=lambda m, b: 1000 * cross_entropy(m, b))


def dropout() -> Step:
    model = net(
        dense(64, activation="relu"),
        L.Dropout(0.3),
        dense(64, activation="gelu"),
        L.GaussianNoise(0.1),
        L.Dropout(0.5),
        dense(3),
    )
    return Step(model, cross_entropy, (normal(32, 8), labels(32, 3)), sgd(0.05))


def zero_last() -> Step:
    model = net(dense(32, activation="relu"), dense(3, kernel_initializer="zeros"))
    return Step(model, cross_entropy, (normal(32, 8), labels(32, 3)), sgd(0.1))


def layer_norm(depth: int = 8) -> Step:
    hidden = []
    for _ in range(depth):
        hidden += [dense(64), L.LayerNormalization(), L.ReLU()]
    model = net(*hidden, dense(3))
    return Step(model, cross_entropy, (normal(32, 8), labels(32, 3)), sgd(0.01))


def low_rank() -> Step:
    """A frozen layer beside a product of two, the second of which begins at 0."""
    x = keras.Input((8,))
    frozen = L.Dense(32, name="frozen", trainable=False)(x)
    down = L.Dense(4, use_bias=False, name="down")(x)
    up = L.Dense(32, use_bias=False, kernel_initializer="zeros", name="up")(down)
    model = keras.Model(x, L.Dense(3)(keras.ops.relu(frozen + up)))
    return Step(model, cross_entropy, (normal(32, 8), labels(32, 3)), keras.optimizers.AdamW(1e-3))


def mixed() -> Step:
    policy = keras.DTypePolicy("mixed_float16")
    model = net(dense(32, activation="relu", dtype=policy), dense(3, dtype=policy))
    optimizer = keras.optimizers.LossScaleOptimizer(sgd(0.05), initial_scale=2.0**10)
    return Step(model, cross_entropy, (normal(32, 8), labels(32, 3)), optimizer)


def autocast(depth: int) -> Step:
    """Layers in bfloat16, weights in float32."""
    policy = keras.DTypePolicy("mixed_bfloat16")
    hidden = [
        dense(64, activation="relu", kernel_initializer="he_normal", dtype=policy)
        for _ in range(depth)
    ]
    model = net(*hidden, dense(3))
    return Step(model, cross_entropy, (normal(32, 8), labels(32, 3)), sgd(1e-3))


def scaled_in_half() -> Step:
    """A gradient in float16, scaled up for the backward pass: its norm squared exceeds 65504."""
    model = net(dense(32, activation="relu", dtype="float16"), dense(3, dtype="float16"))

    def loss_fn(model: keras.Model, batch: Any) -> tf.Tensor:
        return 1024 * cross_entropy(model, batch)

    batch = normal(32, 8).astype("float16"), labels(32, 3)
    return Step(model, loss_fn, batch, keras.optimizers.SGD(1e-6))


def convolution_1d() -> Step:
    model = keras.Sequential(
        [
            keras.Input((64, 2)),
            L.Conv1D(16, 5, activation="relu"),
            L.MaxPooling1D(4),
            L.SeparableConv1D(16, 3, activation="relu"),
            L.GlobalMaxPooling1D(),
            dense(3),
        ]
    )
    optimizer = sgd(0.05, nesterov=True, momentum=0.9)
    return Step(model, cross_entropy, (normal(16, 64, 2), labels(16, 3)), optimizer)


HEALTHY = {
    "LSTM, 100 steps": lambda: sequence(L.LSTM),
    "GRU, 100 steps": lambda: sequence(L.GRU),
    "bidirectional": lambda: sequence(lambda n: L.Bidirectional(L.LSTM(n)), steps=20),
    "transformer": transformer,
    "causal transformer": lambda: transformer(2, mask=True),
    "decoder, loss summed": decoder,
    "residual convolutions": resnet,
    "augmented images, batch norm": augmented,
    "30 ReLU layers, He": lambda: plain(1.0, depth=30),
    "Adam on digits": digits,
    "Adam on digits, later": lambda: trained(digits(), 30),
    "converged": converged,
    "embeddings": embedding,
    "loss × 1000, small rate": large_loss,
    "dropout and noise": dropout,
    "−inf mask": lambda: attention(False),
    "last layer 0": zero_last,
    "layer norm": layer_norm,
    "low-rank branch at 0": low_rank,
    "mixed precision": mixed,
    "mixed bfloat16, 10 layers": lambda: autocast(10),
    "mixed bfloat16, 30 layers": lambda: autocast(30),
    "a scaled loss in float16": scaled_in_half,
    "1-d convolutions": convolution_1d,
    "sqrt of 0 in a branch not taken": lambda: branch(sqrt_branch),  # NaN in PyTorch
    "cross-entropy from logits of 200": lambda: confident(from_logits, 20.0),
}
