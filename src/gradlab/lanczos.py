"""Largest eigenvalue of a symmetric map that can only be applied, by Lanczos iteration.

SciPy's `eigsh` does the same for many eigenvalues to many digits, and needs twenty products and
more for that.  Here a product costs two training steps, and two digits are enough.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

PRODUCTS = 8
"""How often the map is applied at most."""
SETTLED = 0.02
"""Relative change of the eigenvalue that ends the search."""

Product = Callable[[np.ndarray], np.ndarray]


def start_near(gradient: np.ndarray) -> np.ndarray:
    """Where to begin for a Hessian: at the gradient, which lies mostly along steep directions.

    A little noise, the same each time, reaches the directions that it has no part of.

    Args:
        gradient: (n,).

    Returns:
        (n,), not 0.
    """
    noise = np.random.default_rng(0).standard_normal(gradient.size, np.float32)
    start = noise.astype(gradient.dtype) / np.sqrt(gradient.size)
    largest = np.max(np.abs(gradient), initial=0.0)
    if largest > 0 and gradient.size > 1:
        gradient = gradient / largest
        start = 0.3 * start + gradient / np.linalg.norm(gradient)
    return start


def largest_eigenvalue(
    product: Product, start: np.ndarray, products: int = PRODUCTS
) -> tuple[float, np.ndarray, bool]:
    """Lanczos iteration with full reorthogonalisation.

    Args:
        product: a symmetric map v ↦ Av, (n,) to (n,).
        start: (n,), where to begin, not 0.
        products: how often the map may be applied.

    Returns:
        The largest eigenvalue found, its vector (n,) of norm 1, and whether it settled.

    Raises:
        FloatingPointError: the map gave an inf or NaN.
    """
    basis = [start / np.linalg.norm(start)]
    diagonal: list[float] = []
    beside: list[float] = []
    before, settled = np.inf, False
    while not settled and len(diagonal) < products:
        image = product(basis[-1])
        if not np.isfinite(image).all():  # (asked first: NumPy would warn of a product with it)
            raise FloatingPointError("a product with the Hessian is not finite")
        diagonal.append(float(image @ basis[-1]))
        for q in (*basis, basis[-1]):
            image = image - (image @ q) * q
        ritz, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        rest = float(np.linalg.norm(image))
        exhausted = rest <= 1e-6 * max(np.abs(ritz).max(), 1e-300) or len(basis) == start.size
        settled = exhausted or abs(ritz[-1] - before) <= SETTLED * abs(ritz[-1])
        before = ritz[-1]
        if not settled and len(diagonal) < products:
            beside.append(rest)
            basis.append(image / rest)
    vector = sum(c * q for c, q in zip(vectors[:, -1], basis, strict=True))
    return float(ritz[-1]), vector, bool(settled)
