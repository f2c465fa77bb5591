"""Forecasting: no look-ahead, exact units, and two frameworks that start alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradlab import data, forecast

PRICES = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.02, 300)))


def test_windows_hold_the_past_of_their_target():
    x, y = forecast.windows(np.arange(10), 3)
    assert x.shape == (7, 3)
    assert y.shape == (7,)
    for row, target in zip(x, y, strict=True):
        assert row.tolist() == [target - 3, target - 2, target - 1]


@pytest.mark.parametrize("length", [0, -1, 10, 11])
def test_windows_name_the_lengths_that_fit(length):
    with pytest.raises(ValueError, match="length must be between 1 and 9"):
        forecast.windows(np.arange(10), length)
    with pytest.raises(ValueError, match=r"shape \(2, 5\)"):
        forecast.windows(np.zeros((2, 5)), 2)


@pytest.mark.parametrize("kind", forecast.KINDS)
def test_no_value_of_a_task_depends_on_its_future(kind):
    """Later prices changed: no earlier window, no earlier target, no scale may move."""
    task, day = forecast.prepare(PRICES, kind), 250
    changed = PRICES.copy()
    changed[day:] *= 3
    other = forecast.prepare(changed, kind)
    assert (task.shift, task.scale) == (other.shift, other.scale)
    before = task.days < day
    np.testing.assert_array_equal(task.x[before], other.x[before])
    np.testing.assert_array_equal(task.y[before], other.y[before])
    np.testing.assert_array_equal(task.x[task.days == day], other.x[task.days == day])
    assert (task.y[task.days == day] != other.y[task.days == day]).all()


def test_fit_days_lets_the_future_in_and_only_then():
    changed = np.concatenate([PRICES[:250], 3 * PRICES[250:]])
    clean = [forecast.prepare(p, "standard").scale for p in (PRICES, changed)]
    leaky = [forecast.prepare(p, "standard", fit_days=300).scale for p in (PRICES, changed)]
    assert clean[0] == clean[1]
    assert leaky[0] != leaky[1]
    assert leaky[0] == PRICES.std()


@pytest.mark.parametrize("kind", forecast.KINDS)
def test_parts_follow_each_other_in_time_and_cover_all(kind):
    task = forecast.prepare(PRICES, kind, shares=(0.5, 0.2))
    parts = np.stack([task.train, task.validation, task.test])
    assert (parts.sum(0) == 1).all()
    ends = [task.days[part] for part in parts]
    assert [e.min() for e in ends[1:]] == [150, 210]
    assert [e.max() for e in ends] == [149, 209, 299]


@pytest.mark.parametrize("kind", forecast.KINDS)
def test_the_target_itself_says_the_price(kind):
    task = forecast.prepare(PRICES, kind)
    np.testing.assert_allclose(task.dollars(task.y), task.actual, rtol=1e-5)
    np.testing.assert_allclose(task.dollars([task.y, task.y])[1], task.actual, rtol=1e-5)
    assert (task.persistence == PRICES[task.days - 1]).all()
    assert (task.actual == PRICES[task.days]).all()
    with pytest.raises(ValueError, match="one output for each"):
        task.dollars(task.y[1:])


def test_a_return_of_zero_is_persistence():
    task = forecast.prepare(PRICES, "returns")
    zero = np.full(len(task.y), -task.shift / task.scale)
    np.testing.assert_allclose(task.dollars(zero), task.persistence, rtol=1e-12)


@pytest.mark.parametrize("kind", forecast.KINDS)
def test_unchanged_is_what_a_model_says_for_persistence(kind):
    task = forecast.prepare(PRICES, kind)
    np.testing.assert_allclose(task.dollars(task.unchanged), task.persistence, rtol=1e-5)


@pytest.mark.parametrize("kind", ["standard", "returns"])
def test_scaled_values_have_mean_0_and_deviation_1_over_the_training_days(kind):
    task = forecast.prepare(PRICES, kind)
    values = np.concatenate([task.x[0], task.y[task.train]])
    assert values.mean() == pytest.approx(0, abs=1e-6)
    assert values.std() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "log"}, "kind must be one of"),
        ({"shares": (0.9, 0.1)}, "without a target"),
        ({"shares": (0.05, 0.1)}, "without a target"),
        ({"length": 210}, "without a target"),
        ({"fit_days": 301}, "between 2 and 300"),
        ({"kind": "returns", "fit_days": 2}, "between 3 and 300"),
    ],
)
def test_prepare_says_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        forecast.prepare(PRICES, **change)


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0, np.inf])
def test_prices_are_positive_numbers(bad):
    with pytest.raises(ValueError, match="finite numbers > 0"):
        forecast.prepare(np.where(np.arange(300) == 7, bad, PRICES))


def test_a_price_that_never_moved_has_no_scale():
    with pytest.raises(ValueError, match="do not vary"):
        forecast.prepare(np.where(np.arange(300) < 250, 5.0, PRICES))


def test_rmse_is_in_dollars_and_refuses_to_broadcast():
    assert forecast.rmse([1.0, 3.0], [1.0, 1.0]) == pytest.approx(np.sqrt(2))
    assert forecast.rmse([[1.0, 3.0], [1.0, 1.0]], [1.0, 1.0]).tolist() == [np.sqrt(2), 0]
    with pytest.raises(ValueError, match="do not fit"):
        forecast.rmse(np.zeros((5, 1)), np.zeros(5))


def test_relative_range_is_a_ratio_of_rmse():
    actual, wrong = np.zeros(40), np.tile([3.0, -3.0], 20)
    assert forecast.relative_range(2 * wrong, wrong, actual) == pytest.approx((2, 2))
    # by hand: two stretches, squared errors relative to the baseline's 1 and 3 times as large
    halves = np.where(np.arange(40) < 20, 1.0, np.sqrt(3)) * wrong
    low, high = forecast.relative_range(halves, wrong, actual, stretches=2)
    luck = 2 * np.std([0, 2], ddof=1) / np.sqrt(2)
    assert (low, high) == pytest.approx((0, np.sqrt(2 + luck)))


def test_relative_range_holds_the_truth_about_19_times_in_20():
    """Independent days: the baseline errs by 1 a day, the forecast by 1.1, as root mean square."""
    rng = np.random.default_rng(0)
    ranges = [
        forecast.relative_range(*rng.normal(size=(2, 500)) * [[1.1], [1]], np.zeros(500))
        for _ in range(400)
    ]
    held = np.mean([low < 1.1 < high for low, high in ranges])
    assert 0.88 < held < 0.98  # ten stretches: Student's t gives 92 %


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(5), np.ones(4), np.zeros(4)), "one shape"),
        ((np.ones(4), np.zeros(4), np.zeros(4)), "a baseline that errs"),
        ((np.ones(4), np.ones(4), np.zeros(4)), "stretches must be between 2 and 4"),
    ],
)
def test_relative_range_says_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        forecast.relative_range(*arguments)


def test_feeding_back_continues_a_line():
    starts = np.array([[1.0, 2.0, 3.0], [10.0, 8.0, 6.0]])
    kept = starts.copy()
    line = forecast.feed_back(lambda x: 2 * x[:, -1] - x[:, -2], starts, 4)
    assert line.tolist() == [[4, 5, 6, 7], [4, 2, 0, -2]]
    np.testing.assert_array_equal(starts, kept)
    with pytest.raises(ValueError, match="one value a window"):
        forecast.feed_back(lambda x: x, starts, 2)
    with pytest.raises(ValueError, match="must be windows"):
        forecast.feed_back(lambda x: x, starts[0], 2)


@pytest.mark.parametrize("cell", forecast.CELLS)
def test_weights_tell_their_cell(cell):
    weights = forecast.initial_weights(cell, 5, 3)
    assert forecast.cell_of(weights) == (cell, 5)
    assert max(np.abs(w).max() for w in weights) <= 5**-0.5
    with pytest.raises(ValueError, match="five arrays"):
        forecast.cell_of(weights[:4])
    with pytest.raises(ValueError, match="cell must be one of"):
        forecast.initial_weights("GRU", 5, 3)


def test_the_validation_days_choose_the_evaluation_and_the_test_days_do_not():
    task = forecast.prepare(PRICES, "raw")
    outputs = np.tile(task.actual, (3, 1))
    outputs[0, task.validation] += 2
    outputs[1, task.validation] += 1  # the best there ...
    outputs[1, task.test] += 50  # ... and the worst here
    outputs[2] = np.nan
    fit = forecast.Fit(np.ones(3), outputs)
    np.testing.assert_array_equal(fit.forecast(task), outputs[1])


# ---------------------------------------------------------------------------------------------
# Both frameworks


@pytest.fixture(scope="module")
def sides():
    from gradlab.keras import forecast as keras_side
    from gradlab.torch import forecast as torch_side

    return torch_side, keras_side


@pytest.mark.parametrize("cell", forecast.CELLS)
@pytest.mark.parametrize("kind", forecast.KINDS)
def test_both_networks_are_the_same_function_with_the_same_gradient(sides, cell, kind):
    import tensorflow as tf
    import torch

    task = forecast.prepare(PRICES, kind)
    weights = forecast.initial_weights(cell, 6, 1)
    x, y = task.x[task.train], task.y[task.train]
    one = sides[0].network(weights)
    loss = sides[0].mse(one, (torch.tensor(x), torch.tensor(y)))
    trained = [p for p in one.parameters() if p.requires_grad]
    grads = [g.numpy() for g in torch.autograd.grad(loss, trained)]
    grads = [grads[0].T, grads[1].T, grads[2], grads[3].T, grads[4]]
    two = sides[1].network(weights)
    with tf.GradientTape() as tape:
        other = sides[1].mse(two, (tf.constant(x), tf.constant(y)))
    assert float(loss.detach()) == pytest.approx(float(other), rel=1e-5)
    for g, h in zip(grads, tape.gradient(other, two.trainable_variables), strict=True):
        assert g.shape == tuple(h.shape)
        np.testing.assert_allclose(g, h, rtol=1e-3, atol=1e-4 * np.abs(g).max())


def test_the_lstm_is_the_textbook_s(sides):
    import torch

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    weights = forecast.initial_weights("LSTM", 4, 2)
    kernel, recurrent, bias, read, shift = (w.astype(float) for w in weights)
    x = np.random.default_rng(0).normal(size=(3, 5))
    h = c = np.zeros((3, 4))
    for t in range(5):
        i, f, g, o = np.split(x[:, t, None] @ kernel + h @ recurrent + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    outputs = sides[0].network(weights)(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(outputs, (h @ read + shift)[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", forecast.METHODS)
def test_both_sides_train_alike(sides, method):
    task = forecast.prepare(PRICES, "standard")
    starts = [forecast.initial_weights("LSTM", 4, s) for s in (0, 1)]
    fits = [side.fit(task, starts, method, evaluations=8) for side in sides]
    for one, two in zip(*fits, strict=True):
        assert one.loss.shape == two.loss.shape == (8,)
        assert one.outputs.shape == two.outputs.shape == (8, len(task.y))
        assert np.isnan(one.outputs[:, task.train]).all()
        assert np.isfinite(one.outputs[:, ~task.train]).all()
        assert np.isnan(two.outputs[:, task.train]).all()
        np.testing.assert_allclose(one.loss[0], two.loss[0], rtol=1e-5)
        np.testing.assert_allclose(one.outputs[0], two.outputs[0], rtol=1e-4, atol=1e-5)
        assert one.loss.min() < one.loss[0]
        assert two.loss.min() < two.loss[0]
        if method == "Adam":  # the line searches differ
            np.testing.assert_allclose(one.loss, two.loss, rtol=1e-3)
    alone = sides[0].fit(task, starts[1:], method, evaluations=8)[0]
    np.testing.assert_allclose(alone.loss, fits[0][1].loss, rtol=1e-5)


def test_minibatches_are_dealt_alike_and_hold_every_window_once(sides):
    deal = forecast.minibatches(50, 16, np.random.default_rng(0))
    assert [len(rows) for rows in deal] == [16, 16, 16, 2]
    assert sorted(np.concatenate(deal)) == list(range(50))
    assert [len(r) for r in forecast.minibatches(32, 16, np.random.default_rng(0))] == [16, 16]
    task = forecast.prepare(PRICES, "standard")
    starts = [forecast.initial_weights("LSTM", 4, s) for s in (0, 1)]
    options = {"evaluations": 4, "lr": 0.01, "batch_size": 64, "seed": 3}
    fits = [side.fit(task, starts, "Adam", **options) for side in sides]
    for one, two in zip(*fits, strict=True):
        np.testing.assert_allclose(one.loss, two.loss, rtol=1e-3)
        np.testing.assert_allclose(one.outputs, two.outputs, rtol=1e-2, atol=1e-3)
    for side in sides:  # a minibatch of all windows is the full batch
        rows = int(task.train.sum())
        whole, same = (
            side.fit(task, starts[:1], "Adam", evaluations=4, batch_size=size)[0]
            for size in (None, rows)
        )
        np.testing.assert_allclose(whole.loss, same.loss, rtol=1e-4)


def test_a_fit_learns_a_line(sides):
    """A sequence whose next value is easy: both sides must come close, or nothing is learnt."""
    prices = 100 + 10 * np.sin(np.arange(200) / 5)
    task = forecast.prepare(prices, "standard", length=8)
    starts = [forecast.initial_weights("LSTM", 4, 0)]
    for side in sides:
        (fit,) = side.fit(task, starts, "L-BFGS", evaluations=60)
        error = forecast.rmse(fit.forecast(task)[task.test], task.actual[task.test])
        persistence = forecast.rmse(task.persistence[task.test], task.actual[task.test])
        assert error < 0.5 * persistence


def test_fit_refuses_what_it_does_not_know(sides):
    task = replace(forecast.prepare(data.stocks()[1], "standard"))
    for side in sides:
        with pytest.raises(ValueError, match="method must be one of"):
            side.fit(task, [], "SGD")
        with pytest.raises(ValueError, match="at least 1"):
            side.fit(task, [], "Adam", evaluations=0)
        with pytest.raises(ValueError, match="L-BFGS takes none, got 64"):
            side.fit(task, [], "L-BFGS", batch_size=64)
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            side.fit(task, [], "Adam", batch_size=0)
        assert side.fit(task, [], "Adam") == []
