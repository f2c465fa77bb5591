"""`gradlab.formats` against NumPy's and ml_dtypes' own formats."""

import ml_dtypes
import numpy as np
import pytest

from gradlab.formats import FORMATS

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_limits_are_those_of_the_dtype(name):
    ours, theirs = FORMATS[name], ml_dtypes.finfo(DTYPES[name])
    assert ours.largest == float(theirs.max)
    assert ours.smallest_normal == float(theirs.smallest_normal)
    assert ours.smallest == float(theirs.smallest_subnormal)
    assert ours.epsilon == float(theirs.eps)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_rounding_is_the_cast(name):
    ours, rng = FORMATS[name], np.random.default_rng(0)
    logs = np.log2(ours.smallest), np.log2(ours.largest)
    x = rng.choice([-1, 1], 20_000) * 2.0 ** rng.uniform(logs[0] - 3, logs[1] + 1, 20_000)
    edges = [0.0, ours.overflow, ours.largest, ours.smallest / 2, np.inf, -np.inf, 0.1, 3.0]
    x = np.concatenate([x, edges, np.nextafter(edges, 0), -np.array(edges)])
    # ml_dtypes casts float64 to bfloat16 through float32: give it numbers that float32 holds
    with np.errstate(over="ignore"):
        x = x.astype(np.float32).astype(float) if name == "bfloat16" else x
        assert np.array_equal(ours.round(x), x.astype(DTYPES[name]).astype(float))


def test_ties_go_to_the_even_neighbour():
    assert FORMATS["bfloat16"].round([256.0, 257.0, 259.0]).tolist() == [256.0, 256.0, 260.0]
    assert FORMATS["float16"].round([2049.0, 2051.0]).tolist() == [2048.0, 2052.0]


def test_what_is_not_finite_stays():
    rounded = FORMATS["float16"].round([np.nan, np.inf, -np.inf, -1e9])
    assert np.isnan(rounded[0])
    assert rounded[1:].tolist() == [np.inf, -np.inf, -np.inf]


def test_float64_rounds_to_itself():
    x = np.random.default_rng(0).normal(size=100)
    assert np.array_equal(FORMATS["float64"].round(x), x)


def test_spacing_is_the_distance_to_the_next_number():
    x = np.array([1.0, 1.5, 2.0, 1000.0, 3e-5, 1e-7], np.float16)
    assert np.array_equal(FORMATS["float16"].spacing(x), np.spacing(x).astype(float))
