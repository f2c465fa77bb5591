"""One training step, operation by operation: what each one made, and the signal that came back."""

from __future__ import annotations

import copy
import linecache
import re
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import backprop, context, execute
from tensorflow.python.framework import op_callbacks

import gradlab
from gradlab.measurements import Chain, Event, Jump, LayerUse, Origin, Place, chain_growth

_NOT_THE_USERS = tuple(
    str(Path(path)) + "/"
    for path in (
        Path(tf.__file__).parent,
        Path(keras.__file__).parent,
        Path(gradlab.__file__).parent,
        sysconfig.get_paths()["stdlib"] + "/contextlib.py",
        sysconfig.get_paths()["stdlib"] + "/functools.py",
    )
)
# Operations that combine a weight with data, each use a layer in its own right.
_TAKES_WEIGHT = re.compile(r"MatMul|^Conv|^DepthwiseConv|Einsum|Gather")
# Integers that are data here; anywhere else they are shapes and axes.
_TAKES_INTEGERS = re.compile(r"^Cast$|OneHot|Gather|Select|Embedding|Bincount")
_NO_VALUES = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"}
# Operations whose slope does not depend on their inputs …
_LINEAR = {"Sum", "Mean", "Neg", "Tile", "BroadcastTo", "Pack", "ConcatV2", "Cast", "Pad", "PadV2"}
# … and those whose slope depends on the other input alone.
_BILINEAR = {"Mul", "RealDiv", "Div", "MatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"}
_DRAWS = ("Random", "Stateless", "Stateful", "Multinomial", "TruncatedNormal", "Rng")
_REPLAYS = 12


@dataclass(slots=True)
class Op:
    """One operation that ran.

    Attributes:
        type: TensorFlow's name of it.
        inputs, outputs: its tensors.
        attrs: its attributes, name and value in turn.
        layers: the Keras layers it ran in, outermost first.
        line: file name and line number of the user's code.
    """

    type: str
    inputs: list
    outputs: list
    attrs: tuple
    layers: tuple
    line: tuple[str, int] | None


def as_array(tensor: Any) -> np.ndarray:
    """Values of a tensor, without a copy where that is possible; the slices of a sparse one."""
    if isinstance(tensor, tf.IndexedSlices):
        tensor = tensor.values
    return tensor._numpy() if hasattr(tensor, "_numpy") else np.asarray(tensor)


def norm(tensor: Any) -> float:
    """L2 norm whose square neither over- nor underflows; inf or NaN where the tensor holds one."""
    if isinstance(tensor, tf.IndexedSlices):
        tensor = tf.convert_to_tensor(tensor)
    flat = np.ravel(as_array(tensor))
    if flat.dtype in (np.float32, np.float64):
        with np.errstate(all="ignore"):
            size = float(np.linalg.norm(flat))
        if 1e-12 < size < 1e150 or not flat.size:  # float32 squares below that lose digits
            return size
    flat = flat.astype(np.float64)
    largest = float(np.max(np.abs(flat), initial=0.0))
    if largest == 0 or not np.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(flat / largest))


def finite(tensor: Any) -> bool:
    """Whether no element is inf or NaN; so are integers, and what is no tensor at all."""
    if tensor is None:
        return True
    values = as_array(tensor)
    if values.dtype.kind in "biuSO":
        return True
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.sum(values))) or bool(np.isfinite(values).all())


def _floating(tensor: Any) -> bool:
    return isinstance(tensor, tf.Tensor) and tensor.dtype.is_floating


def _holds_nan(tensor: Any) -> bool:
    sparse = isinstance(tensor, tf.IndexedSlices)
    return (sparse or _floating(tensor)) and bool(np.isnan(as_array(tensor)).any())


def _reaches(tensor: tf.Tensor, out: tf.Tensor) -> bool:
    """Whether an inf or NaN may have been passed on: not if it sits where the result is finite."""
    if tensor.shape != out.shape:
        return True
    return bool(np.any(~np.isfinite(as_array(tensor)) & ~np.isfinite(as_array(out))))


def source_line(frames: Iterator[tuple[str, int]]) -> tuple[str, int] | None:
    """The first of some (file, line) that is the user's own."""
    for file, line in frames:
        if not file.startswith(_NOT_THE_USERS) and (file + "/") not in _NOT_THE_USERS:
            return file, line
    return None


def _frames_outwards() -> Iterator[tuple[str, int]]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def source_text(line: tuple[str, int] | None) -> str:
    """ "train.py:12: y = tf.sqrt(x)"; "" for None."""
    if line is None:
        return ""
    text = linecache.getline(*line).strip()
    return f"{Path(line[0]).name}:{line[1]}" + (f": {text}" if text else "")


def layer_paths(model: keras.Model) -> dict[int, str]:
    """Path of every layer inside a model, by identity: "block/dense"; "" for the model."""
    paths = {id(model): ""}

    def visit(layer: keras.layers.Layer, prefix: str) -> None:
        for part in getattr(layer, "_layers", ()):
            if id(part) not in paths:
                paths[id(part)] = f"{prefix}{part.name}"
                visit(part, f"{prefix}{part.name}/")

    visit(model, "")
    return paths


class Trace:
    """A step that was run and differentiated.

    Attributes:
        ops: all operations of the forward pass, in order.
        loss: what the loss function returned.
        gradients: one for each trainable variable; None where the loss does not depend on it.
        random: whether an operation drew random numbers.
        failed_in: the layers that were running when the step raised.
    """

    def __init__(self, model: keras.Model, batch: Any) -> None:
        self.variables = model.trainable_variables
        self._weights = [v.value for v in self.variables]
        self._handles = {w.handle._id: i for i, w in enumerate(self._weights)}
        self.paths = layer_paths(model)
        self.owners = {
            id(v): self.paths[id(layer)]
            for layer in model._flatten_layers()
            if id(layer) in self.paths
            for v in getattr(layer, "_trainable_variables", ())
        }
        leaves = [np.shape(leaf) for leaf in tf.nest.flatten(batch) if hasattr(leaf, "shape")]
        self._lengths = {shape[0] for shape in leaves if len(shape)}
        self.ops: list[Op] = []
        self.loss: Any = None
        self.gradients: list = []
        self.random = False
        self.failed_in: tuple = ()
        self.origin: Origin | None = None  # of a NaN from nowhere, after `forward_event`
        self._signals: dict[int, Any] = {}

    # -- running it ----------------------------------------------------------------------------

    def run(self, step: Callable[[], Any]) -> Trace:
        """Run a step forward, recording; what it raises goes to the caller."""
        stack: list[keras.layers.Layer] = []

        def note(op_type, inputs, attrs, outputs, op_name=None, graph=None):
            if graph is None:
                name = op_type.decode() if isinstance(op_type, bytes) else op_type
                line = source_line(_frames_outwards())
                self.ops.append(Op(name, list(inputs), list(outputs), attrs, tuple(stack), line))

        with tf.GradientTape() as self._tape, _watched(stack, self), _callback(note):
            self.loss = step()
        self.random = any(op.type.startswith(_DRAWS) for op in self.ops)
        return self

    def differentiate(self) -> None:
        """Carry the loss's gradient back to every tensor of the forward pass."""
        self._made = {id(t) for op in self.ops for t in op.outputs}
        seen = {id(t): t for op in self.ops for t in (*op.inputs, *op.outputs) if _floating(t)}
        tensors = list(seen.values())
        found = self._tape.gradient(self.loss, [*tensors, *self._weights])
        self._signals = {
            id(t): tf.convert_to_tensor(s)
            for t, s in zip(tensors, found, strict=False)
            if s is not None
        }
        self.gradients = [
            g if g is None else tf.convert_to_tensor(g) for g in found[len(tensors) :]
        ]
        del self._tape

    def in_float64(self) -> Trace:
        """The same operations with all numbers in float64, random numbers included.

        Gradients of the user's own are not respected here: `random` is then set.

        Raises:
            Exception: whatever TensorFlow raises for an operation that it lacks in float64.
        """
        again = copy.copy(self)
        again.ops, again._weights = [], [tf.cast(w, tf.float64) for w in self._weights]
        known: dict[int, Any] = {}

        def wide(t: Any) -> Any:
            if id(t) not in known:
                index = self._parameter(t)
                known[id(t)] = _widen(t) if index is None else tf.identity(again._weights[index])
            return known[id(t)]

        with tf.GradientTape() as again._tape:
            again._tape.watch(again._weights)
            for op in self.ops:
                index = self._parameter(op.inputs[0]) if op.inputs else None
                inputs, attrs = [wide(t) if _floating(t) else known.get(id(t), t)
                                 for t in op.inputs], op.attrs  # fmt: skip
                if op.type == "ReadVariableOp" and index is not None:
                    outputs = [tf.identity(again._weights[index])]
                elif op.type == "ResourceGather" and index is not None:
                    outputs = [tf.gather(again._weights[index], inputs[1])]
                elif op.type.startswith(_DRAWS) or any(t.dtype == tf.resource for t in op.inputs):
                    outputs = list(map(_widen, op.outputs))
                else:
                    try:
                        attrs, outputs = _rerun(op, inputs)
                    except Exception:
                        if any(self.signal(t) is not None for t in op.outputs):
                            raise
                        outputs = list(map(_widen, op.outputs))  # no gradient passes here
                    else:
                        if op.type not in ("StopGradient", "PreventGradient"):
                            execute.record_gradient(op.type, inputs, attrs, outputs)
                known.update(zip(map(id, op.outputs), outputs, strict=True))
                again.ops.append(Op(op.type, inputs, outputs, attrs, op.layers, op.line))
            again.loss = wide(self.loss)
        again.differentiate()
        again.random = any(
            self.signal(t) is None and again.signal(known[id(t)]) is not None
            for op in self.ops
            for t in op.outputs
        )
        return again

    def _parameter(self, t: Any) -> int | None:
        """Which trainable variable a handle belongs to, or a tensor was read from, unannounced."""
        if t.dtype == tf.resource:
            return self._handles.get(t._id)
        if not _floating(t) or id(t) in self._made or self.signal(t) is None:
            return None
        same = (np.array_equal(as_array(w), as_array(t)) for w in self._weights)
        return next((i for i, equal in enumerate(same) if equal), None)

    def signal(self, tensor: Any) -> Any:
        """Gradient of the loss with respect to a tensor; None where nothing flows back."""
        return self._signals.get(id(tensor))

    # -- places --------------------------------------------------------------------------------

    def place(self, layers: Sequence, operation: str, line: tuple[str, int] | None) -> Place:
        """Where something happened, in words."""
        module = layers[-1].name if layers else "loss"
        for layer in reversed(layers):
            if id(layer) in self.paths:
                module = self.paths[id(layer)]
                break
        return Place(module, re.sub(r"V\d+$", "", operation).lower(), source_text(line))

    def _place(self, op: Op) -> Place:
        return self.place(op.layers, op.type, op.line)

    # -- the first inf or NaN ------------------------------------------------------------------

    def forward_event(self) -> Event | None:
        """The operation where what made the loss inf or NaN began; None where it was fed in."""
        makers = {id(out): op for op in self.ops for out in op.outputs}
        tensor, path = self.loss, []
        while id(tensor) in makers:
            op = makers[id(tensor)]
            path.append(op)
            bad = [t for t in op.inputs if _floating(t) and not finite(t)]
            if any(t.dtype == tf.resource for t in op.inputs):
                path.pop()  # a variable that was not finite before
                break
            if not bad:
                return self._forward(op)
            out = tensor
            tensor = max(bad, key=lambda t, out=out: (_reaches(t, out), _holds_nan(t)))
        # An inf that the user put there, as in a mask: guilty is who made a NaN of it.
        for op in reversed(path):
            if any(map(_holds_nan, op.outputs)) and not any(map(_holds_nan, op.inputs)):
                return self._forward(op)
        if path and _holds_nan(tensor):
            self.origin = Origin("", self._event(path[-1], "forward", True).place)
        return None

    def _forward(self, op: Op) -> Event:
        nan = any(map(_holds_nan, op.outputs))
        return self._event(
            op,
            "forward",
            nan,
            cured=_attempt(lambda: _all_finite(_rerun(op, [*map(_widen, op.inputs)])[1])),
        )

    def backward_event(self) -> Event | None:
        """The operation that made an inf or a NaN of a finite signal; None if there is none."""
        for op in reversed(self.ops):
            arriving = [self.signal(t) for t in op.outputs]
            if all(s is None for s in arriving) or not all(map(finite, arriving)):
                continue
            if all(finite(self.signal(t)) for t in op.inputs if _floating(t)):
                continue
            made = _attempt(
                lambda op=op, s=arriving: _slopes(op.type, op.attrs, op.inputs, op.outputs, s)
            )
            bad = [g for g in made or () if not finite(g)]
            if bad:
                nan = any(map(_holds_nan, bad))
                masked = all(_masked(g, arriving) for g in bad)
                cured = _attempt(lambda op=op, s=arriving: _all_finite(_rerun_slopes(op, s)))
                return self._event(op, "backward", nan, masked=masked, cured=cured)
        # A gradient of the user's own, or a sum of finite signals: where the bad signal came out.
        for op in reversed(self.ops):
            for t in op.outputs:
                if not finite(self.signal(t)):
                    after = next((o for o in self.ops if any(i is t for i in o.inputs)), op)
                    nan = _holds_nan(self.signal(t))
                    return self._event(after, "backward", nan)
        return None

    def _event(
        self, op: Op, phase: str, nan: bool, *, masked: bool = False, cured: bool | None = None
    ) -> Event:
        inputs = [t for t in op.inputs if _floating(t)]
        return Event(
            place=self._place(op),
            phase=phase,
            made="nan" if nan else "inf",
            masked=masked,
            in_float64=cured,
            inputs="; ".join(map(_in_words, inputs)),
            dtype=next((t.dtype.name for t in op.outputs if _floating(t)), ""),
        )

    def narrowest(self) -> str:
        """The 16-bit format that the step computes in; "" if none."""
        formats = {t.dtype.name for op in self.ops for t in op.outputs if _floating(t)}
        return next((name for name in ("float16", "bfloat16") if name in formats), "")

    # -- weights and gains ---------------------------------------------------------------------

    def _origins(self) -> dict[int, Any]:
        """Per tensor: "data", a frozenset of the parameters it was computed from, or "constant".

        A tensor that no operation made is data if it is as long as the batch or has several
        elements of floating point, a parameter if the gradient reaches it and its values say so.
        """
        origin: dict[int, Any] = {}

        def leaf(t: Any) -> Any:
            if not isinstance(t, tf.Tensor):
                return "constant"
            index = self._parameter(t)
            if index is not None or t.dtype == tf.resource or self.signal(t) is not None:
                return "constant" if index is None else frozenset([index])
            as_long = t.shape.rank and t.shape[0] in self._lengths
            return (
                "data" if as_long or (_floating(t) and t.shape.num_elements() > 1) else "constant"
            )

        for op in self.ops:
            taken = set()
            for t in op.inputs:
                if id(t) not in origin:
                    origin[id(t)] = leaf(t)
                if _floating(t) or t.dtype == tf.resource or _TAKES_INTEGERS.search(op.type):
                    taken.add(origin[id(t)])
            parts = [kind for kind in taken if isinstance(kind, frozenset)]
            if op.type in _NO_VALUES:
                result: Any = "constant"
            elif "data" in taken or (parts and "Gather" in op.type and not _floating(op.inputs[1])):
                result = "data"
            else:
                result = frozenset().union(*parts) if parts else "constant"
            for t in op.outputs:
                origin[id(t)] = result
        return origin

    def uses_and_jump(self) -> tuple[tuple[LayerUse, ...], Jump | None]:
        """Every use of a weight, in forward order, and the largest gain of any other operation."""
        origin = self._origins()
        behind = {id(self.loss): 0}  # uses of weights between a tensor and the loss
        users: dict[int, int] = {}
        uses, path = [], []
        for op in reversed(self.ops):
            depths = [behind[id(t)] for t in op.outputs if id(t) in behind]
            arriving = next((s for s in map(self.signal, op.outputs) if s is not None), None)
            if not depths:
                continue
            depth = max(depths)
            weights = [t for t in op.inputs if isinstance(origin[id(t)], frozenset)]
            mixes = any(origin[id(t)] == "data" for t in op.outputs)
            weight = next(
                (
                    t
                    for t in weights
                    if any(len(self.variables[i].shape) > 1 for i in origin[id(t)])
                ),
                None,
            )
            if mixes and weight is not None and _TAKES_WEIGHT.search(op.type):
                depth += 1
                if arriving is not None:
                    index = min(origin[id(weight)])
                    uses.append((index, depth, norm(arriving), norm(op.outputs[0])))
            path.append((op, weights))
            for t in op.inputs:
                users[id(t)] = users.get(id(t), 0) + 1
                if _floating(t) and depth > behind.get(id(t), -1):
                    behind[id(t)] = depth
        named = [(self.variables[index], *rest) for index, *rest in reversed(uses)]
        layers = tuple(LayerUse(self.owners.get(id(v), ""), v.path, *rest) for v, *rest in named)
        bad = any(not finite(g) for g in self.gradients)
        return layers, None if bad else self._jump(path, origin, users)

    def chain(self, largest: float) -> Chain | None:
        """Growth of the signal from operation to operation.

        Args:
            largest: norm of the largest gradient of a variable.
        """
        origin = self._origins()
        data = [op for op in self.ops if any(origin[id(t)] == "data" for t in op.outputs)]
        order = [*reversed([op for op in data if op.layers] or data)]
        arriving = [[self.signal(t) for t in op.outputs] for op in order]
        norms = [
            float(np.hypot.reduce([0.0, *(norm(s) for s in signals if s is not None)]))
            for signals in arriving
        ]
        grown = chain_growth(norms, largest)
        return grown and Chain(self._place(order[grown[0]]), *grown[1:])

    def _jump(self, path: list, origin: dict, users: dict[int, int]) -> Jump | None:
        """The largest gain, counting no more of it than is left at the weights behind.

        A normalisation, for one, is made of operations that magnify and others that undo it.

        Args:
            path: operations and their weights, from the loss backwards.
            origin: of every tensor.
            users: how many operations take a tensor.
        """
        sizes: dict[int, float] = {}

        def size(t: Any) -> float:
            if id(t) not in sizes:
                s = self.signal(t)
                sizes[id(t)] = 0.0 if s is None else norm(s)
            return sizes[id(t)]

        def flowing(op: Op) -> list[int]:
            return [i for i, t in enumerate(op.inputs) if self.signal(t) is not None]

        def gain(op: Op, slopes: list) -> float:
            arriving = float(np.hypot.reduce([0.0, *(size(t) for t in op.outputs)]))
            return max(slopes, default=0.0) / arriving if arriving else 0.0

        largest, left, candidates = 0.0, 0.0, []
        for op, weights in path:
            largest = max(largest, *map(size, op.outputs))
            candidates.append((op, weights, largest))
        ranked = []
        for op, weights, reached in reversed(candidates):
            if weights:
                left = max(left, *map(size, weights), *map(size, op.outputs))
            elif reached > 0:
                lasting = left / reached
                ranked.append((gain(op, [size(op.inputs[i]) for i in flowing(op)]), lasting, op))
        ranked = [(min(factor, lasting), lasting, op) for factor, lasting, op in ranked]
        best: tuple[float, Op | None, list] = (0.0, None, [])
        for factor, lasting, op in sorted(ranked, key=lambda entry: -entry[0])[:_REPLAYS]:
            if factor <= best[0]:
                break
            slopes = [self.signal(t) for t in op.inputs]
            if any(users[id(op.inputs[i])] > 1 for i in flowing(op)):
                # Others add to the signal at its input: take this operation's part alone.
                arriving = map(self.signal, op.outputs)
                made = _attempt(
                    lambda op=op, s=arriving: _slopes(op.type, op.attrs, op.inputs, op.outputs, s)
                )
                if made is None:
                    continue
                slopes = [made[i] if i in flowing(op) else None for i in range(len(op.inputs))]
                factor = min(lasting, gain(op, [norm(g) for g in slopes if g is not None]))
            if factor > best[0]:
                best = factor, op, slopes
        factor, op, slopes = best
        if op is None:
            return None
        moving = flowing(op)
        fixed = all(origin[id(t)] == "constant" for t in op.inputs if self.signal(t) is None)
        linear = op.type in _LINEAR or (
            op.type in _BILINEAR and len(moving) == 1 and fixed and (
                "Div" not in op.type or moving == [0]
            )
        )  # fmt: skip
        return Jump(self._place(op), factor, linear, _smallest_input(op, slopes))


# ---------------------------------------------------------------------------------------------
# One operation alone


def _slopes(kind: str, attrs: tuple, inputs: list, outputs: list, arriving: Any) -> list:
    """What one operation makes of the signals that arrive at its outputs, for each input."""
    signals = [
        tf.zeros_like(t) if s is None else tf.cast(s, t.dtype)
        for t, s in zip(outputs, arriving, strict=True)
    ]
    made = backprop._gradient_function(kind, attrs, len(inputs), inputs, outputs, signals, (), "")
    return list(made) if isinstance(made, (list, tuple)) else [made]


def _smallest_input(op: Op, slopes: list) -> float:
    """Smallest magnitude among the inputs, at the element whose slope is largest."""
    dense = [as_array(g) for g in slopes if isinstance(g, tf.Tensor)]
    if not dense:
        return float("nan")
    steepest = max(dense, key=lambda g: np.max(np.abs(g), initial=0.0))
    if not steepest.size:
        return float("nan")
    where = np.unravel_index(np.argmax(np.abs(steepest)), steepest.shape)
    found = []
    for t in filter(_floating, op.inputs):
        try:
            found.append(abs(float(np.broadcast_to(as_array(t), steepest.shape)[where])))
        except ValueError:
            continue  # of another shape
    return min(found, default=float("nan"))


def _widen(tensor: Any) -> Any:
    return tf.cast(tensor, tf.float64) if _floating(tensor) else tensor


def _rerun(op: Op, inputs: list) -> tuple[tuple, list]:
    """Its attributes and outputs for inputs in float64."""
    attrs = list(op.attrs)
    for k in range(1, len(attrs), 2):
        kind = backprop.op_attr_type(op.type, attrs[k - 1])
        if attrs[k] is None:
            continue
        if kind == _TYPE and tf.as_dtype(attrs[k]).is_floating:
            attrs[k] = tf.float64.as_datatype_enum
        elif kind == [_TYPE]:
            kinds = map(tf.as_dtype, attrs[k])
            attrs[k] = [(tf.float64 if d.is_floating else d).as_datatype_enum for d in kinds]
    pairs = zip(attrs[::2], attrs[1::2], strict=True)
    given = tuple(part for pair in pairs if pair[1] is not None for part in pair)  # None: default
    made = execute.execute(op.type, len(op.outputs), inputs, given, context.context())
    return tuple(attrs), list(made)


def _rerun_slopes(op: Op, arriving: list) -> list:
    inputs = list(map(_widen, op.inputs))
    attrs, outputs = _rerun(op, inputs)
    return _slopes(op.type, attrs, inputs, outputs, arriving)


_TYPE = int(backprop.pywrap_tfe.TF_ATTR_TYPE)


def _all_finite(tensors: list) -> bool:
    return all(finite(t) for t in tensors)


def _attempt(measure: Callable[[], Any]) -> Any:
    """Its result, or None where the operation cannot be run alone."""
    try:
        return measure()
    except Exception:
        return None


def _masked(gradient: Any, arriving: list) -> bool:
    """Whether a signal of 0 arrived wherever a gradient is not finite."""
    if isinstance(gradient, tf.IndexedSlices):
        return False
    bad = ~np.isfinite(as_array(gradient))
    for signal in arriving:
        if signal is None:
            continue
        values = as_array(signal)
        try:
            if np.any(np.broadcast_to(values, bad.shape)[bad]):
                return False
        except ValueError:
            if np.any(values):
                return False
    return True


def _range(tensor: Any) -> tuple[float, float, float]:
    """Lowest and highest finite value, and the largest magnitude; 0 where there is none."""
    values = as_array(tensor).astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 0.0, 0.0
    low, high = float(values.min()), float(values.max())
    return low, high, max(abs(low), abs(high))


def _in_words(tensor: Any) -> str:
    low, high, _ = _range(tensor)
    shape = ", ".join(map(str, tensor.shape))
    values = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    bad = int(np.sum(~np.isfinite(as_array(tensor))))
    return f"{tensor.dtype.name} ({shape}), {values}" + (f", {bad} not finite" if bad else "")


# ---------------------------------------------------------------------------------------------
# Hooks


@contextmanager
def _callback(note: Callable) -> Iterator[None]:
    op_callbacks.add_op_callback(note)
    try:
        yield
    finally:
        op_callbacks.remove_op_callback(note)


@contextmanager
def _watched(stack: list, trace: Trace) -> Iterator[None]:
    """Keep on a stack which Keras layers are running in this thread."""
    call, thread = keras.layers.Layer.__call__, threading.get_ident()

    def watched_call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return call(layer, *args, **kwargs)
        stack.append(layer)
        try:
            return call(layer, *args, **kwargs)
        except BaseException:
            trace.failed_in = trace.failed_in or tuple(stack)
            raise
        finally:
            stack.pop()

    keras.layers.Layer.__call__ = watched_call
    try:
        yield
    finally:
        keras.layers.Layer.__call__ = call
