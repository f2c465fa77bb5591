"""The book's data, as NumPy arrays: small, real, and on every machine.

`digits` and `stocks` come with scikit-learn and matplotlib and need no network.  `mnist` is
downloaded once.  `blobs` are synthetic.
"""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np

from gradlab.checkpoint import replacing

MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
"""The file that Keras's own loader takes."""

_MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"

N_TRAIN = 1437
"""Digits in the training set; the other 360 are the test set (an 80/20 split)."""


@dataclass(frozen=True)
class Split:
    """A data set for classification, cut into training and test part.

    Attributes:
        x_train: float32, (samples, features).
        y_train: int64 class numbers, (samples,).
        x_test: as `x_train`.
        y_test: as `y_train`.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    @property
    def features(self) -> int:
        """Number of input features."""
        return self.x_train.shape[1]


class DataUnavailable(RuntimeError):
    """The data has to be downloaded and could not be."""


class Standardization(NamedTuple):
    """What shifts and scales each feature to mean 0 and standard deviation 1: (x - mean) * scale.

    Attributes:
        mean: (features,), float64.
        scale: (features,), float64, one over the standard deviation; 0 for a feature without one.
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, train: np.ndarray) -> Standardization:
        """That of a training part, (samples, features); see `standardize`."""
        # In float64: in float32 the mean of a constant misses it by a rounding error.
        mean, std = train.mean(axis=0, dtype=float), train.std(axis=0, dtype=float)
        varies = train.max(axis=0) > train.min(axis=0)
        return cls(mean, np.divide(1.0, std, out=np.zeros_like(std), where=varies))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Samples (samples, features) so treated, float32."""
        return ((x - self.mean) * self.scale).astype(np.float32)


def standardize(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shift and scale each feature to mean 0 and standard deviation 1 on the training part.

    A feature that never varies on the training part (a pixel that is always blank) has no scale:
    it is set to 0 everywhere, rather than divided by almost nothing.

    Args:
        train: (samples, features), fixes the shift and the scale.
        others: arrays with as many features, transformed alike.
    """
    return tuple(map(Standardization.of(train), (train, *others)))


def digits(
    scale: str = "standard",
    *,
    n_train: int | None = None,
    seed: int = 0,
    random_labels: bool = False,
) -> Split:
    """scikit-learn's 1797 handwritten digits, 8×8 pixels, 10 classes.

    Args:
        scale: "standard" (each pixel mean 0, standard deviation 1 over the training part), "unit"
            (0 to 1) or "raw" (0 to 16, as stored).
        n_train: keep this many training samples (at most 1437); None keeps all.
        seed: of the shuffle that makes the split.
        random_labels: replace the training labels by random ones: nothing can be learnt from
            them, only memorised.

    Raises:
        ValueError: an unknown scale, or n_train out of range.
    """
    from sklearn.datasets import load_digits

    if scale not in ("standard", "unit", "raw"):
        raise ValueError(f"scale must be 'standard', 'unit' or 'raw', got {scale!r}")
    if n_train is not None and not 1 <= n_train <= N_TRAIN:
        raise ValueError(f"n_train must be between 1 and {N_TRAIN}, got {n_train!r}")
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x, y = x[order].astype(np.float32), y[order].astype(np.int64)
    x_train, x_test = x[:N_TRAIN], x[N_TRAIN:]
    if scale == "standard":
        x_train, x_test = standardize(x_train, x_test)
    elif scale == "unit":
        x_train, x_test = x_train / 16, x_test / 16
    y_train, y_test = y[:N_TRAIN], y[N_TRAIN:]
    if random_labels:
        y_train = rng.integers(0, 10, len(y_train))
    return Split(x_train[:n_train], y_train[:n_train], x_test, y_test)


def mnist() -> Split:
    """MNIST: 60 000 + 10 000 digits of 28×28 pixels, scaled to [0, 1].

    The first call downloads 11 MB to where Keras looks for them too, `~/.keras/datasets`.

    Raises:
        DataUnavailable: there is no network and no copy, or the copy is damaged; the message points
            to `digits`.
    """
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    path = home / "datasets" / "mnist.npz"
    try:
        content = path.read_bytes() if path.exists() else _fetch(MNIST_URL)
    except (OSError, HTTPException) as error:
        raise DataUnavailable(
            f"MNIST could not be downloaded ({error}). gradlab.data.digits(), which is --data "
            "digits on the command line, needs no network."
        ) from error
    if hashlib.sha256(content).hexdigest() != _MNIST_SHA256:
        raise DataUnavailable(
            f"{path if path.exists() else MNIST_URL} does not hold MNIST as it was published: its "
            "SHA-256 is another. Delete the file if it is yours, or take gradlab.data.digits()."
        )
    if not path.exists():
        with suppress(OSError):  # kept if it can be
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_bytes(content)
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        x_train, y_train, x_test, y_test = (
            file[name] for name in ("x_train", "y_train", "x_test", "y_test")
        )

    def flatten(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1).astype(np.float32) / 255

    return Split(
        flatten(x_train), y_train.astype(np.int64), flatten(x_test), y_test.astype(np.int64)
    )


def _fetch(url: str) -> bytes:
    with urlopen(url, timeout=30) as answer:
        return answer.read()


def stocks(field: str = "adj_close") -> tuple[np.ndarray, np.ndarray]:
    """Daily prices of Google's share, 2004 to 2008, as shipped with matplotlib.

    Args:
        field: "open", "high", "low", "close", "adj_close" (US dollars) or "volume" (shares).

    Returns:
        dates (days,), datetime64[D], ascending; values (days,), float64.

    Raises:
        ValueError: an unknown field.
    """
    from matplotlib import cbook

    table = cbook.get_sample_data("goog.npz")["price_data"]
    fields = [name for name in table.dtype.names if name != "date"]
    if field not in fields:
        raise ValueError(f"field must be one of {fields}, got {field!r}")
    order = np.argsort(table["date"])
    return table["date"][order].astype("datetime64[D]"), table[field][order].astype(np.float64)


def blobs(
    n: int = 1000,
    *,
    features: int = 10,
    classes: int = 10,
    separation: float = 3.0,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Split:
    """Gaussian clouds of unit variance, one per class, around random centres.

    Args:
        n: samples in all.
        features: dimensions.
        classes: number of clouds.
        separation: standard deviation of the centres' coordinates, in units of a cloud's own.
        test_fraction: share of the samples that becomes the test part.
        seed: of centres, samples and split.

    Raises:
        ValueError: fewer than two samples a class, or a test fraction that leaves a part empty.
    """
    if classes < 1 or features < 1 or n < 2 * classes:
        raise ValueError(
            f"need n ≥ 2 × classes ≥ 2 and features ≥ 1, got n={n}, classes={classes}, "
            f"features={features}"
        )
    n_test = round(n * test_fraction)
    if not 0 < n_test < n:
        raise ValueError(f"test_fraction must leave samples on both sides, got {test_fraction!r}")
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, separation, (classes, features))
    y = rng.permutation(np.arange(n) % classes)
    x = (centres[y] + rng.normal(size=(n, features))).astype(np.float32)
    return Split(x[n_test:], y[n_test:], x[:n_test], y[:n_test])
