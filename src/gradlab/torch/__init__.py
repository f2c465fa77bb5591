"""PyTorch side of gradlab: the same names as `gradlab.keras`."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "gradlab.torch needs PyTorch, which is not installed: pip install torch"
    ) from error

from gradlab.torch import clip, lbfgs, residual, sweep
from gradlab.torch.diagnose import diagnose
from gradlab.torch.initialize import lsuv_
from gradlab.torch.models import MLP
from gradlab.torch.probe import GradientProbe, NonFiniteGradientError

__all__ = [
    "MLP",
    "GradientProbe",
    "NonFiniteGradientError",
    "clip",
    "diagnose",
    "lbfgs",
    "lsuv_",
    "residual",
    "sweep",
]
