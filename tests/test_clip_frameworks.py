"""What each framework's own clipping does with five awkward gradients.

Every line of the table stands for an agreement or a disagreement that the book documents; a new
release that changes one fails here.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

from gradlab import clip

GRADIENTS = {
    "ordinary": ([3.0, 0.0], [4.0]),
    "one inf": ([np.inf, 1.0], [1.0]),
    "one NaN": ([np.nan, 1.0], [1.0]),
    "overflowing norm": ([1e20, 1e20], [1e20]),
    "tiny": ([1e-25, 1e-25], [1e-25]),
    "zeros": ([0.0, 0.0], [0.0]),
}
NAN = np.nan
TORCH_EPSILON = 1e-6  # PyTorch divides by the norm plus this

TABLE = {
    # The factor is min(1, max_norm / (norm + 1e-6)): an inf makes it 0, and 0 · ∞ is NaN.
    "torch clip_grad_norm_": {
        "ordinary": [0.6, 0, 0.8],
        "one inf": [NAN, 0, 0],
        "one NaN": [NAN, NAN, NAN],
        "overflowing norm": [0, 0, 0],
        "tiny": [1e-25] * 3,
        "zeros": [0, 0, 0],
    },
    "torch clip_grad_value_": {
        "ordinary": [1, 0, 1],
        "one inf": [1, 1, 1],
        "one NaN": [NAN, 1, 1],
        "overflowing norm": [1, 1, 1],
        "tiny": [1e-25] * 3,
        "zeros": [0, 0, 0],
    },
    # TensorFlow makes the factor NaN when the norm is not finite.
    "tf.clip_by_global_norm": {
        "ordinary": [0.6, 0, 0.8],
        "one inf": [NAN] * 3,
        "one NaN": [NAN] * 3,
        "overflowing norm": [NAN] * 3,
        "tiny": [1e-25] * 3,
        "zeros": [0, 0, 0],
    },
    "tf.clip_by_norm": {
        "ordinary": [1, 0, 1],
        "one inf": [NAN, 0, 1],
        "one NaN": [NAN, NAN, 1],
        "overflowing norm": [0, 0, 0],
        "tiny": [1e-25] * 3,
        "zeros": [0, 0, 0],
    },
    "tf.clip_by_value": {
        "ordinary": [1, 0, 1],
        "one inf": [1, 1, 1],
        "one NaN": [NAN, 1, 1],
        "overflowing norm": [1, 1, 1],
        "tiny": [1e-25] * 3,
        "zeros": [0, 0, 0],
    },
}
TABLE["keras global_clipnorm"] = TABLE["tf.clip_by_global_norm"]
TABLE["keras clipnorm"] = TABLE["tf.clip_by_norm"]
TABLE["keras clipvalue"] = TABLE["tf.clip_by_value"]


def parameters(gradient):
    both = [torch.nn.Parameter(torch.zeros(len(part))) for part in gradient]
    for parameter, part in zip(both, gradient, strict=True):
        parameter.grad = torch.tensor(part)
    return both


def with_torch(clipper, gradient):
    both = parameters(gradient)
    clipper(both, 1.0)
    return np.concatenate([p.grad.numpy() for p in both])


def with_keras(keyword, gradient):
    optimizer = keras.optimizers.SGD(1.0, **{keyword: 1.0})
    both = [keras.Variable(np.zeros(len(part), np.float32)) for part in gradient]
    optimizer.apply([tf.constant(part) for part in gradient], both)
    return -np.concatenate([v.numpy() for v in both])


def tensors(gradient):
    return [tf.constant(part) for part in gradient]


RUN = {
    "torch clip_grad_norm_": lambda g: with_torch(torch.nn.utils.clip_grad_norm_, g),
    "torch clip_grad_value_": lambda g: with_torch(torch.nn.utils.clip_grad_value_, g),
    "tf.clip_by_global_norm": lambda g: np.concatenate(tf.clip_by_global_norm(tensors(g), 1.0)[0]),
    "tf.clip_by_norm": lambda g: np.concatenate([tf.clip_by_norm(t, 1.0) for t in tensors(g)]),
    "tf.clip_by_value": lambda g: np.concatenate(
        [tf.clip_by_value(t, -1.0, 1.0) for t in tensors(g)]
    ),
    "keras global_clipnorm": lambda g: with_keras("global_clipnorm", g),
    "keras clipnorm": lambda g: with_keras("clipnorm", g),
    "keras clipvalue": lambda g: with_keras("clipvalue", g),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("function", RUN)
def test_the_table(function, gradient):
    seen = RUN[function](GRADIENTS[gradient])
    np.testing.assert_allclose(seen, TABLE[function][gradient], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_foreach_changes_nothing(foreach, gradient):
    both = parameters(GRADIENTS[gradient])
    torch.nn.utils.clip_grad_norm_(both, 1.0, foreach=foreach)
    seen = np.concatenate([p.grad.numpy() for p in both])
    np.testing.assert_allclose(
        seen, TABLE["torch clip_grad_norm_"][gradient], rtol=1e-6, atol=1e-30
    )


@pytest.mark.parametrize("gradient", ["one inf", "one NaN", "overflowing norm"])
def test_error_if_nonfinite_raises_and_leaves_the_gradient(gradient):
    both = parameters(GRADIENTS[gradient])
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_(both, 1.0, error_if_nonfinite=True)
    seen = [p.grad.tolist() for p in both]
    np.testing.assert_array_equal(
        np.concatenate(seen), np.concatenate(GRADIENTS[gradient]).astype("float32")
    )


def test_the_overflow_is_of_the_norm_not_of_the_gradient():
    gradient = GRADIENTS["overflowing norm"]
    assert np.isinf(float(torch.nn.utils.clip_grad_norm_(parameters(gradient), 1.0)))
    assert np.isinf(float(tf.linalg.global_norm(tensors(gradient))))
    assert clip.global_norm([np.array(p, np.float32) for p in gradient]) == pytest.approx(
        3**0.5 * 1e20
    )


def test_what_both_global_norms_agree_on():
    rng = np.random.default_rng(0)
    gradient = [rng.normal(size=50).astype("float32") for _ in range(4)]
    ours = np.concatenate(clip.by_global_norm(gradient, 1.0)[0])
    for function in ("torch clip_grad_norm_", "tf.clip_by_global_norm", "keras global_clipnorm"):
        np.testing.assert_allclose(RUN[function](gradient), ours, rtol=1e-6)


def test_pytorch_divides_by_a_little_more():
    """A threshold below its ε is not kept to: the gradient comes out shorter."""
    gradient = ([1e-6], [0.0])
    both = parameters(gradient)
    torch.nn.utils.clip_grad_norm_(both, 5e-7)
    assert both[0].grad.item() == pytest.approx(1e-6 * 5e-7 / (1e-6 + TORCH_EPSILON))
    assert tf.clip_by_global_norm(tensors(gradient), 5e-7)[0][0].numpy()[0] == pytest.approx(5e-7)


def test_keras_obeys_one_clipping_and_refuses_two():
    with pytest.raises(ValueError, match="Only one of"):
        keras.optimizers.SGD(clipnorm=1.0, global_clipnorm=1.0)


def test_a_threshold_of_zero_means_all_or_nothing():
    both = parameters(GRADIENTS["ordinary"])
    torch.nn.utils.clip_grad_norm_(both, 0.0)  # PyTorch: no step at all
    assert [p.grad.norm().item() for p in both] == [0, 0]
    np.testing.assert_allclose(  # Keras: no clipping at all
        -np.array(keras_step({"global_clipnorm": 0.0})), [3, 0, 4]
    )


def keras_step(keywords):
    optimizer = keras.optimizers.SGD(1.0, **keywords)
    both = [keras.Variable(np.zeros(n, np.float32)) for n in (2, 1)]
    optimizer.apply(tensors(GRADIENTS["ordinary"]), both)
    return np.concatenate([v.numpy() for v in both])


def test_keras_clips_after_accumulation():
    """`gradient_accumulation_steps` averages first; the clip is of the mean."""
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=1.0, gradient_accumulation_steps=2)
    v = keras.Variable(np.zeros(1, np.float32))
    for g in (10.0, -9.0):
        optimizer.apply([tf.constant([g])], [v])
    assert v.numpy()[0] == pytest.approx(-0.5)


def test_a_loss_scale_optimizer_must_clip_inside():
    """The inner optimiser clips what has been unscaled; the outer one refuses the argument."""
    for keyword in ("clipnorm", "global_clipnorm", "clipvalue"):
        inner = keras.optimizers.SGD(1.0, **{keyword: 1.0})
        outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0)
        v = keras.Variable(np.zeros(1, np.float32))
        outer.apply([tf.constant([0.5 * 1024])], [v])  # a gradient of 0.5, scaled
        assert v.numpy()[0] == pytest.approx(-0.5)
        with pytest.raises(ValueError, match="LossScaleOptimizer"):
            keras.optimizers.LossScaleOptimizer(inner, **{keyword: 1.0})


def test_pytorch_clips_before_unscale_at_the_wrong_place():
    w = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([w], lr=1.0)
    for unscale_first, expected in ((True, -1.0), (False, -1.0 / 1024)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with torch.no_grad():
            w.zero_()
        w.grad = None
        scaler.scale((3 * w).sum()).backward()
        if unscale_first:
            scaler.unscale_(sgd)
        torch.nn.utils.clip_grad_norm_([w], 1.0)
        scaler.step(sgd)
        assert w.item() == pytest.approx(expected, rel=1e-5)
