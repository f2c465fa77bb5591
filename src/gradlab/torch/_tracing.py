"""Run a step once and note every operation: where it stands, what came in, what gradient came back.

Operations are seen as the user writes them (`torch.*`, tensor methods, `F.*`), by a
`TorchFunctionMode`; the signal at each result by a hook on it; weights by walking autograd's graph,
which also shows what a fused recurrent layer does at each time step.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gradlab.measurements import (
    Chain,
    Event,
    Jump,
    LayerUse,
    Origin,
    Place,
    chain_growth,
    source_line,
)
from gradlab.torch._float64 import float64
from gradlab.torch.probe import gradient_norms

# Frames below these folders are not the user's.
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_READS_ONLY = {"size", "dim", "__len__", "is_floating_point", "numel", "stride", "requires_grad_"}
# Autograd's nodes that apply a weight, and those that only rearrange one on its way there.
_APPLIES = ("Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Addmv", "Mv", "Convolution", "Embedding")
_APPLIES += ("Mul", "Mkldnn", "Linear", "SlowConv", "Thnn", "Dot")
_LAYERS = ("Addmm", "Mm", "Convolution", "Embedding", "Linear", "Mkldnn")
_REPARAMETRISED = ("parametrizations", "weight_g", "weight_v", "weight_orig")
_REARRANGES = ("T", "Transpose", "Permute", "View", "UnsafeView", "Reshape", "ReshapeAlias")
_REARRANGES += ("Expand", "Unsqueeze", "Squeeze", "ToCopy", "Clone", "Select", "Slice", "Split")
_REARRANGES += ("UnsafeSplit", "SplitWithSizes", "Unbind", "Alias", "AsStrided", "MkldnnReorder")


@dataclass
class Call:
    """One operation of the user's program.

    Attributes:
        function, args, kwargs: how it was called; tensors stand in `args` as they are.
        place: where.
        inputs, outputs: the tensors of floating point among its arguments and results.
        makers: for each input the number of the call that made it, −1 if none did.
        signals: for each output the gradient that came back to it, None if none did.
        bad: "" / "inf" / "nan" of its outputs, filled in when asked for.
        bad_inputs: the same of its inputs, as they were then.
        constant: a number like −inf was written into the call.
    """

    function: Any
    args: tuple
    kwargs: dict
    place: Place
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    makers: list[int]
    signals: list[torch.Tensor | None] = field(default_factory=list)
    bad: str = ""
    bad_inputs: list[str] = field(default_factory=list)
    constant: bool = False


def _bad(tensor: torch.Tensor) -> str:
    """ "" / "inf" / "nan"; of a tensor inside vmap, which has no single answer, "" too."""
    if (
        is_functorch_wrapped_tensor(tensor)
        or tensor.numel() == 0
        or bool(torch.isfinite(tensor.detach()).all())
    ):
        return ""
    return "nan" if bool(torch.isnan(tensor.detach()).any()) else "inf"


_SEVERITY = ["", "inf", "nan"]
# Inputs that are all smaller than this are moved by a thousandth of 1.
_TINY_INPUT = 1e-6


def _thrown_away(slope: torch.Tensor, signal: torch.Tensor) -> bool:
    """Whether the signal is 0 wherever the slope is not finite."""
    if slope.shape == signal.shape:
        return not bool(signal[~torch.isfinite(slope)].any())
    return not bool(signal.any())


def floats(tree: Any) -> list[torch.Tensor]:
    """The strided tensors of floating point in a structure."""
    return [
        leaf
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, torch.Tensor)
        and leaf.is_floating_point()
        and leaf.layout == torch.strided
        and not is_functorch_wrapped_tensor(leaf)
    ]


def operation_name(function: Any) -> str:
    """What a user calls it: "sqrt", "mul", "cross_entropy"."""
    name = getattr(function, "__name__", str(function)).strip("_")
    return {"rtruediv": "div", "truediv": "div", "rpow": "pow", "rsub": "sub"}.get(
        name, name[1:] if name in {"radd", "rmul", "rdiv", "rmatmul"} else name
    )


def users_frame(depth: int = 1) -> tuple[str, int] | None:
    """File and line of the innermost frame that is neither PyTorch's nor ours."""
    frame = sys._getframe(depth)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((*_LIBRARIES, "<frozen")):
            return name, frame.f_lineno
        frame = frame.f_back
    return None


def raised_at(error: BaseException) -> str:
    """The user's line that an exception came through last; "" if none is known."""
    line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith(_LIBRARIES):
            line = source_line(frame.f_code.co_filename, number)
    return line


class Trace(TorchFunctionMode):
    """Everything that happens while it is active.

    Args:
        model: names the modules.
        check: look at every number for inf and NaN, which costs.
        suspects: names, by id, of the tensors that are not finite before the step.

    Attributes:
        calls: what happened.
        raised_in: the operation that raised, if one did.
        failed_in: the module that an exception passed first.
        origin: after `forward_event`, the tensor that brought a non-finite number in.
    """

    def __init__(
        self, model: nn.Module, *, check: bool, suspects: dict[int, str] | None = None
    ) -> None:
        super().__init__()
        self.origin: Origin | None = None
        self.failed_in: str | None = None
        self._suspects = suspects or {}
        self.calls: list[Call] = []
        self.raised_in: Call | None = None
        self._check = check
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._lines: list[tuple[str, int] | None] = []
        self._maker: dict[int, int] = {}
        self._state: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []
        self._sizes: list[float] | None = None

    # -- where we are --------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[Trace]:
        """Note operations, and which module they belong to."""

        def enter(module: nn.Module, args: tuple) -> None:
            outer = self._stack[-1] if self._stack else "loss"
            self._stack.append(self._names.get(id(module), outer))

        def leave(module: nn.Module, args: tuple, output: object) -> None:
            if self._stack:
                name = self._stack.pop()
                if self.failed_in is None and sys.exc_info()[0] is not None:
                    self.failed_in = name

        handles = [
            module_hooks.register_module_forward_pre_hook(enter),
            module_hooks.register_module_forward_hook(leave, always_call=True),
        ]
        apply = torch.autograd.Function.__dict__["apply"]

        def noted(kind, *args, **kwargs):
            return self._note(kind.__name__, apply.__get__(None, kind), args, kwargs)

        torch.autograd.Function.apply = classmethod(noted)
        try:
            with self:
                yield self
        finally:
            torch.autograd.Function.apply = apply
            for handle in handles:
                handle.remove()

    def place(self, index: int) -> Place:
        """Where a call stands, with the user's line."""
        call = self.calls[index]
        line = self._lines[index]
        return Place(call.place.module, call.place.operation, source_line(*line) if line else "")

    # -- what happens --------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _READS_ONLY:
            return func(*args, **(kwargs or {}))
        return self._note(operation_name(func), func, args, kwargs or {})

    def _note(self, name: str, function: Any, args: tuple, kwargs: dict) -> Any:
        inputs = floats((args, kwargs))
        place = Place(self._stack[-1] if self._stack else "loss", name)
        call = Call(function, args, kwargs, place, inputs, [], [])
        call.makers = [self._maker.get(id(tensor), -1) for tensor in inputs]
        line = users_frame(3)
        if self._check:
            call.bad_inputs = [self._state_of(tensor) for tensor in inputs]
            call.constant = any(
                isinstance(leaf, float) and not np.isfinite(leaf)
                for leaf in pytree.tree_leaves((args, kwargs))
            )
        try:
            result = function(*args, **kwargs)
        except Exception:
            if self.raised_in is None:
                self.raised_in = call
                self.raised_in.place = Place(place.module, name, source_line(*line) if line else "")
            raise
        outputs = floats(result)
        changed = name.endswith("_") or name == "setitem" or kwargs.get("out") is not None
        if (result is None or changed) and inputs:
            outputs = outputs or inputs[:1]
        if not outputs or (name == "get" and any(o is i for o in outputs for i in inputs)):
            return result
        number = len(self.calls)
        call.outputs, call.signals = outputs, [None] * len(outputs)
        self.calls.append(call)
        self._lines.append(line)
        for k, tensor in enumerate(outputs):
            self._maker[id(tensor)] = number
            self._alive.append(tensor)
            if self._check:
                self._state[id(tensor)] = _bad(tensor)
                call.bad = max(call.bad, self._state[id(tensor)], key=_SEVERITY.index)
            if tensor.requires_grad:
                with suppress(RuntimeError):
                    tensor.register_hook(self._keep_signal(call, k))
        return result

    def _state_of(self, tensor: torch.Tensor) -> str:
        if id(tensor) not in self._state:
            self._state[id(tensor)] = _bad(tensor)
            self._alive.append(tensor)
        return self._state[id(tensor)]

    def _keep_signal(self, call: Call, k: int):
        def hook(gradient: torch.Tensor | None) -> None:
            if gradient is not None:
                call.signals[k] = gradient.detach()

        return hook

    # -- what it means -------------------------------------------------------------------------

    def forward_event(self, loss: torch.Tensor) -> Event | None:
        """Where the non-finite number in the loss began; None if the loss is finite."""
        if not self._state_of(loss):
            return None
        number, path = self._maker.get(id(loss), -1), []
        seen: set[int] = set()
        entered = -1  # where the path leaves what we have seen
        while number >= 0 and number not in seen:
            seen.add(number)
            path.append(number)
            call = self.calls[number]
            from_whom = zip(call.bad_inputs, call.makers, strict=True)
            # A NaN before an inf, and of equals the earliest.
            worst = min(((bad != "nan", maker) for bad, maker in from_whom if bad), default=None)
            if worst is None:
                break
            number = worst[1]
            entered = path[-1] if number < 0 else -1
        if not path:
            return None
        first = self.calls[path[-1]]
        if entered >= 0 and (event := self._came_in(entered)) is not None:
            return event
        if self.origin is not None:
            return None
        if first.constant or any(first.bad_inputs):
            # An inf that was put there on purpose, as in a mask: to blame is who made NaN of it.
            for index in reversed(path):
                call = self.calls[index]
                if call.bad == "nan" and "nan" not in call.bad_inputs:
                    return self._event(index, "forward", call.bad)
        return self._event(path[-1], "forward", first.bad or "nan")

    def _came_in(self, index: int) -> Event | None:
        """What a bad input that no call has made tells: an origin, or an operation unseen."""
        call = self.calls[index]
        entries = zip(call.inputs, call.makers, call.bad_inputs, strict=True)
        for tensor, maker, bad in sorted(entries, key=lambda entry: entry[2] != "nan"):
            if maker >= 0 or not bad:
                continue
            name = self._suspects.get(id(tensor))
            if name is None and tensor.grad_fn is not None:
                place = Place(call.place.module, _kind(tensor.grad_fn), self.place(index).source)
                return Event(place, "forward", bad)
            if name is not None or bad == "nan":
                self.origin = Origin(name or "", self.place(index))
                return None
        return None

    def backward_event(self) -> Event | None:
        """The first operation of the backward pass with a finite signal and a bad slope."""
        for index in range(len(self.calls) - 1, -1, -1):
            call = self.calls[index]
            got = [signal for signal in call.signals if signal is not None]
            if not got or any(_bad(signal) for signal in got):
                continue
            if not any(tensor.requires_grad for tensor in call.inputs):
                continue
            if self._inputs_known_finite(call):
                continue
            slopes = self.replay(index)
            bad = [s for s in slopes if s is not None and _bad(s)]
            if bad:
                made = max(map(_bad, bad), key=_SEVERITY.index)
                masked = any(_thrown_away(s, signal) for s in bad for signal in got)
                return self._event(index, "backward", made, masked=masked)
        return None

    def _inputs_known_finite(self, call: Call) -> bool:
        """Every input that carries a gradient was made by a call that got a finite one."""
        for tensor, maker in zip(call.inputs, call.makers, strict=True):
            if not tensor.requires_grad:
                continue
            if maker < 0:
                return False
            signals = [s for s in self.calls[maker].signals if s is not None]
            if not signals or any(_bad(s) for s in signals):
                return False
        return True

    def replay(
        self, index: int, *, wide: bool = False, move: float = 0.0
    ) -> list[torch.Tensor | None]:
        """The slopes of one call alone: its signal carried back to each of its inputs.

        Args:
            index: which call.
            wide: in float64.
            move: move the inputs by this share of their size first.
        """
        call = self.calls[index]
        leaves: dict[int, torch.Tensor] = {}

        def fresh(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if id(leaf) not in leaves:
                copied = leaf.detach().clone()
                if wide and copied.is_floating_point():
                    copied = copied.double()
                if move and leaf.requires_grad:
                    typical = copied.pow(2).mean().sqrt()
                    copied += move * (
                        copied.abs() + torch.where(typical > _TINY_INPUT, typical, 1.0)
                    )
                leaves[id(leaf)] = copied.requires_grad_(leaf.requires_grad)
            # In-place operations may not change a leaf.
            return leaves[id(leaf)].clone() if leaf.requires_grad else leaves[id(leaf)]

        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            args, kwargs = pytree.tree_map(fresh, (call.args, call.kwargs))
            result = call.function(*args, **kwargs)
            if result is None:
                result = args[0]
            pairs = [
                (out, signal.double() if wide else signal)
                for out, signal in zip(floats(result), call.signals, strict=False)
                if signal is not None and out.requires_grad and out.shape == signal.shape
            ]
            wanted = [leaves[id(t)] for t in call.inputs if t.requires_grad and id(t) in leaves]
            if not pairs or not wanted:
                return []
            return list(
                torch.autograd.grad(
                    [out for out, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True
                )
            )

    def _finite_in_float64(self, index: int, phase: str) -> bool | None:
        call = self.calls[index]
        try:
            with float64() as widen, torch.random.fork_rng(devices=[]):
                if phase == "backward":
                    return not any(_bad(s) for s in self.replay(index, wide=True) if s is not None)
                args, kwargs = pytree.tree_map(
                    lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf,
                    (call.args, call.kwargs),
                )
                with torch.no_grad():
                    result = call.function(*widen(args), **widen(kwargs))
                return not any(_bad(t) for t in floats(args[0] if result is None else result))
        except Exception:
            return None

    def _event(self, index: int, phase: str, made: str, *, masked: bool = False) -> Event:
        call = self.calls[index]
        described = []
        for tensor in call.inputs[:3]:
            numbers = tensor.detach()[torch.isfinite(tensor.detach())].double()
            text = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            if numbers.numel():
                low, high = numbers.min().item(), numbers.max().item()
                text += f" = {low:.4g}" if low == high else f" from {low:.4g} to {high:.4g}"
            described.append(text)
        return Event(
            place=self.place(index),
            phase=phase,
            made=made,
            masked=masked,
            in_float64=self._finite_in_float64(index, phase),
            inputs=" and ".join(described),
            dtype=str(call.outputs[0].dtype).removeprefix("torch."),
        )

    def narrowest(self) -> str:
        """The 16-bit format that a part of the step with a gradient computes in; "" if none."""
        formats = {
            tensor.dtype for call in self.calls for tensor in call.outputs if tensor.requires_grad
        }
        narrow = next((f for f in (torch.float16, torch.bfloat16) if f in formats), None)
        return str(narrow).removeprefix("torch.") if narrow else ""

    def jump(self, weights: set[int]) -> Jump | None:
        """The operation without a weight that multiplied the signal most.

        Args:
            weights: ids of the parameters.
        """
        sizes = self._norms()
        # The largest signal between an operation and the loss.
        reached = np.maximum.accumulate(np.array(sizes[::-1] or [0.0]))[::-1]
        candidates, left = [], 0.0  # left: the largest signal at the weights so far
        for index, call in enumerate(self.calls):
            after = sizes[index]
            if any(id(tensor) in weights for tensor in call.inputs):
                left = max(left, after)
                continue
            sources = zip(call.makers, call.inputs, strict=True)
            makers = [maker for maker, t in sources if maker >= 0 and t.requires_grad]
            before = max((sizes[maker] for maker in makers), default=0.0)
            if after > 0 and before > 0:
                candidates.append((min(before / after, left / reached[index]), index))
        # A tensor may be used twice, and its signal then is not this operation's alone: check.
        best: Jump | None = None
        for rough, index in sorted(candidates, reverse=True)[:5]:
            if best is not None and rough <= best.factor:
                break
            try:
                slopes = [s for s in self.replay(index) if s is not None]
            except Exception:
                continue
            factor = min(gradient_norms(slopes).max(initial=0.0) / sizes[index], rough)
            if best is None or factor > best.factor:
                best = Jump(
                    self.place(index),
                    float(factor),
                    at=self._smallest_input(index, slopes),
                    **self._when_moved(index),
                )
        return best

    def _when_moved(self, index: int) -> dict[str, Any]:
        """How the slopes of a call change when its inputs move by a thousandth of their size."""
        try:
            with float64():
                here = [s for s in self.replay(index, wide=True) if s is not None]
                there = [s for s in self.replay(index, wide=True, move=1e-3) if s is not None]
        except Exception:
            return {}
        size, moved = gradient_norms(here).max(initial=0.0), gradient_norms(there).max(initial=0.0)
        apart = gradient_norms(a - b for a, b in zip(here, there, strict=True)).max(initial=0.0)
        return {
            "linear": bool(apart <= 1e-9 * size),
            "sensitive": not np.isfinite(moved) or bool(moved < size / 10),
        }

    def chain(self, largest: float) -> Chain | None:
        """Growth of the signal from operation to operation.

        Args:
            largest: norm of the largest gradient of a parameter.
        """
        norms = self._norms()
        inside = [i for i, call in enumerate(self.calls) if call.place.module != "loss"]
        order = [*reversed(inside or range(len(self.calls)))]
        grown = chain_growth([norms[i] for i in order], largest)
        return grown and Chain(self.place(order[grown[0]]), *grown[1:])

    def _norms(self) -> list[float]:
        """Norm of the signal at each call's results."""
        if self._sizes is None:
            flat = [s for call in self.calls for s in call.signals if s is not None]
            norms = iter(gradient_norms(flat))
            self._sizes = [
                float(np.hypot.reduce([0.0, *(next(norms) for s in call.signals if s is not None)]))
                for call in self.calls
            ]
        return self._sizes

    def _smallest_input(self, index: int, slopes: list[torch.Tensor]) -> float:
        """Magnitude of the inputs where the slope is largest."""
        steepest = max(slopes, key=lambda s: s.abs().max().item() if s.numel() else 0.0)
        at = np.unravel_index(int(steepest.abs().argmax()), tuple(steepest.shape))
        sizes = []
        for tensor in self.calls[index].inputs:
            with suppress(RuntimeError, IndexError):
                sizes.append(tensor.detach().expand_as(steepest)[at].abs().item())
        return min(sizes, default=float("nan"))


# ---------------------------------------------------------------------------------------------
# Weights


def _kind(node: Any) -> str:
    return node.name().rpartition("::")[2].split("Backward")[0]


def _weight_of(node: Any, names: dict[int, str]) -> str | None:
    """The parameter that a branch of the graph leads to, if it only rearranges one."""
    for _ in range(12):
        if node is None:
            return None
        if hasattr(node, "variable"):
            return names.get(id(node.variable))
        following = [n for n, _ in node.next_functions if n is not None]
        if _kind(node) not in _REARRANGES or len(following) != 1:
            return _reparametrised(node, names)
        node = following[0]
    return None


def _reparametrised(node: Any, names: dict[int, str]) -> str | None:
    """The weight behind a spectral or weight norm: a small branch of parameters of one module."""
    todo, found, seen = [node], [], 0
    while todo and seen < 40:
        node, seen = todo.pop(), seen + 1
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.append(names.get(id(node.variable), ""))
        todo += [n for n, _ in node.next_functions]
    marked = [any(mark in name for mark in _REPARAMETRISED) for name in found]
    if todo or not found or not all(marked):
        return None
    return found[0]


class Weights:
    """Every use of a weight in a step, found in autograd's graph.

    Args:
        loss: its graph is walked, and hooks are put where the signal is to be read.
        parameters: by name.
    """

    def __init__(self, loss: torch.Tensor, parameters: dict[str, nn.Parameter]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        order, arrivals = self._topological(loss.grad_fn)
        depth: dict[Any, int] = {}
        self._found: list[tuple[str, int, list[torch.Tensor]]] = []
        for node in order:
            here = max((depth[before] for before in arrivals[node]), default=0)
            weight = None
            if _kind(node).startswith(_APPLIES):
                weights = [_weight_of(n, names) for n, _ in node.next_functions]
                # Of addmm's arguments the first is the bias, which rearranges nothing.
                known = [w for w in weights if w is not None]
                matrices = [w for w in known if parameters[w].dim() >= 2]
                weight = (matrices or known or [None])[0]
                # What a spectral norm does with the weight itself is no layer.
                if weight is not None and any(mark in weight for mark in _REPARAMETRISED):
                    weight = weight if _kind(node).startswith(_LAYERS) else None
            if weight is not None:
                here += 1
                kept: list[torch.Tensor] = []
                node.register_prehook(self._keep(kept))
                self._found.append((weight, here, kept))
            depth[node] = here

    @staticmethod
    def _keep(kept: list[torch.Tensor]):
        def hook(gradients: tuple) -> None:
            kept.extend(g.detach() for g in gradients if g is not None)

        return hook

    @staticmethod
    def _topological(root: Any) -> tuple[list[Any], dict[Any, list[Any]]]:
        """Nodes from the loss on, each after all that lead to it; and which those are."""
        arrivals: dict[Any, list[Any]] = {root: []}
        todo = [root] if root is not None else []
        while todo:
            node = todo.pop()
            for after, _ in node.next_functions:
                if after is None:
                    continue
                if after not in arrivals:
                    arrivals[after] = []
                    todo.append(after)
                arrivals[after].append(node)
        waiting = {node: len(before) for node, before in arrivals.items()}
        ready, order = [root] if root is not None else [], []
        while ready:
            node = ready.pop()
            order.append(node)
            for after, _ in node.next_functions:
                if after is not None:
                    waiting[after] -= 1
                    if waiting[after] == 0:
                        ready.append(after)
        return order, arrivals

    def uses(self) -> tuple[LayerUse, ...]:
        """After the backward pass: the uses, in the order of the forward pass."""
        signals = [signal for _, _, kept in self._found for signal in kept]
        norms = iter(gradient_norms(signals))
        found = []
        for name, depth, kept in self._found:
            if kept:
                norm = float(np.hypot.reduce([next(norms) for _ in kept]))
                found.append(LayerUse(name.rpartition(".")[0], name, depth, norm))
        return tuple(sorted(found, key=lambda use: -use.depth))
