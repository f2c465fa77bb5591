"""The same network in PyTorch, Keras and NumPy: parity, and weights that move between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradlab import backprop, theory
from gradlab.mlp import MLPSpec, initial_weights

SPEC = MLPSpec(5, 3, width=8, depth=3, groups=2)
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def model(side, spec=SPEC, seed=0, dtype="float32"):
    kind = getattr(side._torch, dtype) if side.__name__.endswith("torch") else dtype
    return side.MLP(spec, seed, dtype=kind)


def trainable(spec, dtype, seed=1):
    """Weights none of which is a special value, as they are after some training."""
    rng = np.random.default_rng(seed)
    return {
        name: (w + 0.1 * rng.normal(size=w.shape)).astype(dtype)
        for name, w in initial_weights(spec, seed).items()
    }


def batch(dtype="float64", samples=16):
    rng = np.random.default_rng(3)
    return rng.normal(size=(samples, 5)).astype(dtype), rng.integers(3, size=samples)


def distance(one: dict, other: dict) -> float:
    """Relative distance of two sets of gradients, each as one long vector.

    (One by one would not do: a bias in front of a normalisation has a gradient of exactly 0.)
    """
    assert set(one) == set(other)
    assert all(one[name].shape == other[name].shape for name in one)
    square = sum(((one[n].astype(float) - other[n]) ** 2).sum() for n in one)
    return float(np.sqrt(square / sum((other[n].astype(float) ** 2).sum() for n in one)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normalization", [None, "batch", "layer", "group"])
@pytest.mark.parametrize("activation", theory.activation_names())
def test_gradients_equal_numpys(side, activation, normalization, dtype):
    for skip in (None, 0.5):
        spec = replace(SPEC, activation=activation, normalization=normalization, skip=skip)
        net, weights = model(side, spec, dtype=dtype), trainable(spec, dtype)
        side.models.load_weights(net, weights)
        x, y = batch(dtype)
        loss, grads = side.models.gradients(net, x, y)
        double = {name: w.astype(float) for name, w in weights.items()}
        expected_loss, expected = backprop.gradients(spec, double, x.astype(float), y)
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE[dtype])
        assert distance(grads, expected) < TOLERANCE[dtype]
        assert {g.dtype for g in grads.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("activation", theory.activation_names())
def test_activations_are_those_of_the_theory(side, activation):
    x = np.linspace(-6, 6, 101)
    tensor = side._torch.tensor(x) if side.__name__.endswith("torch") else x
    values = np.asarray(side.models.ACTIVATIONS[activation](tensor))
    np.testing.assert_allclose(values, theory.activation(activation)(x), rtol=1e-12, atol=1e-14)


def test_every_activation_of_the_theory_can_be_built(side):
    assert set(side.models.ACTIVATIONS) == set(theory.activation_names())


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, depth=0),
        replace(SPEC, bias=False, normalization="layer"),
        replace(SPEC, normalization="batch", skip=1.0, initialization="orthogonal"),
    ],
)
def test_initial_weights_are_those_of_the_plan(side, spec):
    got, expected = side.models.get_weights(model(side, spec, seed=6)), initial_weights(spec, 6)
    assert list(got) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name].astype("float32"))


def test_the_output_is_that_of_numpy(side):
    x, _ = batch("float32")
    net = model(side)
    expected = backprop.mlp(
        SPEC, {n: backprop.Tensor(w) for n, w in initial_weights(SPEC).items()}, x
    )
    out = net(side._torch.tensor(x)).detach() if side.__name__.endswith("torch") else net(x)
    assert tuple(out.shape) == (16, 3)
    np.testing.assert_allclose(np.asarray(out), expected.data, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalization", [None, "batch", "group"])
def test_weights_go_round_through_both_frameworks_unchanged(normalization):
    import gradlab.keras
    import gradlab.torch

    spec = replace(SPEC, normalization=normalization)
    weights = trainable(spec, "float32")
    there, back, here = (gradlab.torch.MLP(spec), gradlab.keras.MLP(spec), gradlab.torch.MLP(spec))
    gradlab.torch.models.load_weights(there, weights)
    gradlab.keras.models.load_weights(back, gradlab.torch.models.get_weights(there))
    gradlab.torch.models.load_weights(here, gradlab.keras.models.get_weights(back))
    for name, value in gradlab.torch.models.get_weights(here).items():
        np.testing.assert_array_equal(value, weights[name])


def test_weights_are_copied_and_not_shared(side):
    net, weights = model(side), trainable(SPEC, "float32")
    side.models.load_weights(net, weights)
    expected = {name: w.copy() for name, w in weights.items()}
    weights["hidden0.weight"][:] = 7
    side.models.get_weights(net)["hidden1.weight"][:] = 7
    for name, value in side.models.get_weights(net).items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden1.bias": None}, "missing hidden1.bias"),
        ({"hidden9.bias": np.zeros(8)}, "unexpected hidden9.bias"),
        ({"hidden0.weight": np.zeros((8, 5))}, r"hidden0.weight has shape \(8, 5\).*\(5, 8\)"),
        ({"hidden0.scale": np.ones(8)}, "unexpected hidden0.scale"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(side, change, message):
    net = model(side)
    before = side.models.get_weights(net)
    weights = {n: w for n, w in {**trainable(SPEC, "float32"), **change}.items() if w is not None}
    with pytest.raises(ValueError, match=message):
        side.models.load_weights(net, weights)
    for name, value in side.models.get_weights(net).items():
        np.testing.assert_array_equal(value, before[name])


def test_torch_gradients_touch_no_grad_and_keep_the_mode():
    import gradlab.torch

    net = gradlab.torch.MLP(replace(SPEC, normalization="batch")).eval()
    gradlab.torch.models.gradients(net, *batch())
    assert all(p.grad is None for p in net.parameters())
    assert not any(module.training for module in net.modules())


def test_gradients_take_labels_of_any_integer_type(side):
    x, y = batch("float32")
    net = model(side)
    loss, _ = side.models.gradients(net, x, y)
    for kind in ("int32", "uint8"):
        assert side.models.gradients(net, x, y.astype(kind))[0] == loss


def test_gradients_leave_the_running_statistics_alone(side):
    net = model(side, replace(SPEC, normalization="batch"))

    def statistics():
        if side.__name__.endswith("torch"):
            return {n: b.numpy().copy() for n, b in net.named_buffers()}
        return {v.path: v.numpy() for v in net.non_trainable_variables}

    before = statistics()
    side.models.gradients(net, *batch("float32"))
    assert before
    for name, value in statistics().items():
        np.testing.assert_array_equal(value, before[name])
