"""The Keras probe in the fits people really run: loss scaling, clipping, interruptions, kills."""

from __future__ import annotations

import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from gradlab.history import GradientHistory
from gradlab.keras import GradientProbe, NonFiniteGradientError
from writer import Writer

BATCH = 4


def data(steps: int = 4):
    rng = np.random.default_rng(1)
    return rng.normal(size=(steps * BATCH, 3)).astype("float32"), np.ones((steps * BATCH, 1))


def small(optimizer=None, *, dtype=None, **keywords) -> keras.Model:
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, "tanh", name="one", dtype=dtype),
            keras.layers.Dense(1, name="two", dtype=dtype),
        ],
        name="net",
    )
    net.compile(optimizer or keras.optimizers.SGD(0.1), "mse", **keywords)
    return net


def fit(net, *callbacks, steps: int = 4, xy=None, **keywords):
    keywords = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | keywords
    return net.fit(*(xy or data(steps)), callbacks=list(callbacks), **keywords)


def gradients(net, x, y) -> list[np.ndarray]:
    """By a tape of our own."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((net(x) - y) ** 2)
    return [g.numpy().astype(float) for g in tape.gradient(loss, [v.value for v in net.variables])]


def first_norms(net, steps: int = 4) -> list[float]:
    x, y = data(steps)
    return [np.linalg.norm(g) for g in gradients(net, x[:BATCH], y[:BATCH])]


class Interrupted(keras.callbacks.Callback):
    """Ends a fit as a user's Ctrl-C does."""

    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


# -- clipping and loss scaling -------------------------------------------------------------------


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm", "clipvalue", None])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_total_after_the_optimisers_own_clipping(option, scaled):
    limit = 0.05
    inner = keras.optimizers.SGD(1.0, **({option: limit} if option else {}))
    optimizer = keras.optimizers.LossScaleOptimizer(inner, 2.0**10) if scaled else inner
    net, probe = small(optimizer), GradientProbe()
    expected, before = first_norms(net, 1), net.get_weights()
    fit(net, probe, steps=1)
    moved = [np.linalg.norm(a - b) for a, b in zip(net.get_weights(), before, strict=True)]
    history = probe.history
    np.testing.assert_allclose(history.norms[0], expected, rtol=1e-4)
    np.testing.assert_allclose(history.clipped_total, np.linalg.norm(moved), rtol=1e-4)
    assert (history.clipped_total[0] < 0.9 * history.total[0]) == (option is not None)
    assert ("divided by the loss scale" in history.seen) == scaled


@pytest.mark.parametrize("mode", ["record", "skip", "raise"])
@pytest.mark.parametrize("jit", [False, True])
def test_steps_that_loss_scaling_leaves_out_are_recorded_as_skipped(mode, jit):
    def train(*callbacks):
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1), 2.0**126)
        net = small(optimizer, jit_compile=jit)
        fit(net, *callbacks, xy=(x, y))  # gradients of about 16: too large for the first scales
        return net, float(optimizer.dynamic_scale.value)

    x, y = data(6)
    y *= 8
    probe = GradientProbe(on_nonfinite=mode, update_ratio_every=1)
    net, scale = train(probe)
    plain, plain_scale = train()
    skipped = probe.history.skipped
    count = int(skipped.sum())
    assert 1 <= count <= 5
    assert skipped.tolist() == [True] * count + [False] * (6 - count)
    assert scale == plain_scale == 2.0 ** (126 - count)
    for a, b in zip(net.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert np.isfinite(probe.history.total).tolist() == (~skipped).tolist()
    assert np.isnan(probe.history.update_ratios[skipped]).all()
    at = slice(count * BATCH, (count + 1) * BATCH)  # the weights are still those of the start
    expected = [np.linalg.norm(g) for g in gradients(small(), x[at], y[at])]
    np.testing.assert_allclose(probe.history.norms[count], expected, rtol=1e-4)


def test_mixed_precision_is_recorded_without_its_scale():
    net, probe = small(dtype="mixed_float16"), GradientProbe(activations=True)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), 2.0**8)
    net.compile(optimizer, "mse")
    expected = first_norms(small())
    fit(net, probe)
    np.testing.assert_allclose(probe.history.norms[0], expected, rtol=2e-2)
    assert not probe.history.skipped.any()
    assert np.isfinite(probe.history.activations).all()


def test_a_fixed_loss_scale_is_divided_out():
    net = small(keras.optimizers.SGD(0.1, loss_scale_factor=512.0, global_clipnorm=0.05))
    probe, expected = GradientProbe(), first_norms(net)
    fit(net, probe)
    np.testing.assert_allclose(probe.history.norms[0], expected, rtol=1e-5)
    np.testing.assert_allclose(probe.history.clipped_total, 0.05, rtol=1e-5)


# -- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, {"jit_compile": True}, {"run_eagerly": True}])
def test_activations_are_the_largest_outputs_of_training(mode):
    net, probe = small(keras.optimizers.SGD(0.0), **mode), GradientProbe(activations=True)
    x, y = data(2)
    x[BATCH + 1, 2] = np.nan
    hidden = net.layers[0](x)
    outputs = [hidden.numpy(), net.layers[1](hidden).numpy()]
    huge = (1e3 * x[:2], y[:2])
    fit(net, probe, xy=(x, y), validation_data=huge)  # an evaluation is not training
    expected = [
        [np.abs(out[rows]).max() for out in outputs] for rows in (slice(BATCH), slice(BATCH, None))
    ]
    history = probe.history
    assert [name.rpartition("/")[2] for name in history.activation_names] == ["one", "two"]
    np.testing.assert_allclose(history.activations, expected, rtol=1e-5)
    assert np.isnan(history.activations[1]).all()
    assert not any("call" in vars(layer) for layer in net.layers)
    assert "train_step" not in vars(net)


def test_activations_of_layers_in_loops_shared_and_unused():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.rnn = keras.layers.Bidirectional(keras.layers.GRU(2, unroll=False))
            self.twice = keras.layers.Dense(4, use_bias=False, kernel_initializer="ones")
            self.unused = keras.layers.ReLU()

        def call(self, x):
            return self.twice(self.twice(self.rnn(x)))

    net, probe = Net(), GradientProbe(activations=True)
    net.compile(keras.optimizers.SGD(0.0), "mse")
    x = np.ones((4, 5, 3), "float32")
    fit(net, probe, xy=(x, np.ones((4, 4))))
    inner = net.rnn(x)
    outputs = [inner[:, :2], inner[:, 2:], net.twice(inner), net.twice(net.twice(inner))]
    forward, backward, once, twice = (np.abs(output.numpy()).max() for output in outputs)
    expected = [forward, backward, max(once, twice), np.nan]
    np.testing.assert_allclose(probe.history.activations, [expected], rtol=1e-5)


def test_a_model_that_is_saved_while_it_is_watched(tmp_path):
    net, path = small(), tmp_path / "net.keras"
    saves = keras.callbacks.ModelCheckpoint(path, save_freq=1)
    fit(net, GradientProbe(activations=True), saves)
    loaded = keras.models.load_model(path)
    for a, b in zip(loaded.get_weights(), net.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# -- attaching -----------------------------------------------------------------------------------


def test_after_an_interruption_a_fit_without_the_probe_is_not_watched():
    net, probe = small(), GradientProbe(activations=True)
    with pytest.raises(KeyboardInterrupt):
        fit(net, probe, Interrupted())
    fit(net)
    assert probe.history.steps.tolist() == [0]
    for thing in (net, net.optimizer, *net.layers):
        assert not vars(thing).keys() & {"apply", "call", "make_train_function", "train_step"}
    fit(net, other := GradientProbe())
    fit(net, probe)
    assert other.history.steps.tolist() == [0, 1, 2, 3]
    assert probe.history.steps.tolist() == [0, 1, 2, 3, 4]


def test_after_an_interruption_two_probes_change_places():
    net, one, two = small(), GradientProbe(), GradientProbe()
    with pytest.raises(KeyboardInterrupt):
        fit(net, one, two, Interrupted())
    fit(net, two, one)
    assert one.history.steps.tolist() == two.history.steps.tolist() == [0, 1, 2, 3, 4]
    net.train_on_batch(*data(1))
    assert len(one.history.steps) == 5


def test_after_an_interruption_the_model_may_be_compiled_anew():
    net, probe = small(), GradientProbe()
    with pytest.raises(KeyboardInterrupt):
        fit(net, probe, Interrupted())
    net.compile(keras.optimizers.Adam(0.1, clipnorm=0.01), "mse")
    fit(net, probe)
    assert probe.history.steps.tolist() == [0, 1, 2, 3, 4]
    assert (probe.history.clipped_total < probe.history.total).tolist() == [False] + [True] * 4


def test_a_probe_that_moves_to_another_model_starts_anew():
    net, probe = small(), GradientProbe(activations=True)
    fit(net, probe)
    other = keras.Sequential([keras.layers.Dense(1, name="only")])
    other.compile("sgd", "mse")
    fit(other, probe, steps=2)
    assert probe.history.norms.shape == (2, 2)
    assert probe.history.activations.shape == (2, 1)


@pytest.mark.parametrize("steps_per_execution", [3, 4, 10])
def test_steps_per_execution_changes_nothing_of_what_is_recorded(steps_per_execution):
    probes = [GradientProbe(update_ratio_every=2, activations=True, capacity=6) for _ in "ab"]
    writers = [Writer(), Writer()]
    for probe, writer, steps in zip(probes, writers, (1, steps_per_execution), strict=True):
        probe.log_to(writer, every=3)
        fit(small(steps_per_execution=steps), probe, steps=10)
    one, other = (probe.history for probe in probes)
    np.testing.assert_array_equal(other.steps, range(4, 10))
    for name in ("norms", "present", "skipped", "update_ratios", "activations", "clipped_total"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-6)
    assert {step for _, step in writers[0].seen} == {0, 3, 6, 9}
    if steps_per_execution < 6:  # otherwise the ring has forgotten some
        assert writers[1].seen == pytest.approx(writers[0].seen)


def test_the_error_names_the_layer_and_its_class():
    x, y = data()
    x[BATCH] = np.inf
    net = small()
    with pytest.raises(NonFiniteGradientError, match=r"step 1: .*one/kernel \(layer .*one: Dense"):
        fit(net, GradientProbe(on_nonfinite="raise"), xy=(x, y))
    assert all(np.isfinite(w).all() for w in net.get_weights())


# -- while it runs -------------------------------------------------------------------------------


def test_logging_follows_the_history(tmp_path):
    net, writer = small(), Writer()
    files = tf.summary.create_file_writer(str(tmp_path))
    probe = GradientProbe(update_ratio_every=2)
    assert probe.log_to(writer).log_to(files, every=2) is probe
    fit(net, probe)
    files.close()
    expected = {}
    for step, row in enumerate(probe.history.norms):
        for name, norm in zip(probe.history.names, row, strict=True):
            expected[f"grad_norm/{name}", step] = norm
        expected["grad_norm/total", step] = np.linalg.norm(row)
        expected["grad_norm/clipped_total", step] = np.linalg.norm(row)
    ratios = {key: value for key, value in writer.seen.items() if key[0].startswith("update")}
    assert writer.seen == pytest.approx(expected | ratios)
    assert {step for _, step in ratios} == {0, 2}
    written = {}
    for record in tf.data.TFRecordDataset([str(path) for path in tmp_path.iterdir()]):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            written[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    even = {key: value for key, value in writer.seen.items() if key[1] % 2 == 0}
    assert written == pytest.approx(even, rel=1e-6)
    with pytest.raises(TypeError, match=r"create_file_writer or .*add_scalar.*got dict"):
        probe.log_to({})
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        probe.log_to(writer, every=0)


def test_a_killed_fit_leaves_its_steps(tmp_path):
    code = """
import sys
from gradlab.keras import GradientProbe, keras
class Count(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print(batch, flush=True)
net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
net.compile(keras.optimizers.SGD(0.0), "mse")
probe = GradientProbe(save_to=sys.argv[1], save_every=5)
import numpy as np
x = np.ones((10**6, 2), "float32")
net.fit(x, 0 * x[:, :1], batch_size=1, verbose=0, callbacks=[probe, Count()])
"""
    path = tmp_path / "run.npz"
    run = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    try:
        for line in run.stdout:
            if int(line) >= 23:
                break
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    history = GradientHistory.load(path)
    assert len(history.steps) >= 20
    assert (history.steps[-1] + 1) % 5 == 0
    np.testing.assert_allclose(history.norms, np.tile([4 * np.sqrt(2), 4], (len(history.steps), 1)))


def test_the_file_is_finished_with_the_fit(tmp_path):
    probe = GradientProbe(save_to=tmp_path / "run.npz", save_every=3)
    fit(small(), probe)
    np.testing.assert_array_equal(
        GradientHistory.load(tmp_path / "run.npz").norms, probe.history.norms
    )
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        GradientProbe(save_to=tmp_path / "no" / "run.npz")
    with pytest.raises(ValueError, match="save_every must be at least 1, got 0"):
        GradientProbe(save_every=0)
