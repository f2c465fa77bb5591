"""Recurrent networks: their weights, their gradient through time, and what to expect of it.

A recurrent network reads a sequence, one step at a time, and keeps a state h:

    h_t = φ(x_t W + h_{t-1} U + b)          for t = 1 … T,  h_0 = 0,

and its outputs are h_T V + c.  The same U acts at every step, so the gradient that travels back
from h_T to h_t is multiplied T − t times by the transpose of U, each time after the slopes φ'.
This module holds what no framework is needed for; `gradlab.torch.recurrent` and
`gradlab.keras.recurrent` hold the networks themselves, ready for `sweep.fit`.

Weights are a dict of arrays whose first axis counts the members, as everywhere in `gradlab.sweep`:
"input" W (members, inputs, gates·width), "recurrent" U (members, width, gates·width), "bias" b
(members, gates·width), "readout" V (members, width, outputs), "readout_bias" c (members, outputs).
The gates stand beside each other, in PyTorch's order: input, forget, candidate, output for the LSTM
and reset, update, candidate for the GRU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from gradlab import theory
from gradlab.mlp import orthogonal

__all__ = [
    "CELLS",
    "backward_through_time",
    "growth_per_step",
    "initial_weights",
    "matrices",
    "spectral_radius",
]

CELLS = {"linear": 1, "relu": 1, "tanh": 1, "lstm": 4, "gru": 3}
"""The cells that the networks know, and their numbers of gates."""

KINDS = ("orthogonal", "gaussian", "identity", "triangular")


def matrices(kind: str, width: int, seeds: Iterable[int], scale: float = 1.0) -> np.ndarray:
    """Square matrices of spectral radius `scale` (Gaussian ones: about it, when they are wide).

    Args:
        kind: "orthogonal" (uniformly drawn, every singular value equal), "gaussian" (independent
            entries of standard deviation scale/√width), "identity" (the same for every seed), or
            "triangular" (eigenvalues evenly spaced from -scale to scale on the diagonal, Gaussian
            entries of standard deviation 3/√width above it: far from normal, so that its powers
            grow before they follow the eigenvalues).
        width: rows and columns.
        seeds: one matrix per seed.
        scale: ρ.

    Returns:
        float64 array (seeds, width, width).

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    drawn = []
    for seed in seeds:
        rng = np.random.default_rng([seed, 10])
        if kind == "orthogonal":
            drawn.append(scale * orthogonal(width, width, rng))
            continue
        gaussian = rng.normal(size=(width, width))
        if kind == "gaussian":
            drawn.append(scale * gaussian / np.sqrt(width))
        elif kind == "identity":
            drawn.append(scale * np.eye(width))
        else:
            eigenvalues = np.linspace(-scale, scale, width)
            drawn.append(np.diag(eigenvalues) + 3 * np.triu(gaussian, 1) / np.sqrt(width))
    return np.stack(drawn)


def initial_weights(
    cell: str,
    inputs: int,
    width: int,
    outputs: int,
    seeds: Iterable[int],
    *,
    kind: str = "orthogonal",
    scale: float = 1.0,
    drive: float = 1.0,
    forget_bias: float = 0.0,
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Weights of one network per seed, stacked.

    Args:
        cell: a name of `CELLS`.
        inputs: numbers per step.
        width: units, the state's size.
        outputs: numbers that are read out at the end.
        seeds: one network per seed.
        kind, scale: of the recurrent matrix, each gate's own, see `matrices`.
        drive: standard deviation of what an input of standard deviation 1 adds to each unit: the
            input weights have standard deviation drive/√inputs.
        forget_bias: of the LSTM's forget gate; the other biases are 0.
        dtype: "float32" or "float64".

    Returns:
        The dict described above; the readout has standard deviation 1/√width.

    Raises:
        ValueError: an unknown cell, or a forget bias for a cell without forget gate.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {tuple(CELLS)}, got {cell!r}")
    if forget_bias and cell != "lstm":
        raise ValueError(f"only an LSTM has a forget gate, got forget_bias={forget_bias!r}, {cell}")
    seeds, gates = list(seeds), CELLS[cell]
    # A gate's matrices come from seeds of their own, and the first gate's are the plain network's.
    blocks = [matrices(kind, width, [s + 7919 * g for s in seeds], scale) for g in range(gates)]
    rngs = [np.random.default_rng([seed, 11]) for seed in seeds]
    into = np.stack([rng.normal(size=(inputs, gates * width)) for rng in rngs])
    out = np.stack([rng.normal(size=(width, outputs)) for rng in rngs])
    bias = np.zeros((len(seeds), gates * width))
    if cell == "lstm":
        bias[:, width : 2 * width] = forget_bias
    weights = {
        "input": drive * into / np.sqrt(inputs),
        "recurrent": np.concatenate(blocks, axis=2),
        "bias": bias,
        "readout": out / np.sqrt(width),
        "readout_bias": np.zeros((len(seeds), outputs)),
    }
    return {name: array.astype(dtype) for name, array in weights.items()}


def spectral_radius(matrix: np.ndarray) -> np.ndarray:
    """Largest absolute value of an eigenvalue, of one matrix (n, n) or a stack (…, n, n)."""
    return np.abs(np.linalg.eigvals(matrix)).max(-1)


def growth_per_step(activation: str, scale: float, drive: float = 0.0) -> float:
    """Factor by which the error's norm grows per step backwards, as mean field expects it.

    The state settles at a variance q = scale²·E[φ(√q z)²] + drive², and the squared norm of the
    error then grows by scale²·E[φ'(√q z)²] per step, z being a standard normal number.  It is the
    theory of a random feedforward network (Poole et al. 2016; Schoenholz et al. 2017), with time
    for depth and the inputs in the place of the biases.  It takes every step's matrix for a fresh
    one, which a recurrent network's is not.

    Args:
        activation: a name that `theory.activation` knows.
        scale: ρ, of an orthogonal or a Gaussian recurrent matrix.
        drive: standard deviation of what the inputs add to each unit.
    """
    return theory.growth_factor(activation, scale, drive)


def backward_through_time(
    weights: Mapping[str, np.ndarray], x: np.ndarray, error: np.ndarray, activation: str = "tanh"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Gradients of a plain recurrent network, from the error at its last state.

    Args:
        weights: "input" (members, inputs, width), "recurrent" (members, width, width), "bias"
            (members, width); others are ignored.
        x: inputs (members, batch, steps, inputs).
        error: derivative of the loss with respect to the last state, (members, batch, width).
        activation: a name that `theory.activation` knows.

    Returns:
        The gradients of the three arrays, and the norm of the loss's derivative with respect to
        each state, (steps, members).
    """
    phi = theory.activation(activation)
    into, u, b = weights["input"], weights["recurrent"], weights["bias"]
    steps, states = x.shape[2], [np.zeros(error.shape)]
    before = []
    for t in range(steps):
        before.append(x[:, :, t] @ into + states[-1] @ u + b[:, None])
        states.append(phi.f(before[-1]))
    gradients = {"input": 0.0, "recurrent": 0.0, "bias": 0.0}
    norms = np.empty((steps, len(error)))
    for t in reversed(range(steps)):
        norms[t] = np.linalg.norm(error, axis=(1, 2))
        delta = error * phi.df(before[t])
        gradients["input"] += np.swapaxes(x[:, :, t], 1, 2) @ delta
        gradients["recurrent"] += np.swapaxes(states[t], 1, 2) @ delta
        gradients["bias"] += delta.sum(1)
        error = delta @ np.swapaxes(u, 1, 2)
    return gradients, norms
