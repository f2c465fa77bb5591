"""The network's plan and its initial weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradlab import theory
from gradlab.mlp import (
    MLPSpec,
    check_weights,
    initial_weights,
    layer_names,
    orthogonal,
    stacked_weights,
)

SPEC = MLPSpec(8, 3, width=5, depth=2)


def test_layers_and_their_sizes():
    assert layer_names(SPEC) == ["hidden0", "hidden1", "output"]
    assert SPEC.sizes == [(8, 5), (5, 5), (5, 3)]
    assert replace(SPEC, depth=0).sizes == [(8, 3)]


def test_skips_only_where_the_widths_agree():
    spec = replace(SPEC, skip=0.5)
    assert [spec.has_skip(layer) for layer in range(2)] == [False, True]
    assert not SPEC.has_skip(1)


@pytest.mark.parametrize(
    ("bias", "normalization", "parts"),
    [
        (True, None, {"weight", "bias"}),
        (False, None, {"weight"}),
        (True, "batch", {"weight", "bias", "scale", "shift"}),
        (False, "layer", {"weight", "scale", "shift"}),
    ],
)
def test_names_and_shapes_of_the_weights(bias, normalization, parts):
    weights = initial_weights(replace(SPEC, bias=bias, normalization=normalization))
    for layer, (fan_in, fan_out) in zip(layer_names(SPEC), SPEC.sizes, strict=True):
        expected = parts - ({"scale", "shift"} if layer == "output" else set())
        assert {n.split(".")[1] for n in weights if n.startswith(layer)} == expected
        assert weights[f"{layer}.weight"].shape == (fan_in, fan_out)
        for part in expected - {"weight"}:
            assert weights[f"{layer}.{part}"].shape == (fan_out,)
            assert (weights[f"{layer}.{part}"] == (1 if part == "scale" else 0)).all()
    assert {w.dtype for w in weights.values()} == {np.dtype(float)}


@pytest.mark.parametrize("activation", theory.activation_names())
def test_the_gain_is_the_activations_critical_one_unless_given(activation):
    spec = MLPSpec(300, 10, width=300, depth=1, activation=activation)
    critical = initial_weights(spec, 1)["hidden0.weight"].std() * np.sqrt(300)
    assert critical == pytest.approx(theory.critical_gain(activation), rel=0.02)
    given = initial_weights(replace(spec, gain=2.5), 1)["hidden0.weight"].std() * np.sqrt(300)
    assert given == pytest.approx(2.5, rel=0.02)


def test_fan_in_and_not_fan_out_scales_the_weights():
    spec = MLPSpec(900, 400, width=100, depth=1, gain=1.5, output_gain=0.3)
    weights = initial_weights(spec)
    assert weights["hidden0.weight"].std() * np.sqrt(900) == pytest.approx(1.5, rel=0.02)
    assert weights["output.weight"].std() * np.sqrt(100) == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("features", [3, 6, 9])
def test_orthogonal_weights_stretch_every_direction_alike(features):
    spec = MLPSpec(features, 2, width=6, depth=1, gain=1.7, initialization="orthogonal")
    values = np.linalg.svd(initial_weights(spec, 4)["hidden0.weight"], compute_uv=False)
    np.testing.assert_allclose(values, 1.7, rtol=1e-12)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_an_orthogonal_matrix_has_singular_values_of_one(shape):
    matrix = orthogonal(*shape, seed=3)
    assert matrix.shape == shape
    np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False), 1, rtol=1e-12)
    assert (matrix != orthogonal(*shape, seed=4)).all()


def test_zero_weights_are_zero():
    weights = initial_weights(replace(SPEC, initialization="zeros"))
    assert not any(w.any() for w in weights.values())


@pytest.mark.parametrize("initialization", ["normal", "orthogonal"])
def test_the_seed_fixes_the_weights(initialization):
    spec = replace(SPEC, initialization=initialization)
    one, same, other = (initial_weights(spec, seed) for seed in (7, np.random.default_rng(7), 8))
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
    assert (one["hidden1.weight"] != other["hidden1.weight"]).all()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"features": 0}, "features must be an integer of at least 1, got 0"),
        ({"classes": 2.0}, "classes .* got 2.0"),
        ({"width": -1}, "width .* got -1"),
        ({"depth": -1}, "depth must be an integer of at least 0, got -1"),
        ({"activation": "rleu"}, r"activation must be one of .*'relu'.* got 'rleu'"),
        ({"gain": -1.0}, "gain must be a number ≥ 0 or None, got -1.0"),
        ({"gain": np.nan}, "gain .* got nan"),
        ({"normalization": "power"}, r"normalization .*'batch', 'layer', 'group'.* got 'power'"),
        ({"groups": 0}, "groups must be an integer of at least 1, got 0"),
        ({"normalization": "group"}, "groups must divide the width, got 4 groups of 5 units"),
        ({"initialization": "he"}, r"initialization .*'orthogonal'.* got 'he'"),
    ],
)
def test_a_plan_names_its_bad_field(field, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **field)


def test_a_function_is_no_activation_of_a_network_that_frameworks_share():
    with pytest.raises(ValueError, match="activation must be one of"):
        replace(SPEC, activation=np.tanh)


def test_weights_that_do_not_fit_are_all_named():
    with pytest.raises(ValueError, match=r"missing a.*unexpected c.*b has shape \(2,\).*\(3,\)"):
        check_weights({"b": np.zeros(2), "c": np.zeros(1)}, {"a": (1,), "b": (3,)})
    check_weights({"b": np.zeros(3)}, {"b": (3,)})


def test_stacked_weights_are_those_of_the_single_networks():
    spec = replace(SPEC, bias=False)
    stack = stacked_weights(spec, [5, 2])
    assert [w.shape for w in stack] == [(2, 8, 5), (2, 5, 5), (2, 5, 3)]
    assert {w.dtype for w in stack} == {np.dtype("float32")}
    for member, seed in enumerate([5, 2]):
        single = initial_weights(spec, seed)
        for layer, name in zip(stack, layer_names(spec), strict=True):
            np.testing.assert_array_equal(layer[member], single[f"{name}.weight"].astype("float32"))


@pytest.mark.parametrize("more", [{"bias": True}, {"bias": False, "normalization": "layer"}])
def test_only_matrices_can_be_stacked(more):
    with pytest.raises(ValueError, match=r"bias=False and normalization=None, got bias="):
        stacked_weights(replace(SPEC, **more), [0])
