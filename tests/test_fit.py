"""Stacked training of networks written as functions: equal to `train` where both apply."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest

from gradlab.sweep import EVALUATED, Update, evaluated

rng = np.random.default_rng(0)
X, Y = rng.normal(size=(40, 6)), rng.integers(4, size=40)
MATRICES = [rng.normal(size=(3, 6, 8)) / 2, rng.normal(size=(3, 8, 4)) / 2]
WEIGHTS = {"first": MATRICES[0], "last": MATRICES[1]}


@pytest.fixture(params=["torch", "keras"])
def side(request):
    """A framework's sweep module and its functions under the names of the other."""
    if request.param == "torch":
        torch = pytest.importorskip("torch")
        terms = SimpleNamespace(
            relu=torch.relu, abs=torch.abs, log_sum=torch.logsumexp, mean=torch.mean,
            largest=lambda a: a.amax((1, 2)), sum=torch.sum, rows=lambda table, i: table[:, i[0]],
        )  # fmt: skip
    else:
        tf = pytest.importorskip("tensorflow")
        terms = SimpleNamespace(
            relu=tf.nn.relu, abs=tf.abs, log_sum=tf.reduce_logsumexp, mean=tf.reduce_mean,
            largest=lambda a: tf.reduce_max(a, (1, 2)), sum=tf.reduce_sum,
            rows=lambda table, i: tf.gather(table, i[0], axis=1),
        )  # fmt: skip
    terms.sweep = importlib.import_module(f"gradlab.{request.param}.sweep")
    return terms


def two_layers(side):
    return lambda w, x: side.relu(x @ w["first"]) @ w["last"]


@pytest.mark.parametrize(
    "update",
    [
        Update(),
        Update("adam", clip="norm", threshold=[0.01, 0.1, 10]),
        Update("momentum", l2=0.1, weight_decay=0.1, clip="adaptive", threshold=0.1),
    ],
    ids=lambda update: update.rule,
)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_fit_equals_train(side, update, loss):
    y = Y if loss == "cross_entropy" else np.eye(4)[Y]
    settings = {"lr": [0.1, 0.2, 0.01], "update": update, "steps": 9, "batch_size": 8, "seed": 2}
    settings |= {"loss": loss, "record_updates": True, "x_test": X[:11], "y_test": y[:11]}
    trained = side.sweep.train(MATRICES, X, y, **settings)
    fitted = side.sweep.fit(two_layers(side), WEIGHTS, X, y, **settings)
    for name in ("loss", "grad_norm", "update_norm", "weight_norm", "accuracy", "train_accuracy"):
        np.testing.assert_allclose(
            getattr(fitted, name), getattr(trained, name), rtol=1e-12, err_msg=name
        )
    for one, other in zip(fitted.weights.values(), trained.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_arrays_of_any_shape_are_trained(side):
    """A number, a vector and a stack of matrices: each gets the gradient that it has."""
    weights = {
        "scale": np.array([1.0, 2.0]),
        "shift": rng.normal(size=(2, 4)),
        "stack": rng.normal(size=(2, 3, 6, 4)),
    }

    def network(w, x):
        maps = [x @ w["stack"][:, number] for number in range(3)]
        return w["scale"][:, None, None] * sum(maps) + w["shift"][:, None]

    given = {"steps": 1, "batch_size": 40, "lr": 1.0, "loss": "mse", "record_arrays": True}
    rows = np.tile(np.arange(40), (1, 2, 1))
    target = np.eye(4)[Y]
    result = side.sweep.fit(network, weights, X, target, rows=rows, **given)
    for member in range(2):
        scale, shift = weights["scale"][member], weights["shift"][member]
        maps = X @ weights["stack"][member].sum(0)
        error = (scale * maps + shift - target) / 40
        slopes = [(error * maps).sum(), error.sum(0), scale * np.stack([X.T @ error] * 3)]
        norms = [np.linalg.norm(slope) for slope in slopes]
        np.testing.assert_allclose(result.array_norm[0, member], norms, rtol=1e-10)
        for (name, before), slope in zip(weights.items(), slopes, strict=True):
            after = result.weights[name]
            assert after.shape == before.shape
            np.testing.assert_allclose(after[member], before[member] - slope, atol=1e-10)


def test_what_a_network_notes_is_kept_step_by_step(side):
    def network(w, x):
        outputs = two_layers(side)(w, x)
        return outputs, {"largest": side.largest(side.abs(outputs)), "another": outputs[:, 0, 0]}

    rows = np.arange(24).reshape(2, 3, 4)
    result = side.sweep.fit(network, WEIGHTS, X, Y, lr=0.0, rows=rows)
    outputs = np.maximum(X[rows] @ MATRICES[0], 0) @ MATRICES[1]  # (steps, members, batch, classes)
    assert set(result.noted) == {"largest", "another"}
    np.testing.assert_allclose(result.noted["largest"], np.abs(outputs).max((2, 3)))
    np.testing.assert_allclose(result.noted["another"], outputs[:, :, 0, 0])
    plain = side.sweep.fit(two_layers(side), WEIGHTS, X, Y, lr=0.0, rows=rows)
    assert plain.noted == {}
    assert plain.array_norm is None
    assert plain.update_norm is None


def test_a_loss_of_your_own(side):
    def log_partition(outputs, classes):
        return side.mean(side.log_sum(outputs, -1), -1)

    rows = np.arange(24).reshape(2, 3, 4)
    result = side.sweep.fit(two_layers(side), WEIGHTS, X, Y, lr=0.0, rows=rows, loss=log_partition)
    outputs = np.maximum(X[rows] @ MATRICES[0], 0) @ MATRICES[1]
    np.testing.assert_allclose(result.loss, np.log(np.exp(outputs).sum(-1)).mean(-1))


def test_a_member_that_overflows_leaves_the_others_alone(side):
    given = {"steps": 6, "batch_size": 8, "rows": None}
    lone = side.sweep.fit(two_layers(side), WEIGHTS, X, Y, lr=[0.1, 0.0, 0.1], **given)
    bad = side.sweep.fit(two_layers(side), WEIGHTS, X, Y, lr=[0.1, 1e300, 0.1], **given)
    assert bad.failed.tolist() == [False, True, False]
    assert np.isnan(bad.accuracy[1])
    assert bad.first_nonfinite[1] >= 0
    np.testing.assert_array_equal(bad.loss[:, [0, 2]], lone.loss[:, [0, 2]])


def test_integer_inputs_stay_integers(side):
    tokens = rng.integers(5, size=(40, 1))
    weights = {"table": rng.normal(size=(2, 5, 4)).astype("float32")}

    def network(w, x):  # every member looks up its own rows: here all of them the first member's
        return side.rows(w["table"], x[..., 0]) + 0 * w["table"][:, :1]

    rows = np.tile(np.arange(8), (1, 2, 1))
    result = side.sweep.fit(network, weights, tokens, Y, lr=0.1, rows=rows)
    table = weights["table"][:, tokens[:8, 0]].astype(float)
    expected = np.log(np.exp(table).sum(-1)) - np.take_along_axis(
        table, np.tile(Y[:8], (2, 1))[..., None], -1
    )[..., 0]  # fmt: skip
    np.testing.assert_allclose(result.loss[0], expected.mean(-1), rtol=1e-5)


def test_progress_changes_nothing(side, capsys):
    given = {"lr": 0.1, "steps": 25, "batch_size": 4}
    quiet = side.sweep.fit(two_layers(side), WEIGHTS, X, Y, **given)
    assert capsys.readouterr().err == ""
    shown = side.sweep.fit(two_layers(side), WEIGHTS, X, Y, **given, progress=True)
    assert "25/25" in capsys.readouterr().err
    np.testing.assert_array_equal(quiet.loss, shown.loss)


@pytest.mark.parametrize("n", [1, EVALUATED - 1, EVALUATED, EVALUATED + 1, 3 * EVALUATED])
def test_every_example_is_evaluated_in_its_place(n):
    rows = evaluated(n)
    assert rows.shape[1] == EVALUATED
    assert rows.size - n < EVALUATED
    np.testing.assert_array_equal(rows.ravel()[:n], np.arange(n))
    assert rows.max() == n - 1


def test_more_examples_than_are_evaluated_at_once(side):
    x = rng.normal(size=(EVALUATED + 30, 6))
    outputs = np.maximum(x @ MATRICES[0], 0) @ MATRICES[1]
    y = np.where(np.arange(len(x)) % 3 == 0, outputs[1].argmax(-1), 0)  # mixed right and wrong
    given = {"lr": 0.0, "steps": 1, "batch_size": 4, "x_test": x, "y_test": y}
    result = side.sweep.fit(two_layers(side), WEIGHTS, X, Y, **given)
    np.testing.assert_allclose(result.accuracy, (outputs.argmax(-1) == y).mean(-1))
    np.testing.assert_allclose(
        result.train_accuracy,
        ((np.maximum(X @ MATRICES[0], 0) @ MATRICES[1]).argmax(-1) == Y).mean(-1),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "mlp"}, r"network must be a function of weights and inputs, got 'mlp'"),
        ({"weights": MATRICES}, r"weights must be a dict from name to array, got list"),
        ({"weights": {}}, r"weights must be a dict"),
        ({"weights": {"a": np.ones(())}}, r"shapes \{'a': \(\)\}, expected \(members, …\)"),
        ({"weights": WEIGHTS | {"b": np.ones((4, 2))}}, r"'b': \(4, 2\)\}, expected .* equal"),
        ({"weights": {"a": np.ones((2, 3), int)}}, r"weights are \['int64'\], expected all float"),
        ({"x": X[:9]}, r"x has shape \(9, 6\) and y \(40,\), expected .* the same n"),
        ({"x": np.ones(40)}, r"x has shape \(40,\)"),
        ({"y": Y / 2}, r"y is float64 of shape \(40,\), expected classes"),
        ({"y": Y - 9}, r"expected classes \(n,\), integers ≥ 0"),
        ({"y": Y + 9}, r"y goes up to class 12, but the network has 4 outputs"),
        ({"y": np.ones((40, 3)), "loss": "mse"}, r"outputs have shape \(3, 64, 4\), .* 64, 3\)"),
        ({"network": lambda w, x: (x @ w["first"])[..., 0]}, r"shape \(3, 64\), .* classes\)"),
        ({"x_test": X}, r"x_test and y_test belong together"),
        ({"x_test": X, "y_test": Y[:3]}, r"x_test has shape \(40, 6\) and y_test \(3,\)"),
        ({"loss": "hinge"}, r"loss 'hinge' is none of"),
        ({"update": "adam"}, r"update must be a gradlab.sweep.Update, got 'adam'"),
        ({"steps": 0}, r"steps must be at least 1, got 0"),
        ({"lr": [0.1, 0.2]}, r"lr has shape \(2,\), expected a number or \(3,\)"),
        ({"rows": np.zeros((2, 4, 8), int)}, r"rows have shape \(2, 4, 8\), expected .* 3, batch"),
    ],
)
def test_bad_arguments_are_named(side, change, message):
    given = {"network": two_layers(side), "weights": WEIGHTS, "x": X, "y": Y, "lr": 0.1} | change
    first = [given.pop(name) for name in ("network", "weights", "x", "y")]
    with pytest.raises(ValueError, match=message):
        side.sweep.fit(*first, **given)


def test_both_sides_have_one_signature():
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    fits = [importlib.import_module(f"gradlab.{name}.sweep").fit for name in ("torch", "keras")]
    assert inspect.signature(fits[0]) == inspect.signature(fits[1])
    assert fits[0].__doc__ == fits[1].__doc__
