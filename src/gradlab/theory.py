"""Predictions, made before anything is measured: mean field, growth factors, stability limits.

A wide random network is, layer by layer, a sum of many independent terms, so its pre-activations
are Gaussian and one number, their variance q, describes a layer.  With weights of variance
σ_w²/fan-in, biases of variance σ_b² and activation φ,

    q'  = σ_w² E[φ(√q z)²] + σ_b²         variance of the next layer's pre-activations
    χ   = σ_w² E[φ'(√q z)²]               growth of the squared gradient norm, per layer, backwards

with z a standard normal number (Poole et al. 2016; Schoenholz et al. 2017).  Norms grow by √χ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

ArrayFunction = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Activation:
    """An activation function with its derivative, both elementwise on arrays."""

    name: str
    f: ArrayFunction
    df: ArrayFunction

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.f(x)


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
_SQRT_2PI = np.sqrt(2 * np.pi)


def _elu(x: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _elu_slope(x: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    return np.where(x > 0, 1.0, alpha * np.exp(np.minimum(x, 0)))


def _gelu_slope(x: np.ndarray) -> np.ndarray:
    return special.ndtr(x) + x * np.exp(-x * x / 2) / _SQRT_2PI


def _silu_slope(x: np.ndarray) -> np.ndarray:
    s = special.expit(x)
    return s * (1 + x * (1 - s))


_ACTIVATIONS = {
    "linear": (lambda x: np.asarray(x, float), lambda x: np.ones_like(x, dtype=float)),
    "relu": (lambda x: np.maximum(x, 0), lambda x: np.where(x > 0, 1.0, 0.0)),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "sigmoid": (special.expit, lambda x: special.expit(x) * special.expit(-x)),
    "gelu": (lambda x: x * special.ndtr(x), _gelu_slope),
    "silu": (lambda x: x * special.expit(x), _silu_slope),
    "softplus": (lambda x: np.logaddexp(0, x), special.expit),
    "elu": (_elu, _elu_slope),
    "selu": (
        lambda x: _SELU_SCALE * _elu(x, _SELU_ALPHA),
        lambda x: _SELU_SCALE * _elu_slope(x, _SELU_ALPHA),
    ),
}


def leaky_relu(slope: float = 0.01) -> Activation:
    """x for x > 0 and slope·x elsewhere."""
    return Activation(
        f"leaky_relu({slope:g})",
        lambda x: np.where(x > 0, x, slope * x),
        lambda x: np.where(x > 0, 1.0, slope),
    )


def _central_difference(f: ArrayFunction, x: np.ndarray) -> np.ndarray:
    """Slope of f at x, from two points that lie on x's own side of a kink at 0."""
    # Near the cube root of the machine epsilon rounding and truncation balance.
    h = 1e-5 * np.maximum(1, np.abs(x))
    h = np.where(x == 0, h, np.minimum(h, np.abs(x) / 2))
    return (f(x + h) - f(x - h)) / (2 * h)


def activation(which: str | ArrayFunction | Activation) -> Activation:
    """An activation by name, or any elementwise function.

    Args:
        which: a name ("relu", "tanh", …), an `Activation`, or a function of an array.  A
            function's derivative is taken by central differences (error about 1e-10).

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a function.
    """
    if isinstance(which, Activation):
        return which
    if isinstance(which, str):
        if which == "leaky_relu":
            return leaky_relu()
        if which not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {which!r}; known: {activation_names()}")
        return Activation(which, *_ACTIVATIONS[which])
    if callable(which):
        return Activation(
            getattr(which, "__name__", "custom"), which, lambda x: _central_difference(which, x)
        )
    raise TypeError(f"activation must be a name or a function of an array, got {which!r}")


def activation_names() -> list[str]:
    """Names that `activation` knows."""
    return sorted([*_ACTIVATIONS, "leaky_relu"])


# ---------------------------------------------------------------------------------------------
# Mean field

# Gauss–Legendre on each side of 0 rather than Gauss–Hermite across it: most activations of today
# have a kink at 0, at which a rule that assumes one smooth function converges slowly.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_Z = 6.0 * (_NODES + 1)  # (0, 12): beyond 12 standard deviations lies 1e-33 of the mass
_Z = np.concatenate([-_Z[::-1], _Z])
_MASS = 6.0 * np.concatenate([_WEIGHTS[::-1], _WEIGHTS]) * np.exp(-(_Z**2) / 2) / _SQRT_2PI


def gaussian_mean(f: ArrayFunction, q: float = 1.0) -> float:
    """E[f(√q z)] over a standard normal z, by quadrature.

    Args:
        f: elementwise function, smooth on either side of 0.
        q: variance, ≥ 0.

    Raises:
        ValueError: a negative or non-finite variance.
    """
    if not (np.isfinite(q) and q >= 0):
        raise ValueError(f"the variance q must be finite and ≥ 0, got {q!r}")
    return float(_MASS @ f(np.sqrt(q) * _Z))


def variance_map(
    q: float, which: str | ArrayFunction | Activation, sigma_w: float, sigma_b: float = 0.0
) -> float:
    """Variance of the next layer's pre-activations: σ_w² E[φ(√q z)²] + σ_b².

    Args:
        q: variance of this layer's pre-activations.
        which: the activation φ, see `activation`.
        sigma_w: gain: weights have standard deviation sigma_w/√fan-in.
        sigma_b: standard deviation of the biases.
    """
    phi = activation(which)
    return sigma_w**2 * gaussian_mean(lambda x: phi.f(x) ** 2, q) + sigma_b**2


def fixed_point(
    which: str | ArrayFunction | Activation,
    sigma_w: float,
    sigma_b: float = 0.0,
    *,
    q0: float = 1.0,
) -> float:
    """The variance q* at which a deep network's pre-activations settle.

    Args:
        which: the activation.
        sigma_w: gain, > 0.
        sigma_b: standard deviation of the biases.
        q0: variance of the first layer.  It matters where q* depends on the start: a ReLU network
            at its critical gain keeps the variance that it is given.

    Returns:
        q*, which is 0 when the signal dies out and inf when it grows without bound.
    """
    if not sigma_w > 0 or sigma_b < 0 or not q0 > 0:
        raise ValueError(
            f"need sigma_w > 0, sigma_b ≥ 0 and q0 > 0, got {sigma_w!r}, {sigma_b!r}, {q0!r}"
        )
    phi = activation(which)

    def drift(log_q: float) -> float:
        q = np.exp(log_q)
        return variance_map(q, phi, sigma_w, sigma_b) / q - 1

    # The variance walks from q0 up or down until the drift changes sign.  Doubling or halving
    # q brackets that point in as many steps as the answer has binary digits of distance.
    here = np.log(q0)
    slope = drift(here)
    if abs(slope) < 1e-9:
        return float(q0)
    step = np.log(2) * np.sign(slope)
    while abs(here) < 60:
        if drift(here + step) * slope <= 0:
            low, high = sorted((here, here + step))
            return float(np.exp(optimize.brentq(drift, low, high, xtol=1e-13)))
        here += step
    return float("inf") if step > 0 else 0.0


def chi(
    which: str | ArrayFunction | Activation,
    sigma_w: float,
    sigma_b: float = 0.0,
    *,
    q: float | None = None,
) -> float:
    """χ = σ_w² E[φ'(√q z)²]: growth of the squared gradient norm per layer, going backwards.

    Args:
        which: the activation.
        sigma_w: gain.
        sigma_b: standard deviation of the biases.
        q: variance of the pre-activations; None uses the fixed point.  Where that is 0 or
            infinite, χ is its limit there.

    Returns:
        χ ≥ 0; gradients explode with depth when χ > 1 and vanish when χ < 1.
    """
    phi = activation(which)
    if q is None:
        q = np.clip(fixed_point(phi, sigma_w, sigma_b), 1e-24, 1e24)
    return sigma_w**2 * gaussian_mean(lambda x: phi.df(x) ** 2, float(q))


def growth_factor(
    which: str | ArrayFunction | Activation,
    sigma_w: float,
    sigma_b: float = 0.0,
    *,
    q: float | None = None,
) -> float:
    """√χ: growth of the gradient's norm per layer, going backwards; see `chi`."""
    return float(np.sqrt(chi(which, sigma_w, sigma_b, q=q)))


def critical_gain(which: str | ArrayFunction | Activation) -> float:
    """The gain at which a small signal's gradient neither grows nor shrinks: 1/√E[φ'²] near 0.

    √2 for ReLU (He et al. 2015), 1 for tanh and linear layers, 4 for the sigmoid.
    """
    phi = activation(which)
    return 1 / np.sqrt(gaussian_mean(lambda x: phi.df(x) ** 2, 1e-12))


# ---------------------------------------------------------------------------------------------
# Normalisation


def normalization_growth(
    kind: str, which: str | ArrayFunction | Activation = "relu", size: int | None = None
) -> float:
    """Growth of the gradient's norm per layer when every layer is normalised before its activation.

    The layers have no skips and are at initialisation, scale 1 and shift 0; the gain of the weights
    cancels.  With z a standard normal number, the squared norm grows by E[φ'(z)²]/E[φ(z)²] under
    layer and group normalisation and by E[φ'(z)²]/Var[φ(z)], which is never below 1, under batch
    normalisation; for ReLU that is 1 and π/(π−1) (Yang et al. 2019).  Normalising only n numbers
    multiplies it by (n−2)/(n−3) and, in a batch, correlates the samples by −1/(n−1).

    Args:
        kind: "layer", "group" or "batch".
        which: the activation.
        size: how many numbers are normalised together: the width, the units of a group, or the
            samples of a batch.  None takes infinitely many.

    Returns:
        The factor, which is infinite for a size of 3 or less: the mean of the squared gradient does
        not exist then.

    Raises:
        ValueError: an unknown kind; a finite size for an activation other than "linear", "relu" and
            "leaky_relu" (or a `leaky_relu(slope)`), for which there is no closed form.

    Example:
        >>> round(normalization_growth("batch", "relu"), 3)
        1.211
    """
    if kind not in ("layer", "group", "batch"):
        raise ValueError(f"kind must be 'layer', 'group' or 'batch', got {kind!r}")
    phi = activation(which)
    slopes = gaussian_mean(lambda x: phi.df(x) ** 2)
    square = gaussian_mean(lambda x: phi.f(x) ** 2)
    mean = gaussian_mean(phi.f) if kind == "batch" else 0.0
    if size is None:
        return float(np.sqrt(slopes / (square - mean**2)))
    low, high = (float(phi.f(np.array(x))) for x in (-1.0, 1.0))
    if not np.allclose(phi.f(3 * _Z), np.where(_Z > 0, high, -low) * 3 * _Z):
        raise ValueError(
            "a finite size needs an activation of two straight pieces, "
            f"got {phi.name!r}, size={size}"
        )
    if size <= 3:
        return float("inf")
    finite = (size - 2) / (size - 3)
    if kind != "batch":
        return float(np.sqrt(finite * slopes / square))
    # φ = s·x + r·relu(x); two samples of a batch are correlated by rho (Cho and Saul's kernels)
    s, r, rho = -low, high + low, -1 / (size - 1)
    both_kept = 0.25 + np.arcsin(rho) / (2 * np.pi)
    kernel = (np.sqrt(1 - rho**2) + rho * (np.pi - np.arccos(rho))) / (2 * np.pi)
    cross = s**2 * rho + s * r * rho + r**2 * kernel
    slopes += (s**2 + s * r + r**2 * both_kept) / (size - 1)
    return float(np.sqrt(finite * slopes / (square - cross)))


# ---------------------------------------------------------------------------------------------
# Step size


def stability_limit(method: str = "gradient descent", momentum: float = 0.0) -> float:
    """Largest learning rate × curvature at which a method is stable on a quadratic.

    Args:
        method: "gradient descent" (2), "momentum" (Polyak's heavy ball, 2(1+β)), "nesterov"
            (2(1+β)/(1+2β)) or "adam" (2(1+β)/(1−β), β being β₁: its momentum is an average).
        momentum: β, 0 ≤ β < 1; gradient descent takes none.

    Returns:
        The limit of lr·λ, λ being the largest eigenvalue of the Hessian; for Adam, of the Hessian
        divided by its denominators, while these stand still.

    Raises:
        ValueError: an unknown method, or a momentum out of range.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
    match method:
        case "gradient descent":
            if momentum:
                raise ValueError(f"gradient descent has no momentum, got {momentum!r}")
            return 2.0
        case "momentum":
            return 2 * (1 + momentum)
        case "nesterov":
            return 2 * (1 + momentum) / (1 + 2 * momentum)
        case "adam":
            return 2 * (1 + momentum) / (1 - momentum)
    raise ValueError(
        f"method must be 'gradient descent', 'momentum', 'nesterov' or 'adam', got {method!r}"
    )
