"""Reverse accumulation against PyTorch's autograd and against differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradlab import backprop
from gradlab.backprop import Tensor
from gradlab.mlp import MLPSpec, initial_weights
from gradlab.theory import activation_names
from gradlab.torch.models import ACTIVATIONS

SHAPES = [(3, 4), (4, 3), (4,), (1, 4), (3, 1), (), (3, 4), (4, 4)]


def activate(t, name):
    return t.apply(name) if isinstance(t, Tensor) else ACTIVATIONS[name](t)


def value(t) -> np.ndarray:
    return t.data if isinstance(t, Tensor) else t.detach().numpy()


def bounded(t) -> bool:
    return bool(np.abs(value(t)).max(initial=0) < 50)


BINARY = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    lambda a, b: a / (b * b + 1),
]
UNARY = [
    lambda a: -a,
    lambda a: 2.5 - a,
    lambda a: 3 * a + 1,
    lambda a: a / 2,
    lambda a: a**3,
    lambda a: (a * a + 0.5) ** -0.5,
    lambda a: (a * 0.1).exp(),
    lambda a: (a * a + 0.1).log(),
    lambda a: a.sum(axis=-1, keepdims=True) if a.shape else a.sum(),
    lambda a: a.sum(axis=0) if a.shape else a,
    lambda a: a.mean(axis=0, keepdims=True) if a.shape else a.mean(),
    lambda a: a.mean(),
    lambda a: a[0] if a.shape else a,
    lambda a: a[..., 1:] if a.shape and a.shape[-1] > 1 else a,
    lambda a: a[np.array([0, 0, 0])] if a.shape else a,  # one row taken three times
]


def random_graph(rng: np.random.Generator, leaves: list, operations: int = 40):
    """A scalar: a random expression in which later nodes reuse earlier ones."""
    pool = list(leaves)
    for _ in range(operations):
        kind = rng.random()
        a, b = (pool[i] for i in rng.integers(len(pool), size=2))
        if kind < 0.45:
            try:
                np.broadcast_shapes(tuple(a.shape), tuple(b.shape))
            except ValueError:
                continue
            new = BINARY[rng.integers(len(BINARY))](a, b)
        elif kind < 0.6:
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
                continue
            new = a @ b
        elif kind < 0.85:
            new = UNARY[rng.integers(len(UNARY))](a)
        else:
            new = activate(a, activation_names()[rng.integers(len(activation_names()))])
        if bounded(new):
            pool.append(new)
    total = pool[0].sum()
    for node in pool[1:]:
        total = total + (node * node).sum()
    return total


@pytest.mark.parametrize("seed", range(40))
def test_random_expressions_match_autograd(seed):
    values = [np.random.default_rng(seed).normal(size=shape) for shape in SHAPES]
    ours = [Tensor(v) for v in values]
    theirs = [torch.tensor(v, requires_grad=True) for v in values]
    out, expected = (random_graph(np.random.default_rng(seed), x) for x in (ours, theirs))
    assert out.data == pytest.approx(expected.item(), rel=1e-12)
    out.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.shape == a.shape
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: 3.0 / x,
        lambda x: 1 - x,
        lambda x: np.arange(3.0) * x,
        lambda x: np.arange(3.0) - x,
        lambda x: np.ones((1, 3)) @ (x * np.ones((3, 1))),
        lambda x: (x * x) ** 2 / 7,
    ],
)
def test_numbers_and_arrays_may_stand_on_the_left(f):
    x, at, h = Tensor(1.7), 1.7, 1e-6
    f(x).sum().backward()
    slope = (f(Tensor(at + h)).sum().data - f(Tensor(at - h)).sum().data) / (2 * h)
    assert x.grad == pytest.approx(slope, rel=1e-8)


def test_a_shared_node_collects_from_every_path():
    x = Tensor(3.0)
    y = x * x  # used by three later nodes, at different depths
    z = y + y * x + y * y
    z.backward()
    assert x.grad == pytest.approx(2 * 3 + 3 * 9 + 4 * 27)
    assert y.grad == pytest.approx(1 + 3 + 2 * 9)


def test_a_node_is_added_to_itself():
    x = Tensor([1.0, 2.0])
    (x + x).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2])


def test_each_operation_is_pulled_once_however_many_paths_there_are():
    """2^40 paths, 40 operations: what makes backpropagation dynamic programming."""
    x = Tensor(1.0)
    node, pulls = x, []
    for _ in range(40):
        node = node + node
        original = node._pull
        node._pull = lambda g, original=original: pulls.append(1) or original(g)
    node.backward()
    assert x.grad == 2.0**40
    assert len(pulls) == 40


def test_a_deep_chain_does_not_exhaust_the_stack():
    x = Tensor(1.0)
    node = x
    for _ in range(5000):
        node = node * 1.0001
    node.backward()
    assert x.grad == pytest.approx(1.0001**5000)
    del node  # and neither does giving it back


def test_backward_twice_gives_the_same_and_not_the_sum():
    x = Tensor([1.0, 2.0])
    y = (x * x).sum()
    y.backward()
    first = x.grad.copy()
    y.backward()
    np.testing.assert_array_equal(x.grad, first)


def test_backward_leaves_the_values_alone():
    x = Tensor([1.0, 2.0])
    y = (x * 3).exp().sum()
    before = x.data.copy(), y.data.copy()
    y.backward()
    np.testing.assert_array_equal(x.data, before[0])
    np.testing.assert_array_equal(y.data, before[1])


def test_backward_starts_from_a_scalar_only():
    with pytest.raises(ValueError, match=r"scalar.*shape \(2,\)"):
        Tensor([1.0, 2.0]).backward()


@pytest.mark.parametrize("shapes", [((3,), (3, 2)), ((2, 3), (3,)), ((2, 2, 2), (2, 2, 2))])
def test_matrix_products_of_other_dimensions_are_refused_not_wrong(shapes):
    a, b = (Tensor(np.ones(shape)) for shape in shapes)
    with pytest.raises(ValueError, match=r"two matrices, got shapes"):
        a @ b


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precision_is_that_of_the_inputs(dtype):
    x = Tensor(np.ones((2, 3), dtype))
    y = ((1 - 2.5 * x / 3 + x.mean()) ** 2).exp().apply("tanh").sum()
    y.backward()
    assert y.data.dtype == dtype
    assert x.grad.dtype == dtype


def test_integers_become_floats():
    assert Tensor([1, 2]).data.dtype == np.float64


# -- the network ---------------------------------------------------------------------------------


def batch(spec: MLPSpec, samples: int = 12, seed: int = 5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, spec.features)), rng.integers(spec.classes, size=samples)


@pytest.mark.parametrize("normalization", [None, "batch", "layer", "group"])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu"])
def test_network_gradients_match_central_differences(activation, normalization):
    spec = MLPSpec(
        5, 3, width=6, depth=3, activation=activation, normalization=normalization, skip=0.7,
        groups=2,
    )  # fmt: skip
    x, y = batch(spec)
    weights = initial_weights(spec, seed=1)
    loss, grads = backprop.gradients(spec, weights, x, y)
    rng, h = np.random.default_rng(2), 1e-6
    for name, weight in weights.items():
        way = rng.normal(size=weight.shape)
        up, down = (
            backprop.gradients(spec, {**weights, name: weight + s * h * way}, x, y)[0]
            for s in (1, -1)
        )
        assert (grads[name] * way).sum() == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-8)
    assert loss == pytest.approx(np.log(3), abs=1.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_network_gradients_have_the_weights_precision(dtype):
    spec = MLPSpec(5, 3, width=6, depth=2, normalization="batch", skip=1.0)
    weights = {name: w.astype(dtype) for name, w in initial_weights(spec).items()}
    _, grads = backprop.gradients(spec, weights, *batch(spec))
    assert {g.dtype for g in grads.values()} == {np.dtype(dtype)}
    assert {n: g.shape for n, g in grads.items()} == {n: w.shape for n, w in weights.items()}


def test_cross_entropy_of_huge_logits_is_finite():
    logits = Tensor([[1000.0, 0.0], [0.0, 1000.0]])
    loss = backprop.cross_entropy(logits, np.array([0, 0]))
    loss.backward()
    assert loss.data == pytest.approx(500)
    np.testing.assert_allclose(logits.grad, [[0, 0], [-0.5, 0.5]], atol=1e-12)
