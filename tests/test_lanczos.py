"""The largest eigenvalue, against NumPy's."""

import numpy as np
import pytest

from gradlab.lanczos import largest_eigenvalue, start_near


def symmetric(eigenvalues: np.ndarray) -> np.ndarray:
    n = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(n, n)))[0]
    return q @ np.diag(eigenvalues) @ q.T


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_finds_the_largest_and_not_the_largest_in_magnitude(shift):
    a = symmetric(np.concatenate([np.linspace(-5, 1, 60), [4.0]]) + shift)
    gradient = a @ np.ones(61)
    value, vector, settled = largest_eigenvalue(lambda v: a @ v, start_near(gradient), 20)
    assert settled
    assert value == pytest.approx(np.linalg.eigvalsh(a)[-1], rel=0.03)
    assert vector @ a @ vector == pytest.approx(value, rel=1e-6)
    assert np.linalg.norm(vector) == pytest.approx(1)


def test_is_exact_for_one_number():
    assert largest_eigenvalue(lambda v: 18 * v, start_near(np.array([3.0])))[::2] == (18.0, True)


def test_applies_the_map_no_more_often_than_allowed():
    calls = []

    def product(v):
        calls.append(1)
        return np.linspace(-1, 1, len(v)) ** 3 * v

    assert not largest_eigenvalue(product, start_near(np.zeros(500)), 3)[2]
    assert len(calls) == 3


def test_a_gradient_of_zero_and_one_that_overflows_its_square():
    for gradient in (np.zeros(4), np.full(4, 1e200)):
        start = start_near(gradient)
        assert np.isfinite(start).all()
        assert start.any()


def test_a_map_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="not finite"):
        largest_eigenvalue(lambda v: v * np.nan, np.ones(3))
