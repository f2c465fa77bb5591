"""Products of a loss's Hessian with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from gradlab.lanczos import Product

Gradient = Callable[[bool], list[torch.Tensor]]


def flat(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """All elements in one vector, in at least float32."""
    dense = [t.detach().to_dense() if t.is_sparse else t.detach() for t in tensors]
    parts = [np.ravel(t.double().cpu().numpy()) for t in dense]
    small = sum(part.size for part in parts) < 2**16
    return np.concatenate(parts).astype(np.float64 if small else np.float32, copy=False)


def split(vector: np.ndarray, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of `flat`, in the shapes, dtypes and on the devices of `like`."""
    ends = np.cumsum([t.numel() for t in like])[:-1]
    parts = zip(np.split(vector, ends), like, strict=True)
    return [torch.as_tensor(part).reshape(t.shape).to(t) for part, t in parts]


def hessian_product(gradient: Gradient, parameters: list[torch.Tensor]) -> Product:
    """The map v ↦ Hv.

    By a second backward pass, whose graph is built once; where an operation has none, from two
    gradients: (∇L(w + εv) − ∇L(w − εv)) / 2ε.

    Args:
        gradient: the loss's gradient at the parameters' present values, with a graph if asked.
        parameters: what to differentiate by.
    """
    slopes: list[torch.Tensor] | None = None
    twice = True  # as long as no operation turns out to lack a second derivative

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal slopes, twice
        if twice:
            try:
                slopes = gradient(True) if slopes is None else slopes
                return _again(slopes, parameters, vector)
            except (RuntimeError, NotImplementedError):
                twice = False
        return _by_difference(gradient, parameters, vector)

    return product


def _again(
    slopes: list[torch.Tensor], parameters: list[torch.Tensor], vector: np.ndarray
) -> np.ndarray:
    pairs = zip(slopes, split(vector, parameters), strict=True)
    curved = [(slope, x) for slope, x in pairs if slope.requires_grad]
    found = torch.autograd.grad(
        [slope for slope, _ in curved],
        parameters,
        [x for _, x in curved],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return flat(found)


def _by_difference(
    gradient: Gradient, parameters: list[torch.Tensor], vector: np.ndarray
) -> np.ndarray:
    size = np.linalg.norm(flat(parameters)) or 1.0
    epsilon = 1e-3 * size / np.linalg.norm(vector)
    here, steps = [p.data for p in parameters], split(vector, parameters)
    ends = []
    try:
        for sign in (1, -1):
            for p, w, x in zip(parameters, here, steps, strict=True):
                p.data = w + sign * epsilon * x
            ends.append(flat(gradient(False)))
    finally:
        for p, w in zip(parameters, here, strict=True):
            p.data = w
    return (ends[0] - ends[1]) / (2 * epsilon)
