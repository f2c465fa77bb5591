"""LSUV in both frameworks: variances against NumPy, parity, and nothing else changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradlab import mlp, theory
from gradlab.mlp import MLPSpec, initial_weights

SPEC = MLPSpec(6, 3, width=16, depth=4, activation="relu", gain=0.3, output_gain=5.0)
X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")


def fit(side, model, x=X, **options):
    import importlib

    lsuv_ = importlib.import_module(f"{side.__name__}.initialize").lsuv_
    return lsuv_(model, side._torch.tensor(x) if is_torch(side) else x, **options)


def is_torch(side):
    return side.__name__.endswith("torch")


def pre_activations(weights, x=X):
    h = x
    for name in mlp.layer_names(SPEC):
        z = h @ weights[f"{name}.weight"] + weights[f"{name}.bias"]
        yield name, z
        h = theory.activation(SPEC.activation)(z)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_every_layers_output_has_the_variance(side, orthogonal, variance):
    model = side.MLP(SPEC, 1)
    fitted = fit(side, model, orthogonal=orthogonal, variance=variance, tolerance=1e-3)
    weights = side.models.get_weights(model)
    assert list(fitted) == mlp.layer_names(SPEC)
    for name, z in pre_activations(weights):
        assert z.var() == pytest.approx(variance, rel=1.1e-3)
        assert fitted[name] == pytest.approx(z.var(), rel=1e-5)
        values = np.linalg.svd(weights[f"{name}.weight"], compute_uv=False)
        assert (values.max() / values.min() < 1.0001) == orthogonal
    before = initial_weights(SPEC, 1)
    if not orthogonal:  # a factor, and nothing else
        for name in fitted:
            ratio = weights[f"{name}.weight"] / before[f"{name}.weight"]
            np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def test_both_sides_find_the_same_weights():
    import gradlab.keras
    import gradlab.torch

    found = []
    for side in (gradlab.torch, gradlab.keras):
        model = side.MLP(replace(SPEC, normalization="batch"), 1)
        fit(side, model, seed=4)
        found.append(side.models.get_weights(model))
    for name, value in found[0].items():
        np.testing.assert_allclose(value, found[1][name], rtol=1e-4, atol=1e-6)


def convolutional(side):
    """Two convolutions, batch normalisation, dropout and a dense layer."""
    if is_torch(side):
        from torch import nn

        side._torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(6 * 16, 3),
        )  # fmt: skip
    kl = side.keras.layers
    side.keras.utils.set_random_seed(0)
    return side.keras.Sequential(
        [side.keras.Input((8, 8, 1)), kl.Conv2D(4, 3), kl.BatchNormalization(), kl.ReLU(),
         kl.Conv2D(6, 3, activation="relu"), kl.Flatten(), kl.Dropout(0.2), kl.Dense(3)]
    )  # fmt: skip


def state(side, model):
    if is_torch(side):
        return {n: v.numpy().copy() for n, v in model.state_dict().items()}
    return {v.path: v.numpy() for v in model.variables}


def image(side):
    x = np.random.default_rng(2).normal(size=(32, 8, 8, 1)).astype("float32")
    return np.moveaxis(x, -1, 1).copy() if is_torch(side) else x


def test_convolutions_are_fitted_and_nothing_else_is_changed(side):
    model = convolutional(side)
    before = state(side, model)
    activations = [getattr(layer, "activation", None) for layer in getattr(model, "layers", ())]
    if is_torch(side):
        model[1].eval()
        random = side._torch.get_rng_state()
    fitted = fit(side, model, image(side), tolerance=0.05)
    assert len(fitted) == 3
    assert np.allclose(list(fitted.values()), 1, rtol=0.05)
    after = state(side, model)
    changed = {n for n, value in after.items() if not np.array_equal(value, before[n])}
    assert len(changed) == 3
    assert all(n.endswith(("weight", "kernel")) for n in changed)
    if is_torch(side):
        assert [m.training for m in model] == [True, False] + 6 * [True]
        assert side._torch.equal(random, side._torch.get_rng_state())
    else:
        assert [getattr(layer, "activation", None) for layer in model.layers] == activations


def test_orthogonal_kernels_are_the_same_in_both_frameworks():
    import gradlab.keras
    import gradlab.torch

    kernels = []
    for side in (gradlab.torch, gradlab.keras):
        model = convolutional(side)
        fit(side, model, image(side), variance=1, tolerance=1e-3, seed=9)
        if is_torch(side):
            kernels.append(np.moveaxis(model[3].weight.detach().numpy(), (0, 1), (-1, -2)))
        else:
            kernels.append(model.layers[3].kernel.numpy())
    # Their scales differ a little: ε of batch normalisation is not the same by default.
    one, other = (kernel / np.linalg.norm(kernel) for kernel in kernels)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({"variance": 0}, X, "variance must be a finite number > 0, got 0"),
        ({"tolerance": -1.0}, X, "tolerance must be a finite number > 0, got -1.0"),
        ({"iterations": 0}, X, "iterations must be at least 1, got 0"),
        ({}, 0 * X, "output of 'hidden0' has variance 0.0"),
        ({}, np.inf * np.abs(X), "output of 'hidden0' has variance nan"),
    ],
)
def test_what_cannot_be_fitted_is_named_and_changes_nothing(side, options, x, message):
    model = side.MLP(SPEC, 1)
    before = side.models.get_weights(model)
    with pytest.raises(ValueError, match=message):
        fit(side, model, x, **options)
    for name, value in side.models.get_weights(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_model_without_layers_to_fit_is_refused(side):
    if is_torch(side):
        model = side._torch.nn.Sequential(side._torch.nn.ReLU())
    else:
        model = side.keras.Sequential([side.keras.Input((6,)), side.keras.layers.ReLU()])
    with pytest.raises(ValueError, match=r"nothing to fit: this batch met no .* of the Sequential"):
        fit(side, model)
