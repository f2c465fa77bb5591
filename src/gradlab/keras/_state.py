"""Examine a Keras model and an optimiser, and leave both as they were found, to the bit."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.python.eager import context
from tensorflow.python.ops import stateful_random_ops

_KERAS_SEEDS = "global_seed_generator"


def _held_by(thing: Any) -> Iterator[tf.Variable]:
    """The variables of a layer, metric, optimiser, random generator…; none for other things."""
    if isinstance(thing, keras.Variable):
        if thing._value is not None:
            yield thing._value
    elif isinstance(thing, tf.Variable):
        yield thing
    elif isinstance(thing, (keras.random.SeedGenerator, tf.random.Generator)):
        yield from _held_by(thing.state)
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from _held_by(part)
    elif isinstance(thing, (keras.layers.Layer, keras.Metric, keras.Optimizer)):
        for part in thing.variables:
            yield from _held_by(part)
        if isinstance(thing, keras.layers.Layer):
            # Keras does not track TensorFlow's own variables and generators.
            for layer in thing._flatten_layers():
                for part in vars(layer).values():
                    if isinstance(part, (tf.Variable, tf.random.Generator, keras.Metric)):
                        yield from _held_by(part)


def _used_by(function: Callable) -> list:
    """What a function refers to: its closure, its globals, the object it is a method of."""
    try:
        names = inspect.getclosurevars(inspect.unwrap(function))
        used = [*names.nonlocals.values(), *names.globals.values()]
    except (TypeError, ValueError):
        used = []
    return [*used, getattr(function, "__self__", function)]


@contextmanager
def untouched(model: keras.Model, *others: Any) -> Iterator[Callable[[], None]]:
    """Inside, the step may be taken at will; afterwards all is back.

    Restored are all variables of the model, of the optimiser, and those that the loss function
    refers to; the random generators of TensorFlow, Keras, NumPy and Python; and the settings that
    the measurements change.  TensorFlow's kernels keep a state of their own for every pair of
    global and operation seed, which cannot be read: inside, the global seed is another one, so
    that state is never met.

    Args:
        model: the model.
        others: optimisers, functions and whatever else may hold variables.

    Yields:
        A function that starts over: variables and generators as they were, so that each
        measurement sees the same step.
    """
    things: list = [model, getattr(model, "optimizer", None), *others]
    things += [part for other in others if callable(other) for part in _used_by(other)]
    things += [global_state.get_global_attribute(_KERAS_SEEDS)]
    things += [stateful_random_ops.global_generator]
    variables = {id(v): v for thing in things for v in _held_by(thing)}.values()
    kept = [(v, v.numpy()) for v in variables]
    keras_seeds = global_state.get_global_attribute(_KERAS_SEEDS)
    generator = stateful_random_ops.global_generator
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    engine = context.context()
    seeds = {key: vars(engine)[key] for key in ("_seed", "_rng") if key in vars(engine)}
    fresh = random.Random()  # from the system's entropy

    def rewind() -> None:
        for variable, value in kept:
            variable.assign(value)
        global_state.set_global_attribute(_KERAS_SEEDS, keras_seeds)
        stateful_random_ops.global_generator = generator
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)

    def start_over() -> None:
        rewind()
        engine._seed = fresh.randrange(2**31)
        engine._rng = random.Random(engine._seed)

    def seeds_back() -> None:
        vars(engine).pop("_rng", None)  # not there before a seed was set
        vars(engine).update(seeds)

    with ExitStack() as back:
        back.callback(tf.config.run_functions_eagerly, tf.config.functions_run_eagerly())
        for settings in (keras.config, tf.debugging):
            if settings.is_traceback_filtering_enabled():
                back.callback(settings.enable_traceback_filtering)
                settings.disable_traceback_filtering()
        back.callback(seeds_back)
        back.callback(rewind)
        tf.config.run_functions_eagerly(True)
        start_over()
        yield start_over


def _widened(dtype: Any) -> bool:
    return tf.as_dtype(dtype).is_floating


def widen(batch: Any) -> Any:
    """A structure of arrays and tensors with those of floating point in float64."""

    def cast(leaf: Any) -> Any:
        if tf.is_tensor(leaf) and leaf.dtype.is_floating:
            return tf.cast(leaf, tf.float64)
        if isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.inexact):
            return leaf.astype(np.float64)
        return leaf

    return tf.nest.map_structure(cast, batch)


@contextmanager
def float64(model: keras.Model) -> Iterator[None]:
    """Inside, the model's variables, its dtype policies and Keras's defaults are float64.

    A float32 that the user's own code asks for stays one.
    """
    with ExitStack() as back:

        def change(thing: Any, name: str, value: Any) -> None:
            back.callback(setattr, thing, name, getattr(thing, name))
            setattr(thing, name, value)

        for variable in {id(v): v for v in model.variables}.values():
            if variable._value is not None and _widened(variable._dtype):
                wide = tf.Variable(tf.cast(variable._value, tf.float64))
                change(variable, "_value", wide)
                change(variable, "_dtype", "float64")
        for layer in {id(layer): layer for layer in model._flatten_layers()}.values():
            if _widened(layer.compute_dtype):
                change(layer, "_dtype_policy", keras.DTypePolicy("float64"))
            for tensor in _inputs(layer):
                if _widened(tensor.dtype):
                    change(tensor, "_dtype", "float64")
        back.callback(keras.config.set_floatx, keras.config.floatx())
        keras.config.set_floatx("float64")
        change(keras.losses.Loss, "dtype", property(lambda loss: "float64"))
        yield


def _inputs(layer: keras.layers.Layer) -> Iterable[keras.KerasTensor]:
    """The placeholders of a functional model, to whose dtype it casts what it is given."""
    return getattr(layer, "_inputs", None) or ()
