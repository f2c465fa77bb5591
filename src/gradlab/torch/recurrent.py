"""Recurrent networks for `sweep.fit`, in PyTorch.  `gradlab.keras.recurrent` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
                state = _last(cell, weights, x[:, :, :cut])
            state = _last(cell, weights, x[:, :, cut:], state)
        else:
            state = _last(cell, weights, x)
        h = state[..., : weights["readout"].shape[1]]  # an LSTM's state has a second half
        return h @ weights["readout"] + weights["readout_bias"][:, None]

    return outputs


def states(
    cell: str,
    weights: Weights,
    x: torch.Tensor,
    state: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The state after every step.

    Args:
        cell: a name of `gradlab.recurrent.CELLS`.
        weights: see `gradlab.recurrent`.
        x: inputs, (members, batch, steps, inputs).
        state: what to start from; None: zeros.

    Returns:
        A list of (members, batch, state), one per step.  The state is h; an LSTM's is h and, beside
        it, the cell's memory.

    Raises:
        ValueError: an unknown cell.
    """
    _check(cell)
    return list(_walk(cell, weights, x, state))


def error_norms(
    cell: str, weights: dict[str, np.ndarray], x: np.ndarray, error: np.ndarray
) -> np.ndarray:
    """Norm of a loss's derivative with respect to the state after every step.

    Args:
        cell, weights, x: as in `states`, as NumPy arrays.
        error: the derivative with respect to the last h, (members, batch, width).

    Returns:
        float64 array (steps, members): the norm over the whole batch; an LSTM's counts the memory's
        half as well.  The last row is the norm of `error`.

    Raises:
        ValueError: an unknown cell.
    """
    _check(cell)
    w, x, error = {k: torch.tensor(a) for k, a in weights.items()}, *map(torch.tensor, (x, error))
    seen = states(cell, w, x, _start(cell, w, x).requires_grad_())
    last = seen[-1][..., : error.shape[-1]]
    gradients = torch.autograd.grad((last * error).sum(), seen)
    norms = [torch.linalg.vector_norm(g, dim=(1, 2), dtype=torch.float64) for g in gradients]
    return torch.stack(norms).numpy()


def _check(cell: str, truncate: int | None = None) -> None:
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {tuple(CELLS)}, got {cell!r}")
    if truncate is not None and truncate < 1:
        raise ValueError(f"truncate must be at least 1, got {truncate!r}")


def _start(cell: str, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    width = weights["recurrent"].shape[1] * (2 if cell == "lstm" else 1)
    return x.new_zeros((*x.shape[:2], width))


def _walk(
    cell: str, weights: Weights, x: torch.Tensor, state: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """One state after the other."""
    step, u, bias = _STEPS[cell], weights["recurrent"], weights["bias"][:, None]
    state = _start(cell, weights, x) if state is None else state
    for now in x.unbind(2):
        state = step(now @ weights["input"] + bias, state, u)
        yield state


def _last(
    cell: str, weights: Weights, x: torch.Tensor, state: torch.Tensor | None = None
) -> torch.Tensor:
    """The last state alone: without a gradient, no other is kept in memory."""
    for state in _walk(cell, weights, x, state):  # noqa: B007, B020 (the last one counts)
        pass
    return state


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
