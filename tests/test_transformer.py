"""Stacked transformers: equal in both frameworks, and to each framework's own layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradlab.transformer import TransformerSpec, initial_weights

SPEC = TransformerSpec(tokens=5, features=3, classes=4, width=12, hidden=10, depth=2, heads=2)
SPECS = [replace(SPEC, norm=n, qk_norm=q) for n in ("post", "pre", "deepnorm") for q in (0, 1)]


def named(spec):
    return f"{spec.norm}{'-qk' * spec.qk_norm}"


def jittered(spec, dtype="float64", members=2):
    """Weights whose scales are not all one."""
    rng = np.random.default_rng(7)
    start = initial_weights(spec, range(members), dtype="float64")
    return {
        name: (a * rng.uniform(0.5, 1.5, a.shape) if "scale" in name else a).astype(dtype)
        for name, a in start.items()
    }


def task(spec, dtype="float64", members=2, batch=6):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((members, batch, spec.tokens, spec.features)).astype(dtype)
    return x, rng.integers(spec.classes, size=(members, batch))


def in_torch(spec, weights, x, y, strength=0.01):
    torch = pytest.importorskip("torch")
    from gradlab.torch import transformer

    w = {name: torch.tensor(a, requires_grad=True) for name, a in weights.items()}
    logits, noted = transformer.network(spec)(w, torch.tensor(x))
    loss = transformer.cross_entropy_z(strength)(logits, torch.tensor(y))
    gradients = torch.autograd.grad(loss.sum(), list(w.values()))
    stream, again = transformer.streams(spec, w, torch.tensor(x))
    np.testing.assert_array_equal(again.detach(), logits.detach())
    results = {"logits": logits, "loss": loss, **noted, "stream": torch.stack(stream)}
    results |= {f"gradient of {n}": g for n, g in zip(w, gradients, strict=True)}
    return {name: a.detach().numpy() for name, a in results.items()}


def in_tensorflow(spec, weights, x, y, strength=0.01):
    tf = pytest.importorskip("tensorflow")
    from gradlab.keras import transformer

    w = {name: tf.constant(a) for name, a in weights.items()}
    with tf.GradientTape() as tape:
        tape.watch(w)
        logits, noted = transformer.network(spec)(w, tf.constant(x))
        loss = transformer.cross_entropy_z(strength)(logits, tf.constant(y))
    gradients = tape.gradient(loss, w)
    stream, again = transformer.streams(spec, w, tf.constant(x))
    np.testing.assert_array_equal(again, logits)
    results = {"logits": logits, "loss": loss, **noted, "stream": tf.stack(stream)}
    results |= {f"gradient of {n}": gradients[n] for n in w}
    return {name: a.numpy() for name, a in results.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_both_frameworks_compute_the_same(spec, dtype, tolerance):
    both = [
        run(spec, jittered(spec, dtype), *task(spec, dtype)) for run in (in_torch, in_tensorflow)
    ]
    assert both[0].keys() == both[1].keys()
    for name, one in both[0].items():
        assert one.dtype == both[1][name].dtype == dtype
        assert one.shape == both[1][name].shape
        size = max(1.0, np.abs(one).max())
        assert np.abs(one - both[1][name]).max() <= tolerance * size, name


@pytest.mark.parametrize("run", [in_torch, in_tensorflow])
@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_gradients_are_finite_differences(spec, run):
    weights, (x, y) = jittered(spec), task(spec)
    measured, rng = run(spec, weights, x, y), np.random.default_rng(5)
    direction = {name: rng.standard_normal(a.shape) for name, a in weights.items()}

    def loss(step):
        moved = {name: a + step * direction[name] for name, a in weights.items()}
        return run(spec, moved, x, y)["loss"]

    want = (loss(1e-6) - loss(-1e-6)) / 2e-6
    slope = sum(
        (measured[f"gradient of {name}"] * d).reshape(2, -1).sum(1) for name, d in direction.items()
    )
    np.testing.assert_allclose(slope, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("run", [in_torch, in_tensorflow])
@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_members_do_not_meet(spec, run):
    weights, (x, y) = jittered(spec), task(spec)
    together = run(spec, weights, x, y)
    weights = {name: a.copy() for name, a in weights.items()}
    for a in weights.values():
        a[1] = np.nan
    alone = run(spec, weights, x, y)
    for name, one in together.items():
        axis = 1 if name == "stream" else 0
        np.testing.assert_allclose(
            np.take(alone[name], 0, axis), np.take(one, 0, axis), rtol=0, atol=1e-13
        )


def one_block(spec, member):
    """A block's matrices of one member."""
    return {
        name: a[member, 0] for name, a in jittered(spec).items() if a.ndim > 3 or name == "scale"
    }


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_block_is_pytorchs_encoder_layer(norm):
    torch = pytest.importorskip("torch")
    from gradlab.torch import transformer

    spec = replace(SPEC, norm=norm, depth=1)
    weights, (x, _) = jittered(spec), task(spec)
    tensors = {name: torch.tensor(a) for name, a in weights.items()}
    (before, after), _ = transformer.streams(spec, tensors, torch.tensor(x))
    for member in (0, 1):
        layer = torch.nn.TransformerEncoderLayer(
            spec.width, spec.heads, spec.hidden, dropout=0.0, batch_first=True, bias=False,
            norm_first=norm == "pre", dtype=torch.float64,
        )  # fmt: skip
        block = one_block(spec, member)
        with torch.no_grad():
            for parameter, value in (
                (layer.self_attn.in_proj_weight, block["qkv"].T),
                (layer.self_attn.out_proj.weight, block["out"].T),
                (layer.linear1.weight, block["up"].T),
                (layer.linear2.weight, block["down"].T),
                (layer.norm1.weight, block["scale"][0]),
                (layer.norm2.weight, block["scale"][1]),
            ):
                parameter.copy_(torch.tensor(value))
            sequence = before[member].view(-1, spec.tokens, spec.width)
            want = layer.train()(sequence)
        got = after[member].view(want.shape)
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=0, atol=1e-12)


def test_a_block_is_keras_attention_and_normalization():
    tf = pytest.importorskip("tensorflow")
    from gradlab.keras import keras, transformer
    from gradlab.mlp import EPSILON

    spec = replace(SPEC, norm="post", depth=1)
    weights, (x, _) = jittered(spec), task(spec)
    tensors = {name: tf.constant(a) for name, a in weights.items()}
    (before, after), _ = transformer.streams(spec, tensors, tf.constant(x))
    d, each = spec.width, spec.width // spec.heads
    for member in (0, 1):
        block = one_block(spec, member)
        h = tf.reshape(before[member], (-1, spec.tokens, d))
        attention = keras.layers.MultiHeadAttention(
            spec.heads, each, use_bias=False, dtype="float64"
        )
        norms = [
            keras.layers.LayerNormalization(epsilon=EPSILON, center=False, dtype="float64")
            for _ in range(2)
        ]
        ffn = [
            keras.layers.Dense(n, activation=f, use_bias=False, dtype="float64")
            for n, f in ((spec.hidden, "relu"), (d, None))
        ]
        for layer in (*norms, ffn[0]):
            layer.build(h.shape)
        ffn[1].build((None, spec.hidden))
        attention.build(h.shape, h.shape)
        query, key, value = np.split(block["qkv"], 3, 1)
        shape = (d, spec.heads, each)
        attention.set_weights(
            [*(a.reshape(shape) for a in (query, key, value)), block["out"].reshape(*shape[1:], d)]
        )
        for layer, value in (
            (norms[0], block["scale"][0]),
            (norms[1], block["scale"][1]),
            (ffn[0], block["up"]),
            (ffn[1], block["down"]),
        ):
            layer.set_weights([value])
        h = norms[0](h + attention(h, h))
        want = norms[1](h + ffn[1](ffn[0](h)))
        got = tf.reshape(after[member], want.shape)
        # Keras's constants are float32's, whatever the layer's precision.
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=0, atol=1e-7)


def test_draws_are_shared_by_placements_depths_and_stacks():
    post, pre = (initial_weights(replace(SPEC, norm=n), (4, 9)) for n in ("post", "pre"))
    deep = initial_weights(replace(SPEC, depth=5), (9,))
    for name, a in post.items():
        np.testing.assert_array_equal(a, pre[name])
        shorter = deep[name][0][:2] if a.ndim > 3 or name == "scale" else deep[name][0]
        np.testing.assert_array_equal(a[1], shorter)


def test_deepnorm_scales_what_its_authors_scale():
    spec = replace(SPEC, norm="deepnorm", depth=8)
    plain, scaled = (initial_weights(s, (0,)) for s in (replace(spec, norm="post"), spec))
    assert spec.alpha == 2.0
    assert spec.beta == pytest.approx(64**-0.25)
    d = spec.width
    for name in plain:
        factor = spec.beta if name in ("out", "up", "down") else 1
        want = plain[name] * factor
        if name == "qkv":
            want = plain[name] * np.repeat([1, 1, spec.beta], d)
        np.testing.assert_allclose(scaled[name], want, rtol=1e-6)


@pytest.mark.parametrize("run", [in_torch, in_tensorflow])
def test_deepnorm_is_post_ln_with_branches_divided_by_alpha(run):
    deep = replace(SPEC, norm="deepnorm", depth=8)
    weights, (x, y) = jittered(deep), task(deep)
    divided = weights | {name: weights[name] / deep.alpha for name in ("out", "down")}
    post = replace(deep, norm="post")
    want, other = (run(post, w, x, y)["stream"] for w in (divided, weights))
    got = run(deep, weights, x, y)["stream"]
    # N(αx + f) = N(x + f/α), but for the epsilon under the root
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)
    assert np.abs(got - other).max() > 0.1


@pytest.mark.parametrize("run", [in_torch, in_tensorflow])
def test_qk_norm_bounds_the_attention_logits(run):
    x, y = task(SPEC)
    bound = (SPEC.width / SPEC.heads) ** 0.5
    largest = {}
    for qk_norm in (False, True):
        spec = replace(SPEC, qk_norm=qk_norm)
        weights = initial_weights(spec, (0, 1), query_scale=100, dtype="float64")
        largest[qk_norm] = run(spec, weights, x, y)["attention_logit"]
    assert (largest[False] > 100 * bound).all()
    assert (largest[True] > 0.5 * bound).all()
    assert (largest[True] <= bound).all()


def test_query_scale_multiplies_the_logits_by_its_square():
    x, y = task(SPEC)
    spec = replace(SPEC, depth=1)
    one, two = (
        in_torch(spec, initial_weights(spec, (0, 1), query_scale=s, dtype="float64"), x, y)
        for s in (1, 3)
    )
    np.testing.assert_allclose(two["attention_logit"], 9 * one["attention_logit"], rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"norm": "both"}, "norm must be one of"),
        ({"heads": 5}, "heads must divide the width, got 5 heads and a width of 12"),
    ],
)
def test_says_what_is_wrong_with_a_spec(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)


def test_needs_a_member():
    with pytest.raises(ValueError, match="seeds is empty"):
        initial_weights(SPEC, ())
