"""Recurrent networks: NumPy, both frameworks' stacked networks and their own layers agree."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import gradlab.keras.recurrent as kr
import gradlab.torch.recurrent as tr
from gradlab import recurrent

MEMBERS, BATCH, STEPS, INPUTS, WIDTH, OUTPUTS = 2, 3, 7, 4, 5, 3
CELLS = tuple(recurrent.CELLS)


def weights(cell, **settings):
    settings = {"dtype": "float64", "scale": 1.3} | settings
    made = recurrent.initial_weights(cell, INPUTS, WIDTH, OUTPUTS, range(MEMBERS), **settings)
    rng = np.random.default_rng(3)
    for name in ("bias", "readout_bias"):
        made[name] = made[name] + 0.3 * rng.normal(size=made[name].shape)
    return made


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(MEMBERS, BATCH, STEPS, INPUTS))


def tensors(arrays):
    return {name: torch.tensor(a, requires_grad=True) for name, a in arrays.items()}


def constants(arrays):
    return {name: tf.constant(a) for name, a in arrays.items()}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("truncate", [None, 1, 3, 50])
def test_both_frameworks_give_the_same_outputs_and_gradients(cell, truncate, x):
    arrays = weights(cell)
    w = tensors(arrays)
    out = tr.network(cell, truncate=truncate)(w, torch.tensor(x))
    assert out.shape == (MEMBERS, BATCH, OUTPUTS)
    of_torch = torch.autograd.grad(out.square().sum(), list(w.values()))
    v = constants(arrays)
    with tf.GradientTape() as tape:
        tape.watch(v)
        other = kr.network(cell, truncate=truncate)(v, tf.constant(x))
        loss = tf.reduce_sum(tf.square(other))
    of_tf = tape.gradient(loss, list(v.values()))
    np.testing.assert_allclose(other, out.detach(), rtol=1e-12, atol=1e-12)
    for a, b in zip(of_torch, of_tf, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("side", [tr, kr])
def test_members_do_not_mix(cell, side, x):
    stack, given = (tensors, torch.tensor(x)) if side is tr else (constants, tf.constant(x))

    def outputs(arrays):
        out = side.network(cell)(stack(arrays), given)
        return out.detach().numpy() if side is tr else out.numpy()

    arrays = weights(cell)
    both = outputs(arrays)
    arrays["recurrent"][0] = np.nan
    again = outputs(arrays)
    assert np.isnan(again[0]).all()
    np.testing.assert_array_equal(again[1], both[1])


def torch_layer(cell, arrays):
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(cell, torch.nn.RNN)
    extra = {"nonlinearity": cell} if kind is torch.nn.RNN else {}
    layer = kind(INPUTS, WIDTH, batch_first=True, dtype=torch.float64, **extra)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.tensor(arrays["input"][0].T))
        layer.weight_hh_l0.copy_(torch.tensor(arrays["recurrent"][0].T))
        layer.bias_ih_l0.copy_(torch.tensor(arrays["bias"][0]))
        layer.bias_hh_l0.zero_()
    return layer


def keras_layer(cell, arrays, dtype="float64"):
    def swapped(a):  # Keras's GRU has the update gate first
        parts = np.split(a, 3, -1)
        return np.concatenate([parts[1], parts[0], parts[2]], -1)

    common = {"dtype": dtype, "return_sequences": True}
    names = [arrays[n][0] for n in ("input", "recurrent", "bias")]
    if cell == "gru":
        layer = keras.layers.GRU(WIDTH, **common)
        into, u, b = map(swapped, names)
        names = [into, u, np.stack([b, np.zeros_like(b)])]
    elif cell == "lstm":
        layer = keras.layers.LSTM(WIDTH, unit_forget_bias=False, **common)
    else:
        layer = keras.layers.SimpleRNN(WIDTH, activation=cell, **common)
    layer.build((None, STEPS, INPUTS))
    layer.set_weights(names)
    return layer


@pytest.mark.parametrize("cell", ["relu", "tanh", "lstm", "gru"])
def test_the_frameworks_own_layers_agree(cell, x):
    arrays = weights(cell)
    ours = torch.stack(tr.states(cell, tensors(arrays), torch.tensor(x)))[:, 0].detach().numpy()
    theirs = torch_layer(cell, arrays)(torch.tensor(x[0]))[0].detach().numpy()
    np.testing.assert_allclose(ours[..., :WIDTH], theirs.swapaxes(0, 1), rtol=1e-12, atol=1e-13)
    ours = kr.states(cell, constants(arrays), tf.constant(x)).numpy()[:, 0]
    theirs = keras_layer(cell, arrays)(x[0]).numpy()
    np.testing.assert_allclose(ours[..., :WIDTH], theirs.swapaxes(0, 1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cell", ["linear", "relu", "tanh"])
def test_backward_through_time_is_the_frameworks_gradient(cell, x):
    arrays = weights(cell)
    error = np.random.default_rng(2).normal(size=(MEMBERS, BATCH, WIDTH))
    gradients, norms = recurrent.backward_through_time(arrays, x, error, cell)
    w = tensors(arrays)
    last = tr.states(cell, w, torch.tensor(x))[-1]
    names = ("input", "recurrent", "bias")
    expected = torch.autograd.grad((last * torch.tensor(error)).sum(), [w[n] for n in names])
    for name, gradient in zip(names, expected, strict=True):
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-10, atol=1e-12)
    for side in (tr, kr):
        np.testing.assert_allclose(
            side.error_norms(cell, arrays, x, error), norms, rtol=1e-10, err_msg=side.__name__
        )


@pytest.mark.parametrize("cell", ["tanh", "relu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_backward_through_time_is_the_gradient_of_the_frameworks_own_layers(
    cell, dtype, tolerance, x
):
    """To `tolerance` of each gradient's length; ours is in float64 throughout."""
    arrays = weights(cell)
    error = np.random.default_rng(2).normal(size=(MEMBERS, BATCH, WIDTH))
    gradients, _ = recurrent.backward_through_time(arrays, x, error, cell)
    layer = torch_layer(cell, arrays).to(getattr(torch, dtype))
    last = layer(torch.tensor(x[0].astype(dtype)))[0][:, -1]
    (last * torch.tensor(error[0].astype(dtype))).sum().backward()
    of_torch = (layer.weight_ih_l0.grad.T, layer.weight_hh_l0.grad.T, layer.bias_ih_l0.grad)
    layer = keras_layer(cell, arrays, dtype)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x[0].astype(dtype))[:, -1] * error[0].astype(dtype))
    of_keras = tape.gradient(loss, layer.trainable_variables)
    for own in (of_torch, of_keras):
        for name, theirs in zip(("input", "recurrent", "bias"), own, strict=True):
            ours = gradients[name][0]
            assert np.linalg.norm(theirs.numpy() - ours) < tolerance * np.linalg.norm(ours)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_error_norms_of_gated_cells_agree_and_end_with_the_error(cell, x):
    arrays = weights(cell)
    error = np.random.default_rng(2).normal(size=(MEMBERS, BATCH, WIDTH))
    one, other = (side.error_norms(cell, arrays, x, error) for side in (tr, kr))
    assert one.shape == (STEPS, MEMBERS)
    np.testing.assert_allclose(one, other, rtol=1e-10)
    np.testing.assert_allclose(one[-1], np.linalg.norm(error, axis=(1, 2)), rtol=1e-12)


@pytest.mark.parametrize("side", [tr, kr])
def test_truncation_keeps_the_outputs_and_cuts_the_gradient_of_early_inputs(side, x):
    arrays = weights("tanh")
    if side is tr:
        xs = torch.tensor(x, requires_grad=True)
        full, cut = (side.network("tanh", truncate=k)(tensors(arrays), xs) for k in (None, 2))
        gradient = torch.autograd.grad(cut.sum(), xs)[0].numpy()
        full, cut = full.detach(), cut.detach()
    else:
        xs = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(xs)
            cut = side.network("tanh", truncate=2)(constants(arrays), xs)
        full, gradient = side.network("tanh")(constants(arrays), xs), tape.gradient(cut, xs).numpy()
    np.testing.assert_allclose(full, cut, rtol=1e-12)
    assert (gradient[:, :, :-2] == 0).all()
    assert (gradient[:, :, -2:] != 0).all()


def test_matrices_have_the_promised_eigenvalues():
    for kind in ("orthogonal", "identity", "triangular"):
        stack = recurrent.matrices(kind, 20, range(3), 0.9)
        np.testing.assert_allclose(recurrent.spectral_radius(stack), 0.9, rtol=1e-9)
    orthogonal = recurrent.matrices("orthogonal", 20, range(3), 0.9)
    np.testing.assert_allclose(np.linalg.svd(orthogonal)[1], 0.9, rtol=1e-12)
    assert not np.allclose(orthogonal[0], orthogonal[1])
    far = recurrent.matrices("triangular", 64, range(3), 0.9)
    assert (np.linalg.norm(far, 2, axis=(1, 2)) > 3).all()  # its powers grow first
    gaussian = recurrent.matrices("gaussian", 400, [0], 0.9)
    np.testing.assert_allclose(recurrent.spectral_radius(gaussian), 0.9, rtol=0.1)
    np.testing.assert_allclose(np.linalg.norm(gaussian[0], 2), 1.8, rtol=0.1)


def test_a_linear_orthogonal_network_grows_by_its_scale(x):
    arrays = weights("linear", scale=1.2)
    norms = tr.error_norms("linear", arrays, x, np.ones((MEMBERS, BATCH, WIDTH)))
    np.testing.assert_allclose(norms[:-1] / norms[1:], 1.2, rtol=1e-12)


def test_growth_per_step_of_a_wide_network():
    rng = np.random.default_rng(5)
    arrays = recurrent.initial_weights("tanh", 16, 256, 1, [0], scale=2.0, dtype="float64")
    x, error = rng.normal(size=(1, 8, 80, 16)), rng.normal(size=(1, 8, 256))
    norms = tr.error_norms("tanh", arrays, x, error)[:, 0]
    rate = (norms[20] / norms[70]) ** (1 / 50)
    assert rate == pytest.approx(recurrent.growth_per_step("tanh", 2.0, 1.0), rel=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recurrent.matrices("sparse", 3, [0]), "kind must be"),
        (lambda: recurrent.initial_weights("elman", 1, 2, 3, [0]), "cell must be"),
        (lambda: recurrent.initial_weights("gru", 1, 2, 3, [0], forget_bias=1.0), "forget gate"),
        (lambda: tr.network("elman"), "cell must be"),
        (lambda: kr.network("elman"), "cell must be"),
        (lambda: tr.error_norms("elman", {}, None, None), "cell must be"),
        (lambda: kr.error_norms("elman", {}, None, None), "cell must be"),
        (lambda: tr.states("elman", {}, None), "cell must be"),
        (lambda: kr.states("elman", {}, None), "cell must be"),
        (lambda: tr.network("tanh", truncate=0), "at least 1"),
        (lambda: kr.network("tanh", truncate=0), "at least 1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
