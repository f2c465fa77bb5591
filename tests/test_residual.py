"""Residual networks: both frameworks against NumPy, and the predicted growth against a wide one."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest

from gradlab.residual import (
    ResidualSpec,
    alike,
    check_alike,
    cosines,
    initial_weights,
    predicted_growth,
    stacked_weights,
    stretched,
    variants,
)

EPSILON = 1e-5
SIDES = {"torch": "torch", "keras": "tensorflow"}
NAMES = list(variants(4))


@pytest.fixture(params=SIDES)
def side(request):
    pytest.importorskip(SIDES[request.param])
    return importlib.import_module(f"gradlab.{request.param}.residual")


def normalize(z, axis):
    return (z - z.mean(axis, keepdims=True)) / np.sqrt(z.var(axis, keepdims=True) + EPSILON)


def logits_of(spec, w, x, bump=None):
    """The network in NumPy; bump = (block, array) is added to that h."""
    h = x @ w["stem"]
    for block in range(spec.blocks + 1):
        if bump is not None and bump[0] == block:
            h = h + bump[1]
        z = normalize(h, 1) if spec.normalization == "layer" else h
        if block == spec.blocks:
            break
        for matrix in w["blocks"][block]:
            z = np.maximum(z, 0) @ matrix
            z = normalize(z, 0) if spec.normalization == "batch" else z
        h = spec.skip * h + spec.scale * w["factor"][block] * z
    return np.maximum(z, 0) @ w["readout"]


def loss_of(logits, y):
    top = logits.max(1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    return -log_p[np.arange(len(y)), y].mean()


def task(n=12, features=5, classes=3, seed=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, features)), rng.integers(classes, size=n)


def forward(side, specs, weights, x):
    given = np.broadcast_to(x, (len(specs), *x.shape))
    if side.__name__ == "gradlab.torch.residual":
        import torch

        weights = {name: torch.tensor(array) for name, array in weights.items()}
        return side.network(specs)(weights, torch.tensor(given)).numpy()
    import tensorflow as tf

    weights = {name: tf.constant(array) for name, array in weights.items()}
    return side.network(specs)(weights, tf.constant(given)).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_numpy_s(side, name):
    spec = replace(
        variants(4, features=5, classes=3, width=6)[name], skip=0.7 * ("plain" not in name)
    )
    x, _ = task()
    weights = stacked_weights([spec] * 2, (0, 1), "float64")
    weights["factor"] += 0.3  # zero starts would hide the branches
    weights["blocks"] += 0.1 * np.random.default_rng(0).normal(size=weights["blocks"].shape)
    got = forward(side, [spec] * 2, weights, x)
    for member in range(2):
        own = {key: array[member] for key, array in weights.items()}
        np.testing.assert_allclose(got[member], logits_of(spec, own, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["skip, scaled", "skip, batch norm", "skip, layer norm", "Fixup"])
def test_gradient_norms_equal_finite_differences(side, name):
    spec = variants(4, features=5, classes=3, width=6)[name]
    x, y = task()
    weights = stacked_weights([spec], [7], "float64")
    weights["blocks"] += 0.1 * np.random.default_rng(0).normal(size=weights["blocks"].shape)
    got = side.gradient_norms([spec], weights, x, y)
    assert got.shape == (1, spec.blocks + 1)
    own = {key: array[0] for key, array in weights.items()}
    for block in range(spec.blocks + 1):
        slopes = []
        for place in np.ndindex(len(x), 6):
            step = np.zeros((len(x), 6))
            step[place] = 1e-6
            up, down = (loss_of(logits_of(spec, own, x, (block, d)), y) for d in (step, -step))
            slopes.append((up - down) / 2e-6)
        np.testing.assert_allclose(got[0, block], np.linalg.norm(slopes), rtol=1e-5)


def test_members_of_one_stack_do_not_meet(side):
    every = variants(4, features=5, classes=3, width=6)
    x, y = task()
    for names in alike(every):
        specs = [every[name] for name in names]
        together = side.gradient_norms(specs, stacked_weights(specs, [1] * len(specs)), x, y)
        for number, spec in enumerate(specs):
            alone = side.gradient_norms([spec], stacked_weights([spec], [1]), x, y)
            np.testing.assert_allclose(together[number], alone[0], rtol=1e-4)


def test_only_a_learnt_factor_is_trained(side):
    name = side.__name__.replace("residual", "sweep")
    fit = importlib.import_module(name).fit
    specs = [ResidualSpec(5, 3, 6, 4), ResidualSpec(5, 3, 6, 4, factor=0.0)]
    x, y = task()
    run = fit(side.network(specs), stacked_weights(specs, (0, 1)), x, y, lr=0.05, steps=3)
    assert (run.weights["factor"][0] == 1).all()
    assert (run.weights["factor"][1] != 0).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "plain, He"])
def test_prediction_holds_in_a_wide_network(name):
    side = pytest.importorskip("torch") and importlib.import_module("gradlab.torch.residual")
    spec = variants(12, width=300)[name]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 64)), rng.integers(10, size=100)
    weights = stacked_weights([spec] * 2, (0, 1), "float64")
    norms = side.gradient_norms([spec] * 2, weights, x, y)
    growth = np.sqrt(np.mean((norms[:, 0] / norms[:, -1]) ** 2))
    assert growth == pytest.approx(predicted_growth(spec, batch=100), rel=0.15)


def test_prediction_s_closed_forms():
    def growth(**settings):
        return predicted_growth(ResidualSpec(64, 10, depth=50, **settings))

    assert growth() == pytest.approx(2**25)
    assert growth(scale=50**-0.5) == pytest.approx(1.02**25)
    assert growth(skip=0.0, gain=1.0) == pytest.approx(2**-25)
    assert growth(normalization="layer") == pytest.approx(51**0.5)  # telescopes: (q₀ + n)/q₀
    assert growth(matrices=2) == pytest.approx(2**12.5)
    rotation = {"skip": 0.0, "initialization": "looks_linear"}
    assert growth(**rotation) == 1
    assert growth(scale=0.5, **rotation) == pytest.approx(2**-50)
    plain = growth(skip=0.0, normalization="batch")
    assert plain == pytest.approx((np.pi / (np.pi - 1)) ** 25, rel=1e-9)


def test_stretching_multiplies_lengths_and_leaves_cosines():
    spec, (x, _) = ResidualSpec(5, 3, 6, 4), task()
    w = initial_weights(spec, 2)
    w["readout"] = np.random.default_rng(0).normal(size=(6, 3))
    longer = logits_of(stretched(spec, 1.5), w, x) / logits_of(spec, w, x)
    np.testing.assert_allclose(longer, 1.5**4)
    members, h = [spec, stretched(spec, 1.5)], x @ w["stem"]
    for matrices in w["blocks"]:
        h = h + np.maximum(h, 0) @ matrices[0]
    h = h / np.linalg.norm(h, axis=1, keepdims=True)
    pairs = [h[i] @ h[j] for i in range(len(x)) for j in range(i + 1, len(x))]
    got = cosines(members, stacked_weights(members, (2, 2), "float64"), x)
    np.testing.assert_allclose(got, [pairs, pairs])


def test_groups_are_alike_and_no_larger_than_asked_for():
    specs = variants(6)
    assert list(map(len, alike(specs))) == [6, 3, 1, 1]
    limited = alike(specs, most=4)
    assert list(map(len, limited)) == [4, 2, 3, 1, 1]
    assert sorted(name for group in limited for name in group) == sorted(specs)
    for group in limited:
        check_alike([specs[name] for name in group])
    with pytest.raises(ValueError, match="at least 1"):
        alike(specs, most=0)


def test_looks_linear_computes_a_rotation():
    spec = variants(20, width=8)["plain, looks linear"]
    w = initial_weights(spec, 5)
    h = start = np.random.default_rng(0).normal(size=(6, 64)) @ w["stem"]
    for matrices in w["blocks"]:
        h = np.maximum(h, 0) @ matrices[0]
    np.testing.assert_allclose(h @ h.T, start @ start.T, rtol=1e-9)


def test_fixup_starts_at_the_identity():
    spec = ResidualSpec(64, 10, width=40, depth=50, matrices=2, initialization="fixup")
    blocks = initial_weights(spec)["blocks"]
    assert blocks.shape == (25, 2, 40, 40)
    assert (blocks[:, 1] == 0).all()
    assert blocks[:, 0].std() == pytest.approx((2 / 40 / 25) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width"),
        ({"normalization": "group"}, "normalization"),
        ({"matrices": 3}, "matrices"),
        ({"matrices": 2, "depth": 5}, "divide depth"),
        ({"initialization": "fixup"}, "matrices=2"),
        ({"initialization": "looks_linear"}, "without skips"),
        ({"initialization": "looks_linear", "skip": 0.0, "width": 5}, "even width"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        ResidualSpec(64, 10, **settings)


def test_a_stack_needs_equal_shapes():
    with pytest.raises(ValueError, match="same depth"):
        stacked_weights([ResidualSpec(5, 3, depth=2), ResidualSpec(5, 3, depth=4)], (0, 1))
    with pytest.raises(ValueError, match="1 specifications need as many seeds, got 2"):
        stacked_weights([ResidualSpec(5, 3)], (0, 1))


def test_no_prediction_where_there_is_no_formula():
    with pytest.raises(ValueError, match="two matrices"):
        predicted_growth(ResidualSpec(5, 3, matrices=2, normalization="layer"))
    with pytest.raises(ValueError, match="batch norm"):
        predicted_growth(
            ResidualSpec(
                5, 3, skip=0.0, width=4, normalization="batch", initialization="looks_linear"
            )
        )
