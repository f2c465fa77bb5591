"""Examine a model and an optimiser, and leave both as they were found, to the bit."""

from __future__ import annotations

import copy
import inspect
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import torch
from torch import nn


def _random_states() -> Callable[[], None]:
    """A function that puts all global random generators back to where they are now."""
    devices = torch.cuda.is_available() and torch.cuda.is_initialized()
    now = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    on_devices = torch.cuda.get_rng_state_all() if devices else None

    def rewind() -> None:
        torch.set_rng_state(now[0])
        np.random.set_state(now[1])  # noqa: NPY002
        random.setstate(now[2])
        if on_devices is not None:
            torch.cuda.set_rng_state_all(on_devices)

    return rewind


def _attributes(module: nn.Module) -> Callable[[], None]:
    """A function that restores a module's attributes: counters, hidden states, its own tensors."""
    now = dict(vars(module))
    tables = {key: dict(now[key]) for key in ("_parameters", "_buffers", "_modules")}
    tensors = {
        key: value.detach().clone() for key, value in now.items() if isinstance(value, torch.Tensor)
    }
    generators = {
        key: value.get_state() for key, value in now.items() if isinstance(value, torch.Generator)
    }
    containers = {
        key: copy.copy(value)
        for key, value in now.items()
        if key not in tables and isinstance(value, list | dict | set | deque)
    }

    def restore() -> None:
        vars(module).clear()
        vars(module).update(now)
        for key, table in tables.items():
            now[key].clear()
            now[key].update(table)
        for key, value in tensors.items():
            if not torch.equal(now[key], value):
                with torch.no_grad():
                    now[key].copy_(value)
        for key, value in generators.items():
            now[key].set_state(value)
        for key, value in containers.items():
            held = now[key]
            held.clear()
            (held.extend if isinstance(held, list | deque) else held.update)(value)

    return restore


def _held_generators(function: Callable) -> Callable[[], None]:
    """The same for generators that a function refers to by name."""
    with suppress(TypeError, ValueError):
        names = inspect.getclosurevars(function)
        held = [*names.nonlocals.values(), *names.globals.values()]
        ours = [(g, g.get_state()) for g in held if isinstance(g, torch.Generator)]
        ours_numpy = [
            (g.bit_generator, g.bit_generator.state)
            for g in held
            if isinstance(g, np.random.Generator)
        ]

        def rewind() -> None:
            for generator, state in ours:
                generator.set_state(state)
            for generator, state in ours_numpy:
                generator.state = state

        return rewind
    return lambda: None


@contextmanager
def untouched(model: nn.Module, loss_fn: Callable) -> Iterator[Callable[[], None]]:
    """Inside, the model computes on copies of its parameters and buffers; afterwards all is back.

    The tensors' own storage is put aside and never written.  Gradients, training mode, plain
    attributes and the random generators are restored too.

    Yields:
        A function that starts over: fresh copies, and the random generators as they were, so that
        each measurement sees the same step.
    """
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    kept = [(tensor, tensor.data, tensor.grad if tensor.is_leaf else None) for tensor in tensors]
    global_state, held = _random_states(), _held_generators(loss_fn)

    def rewind() -> None:
        global_state()
        held()

    with ExitStack() as back:
        # A graph that still waits for its backward pass must not think its inputs have changed.
        back.enter_context(torch.autograd._unsafe_preserve_version_counter(tuple(tensors)))
        back.callback(rewind)
        for module in model.modules():
            back.callback(_attributes(module))

        def put_back() -> None:
            for tensor, data, grad in kept:
                # First no gradient: it may not differ in dtype from what it belongs to.
                if tensor.is_leaf:
                    tensor.grad = None
                tensor.data = data
                if tensor.is_leaf:
                    tensor.grad = grad

        back.callback(put_back)

        def start_over() -> None:
            rewind()
            for tensor, data, _ in kept:
                if tensor.is_leaf:
                    tensor.grad = None
                tensor.data = data.clone()

        start_over()
        yield start_over


@contextmanager
def spare_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the optimiser works on a copy of its state and calls no hook; then all is back."""
    now = dict(vars(optimizer))
    groups = [dict(group) for group in optimizer.param_groups]
    tensors = [
        (value, value.clone())
        for group in groups
        for value in group.values()
        if isinstance(value, torch.Tensor)
    ]
    try:
        # The keys stay the parameters themselves; only what is kept for each is copied.
        optimizer.state = defaultdict(
            dict, {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
        )
        optimizer._optimizer_step_pre_hooks = OrderedDict()
        optimizer._optimizer_step_post_hooks = OrderedDict()
        yield
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(now)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        for tensor, before in tensors:
            with torch.no_grad():
                tensor.copy_(before)
