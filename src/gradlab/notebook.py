"""What every notebook does first: one thread a framework, a quiet TensorFlow, style and seed."""

from __future__ import annotations

import os
import sys

#: What a notebook's process runs with.  Notebooks run side by side, so one thread per framework;
#: two of one framework on a busy two-core machine cost far more than they bring.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    # TensorFlow writes to the file descriptor, past every Python filter.
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
}


def base_seed() -> int:
    """The seed that all of a notebook's seeds derive from: `GRADLAB_SEED`, or 0.

    Raises:
        ValueError: `GRADLAB_SEED` is set to something that is no integer ≥ 0.
    """
    text = os.environ.get("GRADLAB_SEED", "0")
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"GRADLAB_SEED must be an integer of at least 0, got {text!r}")
    return int(text)


def setup() -> int:
    """Prepare a notebook's process and return its base seed.

    Call it before the first import of PyTorch or TensorFlow: the thread counts are read once, at
    import.  Later calls only set the style.
    """
    from gradlab import plot

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    plot.use_style()
    return base_seed()
