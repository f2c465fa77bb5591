"""Predictions against closed forms, adaptive quadrature, simulation and iterated optimisers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy import integrate, special, stats

from gradlab import theory
from gradlab.mlp import MLPSpec, initial_weights

NAMES = theory.activation_names()


def relu(x):
    return np.maximum(x, 0)


# -- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_the_functions_slope(name):
    phi = theory.activation(name)
    x = np.concatenate([np.linspace(-8, -0.01, 200), np.linspace(0.01, 8, 200)])
    h = 1e-5
    np.testing.assert_allclose(
        phi.df(x), (phi.f(x + h) - phi.f(x - h)) / (2 * h), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_activation_overflows(name):
    phi = theory.activation(name)
    x = np.array([-1e4, 0.0, 1e4])
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(phi.f(x)).all()
        assert np.isfinite(phi.df(x)).all()


@pytest.mark.parametrize(("which", "error"), [("rleu", ValueError), (3.0, TypeError)])
def test_unknown_activation_is_named(which, error):
    with pytest.raises(error, match=str(which)):
        theory.activation(which)


def test_unknown_activation_lists_the_known():
    with pytest.raises(ValueError, match=r"leaky_relu.*relu.*tanh"):
        theory.activation("rleu")


# -- expectations --------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.01, 1.0, 9.0])
@pytest.mark.parametrize("name", NAMES)
def test_expectations_equal_adaptive_quadrature(name, q):
    phi = theory.activation(name)
    for f in (phi.f, phi.df):

        def integrand(z, f=f):
            return f(np.sqrt(q) * z) ** 2 * stats.norm.pdf(z)

        expected = sum(
            integrate.quad(integrand, *half, epsabs=1e-13)[0] for half in ((-12, 0), (0, 12))
        )
        assert theory.gaussian_mean(lambda x, f=f: f(x) ** 2, q) == pytest.approx(
            expected, rel=1e-9
        )


@pytest.mark.parametrize(("power", "moment"), [(0, 1), (1, 0), (2, 1), (4, 3), (6, 15)])
def test_moments_of_the_normal_distribution(power, moment):
    assert theory.gaussian_mean(lambda z: z**power) == pytest.approx(moment, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("q", [-1.0, np.nan, np.inf])
def test_variance_out_of_range(q):
    with pytest.raises(ValueError, match=r"finite and ≥ 0"):
        theory.gaussian_mean(np.tanh, q)


# -- growth, in closed form ----------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, np.sqrt(2), 3.0])
@pytest.mark.parametrize("q", [None, 1e-6, 1.0, 1e6])
def test_piecewise_linear_growth_is_the_same_at_every_variance(sigma, q):
    for phi, expected in (
        ("linear", sigma**2),
        ("relu", sigma**2 / 2),
        (theory.leaky_relu(0.2), sigma**2 * (1 + 0.2**2) / 2),
        (relu, sigma**2 / 2),  # an arbitrary function with a kink
    ):
        assert theory.chi(phi, sigma, q=q) == pytest.approx(expected, rel=1e-9)
        assert theory.growth_factor(phi, sigma, q=q) == pytest.approx(np.sqrt(expected), rel=1e-9)


@pytest.mark.parametrize("q", [0.1, 1.0, 25.0])
def test_any_function_with_a_smooth_closed_form(q):
    """E[erf²] and E[erf'²] are known (Williams 1997)."""
    assert theory.variance_map(q, special.erf, 1.5, 0.3) == pytest.approx(
        1.5**2 * 2 / np.pi * np.arcsin(2 * q / (1 + 2 * q)) + 0.3**2, rel=1e-9
    )
    assert theory.chi(special.erf, 1.5, q=q) == pytest.approx(
        1.5**2 * 4 / np.pi / np.sqrt(1 + 4 * q), rel=1e-8
    )


@pytest.mark.parametrize(
    ("which", "gain"),
    [
        ("linear", 1),
        ("relu", np.sqrt(2)),
        (theory.leaky_relu(0.2), np.sqrt(2 / 1.04)),
        ("tanh", 1),
        ("sigmoid", 4),
        ("softplus", 2),
        ("gelu", 2),
        ("silu", 2),
        ("elu", 1),
        ("selu", np.sqrt(2) / 1.0507009873554805 / np.sqrt(1 + 1.6732632423543772**2)),
        (np.tanh, 1),
        (relu, np.sqrt(2)),
        (special.expit, 4),
    ],
)
def test_critical_gain(which, gain):
    assert theory.critical_gain(which) == pytest.approx(gain, rel=1e-5)


def test_tanh_turns_from_order_to_chaos_at_its_critical_gain():
    assert theory.chi("tanh", 0.9) < 1 < theory.chi("tanh", 1.5)


# -- fixed points --------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_b", [0.0, 0.4])
@pytest.mark.parametrize("sigma_w", [1.3, 2.5])
@pytest.mark.parametrize("which", ["tanh", "sigmoid", special.erf])
def test_fixed_point_is_one_and_attracts(which, sigma_w, sigma_b):
    star = theory.fixed_point(which, sigma_w, sigma_b)
    assert star > 0
    assert theory.variance_map(star, which, sigma_w, sigma_b) == pytest.approx(star, rel=1e-9)
    q = 0.3 * star
    for _ in range(200):
        q = theory.variance_map(q, which, sigma_w, sigma_b)
    assert q == pytest.approx(star, rel=1e-6)


@pytest.mark.parametrize(
    ("which", "sigma_w", "sigma_b", "expected"),
    [
        ("linear", 0.8, 0.5, 0.5**2 / (1 - 0.8**2)),
        ("relu", 1.2, 0.5, 0.5**2 / (1 - 1.2**2 / 2)),
        ("selu", 1.0, 0.0, 1.0),  # what it was made for (Klambauer et al. 2017)
        ("relu", 1.0, 0.0, 0.0),
        ("linear", 0.99, 0.0, 0.0),
        ("relu", 1.5, 0.0, np.inf),
        ("linear", 1.01, 0.1, np.inf),
    ],
)
def test_fixed_point_in_closed_form(which, sigma_w, sigma_b, expected):
    assert theory.fixed_point(which, sigma_w, sigma_b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("gain", [0.9, 1.0])
def test_a_tanh_network_up_to_its_critical_gain_forgets_its_input(gain):
    assert theory.fixed_point("tanh", gain) < 1e-9


@pytest.mark.parametrize("q0", [1e-3, 1.0, 7.0])
def test_a_critical_relu_network_keeps_the_variance_it_is_given(q0):
    assert theory.fixed_point("relu", np.sqrt(2), q0=q0) == pytest.approx(q0)


@pytest.mark.parametrize("bad", [{"sigma_w": 0}, {"sigma_w": 1, "sigma_b": -1}, {"q0": 0}])
def test_fixed_point_names_bad_arguments(bad):
    with pytest.raises(ValueError, match="sigma_w > 0, sigma_b ≥ 0 and q0 > 0"):
        theory.fixed_point("tanh", **{"sigma_w": 1.0, **bad})


# -- simulation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sigma_w", "sigma_b"),
    [("relu", 1.3, 0.3), ("tanh", 1.5, 0.2), ("gelu", 1.3, 0.5), ("elu", 1.1, 0.3)],
)
def test_wide_random_networks_behave_as_predicted(name, sigma_w, sigma_b):
    """Mean over 6 networks of width 500 and 25 layers, each layer off by about 1/√500."""
    width, depth = 500, 25
    phi = theory.activation(name)
    q = theory.fixed_point(name, sigma_w, sigma_b)
    variances, growths = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        weights = rng.normal(0, sigma_w / np.sqrt(width), (depth, width, width))
        z, before = rng.normal(0, np.sqrt(q), width), []
        for w in weights:
            before.append(z)
            z = phi.f(z) @ w + rng.normal(0, sigma_b, width)
            variances.append(z.var())
        delta = rng.normal(size=width)
        for w, z in zip(weights[::-1], before[::-1], strict=True):
            new = (w @ delta) * phi.df(z)
            growths.append((new @ new) / (delta @ delta))
            delta = new
    assert np.mean(variances) == pytest.approx(q, rel=0.05)
    chi = theory.chi(name, sigma_w, sigma_b)
    assert np.exp(np.mean(np.log(growths))) == pytest.approx(chi, rel=0.03)


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.3])
def test_orthogonal_linear_networks_grow_by_exactly_gain_to_the_depth(gain):
    depth = 12
    spec = MLPSpec(
        32, 2, width=32, depth=depth, activation="linear", gain=gain, initialization="orthogonal"
    )
    weights = initial_weights(spec, seed=3)
    x = np.random.default_rng(0).normal(size=32)
    out = x
    for layer in range(depth):
        out = out @ weights[f"hidden{layer}.weight"]
    growth = np.linalg.norm(out) / np.linalg.norm(x)
    assert growth == pytest.approx(gain**depth, rel=1e-12)
    assert growth == pytest.approx(theory.growth_factor("linear", gain) ** depth, rel=1e-9)


# -- step size -----------------------------------------------------------------------------------


def run(method: str, lr: float, momentum: float, steps: int = 3000) -> float:
    """|w| after minimising w²/2 (curvature 1) from 1, in the frameworks' own formulation."""
    w, v = 1.0, 0.0
    for _ in range(steps):
        v = momentum * v + (w if method != "adam" else (1 - momentum) * w)
        w -= lr * (w + momentum * v if method == "nesterov" else v)
        if abs(w) > 1e6:
            break
    return abs(w)


@pytest.mark.parametrize(
    ("method", "momentum"),
    [("gradient descent", 0.0)]
    + [(m, beta) for m in ("momentum", "nesterov", "adam") for beta in (0.0, 0.3, 0.9)],
)
def test_stability_limit_is_where_iterating_diverges(method, momentum):
    limit = theory.stability_limit(method, momentum)
    assert run(method, 0.99 * limit, momentum) < 1e-3
    assert run(method, 1.01 * limit, momentum) > 1e3


def test_momentum_widens_the_limit_and_nesterov_narrows_it():
    assert theory.stability_limit("momentum", 0.9) == pytest.approx(3.8)
    assert theory.stability_limit("nesterov", 0.9) == pytest.approx(3.8 / 2.8)
    assert theory.stability_limit("adam", 0.9) == pytest.approx(38)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rprop",), "'nesterov' or 'adam', got 'rprop'"),
        (("momentum", 1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (("momentum", -0.1), "got -0.1"),
        (("gradient descent", 0.9), "no momentum, got 0.9"),
    ],
)
def test_stability_limit_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        theory.stability_limit(*arguments)


# -- normalisation -------------------------------------------------------------------------------


def test_growth_under_batch_normalization_has_its_closed_forms():
    growth = theory.normalization_growth
    assert growth("batch", "relu") == pytest.approx(np.sqrt(np.pi / (np.pi - 1)), rel=1e-9)
    assert growth("batch", "relu", 10**7) == pytest.approx(growth("batch", "relu"), rel=1e-6)
    for size in (4, 8, 100):  # Yang et al. 2019: (B − 2)/(B − 3), the smallest that there is
        assert growth("batch", "linear", size) == pytest.approx(np.sqrt((size - 2) / (size - 3)))
        for slope in (0, 0.1, 0.5):
            assert growth("batch", theory.leaky_relu(slope), size) > growth("batch", "linear", size)


def test_growth_under_layer_and_group_normalization_has_its_closed_forms():
    growth = theory.normalization_growth
    assert growth("layer", "relu") == pytest.approx(1)
    assert growth("group", "linear") == pytest.approx(1)
    assert growth("group", "relu", 8) == pytest.approx(np.sqrt(6 / 5))
    assert growth("group", "relu", 3) == np.inf


@pytest.mark.parametrize("name", theory.activation_names())
def test_no_activation_shrinks_the_gradient_under_batch_normalization(name):
    assert theory.normalization_growth("batch", name) >= 1 - 1e-9  # Poincaré's inequality


@pytest.mark.parametrize(
    ("kind", "which", "size"),
    [
        ("batch", "relu", 16),
        ("batch", "leaky_relu", 64),
        ("layer", "tanh", None),
        ("group", "relu", 8),
    ],
)
def test_growth_under_normalization_is_what_networks_show(kind, which, size):
    phi, rng = theory.activation(which), np.random.default_rng(0)
    members, batch, width, depth = 10, (size if kind == "batch" else 8), 128, 30
    h, layers = rng.normal(size=(members, batch, width)), []
    for _ in range(depth):
        w = rng.normal(size=(members, width, width)) / np.sqrt(width)
        z = h @ w
        axis, shape = (1, z.shape) if kind == "batch" else (-1, (members, batch, -1, size or width))
        z = z.reshape(shape)
        std = z.std(axis, keepdims=True)
        u = (z - z.mean(axis, keepdims=True)) / std
        h = phi.f(u).reshape(h.shape)
        layers.append((w, u, std, axis))
    message, norms = rng.normal(size=h.shape), []
    for w, u, std, axis in reversed(layers):  # the derivative of a normalisation, by hand
        g = message.reshape(u.shape) * phi.df(u)
        mean = partial(np.mean, axis=axis, keepdims=True)
        delta = ((g - mean(g) - u * mean(g * u)) / std).reshape(h.shape)
        norms.append(np.linalg.norm(delta, axis=(1, 2)))
        message = delta @ np.swapaxes(w, 1, 2)
    measured = np.exp(np.polyfit(np.arange(depth - 5), np.log(norms[5:]), 1)[0]).mean()
    expected = theory.normalization_growth(kind, which, size)
    assert measured == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("instance", "relu"), "kind must be 'layer', 'group' or 'batch', got 'instance'"),
        (("batch", "tanh", 8), "two straight pieces, got 'tanh', size=8"),
    ],
)
def test_growth_under_normalization_names_what_it_cannot_predict(arguments, message):
    with pytest.raises(ValueError, match=message):
        theory.normalization_growth(*arguments)
