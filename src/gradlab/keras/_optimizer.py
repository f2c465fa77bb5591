"""What Keras's optimisers do to a step: their facts, their denominators, and a trial of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import keras
import numpy as np
import tensorflow as tf

from gradlab.keras._tracing import norm
from gradlab.measurements import OptimizerFacts, Trial

# Per class: its β₁, its β₂ where it corrects the bias, and where it keeps the squares (or sizes).
_ADAM_LIKE = {
    keras.optimizers.Adam: ("beta_1", "beta_2", "_velocities"),  # AdamW is one
    keras.optimizers.Nadam: ("beta_1", "beta_2", "_velocities"),
    keras.optimizers.Adamax: ("beta_1", None, "_u"),
    keras.optimizers.RMSprop: ("momentum", None, "_velocities"),
    keras.optimizers.Adagrad: (None, None, "_accumulators"),
}


def inner(optimizer: keras.Optimizer) -> keras.Optimizer:
    """The optimiser that a `LossScaleOptimizer` holds."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _adam_like(optimizer: keras.Optimizer) -> tuple | None:
    return next((names for kind, names in _ADAM_LIKE.items() if isinstance(optimizer, kind)), None)


def facts(optimizer: keras.Optimizer) -> OptimizerFacts:
    """Method, learning rate at the present step, momentum, steps taken."""
    own = inner(optimizer)
    names, momentum, method = _adam_like(own), 0.0, ""
    if names is not None:
        method = "adam"
        momentum = float(getattr(own, names[0], 0.0) or 0.0) if names[0] else 0.0
    elif isinstance(own, keras.optimizers.SGD):
        momentum = float(own.momentum)
        method = "gradient descent"
        if momentum:
            method = "nesterov" if own.nesterov else "momentum"
    return OptimizerFacts(
        name=type(own).__name__,
        method=method,
        learning_rate=float(own.learning_rate),
        momentum=momentum,
        steps=int(own.iterations),
    )


def denominators(optimizer: keras.Optimizer, variables: list) -> list[np.ndarray] | None:
    """What an Adam-like optimiser divides by, √v̂ + ε, for each variable; None without a state."""
    own = inner(optimizer)
    names, steps = _adam_like(own), int(own.iterations)
    if names is None or not steps or not own.built:
        return None
    _, decay, kept = names
    slots = getattr(own, "_velocity_hats", None) if getattr(own, "amsgrad", False) else None
    slots = slots or getattr(own, kept)
    found = []
    for variable in variables:
        size = slots[own._get_variable_index(variable)].numpy().astype(np.float64)
        if decay:
            size = size / (1 - float(getattr(own, decay)) ** steps)
        found.append((size if kept == "_u" else np.sqrt(size)) + float(own.epsilon))
    return found


@contextmanager
def spare(optimizer: keras.Optimizer, variables: list) -> Iterator[keras.Optimizer]:
    """An optimiser to try: itself if it has its variables, else one like it that may be built.

    The caller restores the variables' values.
    """
    if optimizer.built:
        yield optimizer
        return
    twin = type(optimizer).from_config(optimizer.get_config())
    twin.build(variables)
    own, copied = inner(optimizer), inner(twin)
    copied._iterations.assign(own._iterations)
    if not callable(own._learning_rate) and hasattr(own._learning_rate, "numpy"):
        copied.learning_rate = float(own.learning_rate)
    yield twin


def trial(
    optimizer: keras.Optimizer,
    step: Callable[[], tf.Tensor],
    variables: list[keras.Variable],
    enough: Callable[[list[float]], bool],
) -> Trial:
    """Take some steps with an optimiser.

    Args:
        optimizer: built or not; its variables and those of the model are left changed.
        step: gives the loss.
        variables: what is trained.
        enough: whether the losses so far will do.
    """
    before = [v.value.numpy() for v in variables]
    losses = []
    with spare(optimizer, variables) as tried:
        while True:
            with tf.GradientTape() as tape:
                loss = step()
                scaled = tried.scale_loss(loss)
            losses.append(float(loss))
            if enough(losses):
                break
            # The values: Keras's variables would be read again for every gradient.
            grads = tape.gradient(scaled, [v.value for v in variables])
            pairs = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
            # The class's own: a probe may stand in front of this one's.
            type(tried).apply(tried, *map(list, zip(*pairs, strict=True)))
    moves = [norm(tf.constant(v.value.numpy() - w)) for v, w in zip(variables, before, strict=True)]
    sizes = [norm(tf.constant(w)) for w in before]
    total = float(np.linalg.norm(sizes))
    moved = float(np.linalg.norm(moves))
    ratios = [m / s if s else 0.0 for m, s in zip(moves, sizes, strict=True)]
    return Trial(
        losses=tuple(losses),
        moved=moved / total if total else float("inf") if moved else 0.0,
        where=variables[int(np.argmax(np.nan_to_num(ratios, nan=np.inf)))].path,
    )
