"""L-BFGS on both sides: the same minimum, an honest budget, and no NaN left in the weights."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest

from gradlab import data, mlp
from gradlab.lbfgs import Recorder, Stop, two_loops


class Torch:
    """A model that is one vector, and a network with its loss, in PyTorch."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.gl = importlib.import_module("gradlab.torch")

    def vector(self, start, dtype="float64", shape=None):
        model = self.torch.nn.Module()
        values = np.asarray(start, dtype).reshape(shape or np.shape(start))
        model.w = self.torch.nn.Parameter(self.torch.tensor(values))
        return model, lambda: model.w.detach().numpy().copy()

    def quadratic(self, model, eigenvalues):
        curvature = self.torch.tensor(eigenvalues, dtype=model.w.dtype)
        return lambda: (curvature * model.w.reshape(-1).square()).sum() / 2

    def times(self, loss_fn, factor):
        return lambda: loss_fn() * factor()

    def root(self, model):  # its slope at 0 is infinite
        return lambda: model.w.abs().sum().sqrt()

    def network(self, spec, x, y):
        model = self.gl.MLP(spec, 0, self.torch.float64)
        x, y = self.torch.tensor(x, dtype=self.torch.float64), self.torch.tensor(y)

        def loss_fn():
            logits = model(x)
            each = self.torch.logsumexp(logits, 1) - logits[self.torch.arange(len(y)), y]
            penalty = sum(p.square().sum() for p in model.parameters())
            return each.mean() + 0.005 * penalty

        return model, loss_fn

    def numpy(self, model):
        return importlib.import_module("gradlab.torch.models").get_weights(model)


class Keras:
    """The same in Keras."""

    def __init__(self):
        self.tf = pytest.importorskip("tensorflow")
        self.gl = importlib.import_module("gradlab.keras")

    def vector(self, start, dtype="float64", shape=None):
        layer = self.gl.keras.layers.Layer(dtype=dtype)
        values = np.asarray(start, dtype).reshape(shape or np.shape(start))
        layer.w = layer.add_weight(shape=values.shape, dtype=dtype, trainable=True)
        layer.w.assign(values)
        return layer, lambda: layer.w.numpy().copy()

    def quadratic(self, model, eigenvalues):
        curvature = self.tf.constant(eigenvalues, model.w.dtype)
        tf = self.tf
        return lambda: tf.reduce_sum(curvature * tf.reshape(model.w, [-1]) ** 2) / 2

    def times(self, loss_fn, factor):
        def product():
            loss = loss_fn()
            return loss * self.tf.cast(factor(), loss.dtype)

        return product

    def root(self, model):
        return lambda: self.tf.sqrt(self.tf.reduce_sum(self.tf.abs(model.w)))

    def network(self, spec, x, y):
        tf, model = self.tf, self.gl.MLP(spec, 0, "float64")
        x, rows = tf.constant(x, tf.float64), tf.stack([tf.range(len(y)), y], 1)

        @tf.function
        def loss_fn():
            logits = model(x)
            each = tf.reduce_logsumexp(logits, 1) - tf.gather_nd(logits, rows)
            penalty = tf.add_n([tf.reduce_sum(v**2) for v in model.trainable_variables])
            return tf.reduce_mean(each) + 0.005 * penalty

        return model, loss_fn

    def numpy(self, model):
        return importlib.import_module("gradlab.keras.models").get_weights(model)


def scalar(tensor):
    return float(tensor.detach() if hasattr(tensor, "detach") else tensor)


@pytest.fixture(params=[Torch, Keras], ids=["torch", "keras"])
def side(request):
    return request.param()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_quadratic_takes_little_more_than_its_dimension(side, dtype):
    eigenvalues = np.array([1.0, 3.0, 10.0, 30.0, 100.0, 300.0])
    model, value = side.vector(np.ones(6), dtype, shape=(2, 3))
    loss_fn = side.quadratic(model, eigenvalues)
    result = side.gl.lbfgs.minimize(model, loss_fn, max_evaluations=60, tolerance=1e-5)
    assert result.converged, result.message
    assert "converged" in result.message
    assert result.evaluations <= 40
    assert value().dtype == dtype
    assert np.abs(eigenvalues.reshape(2, 3) * value()).max() <= 1.01e-5
    assert result.loss[0] == pytest.approx(eigenvalues.sum() / 2)
    assert result.grad_norm[0] == pytest.approx(np.linalg.norm(eigenvalues))
    assert result.best == np.argmin(result.loss)


def test_both_sides_find_the_minimum_of_a_convex_problem():
    digits = data.digits(n_train=300)
    spec = mlp.MLPSpec(64, 10, depth=0)
    found = []
    for side in (Torch(), Keras()):
        model, loss_fn = side.network(spec, digits.x_train, digits.y_train)
        result = side.gl.lbfgs.minimize(model, loss_fn, max_evaluations=500, tolerance=1e-8)
        assert result.converged, result.message
        found.append(side.numpy(model))
        assert scalar(loss_fn()) == pytest.approx(result.loss[result.best], abs=1e-14)
    for name, weights in found[0].items():
        np.testing.assert_allclose(weights, found[1][name], atol=1e-6)


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 20])
def test_the_budget_counts_every_evaluation(side, budget):
    digits = data.digits(n_train=100)
    model, loss_fn = side.network(
        mlp.MLPSpec(64, 10, width=8, depth=2), digits.x_train, digits.y_train
    )
    calls, seen = [], []

    def counted():
        calls.append(1)
        return loss_fn()

    result = side.gl.lbfgs.minimize(
        model, counted, max_evaluations=budget, tolerance=0, on_evaluation=lambda *s: seen.append(s)
    )
    assert len(calls) == result.evaluations == budget
    assert f"budget of {budget} evaluations" in result.message
    assert not result.converged
    assert [number for number, _, _ in seen] == list(range(budget))
    assert [loss for _, loss, _ in seen] == result.loss.tolist()
    assert scalar(loss_fn()) == pytest.approx(result.loss.min(), abs=1e-14)


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_leaves_the_best_point(side, factor):
    model, value = side.vector(np.ones(4))
    loss_fn, points, calls = side.quadratic(model, [1.0, 2.0, 50.0, 100.0]), [], []

    def later():
        points.append(value())
        calls.append(1)
        return factor if len(calls) == 4 else 1.0

    result = side.gl.lbfgs.minimize(model, side.times(loss_fn, later), max_evaluations=50)
    assert result.evaluations == 4
    assert "the loss is not finite at evaluation 3" in result.message
    assert result.best == np.argmin(result.loss[:3])
    np.testing.assert_array_equal(value(), points[result.best])
    calls[:] = [1, 1, 1]  # now from the first evaluation on
    before = value()
    result = side.gl.lbfgs.minimize(model, side.times(loss_fn, later), max_evaluations=50)
    assert (result.evaluations, result.best, result.converged) == (1, -1, False)
    assert "as they were given" in result.message
    np.testing.assert_array_equal(value(), before)


def test_a_gradient_that_is_not_finite_is_named(side):
    model, value = side.vector(np.zeros(1))
    result = side.gl.lbfgs.minimize(model, side.root(model), max_evaluations=9)
    assert result.loss.tolist() == [0]
    if np.isfinite(result.grad_norm[0]):
        pytest.fail("the square root's slope at 0 is infinite")
    assert "the gradient is not finite at evaluation 0" in result.message
    assert value() == 0


def test_an_interruption_leaves_the_best_point(side):
    model, value = side.vector(np.ones(3))
    loss_fn = side.quadratic(model, [1.0, 10.0, 100.0])

    def interrupt(number, loss, grad_norm):
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side.gl.lbfgs.minimize(model, loss_fn, max_evaluations=50, on_evaluation=interrupt)
    assert np.isfinite(value()).all()
    assert scalar(loss_fn()) < 55.5  # the first


def test_gradients_that_were_there_stay(side):
    if not isinstance(side, Torch):
        pytest.skip("Keras keeps no gradients")
    model, _ = side.vector(np.ones(3))
    model.w.grad = side.torch.full((3,), 7.0, dtype=side.torch.float64)
    side.gl.lbfgs.minimize(model, side.quadratic(model, [1.0, 2.0, 3.0]), max_evaluations=5)
    assert model.w.grad.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_evaluations": 0}, "max_evaluations must be at least 1, got 0"),
        ({"history": 0}, "history must be at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must be a number ≥ 0, got -1.0"),
        ({"tolerance": float("nan")}, "tolerance must be a number ≥ 0, got nan"),
    ],
)
def test_what_does_not_fit_is_named(side, change, message):
    model, _ = side.vector(np.ones(2))
    with pytest.raises(ValueError, match=message):
        side.gl.lbfgs.minimize(
            model, side.quadratic(model, [1.0, 2.0]), **{"max_evaluations": 5} | change
        )


def test_a_loss_per_sample_and_a_model_without_parameters_are_named(side):
    model, value = side.vector(np.ones(2))
    with pytest.raises(ValueError, match=r"loss_fn returned shape \(2,\), expected a scalar"):
        side.gl.lbfgs.minimize(model, lambda: model.w * 1.0, max_evaluations=5)
    np.testing.assert_array_equal(value(), [1, 1])
    empty = side.torch.nn.ReLU() if isinstance(side, Torch) else side.gl.keras.layers.ReLU()
    with pytest.raises(ValueError, match="ReLU has no"):
        side.gl.lbfgs.minimize(empty, lambda: None, max_evaluations=5)


def test_progress_goes_to_standard_error(side, capsys):
    model, _ = side.vector(np.ones(2))
    side.gl.lbfgs.minimize(
        model, side.quadratic(model, [1.0, 9.0]), max_evaluations=3, tolerance=0, progress=True
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "gradient=" in err


def test_the_recorder_keeps_the_best_of_the_finite():
    recorder = Recorder(5)
    for loss, largest in ((3.0, 1.0), (1.0, 2.0), (2.0, 0.5)):
        recorder.record(loss, largest, largest, lambda loss=loss: loss)
    with pytest.raises(Stop, match=r"the gradient is not finite at evaluation 3; .*evaluation 1"):
        recorder.record(0.5, np.inf, np.inf, lambda: pytest.fail("no point to keep"))
    assert (recorder.best, recorder.point) == (1, 1.0)


def test_two_loops_are_the_bfgs_matrix():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 6))
    hessian, gradient = root @ root.T + np.eye(6), rng.standard_normal(6)
    pairs = [(s, hessian @ s) for s in rng.standard_normal((4, 6))]
    s, y = pairs[-1]
    inverse = s @ y / (y @ y) * np.eye(6)
    for s, y in pairs:
        left = np.eye(6) - np.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
    np.testing.assert_allclose(two_loops(gradient, pairs), inverse @ gradient, rtol=1e-10)
    np.testing.assert_allclose(two_loops(pairs[-1][1], pairs), pairs[-1][0], rtol=1e-10)
    assert (two_loops(gradient, []) == gradient).all()


@pytest.mark.parametrize("name", ["torch", "keras"])
def test_examples_in_docstrings_hold(name):
    pytest.importorskip({"torch": "torch", "keras": "tensorflow"}[name])
    result = doctest.testmod(importlib.import_module(f"gradlab.{name}.lbfgs"))
    assert result.attempted > 0
    assert result.failed == 0
