"""Stacked training: equal to one network at a time, in both frameworks, and NaN stays at home."""

from __future__ import annotations

import importlib
from itertools import pairwise

import numpy as np
import pytest

from gradlab.sweep import minibatches

SIDES = {"torch": "gradlab.torch.sweep", "keras": "gradlab.keras.sweep"}
DERIVATIVE = {
    "relu": lambda z: (z > 0).astype(z.dtype),
    "tanh": lambda z: 1 - np.tanh(z) ** 2,
    "linear": np.ones_like,
}
FUNCTION = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh, "linear": lambda z: z}


@pytest.fixture(params=SIDES)
def train(request):
    pytest.importorskip({"torch": "torch", "keras": "tensorflow"}[request.param])
    return importlib.import_module(SIDES[request.param]).train


def stack(widths, members, seed=0, gain=1.0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [
        (gain * rng.standard_normal((members, a, b)) * np.sqrt(2 / a)).astype(dtype)
        for a, b in pairwise(widths)
    ]


def task(n=50, features=6, classes=4, members=None, seed=1):
    rng = np.random.default_rng(seed)
    lead = (n,) if members is None else (members, n)
    return rng.standard_normal((*lead, features)), rng.integers(classes, size=lead)


def train_alone(weights, x, y, lr, batches, activation, loss):
    """One network, backpropagation by hand in NumPy float64."""
    w = [np.array(array, float) for array in weights]
    losses, grad_norms, delta_norms = [], [], []
    for batch in batches:
        h, z = [x[batch]], []
        for number, weight in enumerate(w):
            z.append(h[-1] @ weight)
            h.append(FUNCTION[activation](z[-1]) if number + 1 < len(w) else z[-1])
        if loss == "cross_entropy":
            p = np.exp(z[-1] - z[-1].max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            rows = np.arange(len(batch))
            losses.append(-np.log(p[rows, y[batch]]).mean())
            delta = p.copy()
            delta[rows, y[batch]] -= 1
        else:
            delta = z[-1] - y[batch]
            losses.append((delta**2).sum(1).mean() / 2)
        delta /= len(batch)
        deltas = [delta]
        for number in range(len(w) - 1, 0, -1):
            delta = (delta @ w[number].T) * DERIVATIVE[activation](z[number - 1])
            deltas.insert(0, delta)
        grads = [before.T @ delta for before, delta in zip(h, deltas, strict=False)]
        grad_norms.append(np.sqrt(sum((g**2).sum() for g in grads)))
        delta_norms.append([np.linalg.norm(delta) for delta in deltas])
        w = [weight - lr * g for weight, g in zip(w, grads, strict=True)]
    return np.array(losses), np.array(grad_norms), np.array(delta_norms), w


@pytest.mark.parametrize("activation", FUNCTION)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("stacked", [False, True])
def test_equals_one_network_at_a_time(train, activation, loss, stacked):
    members, steps, batch = 3, 8, 5
    weights = stack([6, 7, 7, 4], members, dtype="float64")
    x, y = task(members=members if stacked else None)
    if loss == "mse":
        y = np.eye(4)[y] * 3.0
    lr = np.array([0.002, 0.005, 0.01])
    result = train(
        weights, x, y, lr=lr, steps=steps, batch_size=batch, seed=4,
        activation=activation, loss=loss, record_layers=True,
    )  # fmt: skip
    batches = minibatches(50, members, steps, batch, seed=4)
    for m in range(members):
        own = (x[m], y[m]) if stacked else (x, y)
        alone = train_alone(
            [w[m] for w in weights], *own, lr[m], batches[:, m], activation, loss
        )  # fmt: skip
        np.testing.assert_allclose(result.loss[:, m], alone[0], rtol=1e-9)
        np.testing.assert_allclose(result.grad_norm[:, m], alone[1], rtol=1e-9)
        np.testing.assert_allclose(result.delta_norm[:, m], alone[2], rtol=1e-9)
        for got, expected in zip(result.weights, alone[3], strict=True):
            np.testing.assert_allclose(got[m], expected, rtol=1e-9, atol=1e-12)
    assert not result.failed.any()
    assert (result.first_nonfinite == -1).all()
    assert np.isnan(result.accuracy).all() == (loss == "mse")


def test_float32_stays_near_float64(train):
    x, y = task()
    double = stack([6, 8, 4], 2, dtype="float64")
    single = [w.astype("float32") for w in double]
    one, two = (train(w, x, y, lr=0.05, steps=20, batch_size=8) for w in (single, double))
    assert one.weights[0].dtype == np.float32
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-4)


def test_nan_of_one_member_touches_no_other(train):
    x, y = task()
    weights = stack([6, 8, 8, 4], 3)
    calm = train(weights, x, y, lr=0.05, steps=10, batch_size=8, record_layers=True)
    wild = train(weights, x, y, lr=[0.05, 1e30, 0.05], steps=10, batch_size=8, record_layers=True)
    assert wild.failed.tolist() == [False, True, False]
    assert wild.first_nonfinite[[0, 2]].tolist() == [-1, -1]
    assert 1 <= wild.first_nonfinite[1] < 10
    assert np.isnan(wild.accuracy).tolist() == [False, True, False]
    for name in ("loss", "grad_norm", "delta_norm"):
        np.testing.assert_array_equal(
            getattr(calm, name)[:, [0, 2]], getattr(wild, name)[:, [0, 2]]
        )  # fmt: skip
    for before, after in zip(calm.weights, wild.weights, strict=True):
        np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])


def test_a_weight_that_overflows_in_the_last_update_is_a_failure(train):
    x, y = task()
    result = train(stack([6, 8, 4], 1), 1e3 * x, y, lr=3e38, steps=1, batch_size=8)
    assert np.isfinite(result.loss).all()
    assert np.isfinite(result.grad_norm).all()
    assert result.failed.tolist() == [True]
    assert result.first_nonfinite.tolist() == [0]


def test_gradient_norms_beyond_float32_squares_stay_finite(train):
    x, y = task()
    weights = stack([6, 8, 8, 8, 4], 1)
    weights[-1] *= 1e12
    weights[-2] *= 1e12
    result = train(weights, x, y, lr=0.0, steps=1, batch_size=8)
    assert 1e19 < result.grad_norm[0, 0] < np.inf


def test_it_learns_and_counts_on_the_test_set(train):
    rng = np.random.default_rng(0)
    y, y_test = rng.integers(3, size=300), rng.integers(3, size=60)
    x, x_test = (np.eye(3)[c] * 3 + 0.1 * rng.standard_normal((len(c), 3)) for c in (y, y_test))
    weights = stack([3, 16, 3], 2)
    result = train(weights, x, y, lr=0.1, steps=100, x_test=x_test, y_test=y_test)
    assert (result.accuracy == 1).all()
    wrong = train(weights, x, y, lr=0.1, steps=100, x_test=x_test, y_test=(y_test + 1) % 3)
    assert (wrong.accuracy == 0).all()


def test_what_is_passed_in_is_left_alone(train):
    x, y = task()
    weights = stack([6, 8, 4], 2)
    copies = [w.copy() for w in weights]
    train(weights, x, y, lr=0.5, steps=3, batch_size=8)
    for before, after in zip(copies, weights, strict=True):
        np.testing.assert_array_equal(before, after)


def test_layers_are_recorded_on_request_only(train):
    x, y = task()
    assert train(stack([6, 8, 4], 2), x, y, lr=0.1, steps=2).delta_norm is None


def test_both_frameworks_agree_early():
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    x, y = task(n=200, features=16)
    weights = stack([16] + [32] * 6 + [4], 4)
    one, two = (
        importlib.import_module(name).train(weights, x, y, lr=0.02, steps=30, record_layers=True)
        for name in SIDES.values()
    )
    np.testing.assert_allclose(one.loss[:5], two.loss[:5], rtol=1e-4)
    np.testing.assert_allclose(one.grad_norm[:5], two.grad_norm[:5], rtol=1e-4)
    np.testing.assert_allclose(one.delta_norm[0], two.delta_norm[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, r"shapes \[\], expected one"),
        ({"weights": [np.ones((6, 4), "float32")]}, r"\(6, 4\).*\(members, fan_in, fan_out\)"),
        ({"weights": stack([6, 8], 2) + stack([9, 4], 2)}, "fan_in 9, expected 8"),
        ({"weights": stack([6, 8], 2) + stack([8, 4], 3)}, "same number of members"),
        ({"weights": [w.astype("float16") for w in stack([6, 4], 2)]}, "float16.*expected"),
        ({"x": np.ones((50, 7))}, r"x has shape \(50, 7\), expected \(n, 6\) or \(2, n, 6\)"),
        ({"x": np.ones((3, 50, 6))}, r"\(3, 50, 6\), expected"),
        ({"x": np.ones(6)}, r"x has shape \(6,\)"),
        ({"y": np.zeros(49, int)}, r"y has shape \(49,\), expected \(50,\) or \(2, 50\)"),
        ({"y": np.zeros(50)}, "y is float64, expected integer classes"),
        ({"y": np.full(50, 4)}, "4 to 4, expected classes 0 to 3"),
        ({"y": np.zeros(50, int), "loss": "mse"}, r"expected \(50, 4\) or \(2, 50, 4\)"),
        ({"lr": [0.1, 0.1, 0.1]}, r"lr has shape \(3,\), expected a number or \(2,\)"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"activation": "selu"}, "'selu' is none of"),
        ({"loss": "hinge"}, "'hinge' is none of"),
        ({"x_test": np.ones((5, 6))}, "belong together"),
    ],
)
def test_bad_arguments_are_named(train, change, message):
    x, y = task()
    arguments = {"weights": stack([6, 8, 4], 2), "x": x, "y": y, "lr": 0.1, "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        train(arguments.pop("weights"), arguments.pop("x"), arguments.pop("y"), **arguments)
