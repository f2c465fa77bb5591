"""Import Keras on TensorFlow, quietly, or say what is missing."""

import contextlib
import os
import tempfile


@contextlib.contextmanager
def quiet_import():
    """Hold back what TensorFlow's C++ says while it is imported, unless the import fails.

    It says it before its log level is in force, straight to the file descriptor, so
    `TF_CPP_MIN_LOG_LEVEL=3` does not reach it; only who has set that is spared.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "3":
        yield
        return
    with tempfile.TemporaryFile() as said:
        descriptor = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except Exception:  # an interrupt is no failure of TensorFlow's
            said.seek(0)
            os.write(descriptor, said.read())
            raise
        finally:
            os.dup2(descriptor, 2)
            os.close(descriptor)


try:
    with quiet_import():
        import keras
        import tensorflow  # noqa: F401
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
