"""Clipping: the NumPy reference against closed forms, and both frameworks against the reference."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradlab import clip

THOROUGH = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALES = (0.0, 1e-38, 1e-30, 1e-8, 1.0, 1e8, 1e19, 1e30, 1e38)
SHAPES = st.lists(
    st.sampled_from([(), (1,), (3,), (0,), (2, 3), (4, 1), (2, 2, 3, 2)]), min_size=1, max_size=4
)


@st.composite
def lists(draw, bad: bool = False):
    """Random float32 gradients of wild sizes, one of them None at times, and weights to match."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    shapes = draw(SHAPES)
    gradients = [
        (rng.uniform(-1, 1, shape) * draw(st.sampled_from(SCALES))).astype(np.float32)
        for shape in shapes
    ]
    weights = [rng.normal(0, 0.1, shape).astype(np.float32) for shape in shapes]
    if bad:
        shapes.append((2,))
        gradients.append(np.array([draw(st.sampled_from([np.inf, -np.inf, np.nan])), 1], "float32"))
        weights.append(np.ones(2, np.float32))
    if draw(st.booleans()):
        gradients.append(None)
        weights.append(np.ones(2, np.float32))
    return gradients, weights


def tensors(side, arrays):
    if side.__name__ == "gradlab.torch":
        import torch

        return [None if a is None else torch.tensor(a) for a in arrays]
    import tensorflow as tf

    return [None if a is None else tf.constant(a) for a in arrays]


def arrays(values):
    return [None if v is None else np.asarray(v) for v in values]


def exact(gradients):
    """The global norm by Python's own exact arithmetic."""
    return math.hypot(*[float(x) for g in gradients if g is not None for x in g.ravel()])


def same(ours, reference, rtol=3e-6):
    for one, two in zip(arrays(ours), reference, strict=True):
        assert (one is None) == (two is None)
        if two is not None:
            assert one.dtype == two.dtype
            # Below 1e-37 float32 is denormal, and TensorFlow takes such numbers for 0.
            np.testing.assert_allclose(one, two, rtol=rtol, atol=3e-38, equal_nan=True)


FUNCTIONS = ("by_value", "by_norm", "by_global_norm", "adaptive")


def call(module, name, gradients, weights, threshold):
    if name != "adaptive":
        return getattr(module, name)(gradients, threshold)
    return module.adaptive(gradients, weights, threshold, unit_axis=-1)


# -- the reference --------------------------------------------------------------------------------


@THOROUGH
@given(lists(), st.sampled_from([1e-20, 1e-3, 1.0, 1e25]))
def test_the_reference_bounds_what_it_says(drawn, threshold):
    gradients, weights = drawn
    close = 1 + 1e-6
    norm = exact(gradients)
    assert clip.global_norm(gradients) == pytest.approx(norm, rel=1e-12)
    for name in FUNCTIONS:
        clipped, before = call(clip, name, gradients, weights, threshold)
        assert before == pytest.approx(norm, rel=1e-12)
        for g, c in zip(gradients, clipped, strict=True):
            if g is None:
                assert c is None
                continue
            assert c is not g  # nothing is changed in place
            assert (np.sign(c) * np.sign(g) >= 0).all()
            assert (np.abs(c) <= np.abs(g)).all()
            if name == "by_value":
                assert (np.abs(c) <= threshold * close).all()
            if name == "by_norm":
                assert exact([c]) <= threshold * close
        if name == "by_global_norm":
            assert exact(clipped) <= threshold * close
            if norm <= threshold:
                for g, c in zip(gradients, clipped, strict=True):
                    assert g is None or np.array_equal(g, c)
            elif threshold > 1e-10 and all(g is None or g.size for g in gradients):
                assert exact(clipped) == pytest.approx(threshold, rel=1e-5)


def test_adaptive_clipping_by_hand():
    weights = np.array([[3.0, 0.0], [4.0, 0.0]])  # unit norms 5 and 0, along the last axis
    gradient = np.array([[0.3, 0.0], [0.4, 2.0]])  # 0.5 and 2
    clipped, norm = clip.adaptive([gradient], [weights], 0.01, floor=1e-3)
    np.testing.assert_allclose(clipped[0], [[0.03, 0], [0.04, 1e-5]])
    assert norm == pytest.approx(math.hypot(0.5, 2))
    rows, _ = clip.adaptive([gradient.T], [weights.T], 0.01, unit_axis=0)
    np.testing.assert_allclose(rows[0], clipped[0].T)
    bias, _ = clip.adaptive([np.array([3.0, 4.0])], [np.array([0.6, 0.8])], 0.5)
    np.testing.assert_allclose(bias[0], [0.3, 0.4])  # a vector is one unit


def test_the_global_direction_stays_and_the_others_turn_it():
    rng = np.random.default_rng(0)
    g = [rng.normal(size=(5, 4)), 100 * rng.normal(size=(4, 3))]

    def cosine(other):
        a, b = (np.concatenate([x.ravel() for x in many]) for many in (g, other))
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    assert cosine(clip.by_global_norm(g, 0.1)[0]) == pytest.approx(1, abs=1e-12)
    assert cosine(clip.by_norm(g, 0.1)[0]) < 0.9
    assert cosine(clip.by_value(g, 0.1)[0]) < 0.9


@pytest.mark.parametrize("bad", [0, -1.0, float("nan")])
def test_a_threshold_must_be_positive(side, bad):
    for module in (clip, side.clip):
        g = [np.ones(2)] if module is clip else tensors(side, [np.ones(2)])
        for name, argument in (("by_value", "limit"), ("by_norm", "max_norm"),
                               ("by_global_norm", "max_norm"), ("adaptive", "factor")):  # fmt: skip
            with pytest.raises(ValueError, match=f"{argument} must be > 0, got {bad!r}"):
                call(module, name, g, g, bad)


def test_what_does_not_fit_is_named(side):
    for module in (clip, side.clip):
        make = (lambda a: a) if module is clip else (lambda a: tensors(side, a))
        two, three = make([np.ones((2, 2))]), make([np.ones((3, 2))])
        with pytest.raises(ValueError, match=r"shape \(2, 2\) came with weights of shape \(3, 2\)"):
            module.adaptive(two, three)
        with pytest.raises(ValueError, match="1 gradients, 2 weights"):
            module.adaptive(two, two * 2)
        with pytest.raises(ValueError, match="unit_axis 2 is no axis"):
            module.adaptive(two, two, unit_axis=[2])


# -- the frameworks -------------------------------------------------------------------------------


@THOROUGH
@given(drawn=lists(), threshold=st.sampled_from([1e-20, 1e-3, 1.0, 1e25]))
def test_the_frameworks_equal_the_reference(side, drawn, threshold):
    gradients, weights = drawn
    for name in FUNCTIONS:
        reference, norm = call(clip, name, gradients, weights, threshold)
        given_ = tensors(side, gradients), tensors(side, weights)
        ours, seen = call(side.clip, name, *given_, threshold)
        assert float(seen) == pytest.approx(norm, rel=1e-5, abs=1e-37)
        if abs(norm / threshold - 1) > 1e-5:  # else rounding may decide whether it is clipped
            same(ours, reference)
        same(given_[0], gradients, rtol=0)  # and the gradients are as they were


@THOROUGH
@given(drawn=lists(bad=True), threshold=st.sampled_from([1e-3, 1.0, 1e25]))
def test_what_is_not_finite_comes_back_as_it_was(side, drawn, threshold):
    gradients, weights = drawn
    for module in (clip, side.clip):
        given_ = (gradients, weights)
        if module is not clip:
            given_ = tensors(side, gradients), tensors(side, weights)
        for name in FUNCTIONS:
            ours, norm = call(module, name, *given_, threshold)
            assert not math.isfinite(norm)
            for one, two in zip(arrays(ours), gradients, strict=True):
                assert (one is None) == (two is None)
                np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions(side, dtype):
    values = np.random.default_rng(0).normal(size=(3, 4))
    if side.__name__ == "gradlab.torch":
        import torch

        kind = getattr(torch, dtype)
        g = [torch.tensor(values).to(kind)]

        def back_of(t):
            return t.double().numpy()
    else:
        import tensorflow as tf

        kind = tf.as_dtype(dtype)
        g = [tf.cast(values, kind)]

        def back_of(t):
            return tf.cast(t, tf.float64).numpy()

    back = [back_of(g[0])]
    for name in FUNCTIONS:
        ours, norm = call(side.clip, name, g, g, 0.05)
        reference, exact_norm = call(clip, name, back, back, 0.05)
        assert ours[0].dtype == kind
        assert float(norm) == pytest.approx(exact_norm, rel=1e-6)
        seen = back_of(ours[0])
        np.testing.assert_allclose(seen, reference[0], rtol=1e-12 if dtype == "float64" else 1e-2)


def test_float64_far_beyond_its_squares(side):
    values = [np.full(3, 1e200), np.full(4, 1e250)]
    reference, norm = clip.by_global_norm(values, 1e-100)
    ours, seen = side.clip.by_global_norm(tensors(side, values), 1e-100)
    assert float(seen) == pytest.approx(norm, rel=1e-12) == 2e250
    np.testing.assert_allclose(np.asarray(ours[1]), reference[1], rtol=1e-12)


def test_no_gradients(side):
    for module in (clip, side.clip):
        assert float(module.global_norm([None])) == 0
        for name in FUNCTIONS:
            weights = [np.ones(2)] if module is clip else tensors(side, [np.ones(2)])
            assert call(module, name, [None], weights, 1.0)[0] == [None]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sparse_gradients(side, name):
    rows, values = [2, 0, 2], np.array([[3.0, 1.0], [5.0, -1.0], [4.0, 2.0]], np.float32)
    dense = np.zeros((4, 2), np.float32)
    np.add.at(dense, rows, values)
    weights = np.ones((4, 2), np.float32)
    if side.__name__ == "gradlab.torch":
        import torch

        sparse = torch.sparse_coo_tensor(
            [rows], torch.tensor(values), (4, 2), check_invariants=True
        )
        ours, norm = call(side.clip, name, [sparse], [torch.tensor(weights)], 0.5)
        assert name == "adaptive" or ours[0].is_sparse
        seen = ours[0].to_dense().numpy()
    else:
        import tensorflow as tf

        sparse = tf.IndexedSlices(tf.constant(values), tf.constant(rows), tf.constant([4, 2]))
        ours, norm = call(side.clip, name, [sparse], [tf.constant(weights)], 0.5)
        assert name == "adaptive" or isinstance(ours[0], tf.IndexedSlices)
        seen = tf.convert_to_tensor(ours[0]).numpy()
    reference, exact_norm = call(clip, name, [dense], [weights], 0.5)
    assert float(norm) == pytest.approx(exact_norm, rel=1e-6)
    np.testing.assert_allclose(seen, reference[0], rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_in_a_graph(jit):
    tf = pytest.importorskip("tensorflow")
    from gradlab.keras import clip as ours

    rng = np.random.default_rng(0)
    g, w = ([rng.normal(size=s).astype("float32") for s in ((3, 2), (2,))] for _ in range(2))
    for name in FUNCTIONS:

        @tf.function(jit_compile=jit)
        def step(*flat, name=name):
            return call(ours, name, [*flat[:2], None], [*flat[2:], flat[0]], 0.1)[0][:2]

        reference = call(clip, name, [*g, None], [*w, g[0]], 0.1)[0][:2]
        same(step(*map(tf.constant, (*g, *w))), reference, rtol=1e-5)


def test_unit_axes_are_those_of_the_layers():
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("tensorflow")
    from gradlab.keras import clip as there
    from gradlab.torch import clip as here

    rng = np.random.default_rng(0)
    kernel, gradient = rng.normal(size=(2, 3, 3, 5, 4)).astype("float32")  # HWIO
    by_keras, _ = there.adaptive([tf.constant(gradient)], [tf.constant(kernel)])
    turned = [torch.tensor(a.transpose(3, 2, 0, 1).copy()) for a in (gradient, kernel)]  # OIHW
    by_torch, _ = here.adaptive(turned[:1], turned[1:])
    np.testing.assert_allclose(
        by_torch[0].numpy().transpose(2, 3, 1, 0), by_keras[0].numpy(), rtol=1e-5
    )


# -- choosing the threshold -----------------------------------------------------------------------


@THOROUGH
@given(
    st.lists(st.floats(0, 1e30) | st.sampled_from([math.inf, math.nan]), min_size=1, max_size=40),
    st.sampled_from([0, 10, 37.5, 50, 100]),
)
def test_autoclip_is_numpys_percentile(norms, percentile):
    choose, seen = clip.AutoClip(percentile), []
    for norm in norms:
        seen += [norm] if math.isfinite(norm) else []
        expected = max(np.percentile(seen, percentile), 5e-324) if seen else math.inf
        assert choose(norm) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_zclip_against_the_published_rule():
    rng = np.random.default_rng(0)
    norms = np.abs(rng.normal(1, 0.1, 200))
    norms[[60, 61, 150]] = 5, 50, 1e6
    norms[80] = np.nan
    choose = clip.ZClip()
    seen = [choose(n) for n in norms]
    assert np.isinf(seen[:25]).all()
    mean, var = norms[:25].mean(), norms[:25].var()
    for norm, threshold in zip(norms[25:], seen[25:], strict=True):
        if not np.isfinite(norm):
            assert threshold == math.inf
            continue
        score = (norm - mean) / var**0.5
        if score > 2.5:
            assert threshold == pytest.approx(mean + 2.5 * var**0.5 / (score / 2.5))
            norm = threshold
        else:
            assert threshold == math.inf
        mean = 0.97 * mean + 0.03 * norm
        var = 0.97 * var + 0.03 * (norm - mean) ** 2
    assert choose.mean == pytest.approx(mean)
    assert choose.variance == pytest.approx(var)
    assert seen[60] < 1.5
    assert mean < seen[150] < 1.1  # the further out, the harder: next to the mean
    capped = clip.ZClip(max_norm=0.5)
    assert {capped(n) for n in norms[:60]} == {0.5}


@pytest.mark.parametrize("make", [lambda: clip.AutoClip(20), lambda: clip.ZClip(warmup=5)])
def test_a_chooser_goes_on_after_a_restart(make):
    norms = np.abs(np.random.default_rng(1).normal(1, 0.3, 60)) + 10 * (np.arange(60) % 17 == 16)
    choose = make()
    whole = [choose(n) for n in norms]
    for cut in (3, 30):
        first, second = make(), make()
        for n in norms[:cut]:
            first(n)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second(n) for n in norms[cut:]] == whole[cut:]


def test_choosers_in_place_of_a_number(side):
    choose, reference = clip.AutoClip(50), clip.AutoClip(50)
    for size in (1.0, 3.0, 100.0, math.nan, 2.0):
        g = [np.array([size, 0], np.float32)]
        ours, _ = side.clip.by_global_norm(tensors(side, g), choose)
        same(ours, clip.by_global_norm(g, reference)[0])
    assert choose.state_dict() == reference.state_dict()


def test_a_chooser_inside_a_graph():
    tf = pytest.importorskip("tensorflow")
    from gradlab.keras import clip as ours

    choose = ours.AutoClip(50)
    step = tf.function(lambda g: ours.by_global_norm([g], choose)[0][0])
    assert [float(step(tf.constant([x]))[0]) for x in (1.0, 3.0, 100.0)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clip.AutoClip(101), "percentile must be between 0 and 100, got 101"),
        (lambda: clip.ZClip(0), "z must be > 0"),
        (lambda: clip.ZClip(decay=1), "decay=1"),
        (lambda: clip.ZClip(warmup=1), "warmup=1"),
    ],
)
def test_choosers_refuse_nonsense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_infinite_norm_does_not_poison_the_statistics():
    for choose in (clip.AutoClip(), clip.ZClip(warmup=3)):
        for norm in (1.0, 1.1, 0.9, math.nan, math.inf, 1.0):
            choose(norm)
        assert "nan" not in str(choose.state_dict()).lower().replace("inf", "nan")


def test_both_sides_have_the_same_names():
    from gradlab.keras import clip as there
    from gradlab.torch import clip as here

    assert here.__all__ == there.__all__
    assert all(hasattr(clip, name) for name in here.__all__)
