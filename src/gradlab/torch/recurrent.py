"""Recurrent networks for `sweep.fit`, in PyTorch.  `gradlab.keras.recurrent` is its twin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from gradlab.recurrent import CELLS

__all__ = ["error_norms", "network", "states"]

Weights = dict[str, torch.Tensor]


def network(cell: str, *, truncate: int | None = None) -> Callable[[Weights, torch.Tensor], object]:
    """A network that reads a sequence and answers after its last step.

    Args:
        cell: a name of `gradlab.recurrent.CELLS`.
        truncate: how many of the last steps the gradient travels back through (truncated
            backpropagation through time); None takes all.  The outputs do not depend on it.

    Returns:
        A function of the weights (see `gradlab.recurrent`) and the inputs (members, batch, steps,
        inputs), which returns the outputs (members, batch, outputs).

    Raises:
        ValueError: an unknown cell, or `truncate` below 1.
    """
    _check(cell, truncate)

    def outputs(weights: Weights, x: torch.Tensor) -> torch.Tensor:
        if truncate is not None and truncate < x.shape[2]:
            cut = x.shape[2] - truncate
            with torch.no_grad():
                state = states(cell, weights, x[:, :, :cut])[-1]
            state = states(cell, weights, x[:, :, cut:], state)[-1]
        else:
            state = states(cell, weights, x)[-1]
        h = state[..., : weights["readout"].shape[1]]  # an LSTM's state has a second half
        return h @ weights["readout"] + weights["readout_bias"][:, None]

    return outputs


def states(
    cell: str,
    weights: Weights,
    x: torch.Tensor,
    state: torch.Tensor | None = None,
    nudges: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The state after every step.

    Args:
        cell: a name of `gradlab.recurrent.CELLS`.
        weights: see `gradlab.recurrent`.
        x: inputs, (members, batch, steps, inputs).
        state: what to start from; None: zeros.
        nudges: added to the states, (steps, members, batch, state); the loss's derivatives with
            respect to them are those with respect to the states.  None: nothing.

    Returns:
        A list of (members, batch, state), one per step.  The state is h; an LSTM's is h and, beside
        it, the cell's memory.
    """
    step = _STEPS[cell]
    u = weights["recurrent"]
    batch, width = x.shape[:2], u.shape[1]
    from_input = x @ weights["input"][:, None] + weights["bias"][:, None, None]
    if state is None:
        state = x.new_zeros((*batch, 2 * width if cell == "lstm" else width))
    seen = []
    for t, a in enumerate(from_input.unbind(2)):
        state = step(a, state, u)
        if nudges is not None:
            state = state + nudges[t]
        seen.append(state)
    return seen


def error_norms(
    cell: str, weights: dict[str, np.ndarray], x: np.ndarray, error: np.ndarray
) -> np.ndarray:
    """Norm of a loss's derivative with respect to the state after every step.

    Args:
        cell, weights, x: as in `states`, as NumPy arrays.
        error: the derivative with respect to the last h, (members, batch, width).

    Returns:
        float64 array (steps, members); its last row is the norm of `error`.
    """
    w, x, error = {k: torch.tensor(a) for k, a in weights.items()}, *map(torch.tensor, (x, error))
    width = error.shape[-1] * (2 if cell == "lstm" else 1)
    nudges = x.new_zeros((x.shape[2], *x.shape[:2], width), requires_grad=True)
    last = states(cell, w, x, nudges=nudges)[-1][..., : error.shape[-1]]
    (gradient,) = torch.autograd.grad((last * error).sum(), nudges)
    return torch.linalg.vector_norm(gradient, dim=(2, 3), dtype=torch.float64).numpy()


def _check(cell: str, truncate: int | None) -> None:
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {tuple(CELLS)}, got {cell!r}")
    if truncate is not None and truncate < 1:
        raise ValueError(f"truncate must be at least 1, got {truncate!r}")


def _plain(phi: Callable) -> Callable:
    return lambda a, h, u: phi(a + h @ u)


def _lstm(a: torch.Tensor, state: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    h, c = state.chunk(2, -1)
    i, f, g, o = (a + h @ u).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], -1)


def _gru(a: torch.Tensor, h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    (ar, az, an), (hr, hz, hn) = a.chunk(3, -1), (h @ u).chunk(3, -1)
    z = torch.sigmoid(az + hz)
    return z * h + (1 - z) * torch.tanh(an + torch.sigmoid(ar + hr) * hn)


_STEPS = {
    "linear": _plain(lambda z: z),
    "relu": _plain(torch.relu),
    "tanh": _plain(torch.tanh),
    "lstm": _lstm,
    "gru": _gru,
}
