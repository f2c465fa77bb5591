"""Stacked training: equal to one network at a time, in both frameworks, and NaN stays at home."""

from __future__ import annotations

import importlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
import pytest

from gradlab import theory
from gradlab.sweep import MembersFailed, Update, distribute, dropout_draws, minibatches

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
        ({"activation": "sine"}, "'sine' is none of"),
        ({"loss": "hinge"}, "'hinge' is none of"),
        ({"x_test": np.ones((5, 6))}, "belong together"),
    ],
)
def test_bad_arguments_are_named(train, change, message):
    x, y = task()
    arguments = {"weights": stack([6, 8, 4], 2), "x": x, "y": y, "lr": 0.1, "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        train(arguments.pop("weights"), arguments.pop("x"), arguments.pop("y"), **arguments)


# ---------------------------------------------------------------------------------------------
# Update rules, penalties, clipping, schedules: against PyTorch's own, one network at a time

UPDATES = {
    "sgd": {},
    "momentum": {"rule": "momentum", "momentum": 0.8},
    "nesterov": {"rule": "nesterov", "momentum": 0.8},
    "rmsprop": {"rule": "rmsprop", "beta2": 0.9, "epsilon": 1e-6},
    "adam": {"rule": "adam", "momentum": 0.85, "beta2": 0.97, "epsilon": 1e-6},
    "l1 and l2": {"l1": 0.003, "l2": 0.02},
    "adamw": {"rule": "adam", "momentum": 0.9, "weight_decay": 0.1},
    "clip norm": {"clip": "norm", "threshold": 0.5},
    "clip layer": {"clip": "layer", "threshold": 0.2},
    "clip value": {"clip": "value", "threshold": 0.02},
    "clip adaptive": {"clip": "adaptive", "threshold": 0.01},
    "all": {"rule": "nesterov", "l2": 0.05, "weight_decay": 0.1, "clip": "norm", "threshold": 0.5},
}


def torch_optimizer(torch, w, lr, how):
    rule, decay = how.get("rule", "sgd"), how.get("weight_decay", 0)
    betas = how.get("momentum", 0.9), how.get("beta2", 0.999)
    eps = how.get("epsilon", 1e-8)
    if rule == "adam":
        return torch.optim.AdamW(w, lr, betas, eps, weight_decay=decay)
    if rule == "rmsprop":
        return torch.optim.RMSprop(w, lr, betas[1], eps)
    momentum = 0 if rule == "sgd" else betas[0]
    return torch.optim.SGD(w, lr, momentum, nesterov=rule == "nesterov")


def by_torch(
    weights, x, y, lr, batches, how, factors, normalization=None, skip=None, act=None, mask=None
):
    """One network in float64 with PyTorch's own layers, optimisers and clipping.

    `mask` gives, for a step and a hidden layer, what dropout multiplies the outputs by.
    """
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    act = act or torch.relu
    w = [torch.tensor(array, requires_grad=True) for array in weights]
    optimizer, norms = torch_optimizer(torch, w, lr, how), []
    for step, (batch, factor) in enumerate(zip(batches, factors, strict=True)):
        h = torch.tensor(x[batch])
        for number, weight in enumerate(w):
            z = h @ weight
            if number + 1 == len(w):
                break
            if normalization == "batch":
                z = F.batch_norm(z, None, None, training=True, eps=1e-5)
            elif normalization == "layer":
                z = F.layer_norm(z, z.shape[-1:], eps=1e-5)
            branch = act(z) * (torch.tensor(mask(step, number)) if mask else 1)
            same = skip is not None and weight.shape[0] == weight.shape[1]
            h = h + skip * branch if same else branch
        optimizer.zero_grad()
        F.cross_entropy(z, torch.tensor(y[batch])).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in w]).item())
        for p in w:
            p.grad += how.get("l1", 0) * p.detach().sign() + how.get("l2", 0) * p.detach()
        threshold = how.get("threshold")
        match how.get("clip"):
            case "norm":
                torch.nn.utils.clip_grad_norm_(w, threshold)
            case "layer":
                for p in w:
                    torch.nn.utils.clip_grad_norm_([p], threshold)
            case "value":
                torch.nn.utils.clip_grad_value_(w, threshold)
            case "adaptive":
                for p in w:
                    for unit in range(p.shape[1]):
                        most = threshold * max(p.detach()[:, unit].norm().item(), 1e-3)
                        p.grad[:, unit] *= min(1, most / max(p.grad[:, unit].norm().item(), 1e-300))
        decay = how.get("weight_decay", 0) if how.get("rule") != "adam" else 0
        optimizer.param_groups[0]["lr"] = lr * factor
        before = [p.detach().clone() for p in w]
        optimizer.step()
        with torch.no_grad():
            for p, old in zip(w, before, strict=True):
                p -= lr * factor * decay * old
    return norms, [p.detach().numpy() for p in w]


@pytest.mark.parametrize("name", UPDATES)
def test_updates_equal_pytorch_s_optimisers(train, name):
    members, steps = 3, 12
    weights, (x, y) = stack([6, 7, 7, 4], members, dtype="float64"), task()
    lr, factors = np.array([0.02, 0.1, 0.3]), np.linspace(1, 0.2, steps)
    update = Update(**UPDATES[name], schedule=factors)
    rows = minibatches(50, members, steps, 8, seed=2)
    result = train(weights, x, y, lr=lr, update=update, rows=rows)
    for m in range(members):
        alone = by_torch([w[m] for w in weights], x, y, lr[m], rows[:, m], UPDATES[name], factors)
        # PyTorch's clipping adds 1e-6 to the norm.
        tolerance = 3e-5 if "clip" in UPDATES[name] else 1e-9
        np.testing.assert_allclose(result.grad_norm[:, m], alone[0], rtol=tolerance)
        for got, expected in zip(result.weights, alone[1], strict=True):
            np.testing.assert_allclose(got[m], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("skip", [None, 0.5])
def test_normalization_and_skip_equal_pytorch_s(train, normalization, skip):
    weights, (x, y) = stack([6, 7, 7, 7, 4], 2, dtype="float64"), task()
    rows = minibatches(50, 2, 6, 8, seed=2)
    result = train(weights, x, y, lr=0.1, rows=rows, normalization=normalization, skip=skip)
    for m in range(2):
        own = [w[m] for w in weights]
        alone = by_torch(own, x, y, 0.1, rows[:, m], {}, np.ones(6), normalization, skip)
        np.testing.assert_allclose(result.grad_norm[:, m], alone[0], rtol=1e-9)
        for got, expected in zip(result.weights, alone[1], strict=True):
            np.testing.assert_allclose(got[m], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", theory.activation_names())
def test_activations_equal_pytorch_s(train, activation):
    F = pytest.importorskip("torch").nn.functional
    weights, (x, y) = stack([6, 7, 7, 4], 2, dtype="float64"), task()
    rows, slopes = minibatches(50, 2, 6, 8, seed=2), np.array([0.03, 0.4])
    result = train(weights, x, y, lr=0.1, rows=rows, activation=activation, slope=slopes)
    for m in range(2):
        act = getattr(F, activation, lambda z: z)  # "linear" is a layer there
        if activation == "leaky_relu":
            act = partial(F.leaky_relu, negative_slope=slopes[m])
        if activation == "linear":
            act = lambda z: z  # noqa: E731
        own = [w[m] for w in weights]
        alone = by_torch(own, x, y, 0.1, rows[:, m], {}, np.ones(6), act=act)
        # TensorFlow's kernel of SELU holds its constants in float32.
        tolerance = 1e-6 if activation == "selu" else 1e-9
        np.testing.assert_allclose(result.grad_norm[:, m], alone[0], rtol=tolerance)
        for got, expected in zip(result.weights, alone[1], strict=True):
            np.testing.assert_allclose(got[m], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("skip", [None, 0.5])
def test_dropout_drops_what_the_draws_say(train, skip):
    weights, (x, y) = stack([6, 7, 5, 5, 4], 3, dtype="float64"), task()
    rows, rates = minibatches(50, 3, 6, 8, seed=2), np.array([0.0, 0.2, 0.6])
    result = train(weights, x, y, lr=0.1, rows=rows, seed=5, dropout=rates, skip=skip)
    draws, ends = dropout_draws(6, 8, 7 + 5 + 5, seed=5), np.cumsum([0, 7, 5, 5])
    for m, rate in enumerate(rates):

        def mask(step, layer, rate=rate):
            return (draws[step, :, ends[layer] : ends[layer + 1]] >= rate) / (1 - rate)

        own = [w[m] for w in weights]
        alone = by_torch(own, x, y, 0.1, rows[:, m], {}, np.ones(6), skip=skip, mask=mask)
        np.testing.assert_allclose(result.grad_norm[:, m], alone[0], rtol=1e-9)
        for got, expected in zip(result.weights, alone[1], strict=True):
            np.testing.assert_allclose(got[m], expected, rtol=1e-9, atol=1e-12)


def test_dropout_keeps_the_share_it_says_and_the_mean():
    draws = dropout_draws(3, 40, 500, seed=1)
    for rate in (0.1, 0.5, 0.9):
        kept = draws >= rate
        assert kept.mean() == pytest.approx(1 - rate, abs=0.01)
    assert len(np.unique(draws)) > 0.9 * draws.size
    assert not np.array_equal(draws, dropout_draws(3, 40, 500, seed=2))


def test_nothing_is_dropped_when_a_member_is_judged(train):
    x, y = task()
    weights = stack([6, 8, 8, 4], 2)
    one, two = (train(weights, x, y, lr=0.0, steps=1, dropout=p) for p in (0.0, 0.8))
    np.testing.assert_array_equal(one.accuracy, two.accuracy)
    assert (one.loss != two.loss).all()


def test_every_number_may_differ_between_members(train):
    weights, (x, y) = stack([6, 8, 4], 2), task()
    rows = minibatches(50, 2, 5, 8, seed=3)
    schedule = np.linspace(1, 2, 10).reshape(5, 2)
    numbers = {"momentum": [0.5, 0.9], "l2": [0.0, 0.1], "threshold": [np.inf, 0.3]}
    how = Update("momentum", clip="norm", schedule=schedule, **numbers)
    both = train(weights, x, y, lr=[0.1, 0.2], update=how, rows=rows, record_updates=True)
    for m in range(2):
        own = {name: value[m] for name, value in numbers.items()}
        one = train(
            [w[m : m + 1] for w in weights], x, y, lr=[0.1, 0.2][m], rows=rows[:, m : m + 1],
            update=Update("momentum", clip="norm", schedule=schedule[:, m], **own),
        )  # fmt: skip
        np.testing.assert_allclose(both.loss[:, m], one.loss[:, 0], rtol=1e-5)
    moved = np.sqrt(sum(((a - b) ** 2).sum((1, 2)) for a, b in
                        zip(both.weights, weights, strict=True)))  # fmt: skip
    assert (both.update_norm.sum(0) >= moved * (1 - 1e-5)).all()
    assert both.weight_norm[0] == pytest.approx(
        np.sqrt(sum((w.astype(float) ** 2).sum((1, 2)) for w in weights)), rel=1e-6
    )


def test_clipping_survives_a_norm_whose_square_overflows(train):
    weights, (x, y) = stack([6, 8, 4], 2), task()
    huge = train(
        weights, x, y, lr=0.1, steps=2, batch_size=8, output_scale=1e25,
        update=Update(clip="norm", threshold=1.0), record_updates=True,
    )  # fmt: skip
    assert (huge.grad_norm > 1e20).all()
    np.testing.assert_allclose(huge.update_norm, 0.1, rtol=1e-5)


def test_training_and_test_accuracy_are_told_apart(train):
    weights, (x, y) = stack([6, 32, 4], 2), task()
    fitted = train(weights, x, y, lr=0.5, steps=300, batch_size=16, x_test=x, y_test=(y + 1) % 4)
    assert (fitted.train_accuracy > 0.9).all()
    assert (fitted.accuracy < 0.1).all()


def test_progress_changes_nothing(train, capsys):
    weights, (x, y) = stack([6, 8, 4], 2), task()
    how = {"lr": 0.1, "steps": 45, "batch_size": 8, "update": Update("adam"), "record_layers": True}
    quiet = train(weights, x, y, **how)
    assert capsys.readouterr().err == ""
    shown = train(weights, x, y, **how, progress=True)
    assert "45/45" in capsys.readouterr().err
    np.testing.assert_array_equal(quiet.loss, shown.loss)
    np.testing.assert_array_equal(quiet.delta_norm, shown.delta_norm)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": "lion"}, "rule must be one of"),
        ({"clip": "agc"}, "clip must be one of"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"l2": -1.0}, "l2 must be ≥ 0"),
        ({"epsilon": np.nan}, "epsilon must be ≥ 0"),
        ({"threshold": 1.0}, "nothing is clipped"),
        ({"clip": "norm", "threshold": 0.0}, "threshold must be > 0"),
    ],
)
def test_an_update_that_makes_no_sense_says_so(wrong, message):
    with pytest.raises(ValueError, match=message):
        Update(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"update": "adam"}, "must be a gradlab.sweep.Update"),
        ({"update": Update(l2=[1.0, 2.0, 3.0])}, r"l2 has shape \(3,\)"),
        ({"update": Update(schedule=[1.0])}, r"schedule has shape \(1,\), expected \(4,\)"),
        ({"rows": np.zeros((4, 3, 2), int)}, r"expected \(steps, 2, batch\)"),
        ({"rows": np.full((4, 2, 2), 50)}, "integers from 0 to 49"),
        ({"normalization": "group"}, "normalization 'group'"),
        ({"slope": [0.1, 0.2, 0.3]}, r"slope has shape \(3,\)"),
        ({"dropout": 1.0}, "at least 0 and below 1, got 1.0"),
        ({"dropout": [0.1, -0.1]}, "at least 0 and below 1"),
    ],
)
def test_settings_that_do_not_fit_say_so(train, wrong, message):
    weights, (x, y) = stack([6, 8, 4], 2), task()
    with pytest.raises(ValueError, match=message):
        train(weights, x, y, **({"lr": 0.1, "steps": 4, "batch_size": 2} | wrong))


# ---------------------------------------------------------------------------------------------
# Members spread over processes

EVERYTHING = {
    "lr": np.linspace(0.05, 0.2, 5), "steps": 6, "batch_size": 8, "record_layers": True,
    "update": Update("momentum", l2=np.linspace(0, 0.1, 5), schedule=np.ones((6, 5))),
    "activation": "leaky_relu", "slope": np.linspace(0, 0.4, 5), "seed": 3,
    "dropout": np.linspace(0, 0.4, 5),
}  # fmt: skip


def same(one, other):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "noted":
            assert a == b == {}  # only `fit` notes
            continue
        for left, right in zip(a, b, strict=True) if field.name == "weights" else [(a, b)]:
            assert (left is None) == (right is None), field.name
            if left is not None:
                np.testing.assert_allclose(left, right, rtol=2e-5, err_msg=field.name)


def test_distribute_equals_train(train, capsys):
    weights, (x, y) = stack([6, 8, 4], 5), task(members=5)
    whole = train(weights, x, y, **EVERYTHING)
    same(whole, distribute(train, weights, x, y, **EVERYTHING, share=2))
    assert "5/5" in capsys.readouterr().err


def test_distribute_over_processes(train):
    weights, (x, y) = stack([6, 8, 4], 5), task()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = distribute(train, weights, x, y, **EVERYTHING, share=3, executor=pool)
        same(train(weights, x, y, **EVERYTHING), parts)
        with pytest.raises(MembersFailed, match=r"2 of 2 shares .* activation 'sine'"):
            distribute(train, weights, x, y, lr=0.1, activation="sine", share=3, executor=pool)


def test_distribute_on_a_dask_cluster():
    pytest.importorskip("torch")
    from distributed import Client, LocalCluster

    from gradlab.torch.sweep import train

    weights, (x, y) = stack([6, 8, 4], 5), task()
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        parts = distribute(
            train, weights, x, y, **EVERYTHING, share=2, executor=client.get_executor()
        )
    same(train(weights, x, y, **EVERYTHING), parts)


class _Dying:
    """A framework whose second share of members ends with its machine."""

    def __init__(self, train):
        self.train, self.calls = train, 0

    def __call__(self, weights, x, y, **settings):
        self.calls += 1
        if self.calls == 2:
            raise OSError("the machine went away")
        return self.train(weights, x, y, **settings)


def test_what_other_shares_computed_is_not_lost(train):
    weights, (x, y) = stack([6, 8, 4], 5), task()
    with ThreadPoolExecutor(1) as pool, pytest.raises(MembersFailed, match="from member 2") as e:
        distribute(_Dying(train), weights, x, y, **EVERYTHING, share=2, executor=pool)
    assert sorted(e.value.results) == [0, 4]
    assert e.value.results[4].loss.shape == (6, 1)


def test_a_share_below_one_says_so(train):
    with pytest.raises(ValueError, match="share must be at least 1, got 0"):
        distribute(train, stack([6, 4], 2), *task(), lr=0.1, share=0)
