"""Gradient clipping in PyTorch, equal to the NumPy reference in `gradlab.clip`.

The functions take and return lists, so that the two frameworks share them; hand the result back::

    gradients = [p.grad for p in parameters]
    clipped, norm = clip.by_global_norm(gradients, 1.0)
    for p, gradient in zip(parameters, clipped):
        p.grad = gradient

If any gradient holds an inf or a NaN, all come back as they were: look at `norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from gradlab.clip import AutoClip, ZClip, check_threshold, check_units
from gradlab.torch.probe import gradient_norms, total_norm

__all__ = ["AutoClip", "ZClip", "adaptive", "by_global_norm", "by_norm", "by_value", "global_norm"]

Gradients = Sequence[torch.Tensor | None]
Clipped = tuple[list[torch.Tensor | None], float]


def global_norm(gradients: Gradients) -> float:
    """Euclidean norm over all gradients together, which waits for the device that holds them.

    Args:
        gradients: dense or sparse tensors of any floating dtype, or None.

    Returns:
        √Σg², 0 for no gradient at all; inf or NaN only if an entry is.
    """
    return total_norm(gradient_norms([g for g in gradients if g is not None]))


@torch.no_grad()
def by_value(gradients: Gradients, limit: float) -> Clipped:
    """Cut every component to [−limit, limit], each for itself (Mikolov 2012).

    Args:
        gradients: tensors, or None.  Of a sparse one, rows that repeat are summed first.
        limit: > 0.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a limit that is not > 0.
    """
    check_threshold("limit", limit)
    return _each(gradients, lambda g, norm: _on_values(g, lambda v: v.clamp(-limit, limit)))


@torch.no_grad()
def by_norm(gradients: Gradients, max_norm: float) -> Clipped:
    """Shorten every gradient that is longer than `max_norm` to it, each by its own norm.

    Keras calls it `clipnorm`.  The direction of the whole changes when some are shortened and
    others not.

    Args:
        gradients: tensors, or None.
        max_norm: > 0.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a threshold that is not > 0.
    """
    check_threshold("max_norm", max_norm)
    return _each(gradients, lambda g, norm: _shorten(g, norm, max_norm))


@torch.no_grad()
def by_global_norm(gradients: Gradients, max_norm: float | Callable[[float], float]) -> Clipped:
    """Shorten all gradients by one factor, to a global norm of at most `max_norm`.

    Algorithm 1 of Pascanu et al. 2013; the direction stays.

    Args:
        gradients: tensors, or None.
        max_norm: > 0, or what chooses it when it is called with the norm, such as `AutoClip`.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a threshold that is not > 0.

    Example:
        >>> by_global_norm([torch.tensor([3.0]), torch.tensor([4.0])], 1.0)
        ([tensor([0.6000]), tensor([0.8000])], 5.0)
    """
    norm = global_norm(gradients)
    max_norm = max_norm(norm) if callable(max_norm) else max_norm
    check_threshold("max_norm", max_norm)
    return [None if g is None else _shorten(g, norm, max_norm) for g in gradients], norm


@torch.no_grad()
def adaptive(
    gradients: Gradients,
    weights: Sequence[torch.Tensor],
    factor: float = 0.01,
    *,
    floor: float = 1e-3,
    unit_axis: int | Sequence[int] = 0,
) -> Clipped:
    """Shorten each unit's gradient to at most `factor` times the norm of the unit's weights.

    Adaptive gradient clipping, AGC (Brock et al. 2021): a unit is one output of a layer, with all
    the weights that lead to it; a vector (biases) or a scalar counts as one unit.  The authors
    leave the last linear layer out: leave it out of the lists.

    Args:
        gradients: tensors, or None.  A sparse one becomes dense.
        weights: one tensor per gradient, of its shape.
        factor: λ, > 0.
        floor: a unit's weights count as at least this long, so that those at zero can move; > 0.
        unit_axis: the axis that numbers the units, one for all or one per gradient: 0 for the
            weights (out, in, …) of Linear and Conv, 1 for ConvTranspose.

    Returns:
        The clipped gradients, and the global norm before clipping.

    Raises:
        ValueError: a factor or floor that is not > 0, or weights that do not fit the gradients.
    """
    check_threshold("factor", factor)
    check_threshold("floor", floor)
    axes = check_units([g if g is None else g.shape for g in gradients],
                       [w.shape for w in weights], unit_axis)  # fmt: skip
    norm = global_norm(gradients)
    if not math.isfinite(norm):
        return list(gradients), norm
    clipped = []
    for g, w, axis in zip(gradients, weights, axes, strict=True):
        if g is None:
            clipped.append(None)
            continue
        wide = g.to_dense().to(torch.float64 if g.dtype == torch.float64 else torch.float32)
        others = [i for i in range(g.ndim) if g.ndim < 2 or i != axis % g.ndim]
        limit = factor * _unit_norms(w.detach().to(wide.dtype), others).clamp(min=floor)
        length = _unit_norms(wide, others)
        longer = length > limit
        shorter = wide / torch.where(longer, length, 1) * torch.where(longer, limit, 1)
        clipped.append(torch.where(longer, shorter, wide).to(g.dtype))
    return clipped, norm


def _unit_norms(x: torch.Tensor, axes: list[int]) -> torch.Tensor:
    """√Σx² over the axes, which stay with length 1; scaled before it is squared."""
    if x.numel() == 0 or not axes:
        return x.abs()
    largest = x.abs().amax(axes, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    return largest * torch.linalg.vector_norm(x / largest, dim=axes, keepdim=True)


def _on_values(gradient: torch.Tensor, change: Callable) -> torch.Tensor:
    """The gradient with its numbers changed; a sparse one stays sparse, each row there once."""
    if not gradient.is_sparse:
        return change(gradient)
    gradient = gradient.coalesce()
    indices, shape = gradient.indices(), gradient.shape
    return torch.sparse_coo_tensor(
        indices, change(gradient.values()), shape, is_coalesced=True, check_invariants=False
    )


def _shorten(gradient: torch.Tensor, norm: float, limit: float) -> torch.Tensor:
    """The gradient times limit/norm where its norm exceeds the limit and is finite."""
    if not (math.isfinite(norm) and norm > limit):
        return gradient.clone()
    # In two steps, by factors of about one size each, where limit / norm is too small for a
    # float32; a norm beyond the largest float32 is one of several long gradients.
    root = math.sqrt(limit) / math.sqrt(norm)
    factors = (root, root) if limit / norm < 1e-30 else (limit / norm,)

    def scaled(values: torch.Tensor) -> torch.Tensor:
        narrow = values.dtype in (torch.float16, torch.bfloat16)
        wide = values.float() if narrow else values
        for factor in factors:
            wide = wide * factor
        return wide.to(values.dtype)

    return _on_values(gradient, scaled)


def _each(gradients: Gradients, clip: Callable) -> Clipped:
    live = [g for g in gradients if g is not None]
    norms = gradient_norms(live)
    norm = total_norm(norms)
    if not math.isfinite(norm):
        return list(gradients), norm
    each = iter(norms.tolist())
    return [None if g is None else clip(g, next(each)) for g in gradients], norm
