"""Keras side of gradlab, on TensorFlow: the same names as `gradlab.torch`."""

from gradlab.keras._backend import keras  # first: it imports quietly, or says what is missing

# isort: split
from gradlab.keras import clip, lbfgs, residual, sweep
from gradlab.keras.diagnose import diagnose
from gradlab.keras.initialize import lsuv_
from gradlab.keras.models import MLP
from gradlab.keras.probe import GradientProbe, NonFiniteGradientError

__all__ = [
    "MLP",
    "GradientProbe",
    "NonFiniteGradientError",
    "clip",
    "diagnose",
    "keras",
    "lbfgs",
    "lsuv_",
    "residual",
    "sweep",
]
