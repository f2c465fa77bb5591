"""gradlab: measure, predict and explain gradients that explode.

The framework-free half (`data`, `theory`, `backprop`, `mlp`, `history`, `claims`, `plot`) needs
NumPy, SciPy and matplotlib.  `gradlab.torch` and `gradlab.keras` hold the same names for the two
frameworks; importing `gradlab` imports neither.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = frozenset(
    [
        "backprop",
        "checkpoint",
        "claims",
        "cli",
        "clip",
        "convnet",
        "data",
        "diagnosis",
        "forecast",
        "formats",
        "history",
        "keras",
        "lanczos",
        "lbfgs",
        "measurements",
        "mlp",
        "notebook",
        "plot",
        "processes",
        "recurrent",
        "remedies",
        "residual",
        "resnet",
        "sweep",
        "theory",
        "torch",
        "training",
        "transformer",
        "trials",
        "updates",
    ]
)


def __getattr__(name: str):
    """Import a module of the package when it is first used."""
    if name in _MODULES:
        return import_module(f"gradlab.{name}")
    raise AttributeError(f"module 'gradlab' has no attribute {name!r}; it has {sorted(_MODULES)}")


def __dir__() -> list[str]:
    return sorted(_MODULES | {"__version__"})
