"""Deep residual networks, many at once, in PyTorch.  `gradlab.keras.residual` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from gradlab.mlp import EPSILON
from gradlab.residual import ResidualSpec, check_alike

__all__ = ["gradient_norms", "network"]


def network(specs: Sequence[ResidualSpec]) -> Callable:
    """The networks of several specifications as one function, for `sweep.fit`.

    Args:
        specs: one per member; they may differ in skip, scale, factor, gain and initialization.

    Returns:
        A function of weights, as `gradlab.residual.stacked_weights` gives them, and inputs
        (members, batch, features) that returns logits (members, batch, classes).

    Raises:
        ValueError: see `gradlab.residual.check_alike`.
    """
    states = _states(specs)

    def forward(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        *_, logits = states(weights, x)
        return logits

    return forward


def gradient_norms(
    specs: Sequence[ResidualSpec], weights: Mapping[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Norms of the gradient of the mean cross-entropy with respect to every h.

    Args:
        specs: one per member.
        weights: from `gradlab.residual.stacked_weights`.
        x: inputs (batch, features), for all members.
        y: classes (batch,).

    Returns:
        (members, blocks + 1) norms over the batch, h₀ first.
    """
    w = {name: torch.from_numpy(array) for name, array in weights.items()}
    inputs = torch.as_tensor(x, dtype=w["stem"].dtype).expand(len(specs), -1, -1).requires_grad_()
    *h, logits = _states(specs)(w, inputs)
    classes = torch.as_tensor(y).expand(len(specs), -1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten())
    grads = torch.autograd.grad(loss * len(specs), h)
    return torch.stack([torch.linalg.vector_norm(g.double(), dim=(1, 2)) for g in grads], 1).numpy()


def _states(specs: Sequence[ResidualSpec]) -> Callable[..., Iterator[torch.Tensor]]:
    """A function that gives every h, (members, batch, width), and last the logits."""
    check_alike(specs)
    kind, matrices = specs[0].normalization, specs[0].matrices
    numbers = [(spec.skip, spec.scale, spec.factor is not None) for spec in specs]
    skip, scale, learnt = torch.tensor(numbers, dtype=torch.float64).T[..., None, None]

    def states(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> Iterator[torch.Tensor]:
        h = x @ weights["stem"]
        factor = weights["factor"][..., None, None]  # (members, blocks, 1, 1)
        factor = torch.where(learnt[:, None] > 0, factor, factor.detach()).unbind(1)
        keep, times = skip.to(h.dtype), scale.to(h.dtype)
        yield h
        for block, number in zip(weights["blocks"].unbind(1), factor, strict=True):
            z = _normalize(h, 2) if kind == "layer" else h
            for matrix in range(matrices):
                z = torch.relu(z) @ block[:, matrix]
                z = _normalize(z, 1) if kind == "batch" else z
            h = keep * h + times * number * z
            yield h
        h = _normalize(h, 2) if kind == "layer" else h
        yield torch.relu(h) @ weights["readout"]

    return states


def _normalize(z: torch.Tensor, axis: int) -> torch.Tensor:
    variance, mean = torch.var_mean(z, axis, correction=0, keepdim=True)
    return (z - mean) * torch.rsqrt(variance + EPSILON)
