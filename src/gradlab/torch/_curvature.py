"""Largest eigenvalue of a loss's Hessian, by Lanczos iteration."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

Vector = list[torch.Tensor]

# Products with the Hessian at most, and the change of the largest Ritz value that ends the search.
PRODUCTS = 8
SETTLED = 0.02


def _dot(a: Vector, b: Vector) -> float:
    return sum(torch.sum(x.double() * y.double()).item() for x, y in zip(a, b, strict=True))


def hessian_product(
    gradient: Callable[[bool], Vector], parameters: Vector
) -> Callable[[Vector], Vector]:
    """The map v ↦ Hv.

    By a second backward pass where every operation has one, and else from two gradients:
    (∇L(w + εv) − ∇L(w − εv)) / 2ε.

    Args:
        gradient: the loss's gradient at the parameters' present values, with a graph if asked.
        parameters: what to differentiate by.
    """
    slopes: Vector | None = None
    twice = True  # as long as no operation turns out to lack a second derivative

    def product(v: Vector) -> Vector:
        nonlocal slopes, twice
        if twice:
            try:
                slopes = gradient(True) if slopes is None else slopes
                return again(slopes, v)
            except (RuntimeError, NotImplementedError):
                twice = False
        return _by_difference(gradient, parameters, v)

    def again(slopes: Vector, v: Vector) -> Vector:
        with_graph = [(s, x) for s, x in zip(slopes, v, strict=True) if s.requires_grad]
        found = torch.autograd.grad(
            [s for s, _ in with_graph],
            parameters,
            [x for _, x in with_graph],
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros_like(p) if h is None else h for h, p in zip(found, parameters, strict=True)
        ]

    return product


def _by_difference(gradient: Callable[[bool], Vector], parameters: Vector, v: Vector) -> Vector:
    size = max(_dot(parameters, parameters), 1e-12) ** 0.5
    epsilon = 1e-3 * size / max(_dot(v, v) ** 0.5, 1e-300)
    here = [p.data for p in parameters]
    ends = []
    try:
        for sign in (1, -1):
            for p, w, x in zip(parameters, here, v, strict=True):
                p.data = w + sign * epsilon * x
            ends.append(gradient(False))
    finally:
        for p, w in zip(parameters, here, strict=True):
            p.data = w
    return [(a - b) / (2 * epsilon) for a, b in zip(*ends, strict=True)]


def largest_eigenvalue(
    product: Callable[[Vector], Vector], start: Vector, products: int = PRODUCTS
) -> tuple[float, Vector, bool]:
    """Lanczos iteration with full reorthogonalisation.

    Args:
        product: the symmetric map v ↦ Av.
        start: where to begin, not 0.
        products: how often the map may be applied.

    Returns:
        The largest eigenvalue found, its vector of norm 1, and whether it settled to 2 %.

    Raises:
        FloatingPointError: the map gave an inf or NaN.
    """
    norm = _dot(start, start) ** 0.5
    basis = [[x / norm for x in start]]
    diagonal, beside = [], []
    before, settled = np.inf, False
    for _ in range(products):
        image = product(basis[-1])
        alpha = _dot(image, basis[-1])
        if not np.isfinite(alpha):
            raise FloatingPointError("the product with the Hessian is not finite")
        diagonal.append(alpha)
        for q in basis:
            share = _dot(image, q)
            image = [x - share * y for x, y in zip(image, q, strict=True)]
        values, vectors = np.linalg.eigh(
            np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        )
        beta = _dot(image, image) ** 0.5
        change, before = abs(values[-1] - before), values[-1]
        scale = max(abs(values).max(), 1e-300)
        settled = beta <= 1e-6 * scale or change <= SETTLED * abs(values[-1])
        if settled:
            break
        beside.append(beta)
        basis.append([x / beta for x in image])
    top = [
        sum(float(c) * q[i] for c, q in zip(vectors[:, -1], basis, strict=False))
        for i in range(len(start))
    ]
    return float(values[-1]), top, settled
