"""Keras side of gradlab, on TensorFlow: the same names as `gradlab.torch`."""

from gradlab.keras._backend import keras  # first: it imports quietly, or says what is missing

# isort: split
from gradlab.keras import lbfgs, sweep
from gradlab.keras.diagnose import diagnose
from gradlab.keras.models import MLP
from gradlab.keras.probe import GradientProbe, NonFiniteGradientError

__all__ = ["MLP", "GradientProbe", "NonFiniteGradientError", "diagnose", "keras", "lbfgs", "sweep"]
