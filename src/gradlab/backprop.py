"""Reverse accumulation from scratch: the whole of automatic differentiation, in NumPy.

Each operation computes its value and keeps one function that hands the gradient of its output
back to its inputs.  `Tensor.backward` calls these functions once each, in the reverse of a
topological order: a gradient that several paths share is completed before it is passed on, so
every operation's derivative is used exactly once (Linnainmaa 1970; Rumelhart et al. 1986).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from gradlab import mlp as _mlp
from gradlab import theory


def _unbroadcast(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum a gradient over the axes along which its input was broadcast."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1)
    return gradient.sum(axis=stretched, keepdims=True) if stretched else gradient


class Tensor:
    """An array that remembers how it was computed.

    Attributes:
        data: the value, a floating-point array.
        grad: ∂(output)/∂(this), of the same shape, after `output.backward()`; None before.

    Example:
        >>> x = Tensor([1.0, 2.0])
        >>> ((x * x).sum()).backward()
        >>> x.grad
        array([2., 4.])
    """

    __array_priority__ = 1  # ndarray @ Tensor asks Tensor

    def __init__(
        self,
        data: object,
        parents: tuple[Tensor, ...] = (),
        pull: Callable[[np.ndarray], tuple[np.ndarray, ...]] | None = None,
    ) -> None:
        array = np.asarray(data)
        self.data = array if array.dtype.kind == "f" else array.astype(float)
        self.grad: np.ndarray | None = None
        self._parents, self._pull = parents, pull

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.data.shape

    def __repr__(self) -> str:
        return f"Tensor(shape={self.shape}, dtype={self.data.dtype})"

    def _lift(self, other: object) -> Tensor:
        """Make the other operand a tensor; a number takes this tensor's precision."""
        if isinstance(other, Tensor):
            return other
        return Tensor(np.asarray(other, self.data.dtype) if np.isscalar(other) else other)

    # -- operations: a value, and how its gradient goes back to the inputs ---------------------

    def __add__(self, other: object) -> Tensor:
        a, b = self, self._lift(other)
        return Tensor(a.data + b.data, (a, b), lambda g: (g, g))

    def __mul__(self, other: object) -> Tensor:
        a, b = self, self._lift(other)
        return Tensor(a.data * b.data, (a, b), lambda g: (g * b.data, g * a.data))

    def __truediv__(self, other: object) -> Tensor:
        return self * self._lift(other) ** -1.0

    def __rtruediv__(self, other: object) -> Tensor:
        return self._lift(other) * self**-1.0

    def __pow__(self, power: float) -> Tensor:
        return Tensor(self.data**power, (self,), lambda g: (g * power * self.data ** (power - 1),))

    def __matmul__(self, other: object) -> Tensor:
        a, b = self, self._lift(other)
        if a.data.ndim != 2 or b.data.ndim != 2:
            raise ValueError(f"@ multiplies two matrices, got shapes {a.shape} and {b.shape}")
        return Tensor(a.data @ b.data, (a, b), lambda g: (g @ b.data.T, a.data.T @ g))

    def __rmatmul__(self, other: object) -> Tensor:
        return self._lift(other) @ self

    def __neg__(self) -> Tensor:
        return self * -1.0

    def __sub__(self, other: object) -> Tensor:
        return self + -self._lift(other)

    def __rsub__(self, other: object) -> Tensor:
        return self._lift(other) - self

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, index: object) -> Tensor:
        def pull(g: np.ndarray) -> tuple[np.ndarray]:
            spread = np.zeros_like(self.data)
            np.add.at(spread, index, g)
            return (spread,)

        return Tensor(self.data[index], (self,), pull)

    def reshape(self, *shape: int) -> Tensor:
        """The same numbers in another shape; -1 stands for what is left."""
        return Tensor(self.data.reshape(shape), (self,), lambda g: (g.reshape(self.shape),))

    def exp(self) -> Tensor:
        """Elementwise exponential."""
        out = np.exp(self.data)
        return Tensor(out, (self,), lambda g: (g * out,))

    def log(self) -> Tensor:
        """Elementwise natural logarithm."""
        return Tensor(np.log(self.data), (self,), lambda g: (g / self.data,))

    def apply(self, which: str | theory.Activation) -> Tensor:
        """An activation function, elementwise; see `theory.activation`."""
        phi = theory.activation(which)
        value = phi.f(self.data).astype(self.data.dtype)
        return Tensor(value, (self,), lambda g: (g * phi.df(self.data).astype(g.dtype),))

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        """Sum over one axis, or over all."""

        def pull(g: np.ndarray) -> tuple[np.ndarray]:
            if axis is not None and not keepdims:
                g = np.expand_dims(g, axis)
            return (np.broadcast_to(g, self.shape),)

        return Tensor(self.data.sum(axis=axis, keepdims=keepdims), (self,), pull)

    def mean(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        """Mean over one axis, or over all."""
        count = self.data.size if axis is None else self.shape[axis]
        return self.sum(axis, keepdims) * (1 / count)

    # -- the backward pass ---------------------------------------------------------------------

    def backward(self) -> None:
        """Set `grad` of every tensor that this scalar was computed from.

        Raises:
            ValueError: this tensor is not a scalar.
        """
        if self.data.size != 1:
            raise ValueError(f"backward starts from a scalar, this tensor has shape {self.shape}")
        order: list[Tensor] = []
        seen: set[int] = set()
        stack = [(self, False)]
        while stack:  # depth first without recursion: deep networks exceed Python's stack
            node, finished = stack.pop()
            if finished:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack.extend((parent, False) for parent in node._parents)
        for node in order:
            node.grad = np.zeros_like(node.data)
        self.grad = np.ones_like(self.data)
        for node in reversed(order):
            if node._pull is not None:
                for parent, part in zip(node._parents, node._pull(node.grad), strict=True):
                    parent.grad = parent.grad + _unbroadcast(part, parent.shape)


# ---------------------------------------------------------------------------------------------
# The network of `gradlab.mlp`, for comparison with the frameworks


def cross_entropy(logits: Tensor, labels: np.ndarray) -> Tensor:
    """Mean cross-entropy of integer labels.

    Args:
        logits: (samples, classes).
        labels: (samples,), class numbers.
    """
    shifted = logits - logits.data.max(axis=1, keepdims=True)  # a constant: exp cannot overflow
    log_sum = shifted.exp().sum(axis=1).log()
    return (log_sum - shifted[np.arange(len(labels)), labels]).mean()


def _normalize(x: Tensor, spec: _mlp.MLPSpec) -> Tensor:
    shape, axis = x.shape, 0 if spec.normalization == "batch" else -1
    if spec.normalization == "group":
        x = x.reshape(len(x.data), spec.groups, -1)
    centred = x - x.mean(axis=axis, keepdims=True)
    variance = (centred * centred).mean(axis=axis, keepdims=True)
    return (centred * (variance + _mlp.EPSILON) ** -0.5).reshape(*shape)


def mlp(spec: _mlp.MLPSpec, weights: Mapping[str, Tensor], x: np.ndarray) -> Tensor:
    """Logits of the network `spec` with these weights.

    Args:
        spec: the network.
        weights: as `gradlab.mlp.initial_weights` names them, wrapped in tensors.
        x: (samples, features).

    Returns:
        (samples, classes).
    """
    h = x if isinstance(x, Tensor) else Tensor(x)
    for layer, name in enumerate(_mlp.layer_names(spec)):
        z = h @ weights[f"{name}.weight"]
        if spec.bias:
            z = z + weights[f"{name}.bias"]
        if name == "output":
            return z
        if spec.normalization:
            z = _normalize(z, spec)
            z = z * weights[f"{name}.scale"] + weights[f"{name}.shift"]
        branch = z.apply(spec.activation)
        h = h + spec.skip * branch if spec.has_skip(layer) else branch
    raise AssertionError("a specification always ends with an output layer")


def gradients(
    spec: _mlp.MLPSpec, weights: Mapping[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """Cross-entropy loss and its gradient for every weight.

    Args:
        spec: the network.
        weights: name to array; the computation runs in their precision.
        x: (samples, features).
        y: (samples,), class numbers.

    Returns:
        The loss, and a dict from name to gradient, shaped like the weights.
    """
    tensors = {name: Tensor(value) for name, value in weights.items()}
    dtype = next(iter(tensors.values())).data.dtype
    loss = cross_entropy(mlp(spec, tensors, np.asarray(x, dtype)), y)
    loss.backward()
    return float(loss.data), {name: t.grad for name, t in tensors.items()}
