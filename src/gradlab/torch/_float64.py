"""Run a step in float64, whatever number formats the user's code asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_CASTS = {torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float}


_NARROW = {torch.float16, torch.bfloat16, torch.float32, torch.complex64}


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _cast(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.dtype in _NARROW:
        return leaf.to(_wide(leaf.dtype))
    return leaf


def widen(tree: Any) -> Any:
    """A structure of tensors with those of floating point in float64."""

    return pytree.tree_map(_cast, tree)


class _Float64Mode(TorchFunctionMode):
    """Every dtype of floating point that is asked for becomes float64, and every tensor read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _CASTS:
            func, args, kwargs = torch.Tensor.double, args[:1], {}

        def cast(leaf: Any) -> Any:
            if isinstance(leaf, torch.dtype):
                return _wide(leaf)
            return _cast(leaf)  # a constant of the program's own

        # What is written into must be the tensor itself.
        name = getattr(func, "__name__", "")
        kept = int((name.endswith("_") and not name.endswith("__")) or name == "__setitem__")
        rest, kwargs = pytree.tree_map(cast, (args[kept:], kwargs or {}))
        args = (*args[:kept], *rest)
        return func(*args, **kwargs)


@contextmanager
def float64(model: nn.Module | None = None) -> Iterator[Callable[[Any], Any]]:
    """Inside, the model's tensors and all that is computed are float64.

    The caller puts the model's tensors back.

    Yields:
        `widen`, for the batch.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for tensor in [*model.parameters(), *model.buffers()] if model is not None else []:
            tensor.data = _cast(tensor.data)
        with _Float64Mode():
            yield widen
    finally:
        torch.set_default_dtype(default)
