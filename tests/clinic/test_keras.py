"""What `diagnose` says about steps that fail, and about steps that do not, in Keras."""

import random
import time

import keras_cases as clinic
import numpy as np
import pytest
from keras_cases import CASES, HEALTHY, UNSEEN, Outcome, Step

from gradlab.diagnosis import SURE_AFTER, tried_enough
from gradlab.keras import diagnose, keras

tf = pytest.importorskip("tensorflow")


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def plain_step(step: Step) -> Outcome:
    variables = [v.value for v in step.model.trainable_variables]
    with tf.GradientTape() as tape:
        loss = step.loss_fn(step.model, step.batch)
    grads = tape.gradient(loss, variables)
    return Outcome(float(loss), [tf.convert_to_tensor(g).numpy() for g in grads if g is not None])


def train(step: Step, steps: int = 30) -> list[float]:
    losses = []
    for _ in range(steps):
        variables = step.model.trainable_variables
        with tf.GradientTape() as tape:
            loss = step.loss_fn(step.model, step.batch)
        grads = tape.gradient(loss, [v.value for v in variables])
        found = [
            (tf.convert_to_tensor(g), v)
            for g, v in zip(grads, variables, strict=True)
            if g is not None
        ]
        assert all(np.isfinite(g.numpy()).all() for g, _ in found)
        step.optimizer.apply_gradients(found)
        losses.append(float(loss))
    return losses


def told(step: Step):
    return diagnose(step.model, step.loss_fn, step.batch, optimizer=step.optimizer)


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# ---------------------------------------------------------------------------------------------
# The clinic


@by_name(CASES)
def test_case(case):
    step = case.make()
    if case.raises:
        with pytest.raises(tf.errors.InvalidArgumentError):
            plain_step(step)
    else:
        assert case.symptom(plain_step(step))
    diagnosis = told(step)
    assert diagnosis.kind == case.kind, str(diagnosis)
    assert not case.where or diagnosis.where in case.where, str(diagnosis)


@by_name([case for case in CASES if case.mended])
def test_mended(case):
    step = case.mended()
    diagnosis = told(step)
    assert diagnosis.kind == "healthy", str(diagnosis)
    losses = train(step)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen_singularity(name):
    step = UNSEEN[name]()
    diagnosis = told(step)
    assert diagnosis.kind == "singularity", str(diagnosis)
    assert diagnosis.where == "loss"
    assert "keras_cases.py" in diagnosis.findings[0].source


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(name):
    diagnosis = told(HEALTHY[name]())
    assert diagnosis.kind == "healthy", str(diagnosis)


def test_steps_that_diverge_do_diverge():
    for name in ("11", "12", "13"):
        case = next(case for case in CASES if case.name.startswith(f"{name}:"))
        step, losses = case.make(), []
        for _ in range(40):
            variables = step.model.trainable_variables
            with tf.GradientTape() as tape:
                loss = step.loss_fn(step.model, step.batch)
            grads = tape.gradient(loss, [v.value for v in variables])
            step.optimizer.apply(grads, variables)
            losses.append(float(loss))
        assert not losses[-1] < losses[0], case.name


def test_norm_overflow_defeats_clipping():
    """`clip_by_global_norm` makes NaN of finite gradients; `clipnorm` makes zeros."""
    step = clinic.loss_scale(1e20)
    grads = plain_step(step).grads
    clipped, _ = tf.clip_by_global_norm([tf.constant(g) for g in grads], 1.0)
    assert all(np.isnan(g).all() for g in clipped)
    optimizer = clinic.sgd(1.0, clipnorm=1.0)
    before = step.model.layers[0].kernel.numpy()
    optimizer.apply([tf.constant(g) for g in grads], step.model.trainable_variables)
    np.testing.assert_array_equal(step.model.layers[0].kernel.numpy(), before)


def test_a_matrix_without_an_inverse():
    """TensorFlow raises here: it is the values, and not the shapes."""
    step = clinic.singular(
        lambda z: tf.linalg.trace(tf.linalg.inv(tf.matmul(z, z, transpose_a=True)))
    )()
    diagnosis = told(step)
    assert diagnosis.measurements.raised.place.operation == "matrixinverse"
    assert diagnosis.kind == "singularity", str(diagnosis)


# ---------------------------------------------------------------------------------------------
# Tools that mislead


def test_terminate_on_nan_is_too_late():
    step = clinic.distance(lambda d: tf.norm(d, axis=-1))

    def loss(y_true, y_pred):
        return tf.norm(y_pred - y_true, axis=-1)

    step.model.compile(clinic.sgd(0.05), loss)
    step.model.fit(
        *step.batch, batch_size=6, epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()]
    )
    assert np.isnan(step.model.layers[-1].kernel.numpy()).any()


def test_check_numerics_and_compiled_steps():
    """Of a step compiled before it names no operation; one compiled after fails to compile."""
    step = clinic.distance(lambda d: tf.norm(d, axis=-1))
    before = tf.function(lambda: plain_gradient(step), jit_compile=True)
    before()
    tf.debugging.enable_check_numerics()
    try:
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"SqrtGrad|RealDiv|Mul"):
            plain_gradient(step)
        with pytest.raises(tf.errors.InvalidArgumentError, match="__inference_"):
            before()
        with pytest.raises(tf.errors.InvalidArgumentError, match="unsupported operations"):
            tf.function(lambda: plain_gradient(step), jit_compile=True)()
    finally:
        tf.debugging.disable_check_numerics()
    assert told(step).measurements.backward.place.operation == "sqrt"


def plain_gradient(step: Step):
    with tf.GradientTape() as tape:
        loss = step.loss_fn(step.model, step.batch)
    return tape.gradient(loss, [v.value for v in step.model.trainable_variables])


def test_labels_beyond_the_classes_are_nan_when_compiled():
    step = clinic.classes(3)
    compiled = tf.function(lambda: step.loss_fn(step.model, step.batch), jit_compile=True)
    assert np.isnan(compiled())
    diagnosis = told(step)
    assert diagnosis.kind == "bad input"
    assert "batch[1] from 0 to 3" in str(diagnosis)


# ---------------------------------------------------------------------------------------------
# Nothing is changed


class Restless(keras.layers.Layer):
    """Draws from every random generator there is."""

    def __init__(self):
        super().__init__()
        self.generator = tf.random.Generator.from_seed(1)
        self.seeds = keras.random.SeedGenerator(2)
        self.calls = tf.Variable(0, trainable=False)

    def call(self, x):
        self.calls.assign_add(1)
        shape = tf.shape(x)
        noise = self.generator.normal(shape) + tf.random.normal(shape)
        noise += keras.random.normal(shape, seed=self.seeds) + keras.random.normal(shape)
        noise += tf.random.get_global_generator().normal(shape) + tf.random.normal([], seed=3)
        return x + 1e-3 * noise + 1e-3 * random.random() + 1e-3 * np.random.rand()  # noqa: NPY002


def restless(bad: bool) -> Step:
    model = clinic.net(
        clinic.dense(16),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        Restless(),
        clinic.dense(3),
    )

    def loss_fn(m, batch):
        loss = clinic.cross_entropy(m, batch)
        if bad:
            raise RuntimeError("no more")
        return loss

    return Step(model, loss_fn, (clinic.normal(8, 8), clinic.labels(8, 3)))


def values(step: Step) -> list[np.ndarray]:
    held = [*step.model.variables, *(step.optimizer.variables if step.optimizer else ())]
    layer = next((x for x in step.model.layers if isinstance(x, Restless)), None)
    held += [layer.generator.state, layer.calls] if layer else []
    return [v.numpy() for v in held]


def draws() -> list:
    return [
        random.random(),
        np.random.rand(),  # noqa: NPY002
        tf.random.normal([2]).numpy().tolist(),
        tf.random.normal([2], seed=3).numpy().tolist(),
        tf.random.get_global_generator().normal([2]).numpy().tolist(),
        keras.random.normal([2]).numpy().tolist(),
    ]


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("built", [False, True])
def test_everything_is_restored(bad, built):
    def run(examine: bool) -> tuple:
        keras.utils.set_random_seed(5)
        tf.random.set_global_generator(tf.random.Generator.from_seed(7))
        step = restless(bad)._replace(optimizer=keras.optimizers.AdamW(0.1, clipnorm=1.0))
        draws()
        if built:
            variables = step.model.trainable_variables
            step.optimizer.apply([tf.ones(v.shape) for v in variables], variables)
        before = values(step)
        if examine:
            told(step)
        for one, other in zip(values(step), before, strict=True):
            np.testing.assert_array_equal(one, other)
        assert step.optimizer.built == built
        after = draws()
        if not bad:
            after.append(train(step, 3))
        return after

    assert run(True) == run(False)


def test_attributes_and_added_losses_are_restored():
    class Counts(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.calls, self.seen = 0, []

        def call(self, x):
            self.calls += 1
            self.add_loss(tf.reduce_mean(x**2))
            return x

    model = clinic.net(clinic.dense(3), Counts(), clinic.dense(3))
    layer = model.layers[1]
    step = Step(
        model,
        lambda m, b: clinic.cross_entropy(m, b) + sum(m.losses),
        (clinic.normal(8, 8), clinic.labels(8, 3)),
        clinic.sgd(),
    )
    plain_step(step)
    calls, (loss,) = layer.calls, model.losses
    told(step)
    assert layer.calls == calls
    assert model.losses[0] is loss


def test_a_probe_on_the_same_optimiser_sees_nothing():
    from gradlab.keras import GradientProbe

    class Asks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            told(step)

    step = clinic.two_layers(0.1)
    step.model.compile(step.optimizer, clinic.from_logits)
    probe = GradientProbe()
    step.model.fit(*step.batch, batch_size=16, verbose=0, callbacks=[probe, Asks()])
    assert list(probe.history.steps) == [0, 1]


def test_settings_are_restored():
    call, dtype = keras.layers.Layer.__call__, keras.losses.Loss.dtype
    told(clinic.two_layers(0.1))
    assert keras.layers.Layer.__call__ is call
    assert keras.losses.Loss.dtype is dtype
    assert keras.config.floatx() == "float32"
    assert not tf.config.functions_run_eagerly()


def test_a_model_that_was_not_built_is_as_created():
    class Lazy(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [clinic.dense(16), keras.layers.BatchNormalization(), clinic.dense(3)]

        def call(self, x, training=False):
            for part in self.parts[:2]:
                x = part(x, training=training) if part is self.parts[1] else part(x)
            return self.parts[2](x)

    model = Lazy()
    batch = 3 + clinic.normal(8, 8), clinic.labels(8, 3)
    assert diagnose(model, clinic.cross_entropy, batch, optimizer=clinic.sgd()).kind == "healthy"
    np.testing.assert_array_equal(model.parts[1].moving_mean.numpy(), 0)
    np.testing.assert_array_equal(model.parts[1].moving_variance.numpy(), 1)


# ---------------------------------------------------------------------------------------------
# Whatever it is given


def test_a_loss_in_a_compiled_function():
    step = clinic.distance(lambda d: tf.norm(d, axis=-1))
    compiled = tf.function(step.loss_fn)
    assert diagnose(step.model, compiled, step.batch).kind == "singularity"


def test_a_slope_of_the_users_own():
    @tf.custom_gradient
    def bad(x):
        return tf.identity(x), lambda dy: dy / tf.zeros_like(x)

    step = clinic.on_output(lambda z: tf.reduce_mean(bad(z) ** 2))
    diagnosis = told(step)
    assert diagnosis.measurements.backward is not None
    assert "return tf.identity(x)" in diagnosis.measurements.backward.place.source


def test_a_branch_that_is_thrown_away_is_not_blamed():
    def loss(z):
        thrown, kept = tf.math.log(-1 - z**2), tf.asin(2 + z**2)
        return tf.reduce_mean(tf.where(z < 1e9, kept, thrown))

    event = told(clinic.on_output(loss)).measurements.forward
    assert event.place.operation == "asin"


def test_deliberate_infinities_are_not_blamed():
    def loss(z):
        scores = tf.where(tf.zeros_like(z, bool), z, -np.inf)
        return tf.reduce_mean(tf.nn.softmax(scores) ** 2)

    event = told(clinic.on_output(loss)).measurements.forward
    assert (event.place.operation, event.made) == ("softmax", "nan")


def test_weights_that_are_already_lost():
    step = clinic.two_layers(0.1)
    step.model.layers[0].bias.assign(np.full(32, np.nan))
    diagnosis = told(step)
    assert diagnosis.kind == "bad input"
    assert diagnosis.where == step.model.layers[0].bias.path
    assert diagnosis.measurements.forward is None


def test_place_inside_nested_layers():
    class Root(keras.layers.Layer):
        def call(self, x):
            return tf.sqrt(x)

    inner = keras.Sequential(
        [clinic.dense(4, "zero", kernel_initializer="zeros"), Root(name="root")]
    )
    inner.build((None, 8))
    inner.name = "inner"
    model = keras.Sequential([keras.Input((8,)), inner, clinic.dense(1, "last")])
    diagnosis = diagnose(model, lambda m, x: tf.reduce_mean(m(x)), clinic.normal(6, 8))
    assert diagnosis.where == "inner/root"
    assert diagnosis.findings[0].source.endswith("return tf.sqrt(x)")


def test_regularisers_are_not_layers():
    penalty = keras.regularizers.OrthogonalRegularizer(0.1)
    model = clinic.net(clinic.dense(16, "first", kernel_regularizer=penalty), clinic.dense(3))

    def loss_fn(m, batch):
        return clinic.cross_entropy(m, batch) + sum(m.losses)

    batch = clinic.normal(8, 8), clinic.labels(8, 3)
    found = diagnose(model, loss_fn, batch).measurements.layers
    assert [use.module for use in found] == ["first", model.layers[1].name]
    assert [use.depth for use in found] == [2, 1]


def test_uses_of_a_recurrent_weight():
    step = clinic.sequence(keras.layers.SimpleRNN, steps=7)
    uses = told(step).measurements.layers
    recurrent = [use for use in uses if use.parameter.endswith("recurrent_kernel")]
    assert len(recurrent) in (6, 7)
    assert max(use.depth for use in recurrent) >= 7


def test_curvature_is_the_largest_eigenvalue():
    x = clinic.normal(32, 6)
    model = clinic.net(clinic.dense(1, use_bias=False), features=6)
    step = Step(model, clinic.squares, (x, clinic.normal(32, 1, seed=1)), clinic.sgd(0.1))
    expected = np.linalg.eigvalsh(2 * x.T @ x / 32)[-1]
    assert told(step).measurements.curvature.sharpness == pytest.approx(expected, rel=0.02)


def test_curvature_without_a_second_derivative():
    @tf.custom_gradient
    def once(x):
        def slope(dy):
            return tf.numpy_function(lambda d, v: 2 * d * v, [dy, x], tf.float32)

        return x * x, slope

    x = clinic.normal(32, 6)
    model = clinic.net(clinic.dense(1, use_bias=False), features=6)

    def loss_fn(m, batch):
        return tf.reduce_mean(tf.reshape(once(m(batch)), [-1]))

    found = diagnose(model, loss_fn, x, optimizer=clinic.sgd(0.1)).measurements.curvature
    expected = np.linalg.eigvalsh(2 * x.T @ x / 32)[-1]
    assert found.sharpness == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda m, b: m.nothing,
        lambda m, b: tf.reduce_sum(m(b[:, :3])),
        lambda m, b: tf.constant(1.0),
        lambda m, b: tf.reduce_sum(tf.stop_gradient(m(b))),
        lambda m, b: float("nan"),
        lambda m, b: tf.reduce_sum(tf.constant(m(b).numpy())),
        lambda m, b: tf.reduce_sum(tf.argmax(m(b), -1)),
        lambda m, b: tf.reduce_sum(tf.numpy_function(np.sqrt, [m(b)], tf.float32)),
        lambda m, b: tf.reduce_sum(tf.map_fn(lambda row: tf.sqrt(row), m(b))),
        lambda m, b: tf.reduce_sum(tf.cast(m(b), tf.bfloat16)),
        lambda m, b: tf.reduce_sum(tf.math.real(tf.signal.fft(tf.cast(m(b), tf.complex64)))),
        lambda m, b: tf.reduce_sum(tf.RaggedTensor.from_tensor(m(b)).values),
        lambda m, b: tf.while_loop(lambda i, a: i < 3, lambda i, a: (i + 1, a * m(b)[0, 0]),
                                   (0, 1.0))[1],
    ],
)  # fmt: skip
def test_never_raises(loss_fn):
    model = clinic.net(clinic.dense(4))
    diagnosis = diagnose(model, loss_fn, clinic.normal(6, 8), optimizer=clinic.sgd())
    assert str(diagnosis)


def test_models_without_weights_and_batches_of_any_shape():
    model = keras.Sequential([keras.Input((8,)), keras.layers.ReLU()])
    assert str(diagnose(model, lambda m, b: tf.reduce_sum(m(b["x"])), {"x": clinic.normal(6, 8)}))
    assert str(diagnose(model, lambda m, b: tf.reduce_sum(m(tf.ones((2, 8)))), None))
    model = clinic.net(clinic.dense(4))
    assert str(diagnose(model, lambda m, b: tf.reduce_sum(m(b[0])), [clinic.normal(6, 8), "name"]))
    model.trainable = False
    assert str(diagnose(model, lambda m, b: tf.reduce_sum(m(b)), clinic.normal(6, 8)))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (lambda m, f, b: (None, f, b), TypeError, "model must be"),
        (lambda m, f, b: (m, "mse", b), TypeError, "loss_fn must be"),
        (lambda m, f, b: (m, lambda m, b: m(b), b), ValueError, r"shape \(6, 4\)"),
        (lambda m, f, b: (m, lambda m, b: None, b), TypeError, "NoneType"),
        (lambda m, f, b: (m, lambda m, b: "loss", b), TypeError, "string"),
    ],
)
def test_bad_arguments(arguments, error, says):
    model = clinic.net(clinic.dense(4))
    before = [v.numpy() for v in model.variables]
    good = model, lambda m, b: tf.reduce_sum(m(b)), clinic.normal(6, 8)
    with pytest.raises(error, match=says):
        diagnose(*arguments(*good))
    with pytest.raises(TypeError, match="optimizer must be"):
        diagnose(*good, optimizer="adam")
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize(
    "optimizer",
    ["SGD", "Adam", "AdamW", "Nadam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Adafactor",
     "Ftrl", "Lion", "Lamb", "Muon"],
)  # fmt: skip
@pytest.mark.parametrize("taken", [0, 2])
def test_optimizers(optimizer, taken):
    rate = keras.optimizers.schedules.ExponentialDecay(1e-3, 1, 0.5)
    step = clinic.two_layers(0.1)._replace(
        optimizer=getattr(keras.optimizers, optimizer)(learning_rate=rate)
    )
    clinic.trained(step, taken)
    before = values(step)
    m = told(step).measurements
    assert m.notes == ()
    assert m.optimizer.learning_rate == pytest.approx(1e-3 * 0.5**taken)
    assert m.optimizer.steps == taken
    assert tried_enough(m.trial.losses, m.optimizer, m.curvature)
    assert len(m.trial.losses) > SURE_AFTER
    if m.optimizer.method == "adam":
        assert (m.curvature is not None) == bool(taken)
    for one, other in zip(values(step), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_cost(capsys):
    """Printed only: what one diagnosis costs, in compiled training steps."""
    makers = {
        "MLP, 20 layers": lambda: clinic.plain(1.0, depth=19, width=256),
        "residual convolutions": lambda: clinic.resnet(4, 32, 32, 32),
        "transformer": lambda: clinic.transformer(4, 128),
    }
    for name, make in makers.items():
        step = make()
        clinic.trained(step, 1)
        batch = tuple(map(tf.constant, step.batch))

        @tf.function
        def compiled(batch, step=step):
            clinic.trained(step._replace(batch=batch), 1)

        compiled(batch)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            compiled(batch)
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        told(step)
        took, one = time.perf_counter() - start, float(np.median(times))
        with capsys.disabled():
            print(f"\n{name}: {took:.2f} s, {took / one:.0f} steps of {1e3 * one:.1f} ms")


@pytest.mark.parametrize("dtype", [tf.float32, tf.float16])
def test_numbers_that_the_user_asks_for_are_replaced_in_float64(dtype):
    step = clinic.two_layers(0.1)

    def loss_fn(m, batch):
        z = tf.cast(m(batch[0]), dtype) * tf.constant(2.0, dtype) + tf.random.normal(
            [3], 0, 1, dtype
        )
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(batch[1], z))

    wide = told(step._replace(loss_fn=loss_fn)).measurements.float64
    assert 1e-9 < wide.difference < {tf.float32: 1e-5, tf.float16: 1e-2}[dtype]
    assert [use.depth for use in wide.layers] == [2, 1]


def test_float64_gives_the_gradient_of_the_users_own():
    @tf.custom_gradient
    def reversed_(x):
        return tf.identity(x), lambda dy: -dy

    step = clinic.on_output(lambda z: tf.reduce_mean(reversed_(z) ** 2))
    assert told(step).measurements.float64.difference < 1e-5
