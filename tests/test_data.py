"""The data sets: what they hold, that a seed fixes them, and what happens without a network."""

from __future__ import annotations

import hashlib
import io
from urllib.error import URLError

import numpy as np
import pytest

from gradlab import data


def test_digits_have_the_shapes_and_types_they_promise():
    split = data.digits()
    assert split.x_train.shape == (1437, 64)
    assert split.x_test.shape == (360, 64)
    assert split.y_train.shape == (1437,)
    assert split.y_test.shape == (360,)
    assert split.x_train.dtype == split.x_test.dtype == np.float32
    assert split.y_train.dtype == split.y_test.dtype == np.int64
    assert (split.features, split.classes) == (64, 10)


def test_standard_digits_are_standardised_on_the_training_part():
    raw, standard = data.digits("raw"), data.digits("standard")
    mean, std = standard.x_train.mean(0), standard.x_train.std(0)
    varies = raw.x_train.std(0) > 0
    assert not varies.all()  # some pixels are always blank
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(std[varies], 1, rtol=1e-4)
    assert (standard.x_train[:, ~varies] == 0).all()
    assert (standard.x_test[:, ~varies] == 0).all()
    # The test part goes through the training part's shift and scale, not its own.
    expected = (raw.x_test - raw.x_train.mean(0))[:, varies] / raw.x_train.std(0)[varies]
    np.testing.assert_allclose(standard.x_test[:, varies], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 7.3, -123.4])
def test_a_constant_feature_becomes_zero_whatever_its_value(constant, dtype):
    x = np.full((1437, 2), constant, dtype=dtype)
    x[:, 1] = np.linspace(-1, 1, 1437)
    train, other = data.standardize(x, x + 1)
    assert (train[:, 0] == 0).all()
    assert (other[:, 0] == 0).all()
    assert train[:, 1].std() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_standardizes_can_be_kept_and_gives_the_same_bits(dtype):
    rng = np.random.default_rng(0)
    train, other = (rng.normal(5, 3, (n, 4)).astype(dtype) for n in (50, 7))
    train[:, 2] = 0.1
    kept = data.Standardization.of(train)
    std = train.std(axis=0, dtype=float)
    wanted = np.array([0 if i == 2 else 1 / std[i] for i in range(4)])
    assert kept.mean.tobytes() == train.mean(axis=0, dtype=float).tobytes()
    assert kept.scale.tobytes() == wanted.tobytes()
    for x, made in zip((train, other), data.standardize(train, other), strict=True):
        by_hand = ((x - kept.mean) * kept.scale).astype(np.float32)
        assert made.tobytes() == by_hand.tobytes() == kept(x).tobytes()
        assert made.dtype == np.float32


@pytest.mark.parametrize(("scale", "top"), [("unit", 1), ("raw", 16)])
def test_other_scales(scale, top):
    split = data.digits(scale)
    assert (split.x_train.min(), split.x_train.max()) == (0, top)


def test_digits_depend_on_the_seed_and_on_nothing_else():
    one, same, other = data.digits(seed=3), data.digits(seed=3), data.digits(seed=4)
    np.testing.assert_array_equal(one.x_train, same.x_train)
    np.testing.assert_array_equal(one.y_test, same.y_test)
    assert (one.y_train != other.y_train).any()


def test_train_and_test_part_share_no_sample():
    split = data.digits("raw")
    everything = np.concatenate([split.x_train, split.x_test])
    from sklearn.datasets import load_digits

    expected = load_digits().data
    np.testing.assert_array_equal(
        np.sort(everything, axis=None), np.sort(expected.astype("float32"), axis=None)
    )
    assert len(np.unique(everything, axis=0)) == len(np.unique(expected, axis=0))


def test_fewer_training_samples_are_the_first_ones():
    few, all_of_them = data.digits("raw", n_train=100), data.digits("raw")
    np.testing.assert_array_equal(few.x_train, all_of_them.x_train[:100])
    assert len(few.y_train) == 100
    assert len(few.x_test) == 360


def test_random_labels_carry_no_information_but_the_test_labels_stay():
    true, random = data.digits(), data.digits(random_labels=True)
    np.testing.assert_array_equal(true.x_train, random.x_train)
    np.testing.assert_array_equal(true.y_test, random.y_test)
    assert random.y_train.dtype == np.int64
    assert set(random.y_train) == set(range(10))
    assert (true.y_train == random.y_train).mean() < 0.15  # chance is 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "minmax"}, "'standard', 'unit' or 'raw', got 'minmax'"),
        ({"n_train": 0}, "between 1 and 1437, got 0"),
        ({"n_train": 1438}, "got 1438"),
    ],
)
def test_digits_name_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.digits(**arguments)


def test_stocks_run_forward_in_time():
    dates, prices = data.stocks()
    assert dates.dtype == np.dtype("datetime64[D]")
    assert prices.dtype == np.float64
    assert dates.shape == prices.shape
    assert (np.diff(dates) > np.timedelta64(0, "D")).all()
    assert dates[0] == np.datetime64("2004-08-19")  # Google's first day at the stock exchange
    assert 50 < prices[0] < 150
    assert prices.max() > 500


def test_fields_belong_to_their_dates():
    _, low = data.stocks("low")
    _, high = data.stocks("high")
    _, close = data.stocks("close")
    assert (low <= close).all()
    assert (close <= high).all()


def test_stocks_name_an_unknown_field():
    with pytest.raises(ValueError, match=r"adj_close.*got 'price'"):
        data.stocks("price")


def test_blobs_are_unit_clouds_around_their_centres():
    split = data.blobs(3000, features=5, classes=3, separation=10.0, seed=1)
    assert split.x_train.shape == (2400, 5)
    assert split.x_test.shape == (600, 5)
    assert split.x_train.dtype == np.float32
    assert split.y_train.dtype == np.int64
    assert split.classes == 3
    centres = []
    for number in range(3):
        cloud = split.x_train[split.y_train == number]
        assert len(cloud) == pytest.approx(800, abs=80)
        np.testing.assert_allclose(cloud.std(0), 1, atol=0.1)
        centres.append(cloud.mean(0))
        np.testing.assert_allclose(  # both parts come from the same clouds
            split.x_test[split.y_test == number].mean(0), centres[-1], atol=0.4
        )
    assert np.ptp(centres, axis=0).max() > 3
    np.testing.assert_array_equal(
        data.blobs(3000, features=5, classes=3, separation=10.0, seed=1).x_test, split.x_test
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 10, "classes": 6}, "n=10, classes=6"),
        ({"features": 0}, "features=0"),
        ({"test_fraction": 0.0}, "test_fraction .* got 0.0"),
        ({"test_fraction": 1.0}, "test_fraction .* got 1.0"),
    ],
)
def test_blobs_name_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.blobs(**arguments)


def mnist_file(monkeypatch) -> tuple[bytes, np.ndarray]:
    """A small file of MNIST's form, taken for the real one, and its images."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (7, 28, 28), np.uint8), rng.integers(0, 10, 7).astype(np.uint8)
    x[0, 0, :2] = 0, 255
    file = io.BytesIO()
    np.savez(file, x_train=x[:5], y_train=y[:5], x_test=x[5:], y_test=y[5:])
    content = file.getvalue()
    monkeypatch.setattr(data, "_MNIST_SHA256", hashlib.sha256(content).hexdigest())
    return content, x


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Where Keras and gradlab keep what they download; and nothing is downloaded."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))

    def offline(url, timeout):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(data, "urlopen", offline)
    return tmp_path / "keras"


def test_mnist_without_a_network_points_to_the_digits(home):
    with pytest.raises(data.DataUnavailable, match=r"name resolution.*gradlab\.data\.digits"):
        data.mnist()
    assert not home.exists()


def test_mnist_is_downloaded_once_and_kept_for_keras(home, monkeypatch):
    content, _ = mnist_file(monkeypatch)
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(data, "urlopen", answer)
    one, two = data.mnist(), data.mnist()
    assert asked == [data.MNIST_URL]
    assert (home / "datasets" / "mnist.npz").read_bytes() == content
    np.testing.assert_array_equal(one.x_train, two.x_train)


def test_mnist_s_address_and_digest_are_those_of_keras():
    import inspect

    from gradlab.keras import keras

    source = inspect.getsource(inspect.getmodule(keras.datasets.mnist.load_data))
    folder, _, name = data.MNIST_URL.rpartition("/")
    assert f"{folder}/" in source
    assert name in source
    assert data._MNIST_SHA256 in source


def test_a_damaged_copy_of_mnist_is_refused(home, monkeypatch):
    content, _ = mnist_file(monkeypatch)
    (home / "datasets").mkdir(parents=True)
    (home / "datasets" / "mnist.npz").write_bytes(content[:-3])
    with pytest.raises(data.DataUnavailable, match="SHA-256 is another"):
        data.mnist()


def test_mnist_is_flattened_and_scaled(home, monkeypatch):
    content, x = mnist_file(monkeypatch)
    (home / "datasets").mkdir(parents=True)
    (home / "datasets" / "mnist.npz").write_bytes(content)
    split = data.mnist()
    assert split.x_train.shape == (5, 784)
    assert split.x_train.dtype == np.float32
    assert split.y_test.dtype == np.int64
    assert (split.x_train.min(), split.x_train.max()) == (0, 1)
    np.testing.assert_allclose(split.x_test[1] * 255, x[6].ravel(), rtol=1e-6)
