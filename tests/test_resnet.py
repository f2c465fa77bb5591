"""The bottleneck ResNet: its plan, parity of the two frameworks, running statistics, full size."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest

from gradlab import resnet
from gradlab.resnet import ResNetSpec

TINY = ResNetSpec(width=4, blocks=(2, 1))
LARGE = ResNetSpec(channels=3, width=2, blocks=(1, 1), stem="large")
SPECS = {
    "residual": TINY,
    "plain": replace(TINY, skip=False),
    "leaky": replace(TINY, slope=0.1),
    "zero scale": replace(TINY, zero_scale=True),
    "bare": replace(TINY, normalization=None),
    "large stem": replace(LARGE, slope=0.1),
}


def batch(spec, samples=16, side=8):
    rng = np.random.default_rng(3)
    side = 32 if spec.stem == "large" else side
    x = rng.normal(size=(samples, side, side, spec.channels)).astype(np.float32)
    return x, rng.integers(spec.classes, size=samples)


def trained(spec, seed=1):
    """Weights none of which is a special value, as they are after some training."""
    rng = np.random.default_rng(seed)
    return {
        name: (w + 0.1 * rng.normal(size=w.shape)).astype(np.float32)
        for name, w in resnet.initial_weights(spec).items()
    }


def module(side):
    return importlib.import_module(f"{side.__name__}.resnet")


def built(side, spec):
    return module(side).ResNet(spec)


def logits(side, net, x, training):
    if side.__name__.endswith("torch"):
        return net.train(training)(side._torch.tensor(x)).detach().numpy()
    return net(x, training=training).numpy()


# ---------------------------------------------------------------------------------------------
# The plan


def test_it_is_resnet_50():
    full = ResNetSpec.full()
    assert resnet.depth(full) == resnet.depth(ResNetSpec()) == 50
    assert resnet.parameters(full) == 25_557_032  # as published for 1000 classes and 3 channels
    assert len(resnet.convolutions(full)) == 53
    beside = [block.project for block in resnet.blocks(full) if block.project]
    assert len(beside) == 4
    assert resnet.parameters(ResNetSpec.full(10, 1, blocks=(1, 1))) < 10**6


def test_without_skips_the_weighted_layers_are_fifty():
    weights = [n for n in resnet.shapes(ResNetSpec(skip=False)) if n.endswith(".weight")]
    assert len(weights) == 50


def test_parameters_are_counted_from_the_weights():
    for spec in SPECS.values():
        assert resnet.parameters(spec) == sum(w.size for w in resnet.initial_weights(spec).values())


def test_networks_share_the_draws_of_the_layers_they_share():
    weights = resnet.initial_weights(TINY, 4)
    for change in ({"skip": False}, {"zero_scale": True}, {"normalization": None}):
        for name, w in resnet.initial_weights(replace(TINY, **change), 4).items():
            if name.endswith(".weight"):
                np.testing.assert_array_equal(w, weights[name])
    other = resnet.initial_weights(TINY, 5)
    assert not np.allclose(weights["stem.weight"], other["stem.weight"])


def test_initial_weights_have_hes_variance():
    weights = resnet.initial_weights(ResNetSpec(slope=0.5))
    w = weights["stage3.block1.conv1.weight"]
    assert w.std() * np.sqrt(w[..., 0].size) == pytest.approx(np.sqrt(2 / 1.25), rel=0.02)
    zero = resnet.initial_weights(replace(TINY, zero_scale=True))
    scales = {n: w for n, w in zero.items() if n.endswith("scale")}
    assert {n for n, w in scales.items() if not w.any()} == {
        n for n in scales if n.endswith("conv2.scale")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be made of integers of at least 1, got 0"),
        ({"blocks": (3, 0)}, r"blocks must be .* got \(3, 0\)"),
        ({"blocks": ()}, r"blocks must be .* got \(\)"),
        ({"stem": "big"}, "stem must be one of .* got 'big'"),
        ({"normalization": "layer"}, "normalization must be one of .* got 'layer'"),
        ({"slope": 2}, "slope must be a number from 0 to 1, got 2"),
        ({"momentum": -1}, "momentum must be"),
        ({"epsilon": 0}, "epsilon must be a number > 0, got 0"),
        ({"zero_scale": True, "skip": False}, "zero_scale needs skip=True"),
    ],
)
def test_a_field_out_of_range_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_images_keep_every_pixel():
    x = np.arange(8.0).reshape(2, 4)
    assert resnet.images(x)[1, 1, 0, 0] == x[1, 2]
    big = resnet.images(x, enlarge=3, channels=2)
    assert big.shape == (2, 6, 6, 2)
    np.testing.assert_array_equal(big[:, ::3, ::3, 1], resnet.images(x)[..., 0])
    with pytest.raises(ValueError, match=r"expected \(samples, side²\), got shape \(2, 5\)"):
        resnet.images(np.zeros((2, 5)))


# ---------------------------------------------------------------------------------------------
# Both frameworks


@pytest.mark.parametrize("name", SPECS)
def test_both_frameworks_have_the_same_loss_and_gradients(name):
    import gradlab.keras.resnet
    import gradlab.torch.resnet

    spec = SPECS[name]
    x, y = batch(spec)
    sides = gradlab.torch.resnet, gradlab.keras.resnet
    nets = [side.ResNet(spec) for side in sides]
    for side, net in zip(sides, nets, strict=True):
        side.load_weights(net, trained(spec))
    (loss, grads), (other_loss, others) = (
        side.gradients(net, x, y) for side, net in zip(sides, nets, strict=True)
    )
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert list(grads) == list(others) == list(resnet.shapes(spec))
    square = sum(((grads[n] - others[n]) ** 2).sum() for n in grads)
    assert np.sqrt(square / sum((g**2).sum() for g in others.values())) < 1e-4
    here, there = (side.block_gradients(n, x, y) for side, n in zip(sides, nets, strict=True))
    assert here.shape == (len(resnet.blocks(spec)) + 1,)
    np.testing.assert_allclose(here, there, rtol=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_finite_differences(name):
    """In float64, in PyTorch; Keras has the same ones."""
    import gradlab.torch.resnet as kit

    spec = SPECS[name]
    (x, y), weights = batch(spec), trained(spec)
    net = kit.ResNet(spec).double()
    kit.load_weights(net, weights)
    _, grads = kit.gradients(net, x, y)
    rng = np.random.default_rng(0)
    way = {n: rng.normal(size=w.shape) for n, w in weights.items()}
    losses = []
    for sign in (1, -1):
        kit.load_weights(net, {n: w + sign * 1e-9 * way[n] for n, w in weights.items()})
        losses.append(kit.gradients(net, x, y)[0])
    slope = sum((grads[n] * way[n]).sum() for n in grads)
    assert (losses[0] - losses[1]) / 2e-9 == pytest.approx(slope, rel=1e-4)


def test_gradients_change_nothing(side):
    net, kit = built(side, TINY), module(side)
    x, y = batch(TINY)
    before, logits_before = kit.get_weights(net), logits(side, net, x, False)
    kit.gradients(net, x, y)
    kit.block_gradients(net, x, y)
    np.testing.assert_array_equal(logits(side, net, x, False), logits_before)
    for name, w in kit.get_weights(net).items():
        np.testing.assert_array_equal(w, before[name])


def test_weights_go_round_and_are_checked(side):
    kit, weights = module(side), trained(SPECS["large stem"])
    net = built(side, SPECS["large stem"])
    kit.load_weights(net, weights)
    for name, w in kit.get_weights(net).items():
        np.testing.assert_array_equal(w, weights[name])
    del weights["stem.weight"]
    with pytest.raises(ValueError, match=r"missing stem\.weight"):
        kit.load_weights(net, weights)


def test_with_zero_scale_a_block_passes_the_gradient_on(side):
    spec = replace(TINY, blocks=(3,), zero_scale=True)
    x, y = batch(spec)
    norms = module(side).block_gradients(built(side, spec), x, y)
    assert [block.project is None for block in resnet.blocks(spec)] == [False, True, True]
    # Its output is its input.  The first ReLU on the way back takes what is off; the next takes
    # the same, so nothing.
    assert norms[1] == pytest.approx(norms[2], rel=1e-6)
    assert norms[2] < 0.9 * norms[3]


def test_recalibrated_statistics_are_those_of_the_batch(side):
    """With one batch, evaluation must read what training read (but for n / (n − 1) in PyTorch)."""
    net, kit = built(side, TINY), module(side)
    x, _ = batch(TINY, samples=256)
    in_training = logits(side, net, x, True)
    assert np.abs(logits(side, net, x, False) - in_training).mean() > 0.1
    weights = kit.get_weights(net)
    kit.recalibrate(net, x, batch_size=256)
    assert np.abs(logits(side, net, x, False) - in_training).max() < 0.02
    for name, w in kit.get_weights(net).items():
        np.testing.assert_array_equal(w, weights[name])


def test_recalibration_takes_the_mean_over_batches(side):
    net, kit = built(side, TINY), module(side)
    x, _ = batch(TINY, samples=64)
    kit.recalibrate(net, x, batch_size=32)
    mean, halves = _first_mean(side, net), []
    for half in (x[:32], x[32:]):
        kit.recalibrate(net, half, batch_size=32)
        halves.append(_first_mean(side, net))
    np.testing.assert_allclose(mean, np.mean(halves, 0), atol=1e-5)


def _first_mean(side, net):
    torch = side.__name__.endswith("torch")
    return (
        (net.norms["stem"].running_mean if torch else net.norms["stem"].moving_mean).numpy().copy()
    )


def test_momentum_is_the_share_of_the_newest_batch(side):
    """The two frameworks write it the other way round; here 0.25 means 0.25 in both."""
    net = built(side, replace(TINY, momentum=0.25))
    x, _ = batch(TINY)
    logits(side, net, x, True)
    once = _first_mean(side, net)
    logits(side, net, x, True)
    np.testing.assert_allclose(_first_mean(side, net), once * 1.75, atol=1e-5)


def test_recalibrate_refuses_what_it_cannot_do(side):
    x, _ = batch(TINY)
    kit = module(side)
    with pytest.raises(ValueError, match="batch_size must be between 2 and 16, got 17"):
        kit.recalibrate(built(side, TINY), x, 17)
    with pytest.raises(ValueError, match="normalization='batch', got None"):
        kit.recalibrate(built(side, SPECS["bare"]), x, 8)


# ---------------------------------------------------------------------------------------------
# Full size


def test_full_size_on_the_meta_device_has_resnet_50s_parameters():
    import torch

    from gradlab.torch.resnet import ResNet

    with torch.device("meta"):
        net = ResNet(ResNetSpec.full(), seed=None)
        assert sum(p.numel() for p in net.parameters()) == 25_557_032
        out = net(torch.empty(2, 224, 224, 3))
    assert out.shape == (2, 1000)


def test_ours_is_keras_applications_resnet_50():
    """Keras's own has a bias in front of each normalisation, and is otherwise the same function."""
    import keras

    import gradlab.keras.resnet as kit

    keras.utils.set_random_seed(0)
    theirs = keras.applications.ResNet50(
        weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None
    )
    spec = ResNetSpec.full(10, epsilon=1.001e-5, momentum=0.01)
    biases = sum(conv.fan[1] for conv in resnet.convolutions(spec))
    trainable = sum(int(np.prod(v.shape)) for v in theirs.trainable_variables)
    assert trainable == resnet.parameters(spec) + biases
    ours, weights = kit.ResNet(spec, seed=None), {}
    number = {"0": "1", "1": "2", "2": "3"}
    for name in resnet.shapes(spec):
        layer, part = name.rsplit(".", 1)
        what = "bn" if part in ("scale", "shift") else "conv"
        if layer == "output":
            theirs_name = "predictions"
        elif layer == "stem":
            theirs_name = f"conv1_{what}"
        else:
            stage, block, conv = layer.split(".")
            last = "0" if conv == "project" else number[conv[4:]]
            theirs_name = f"conv{int(stage[5:]) + 2}_block{int(block[5:]) + 1}_{last}_{what}"
        attribute = {"weight": "kernel", "scale": "gamma", "shift": "beta", "bias": "bias"}[part]
        weights[name] = getattr(theirs.get_layer(theirs_name), attribute).numpy()
    kit.load_weights(ours, weights)
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    np.testing.assert_allclose(
        ours(x, training=True).numpy(), theirs(x, training=True).numpy(), rtol=1e-2, atol=1e-2
    )
