"""Keras side of gradlab, on TensorFlow: the same names as `gradlab.torch`."""

import contextlib as _contextlib
import os as _os
import tempfile as _tempfile


@_contextlib.contextmanager
def _quiet_import():
    """Hold back what TensorFlow's C++ says while it is imported, unless the import fails.

    It says it before its log level is in force, straight to the file descriptor, so
    `TF_CPP_MIN_LOG_LEVEL=3` does not reach it; only who has set that is spared.
    """
    if _os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "3":
        yield
        return
    with _tempfile.TemporaryFile() as said:
        descriptor = _os.dup(2)
        _os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            _os.write(descriptor, said.read())
            raise
        finally:
            _os.dup2(descriptor, 2)
            _os.close(descriptor)


try:
    with _quiet_import():
        import keras
        import tensorflow as _tf  # noqa: F401
except ImportError as error:
    raise ImportError(
        "gradlab.keras needs TensorFlow and Keras, which are not installed: "
        "pip install tensorflow keras"
    ) from error

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"gradlab.keras works with Keras's TensorFlow backend, Keras runs on "
        f"{keras.backend.backend()!r}: set KERAS_BACKEND=tensorflow before the first import"
    )

from gradlab.keras.models import MLP
from gradlab.keras.probe import GradientProbe, NonFiniteGradientError

__all__ = ["MLP", "GradientProbe", "NonFiniteGradientError"]
