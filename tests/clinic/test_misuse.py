"""Steps that are finite and wrong: what the probe records shows it; and tools that mislead."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from torch_cases import Around, cross_entropy, deep, digits, sgd

import gradlab.keras as gk
import gradlab.torch as gt

# -- PyTorch -----------------------------------------------------------------------------------


def fresh() -> torch.nn.Module:
    """The same small network, each time."""
    torch.manual_seed(0)
    return deep(1.0, 2)


def backward(model, factor: float = 1.0, batch=None) -> None:
    (factor * cross_entropy(model, batch or digits())).backward()


def recorded(loop) -> float:
    """The total norm that the probe saw in a loop of one step."""
    model = fresh()
    optimizer = sgd(model)
    with gt.GradientProbe(model, optimizer) as probe:
        loop(model, optimizer)
    return probe.history.total[0]


def clip(model, norm: float = 1.0) -> float:
    return torch.nn.utils.clip_grad_norm_(model.parameters(), norm).item()


def micro_batches():
    x, y = digits(64)
    return [(x[rows], y[rows]) for rows in torch.arange(64).split(16)]


@pytest.mark.parametrize(("unscale", "norm"), [(False, 1 / 65536), (True, 1.0)])
def test_clipping_before_the_scale_is_taken_out_stops_learning(unscale, norm):
    model, scaler = fresh(), torch.amp.GradScaler("cpu")
    optimizer = sgd(model)
    with gt.GradientProbe(model, optimizer, scaler=scaler) as probe:
        scaler.scale(20 * cross_entropy(model, digits())).backward()
        if unscale:
            scaler.unscale_(optimizer)
        clip(model)
        scaler.step(optimizer)
        scaler.update()
    assert probe.history.total[0] == pytest.approx(norm, rel=1e-3)


def test_clipping_after_the_step_does_nothing():
    def late(model, optimizer):
        backward(model, 100)
        optimizer.step()
        clip(model)

    def in_time(model, optimizer):
        backward(model, 100)
        clip(model)
        optimizer.step()

    assert recorded(late) > 10
    assert recorded(in_time) == pytest.approx(1.0, rel=1e-3)


def test_clipping_each_micro_batch_changes_the_direction():
    def direction(each: bool) -> torch.Tensor:
        model = fresh()
        for batch in micro_batches():
            backward(model, 100, batch)
            if each:
                clip(model)
        clip(model)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    together, each = direction(False), direction(True)
    assert together.norm() == pytest.approx(1.0, rel=1e-3)
    assert torch.cosine_similarity(together, each, 0) < 0.99


def test_accumulation_without_dividing_is_k_times_the_gradient():
    def loop(factor):
        def steps(model, optimizer):
            for batch in micro_batches():
                backward(model, factor, batch)
            optimizer.step()

        return recorded(steps)

    assert loop(1.0) == pytest.approx(4 * loop(1 / 4), rel=1e-4)


def test_clipping_sets_huge_finite_gradients_to_zero_and_the_probe_does_not():
    def after(clipped) -> torch.Tensor:
        model = Around(lambda h: h)
        optimizer = sgd(model)
        with gt.GradientProbe(model, optimizer) as probe:
            (model(torch.ones(3, 4)).mean() * 1e21).backward()
            clipped(model, probe)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    silent = after(lambda model, probe: clip(model))
    assert not silent.any()
    ours = after(lambda model, probe: probe.clip_(1.0))
    assert ours.norm() == pytest.approx(1.0, rel=1e-4)


# -- Keras -------------------------------------------------------------------------------------


def fitted(**clipping):
    """History and update of one step of a small Keras model."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10)]
    )
    x, y = (t.numpy() for t in digits())
    model.compile(
        keras.optimizers.SGD(1.0, **clipping),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    before = [w.copy() for w in model.get_weights()]
    probe = gk.GradientProbe()
    model.fit(20 * x, y, batch_size=64, verbose=0, callbacks=[probe])
    update = np.concatenate(
        [(b - a).ravel() for b, a in zip(before, model.get_weights(), strict=True)]
    )
    return probe.history, update


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_keras_clipnorm_is_per_variable():
    _, plain = fitted()
    each, by_variable = fitted(clipnorm=1.0)
    together, by_all = fitted(global_clipnorm=1.0)
    assert each.total[0] > 10  # before clipping, in both
    assert each.total[0] == pytest.approx(together.total[0], rel=1e-5)
    assert each.clipped_total[0] > 1.3  # four variables, each of norm up to 1
    assert together.clipped_total[0] == pytest.approx(1.0, rel=1e-4)
    assert np.linalg.norm(by_variable) == pytest.approx(each.clipped_total[0], rel=1e-4)
    assert cosine(by_all, plain) > 0.9999
    assert cosine(by_variable, plain) < 0.99


# -- tools that mislead ------------------------------------------------------------------------


def test_detect_anomaly_blames_the_operation_after_the_guilty_one():
    x = torch.zeros(3, requires_grad=True)
    with (
        pytest.warns(UserWarning, match="PowBackward0"),
        pytest.raises(RuntimeError, match="PowBackward0"),
        torch.autograd.set_detect_anomaly(True),
    ):
        (x**2).sum().sqrt().backward()

    model = Around(lambda h: (h**2).sum(-1).sqrt())
    found = gt.diagnose(model, lambda m, b: m(b).mean(), torch.zeros(2, 4))
    assert found.measurements.backward.place.operation == "sqrt"


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_detect_anomaly_never_sees_an_infinity():
    x = torch.zeros(3, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        x.sqrt().sum().backward()
    assert x.grad.isinf().all()


def test_check_numerics_lets_nan_through_a_compiled_function():
    def step(x):
        return tf.reduce_sum(tf.sqrt(x))

    tf.debugging.enable_check_numerics()
    try:
        with pytest.raises(tf.errors.InvalidArgumentError, match="Sqrt"):
            step(tf.constant([-1.0]))
        with pytest.raises(tf.errors.InvalidArgumentError, match="DebugNumericSummaryV2"):
            tf.function(step, jit_compile=True)(tf.constant([1.0]))  # an error where all is well
    finally:
        tf.debugging.disable_check_numerics()
    assert math.isnan(float(tf.function(step, jit_compile=True)(tf.constant([-1.0]))))
