"""Watch a training loop's gradients without changing the loop."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import OptState

from gradlab.history import GradientHistory, Outlet, Recorder, check_options


class NonFiniteGradientError(FloatingPointError):
    """A gradient held an inf or a NaN, and the probe was asked to raise.

    Attributes:
        step: the optimiser step that was about to be taken.
        parameter: dotted name of the first parameter with a bad gradient.
        module: dotted name of the module that owns it, and its class.
    """

    def __init__(self, step: int, parameter: str, module: str) -> None:
        self.step, self.parameter, self.module = step, parameter, module
        super().__init__(
            f"step {step}: the gradient of {parameter} (module {module}) is not finite. "
            "The step was not taken: the weights are those of the step before."
        )


# Below this, squares of float32 numbers may have lost digits, or all of them, to underflow.
_TINY = 1e-15
# One running float32 sum over more numbers than _LARGE loses the fourth digit, pieces do not.
_LARGE, _PIECE = 1 << 22, 1 << 18
_PLAIN = (torch.float32, torch.float64)
_PLAIN_KINDS = {(dtype, torch.strided) for dtype in _PLAIN}


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient's numbers, real and in at least float32."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    if gradient.dtype in _PLAIN:
        return gradient
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    return gradient if gradient.dtype in _PLAIN else gradient.float()


def _read(scalars: Iterable[torch.Tensor]) -> list[float]:
    """Numbers that lie on the model's devices; the only place that waits for them."""
    scalars = list(scalars)
    if type(scalars[0]) is torch.Tensor and scalars[0].is_cpu:
        return [s.item() for s in scalars]  # nothing to wait for, and half the time
    try:
        stacked = torch.stack(scalars)
    except RuntimeError:  # a model that is spread over devices
        return [s.item() for s in scalars]
    if hasattr(stacked, "full_tensor"):  # a DTensor: each process holds a part of the sum
        stacked = stacked.full_tensor()
    return stacked.tolist()


def _exact_norm(gradient: torch.Tensor) -> float:
    """L2 norm whose square may neither overflow nor underflow."""
    if gradient.numel() == 0:
        return 0.0
    largest = gradient.abs().max().item()
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * torch.linalg.vector_norm(gradient.double() / largest).item()


def gradient_norms(gradients: Iterable[torch.Tensor]) -> np.ndarray:
    """L2 norm of each gradient, in one pass over them.

    Only norms that read inf, NaN or next to 0 are looked at again, in float64: the square of a
    float32 number above 1e19 overflows and that of one below 1e-19 underflows.

    Args:
        gradients: dense or sparse tensors of any dtype.

    Returns:
        (gradients,), float64; NaN or inf only where a gradient itself holds one.
    """
    dense = list(gradients)
    if not dense:
        return np.zeros(0)
    # This runs at every step: the usual case costs as few calls as possible.
    if not {(g.dtype, g.layout) for g in dense} <= _PLAIN_KINDS:
        dense = [_dense(g.detach()) for g in dense]
    if max([g.numel() for g in dense]) <= _LARGE:
        norms = _read(torch._foreach_norm(dense))
    else:
        pieces = [g.flatten().split(_PIECE) if g.numel() > _LARGE else (g,) for g in dense]
        parts = iter(_read(torch._foreach_norm([part for cut in pieces for part in cut])))
        norms = [math.hypot(*islice(parts, len(cut))) for cut in pieces]
    for i in [i for i, norm in enumerate(norms) if not _TINY < norm < math.inf]:
        norms[i] = _exact_norm(dense[i])
    return np.array(norms)


def total_norm(norms: np.ndarray) -> float:
    """√Σ norm², without overflow for norms up to the largest float64."""
    return math.hypot(*norms.tolist())


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _clean(name: str) -> str:
    """A name without what wrappers inside the model put into it."""
    wrapper = r"(^|\.)_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)(?=\.|$)"
    return re.sub(wrapper, "", name).lstrip(".")


def _float_tensors(output: object) -> Iterator[torch.Tensor]:
    """What a module gave that can overflow: tensors inside tuples, lists and dictionaries too."""
    if isinstance(output, torch.Tensor):
        if output.numel() and (output.is_floating_point() or output.is_complex()):
            yield output.detach()
    elif isinstance(output, tuple | list | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _float_tensors(part)


class _Seen(NamedTuple):
    """What one look at the gradients found."""

    norms: np.ndarray  # (parameters,)
    present: np.ndarray  # (parameters,)
    total: float
    clipped_total: float

    @property
    def bad(self) -> bool:
        return not math.isfinite(self.total)


class GradientProbe:
    """Record the gradient norm of every parameter at every optimiser step.

    Use it as a context manager around a loop that does not change::

        with GradientProbe(model, optimizer) as probe:
            for x, y in batches:
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
        probe.history.plot()

    Args:
        model: names the parameters; what `torch.compile` and `DistributedDataParallel` add to the
            names is left out.
        optimizer: whose `step` is watched.
        capacity: steps kept; older ones are overwritten.
        activations: also record the largest absolute output of every leaf module, over all forward
            passes with gradients since the step before.
        update_ratio_every: every so many steps, also record ‖Δw‖/‖w‖ of every parameter; 0 never.
        on_nonfinite: what to do when a gradient holds an inf or NaN: "record" it, "skip" the step
            (weights and optimiser state stay as they are), or "raise" before the step.
        scaler: the `torch.amp.GradScaler` that calls `step`, if one does.
        save_to: an .npz file that is replaced every `save_every` steps and at the end of the block,
            so that a run that is killed leaves its history.

    The probe sees gradients as they are when `step` is called: summed over accumulated batches,
    and clipped if the loop clips them first.  Call `probe.clip_(max_norm)` instead of
    `clip_grad_norm_` to record both norms; `history.seen` says which ones it holds.

    A GradScaler divides the gradients by its scale before it calls `step`, so the norms are those
    of the loss itself.  Steps that it leaves out never reach the optimiser: give it as `scaler` to
    have them recorded, as skipped.  They are its way to find a scale, so none of them raises.

    A `step(closure)` gives one row, of the last evaluation or of the first whose gradient is not
    finite.  If that is skipped, the whole step is undone.

    On an accelerator the norms are read once per step, which waits for the backward pass.

    Raises:
        ValueError: an argument out of range.
        FileNotFoundError: `save_to` lies in no folder.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        capacity: int = 1000,
        activations: bool = False,
        update_ratio_every: int = 0,
        on_nonfinite: str = "record",
        scaler: torch.amp.GradScaler | None = None,
        save_to: str | Path | None = None,
        save_every: int = 100,
    ) -> None:
        check_options(
            capacity=capacity, update_ratio_every=update_ratio_every, on_nonfinite=on_nonfinite
        )
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.on_nonfinite, self.update_ratio_every = on_nonfinite, update_ratio_every
        self._inner = _unwrapped(model)
        self._named = dict(self._inner.named_parameters())
        self._leaves = {
            _clean(name): module
            for name, module in self._inner.named_modules()
            if activations and not any(module.children())
        }
        self._recorder = Recorder(
            [_clean(name) for name in self._named],
            capacity,
            list(self._leaves) if activations else None,
        )
        self._outlet = Outlet(save_to, save_every)
        self._all = np.ones(len(self._named), dtype=bool)
        self._largest: dict[int, torch.Tensor] = {}  # by module
        self._clips = 0
        self._pending: _Seen | None = None  # what clip_ saw
        self._closed: _Seen | None = None  # what the closure's evaluations left
        self._undo: Callable[[], None] | None = None
        self._held_back: dict[nn.Parameter, torch.Tensor] = {}
        self._before: list[torch.Tensor] | None = None
        self._attached: ExitStack | None = None

    # -- attaching -----------------------------------------------------------------------------

    def __enter__(self) -> GradientProbe:
        if self._attached:
            raise RuntimeError("this probe is already attached; leave its `with` block first")
        self._attached = ExitStack()
        for handle in (
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            *(
                module.register_forward_hook(self._watch_output(i))
                for i, module in enumerate(self._leaves.values())
            ),
        ):
            self._attached.callback(handle.remove)
        if self.scaler is not None:
            self._watch_scaler(self._attached)
        return self

    def __exit__(self, *exception: object) -> None:
        self._attached.close()
        self._attached = None
        self._give_back()  # where the step itself raised, this is still to be done
        self._pending = self._closed = self._undo = self._before = None
        self._largest.clear()
        if self._recorder.count:
            self._outlet.save(self._history)

    def _watch_output(self, place: int):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not torch.is_grad_enabled():
                return  # an evaluation
            for tensor in _float_tensors(output):
                low, high = torch.aminmax(tensor.abs() if tensor.is_complex() else tensor)
                largest = torch.maximum(-low, high)  # both hand a NaN on
                if place in self._largest:
                    largest = torch.maximum(largest, self._largest[place])
                self._largest[place] = largest

        return hook

    def _watch_scaler(self, attached: ExitStack) -> None:
        """Hear of the steps that the scaler leaves out: the optimiser's hooks do not."""
        own, step = vars(self.scaler).get("step"), self.scaler.step

        def watched(optimizer: torch.optim.Optimizer, *args: object, **kwargs: object):
            before = self._recorder.count
            result = step(optimizer, *args, **kwargs)
            if optimizer is self.optimizer and self._recorder.count == before:
                self._record(self._look(), skipped=True)
                self._publish()
            return result

        self.scaler.step = watched
        if own is None:
            attached.callback(delattr, self.scaler, "step")
        else:  # another probe's
            attached.callback(setattr, self.scaler, "step", own)

    # -- what was seen -------------------------------------------------------------------------

    @property
    def history(self) -> GradientHistory:
        """What has been recorded so far."""
        return self._history()

    def _history(self, since: int = 0) -> GradientHistory:
        clips, count = self._clips, self._recorder.count
        seen = "gradients as step() found them, after any clipping by the loop"
        if clips:
            seen = "gradients before the probe's clip_"
            if clips < count:
                seen += f" at {clips} of {count} steps, as step() found them at the others"
        self._recorder.seen = seen + (", divided by the loss scale" if self.scaler else "")
        return self._recorder.history(since)

    def save(self, path: str | Path) -> Path:
        """Write the history to an .npz file; see `GradientHistory.save`."""
        return self.history.save(path)

    def log_to(self, writer: object, every: int = 1) -> GradientProbe:
        """Send every `every`-th step's numbers to a writer as well.

        Args:
            writer: TensorBoard's SummaryWriter, or anything with `add_scalar(tag, value, step)`.
                Tags are `grad_norm/<parameter>`, `grad_norm/total`, `grad_norm/clipped_total` and,
                where measured, `update_ratio/<parameter>`.
            every: ≥ 1.

        Returns:
            The probe itself.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                f"a writer has a method add_scalar(tag, value, step), got {type(writer).__name__}"
            )
        self._outlet.log_to(writer.add_scalar, every)
        return self

    # -- at each step --------------------------------------------------------------------------

    def _measure(self) -> _Seen:
        gradients = [p.grad for p in self._named.values()]
        missing = [i for i, g in enumerate(gradients) if g is None]
        present = self._all
        if not missing:
            norms = here = gradient_norms(gradients)
        else:
            present = present.copy()
            present[missing] = False
            norms = np.full(len(present), np.nan)
            here = norms[present] = gradient_norms(g for g in gradients if g is not None)
        # An optimiser that undoes the loss scale itself, as fused ones do, is told it this way.
        scale = getattr(self.optimizer, "grad_scale", None)
        if scale is not None:
            norms /= float(scale)
            here = norms[present]
        total = total_norm(here)
        return _Seen(norms, present, total, total)

    def _look(self) -> _Seen:
        """What `clip_` saw just now, or what is there."""
        if self._pending is None:
            return self._measure()
        seen, self._pending = self._pending, None
        self._clips += 1
        return seen

    def clip_(self, max_norm: float) -> float:
        """Scale the gradients to a total norm of at most `max_norm`, and record both norms.

        Call it where `torch.nn.utils.clip_grad_norm_` would stand.  Gradients that hold an inf or
        NaN are left as they are, for `on_nonfinite` to deal with: scaling would spread the NaN.
        With a `scaler`, they are unscaled first, if `scaler.unscale_` has not done so.

        Args:
            max_norm: > 0.

        Returns:
            The total norm before clipping.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
        scaler = self.scaler
        if (
            scaler is not None
            and scaler.is_enabled()
            and scaler._per_optimizer_states[id(self.optimizer)]["stage"] is OptState.READY
        ):
            scaler.unscale_(self.optimizer)
        seen = self._measure()
        if not seen.bad and seen.total > max_norm:
            gradients = [p.grad for p in self._named.values() if p.grad is not None]
            # A sparse gradient's rows may repeat; scaling each scales their sum.
            gradients = [g._values() if g.is_sparse else g for g in gradients]
            with torch.no_grad():
                torch._foreach_mul_(gradients, max_norm / seen.total)
            seen = seen._replace(clipped_total=max_norm)
        self._pending = seen
        return seen.total

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict):
        every = self.update_ratio_every
        self._closed = self._undo = self._before = None
        if every and self._recorder.count % every == 0:
            self._before = [p.detach().clone() for p in self._named.values()]
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            closure = self._watched(closure)
            if len(args) > 1:
                return (args[0], closure, *args[2:]), kwargs
            return args, {**kwargs, "closure": closure}
        seen = self._look()
        act = seen.bad and self.on_nonfinite != "record"
        # A fused optimiser that is told of an inf leaves the step out itself.
        left_out = bool(getattr(optimizer, "found_inf", 0))
        self._record(seen, skipped=act or left_out)
        if act and self.on_nonfinite == "raise" and not left_out:
            self._raise(seen)
        if act:
            self._hide()
        return None

    def _watched(self, closure: Callable[[], object]) -> Callable[[], object]:
        """The closure, with a look at the gradients after each evaluation."""
        undo = None if self.on_nonfinite == "record" else self._way_back()

        def evaluate() -> object:
            loss = closure()
            seen = self._look()
            if self._closed is None or not self._closed.bad:
                self._closed = seen
            if seen.bad and undo is not None:
                self._undo = undo
                if self.on_nonfinite == "raise":
                    undo()
                    self._record(seen, skipped=True)
                    self._raise(seen)
                self._hide()
            return loss

        return evaluate

    def _way_back(self) -> Callable[[], None]:
        """How to undo a step that moves the weights before it meets a bad gradient."""
        optimizer = self.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        state = {p: copy.deepcopy(value) for p, value in optimizer.state.items()}

        def undo() -> None:
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
            optimizer.state.clear()
            optimizer.state.update(state)

        return undo

    def _record(self, seen: _Seen, *, skipped: bool) -> None:
        activations = np.nan
        if self._largest:
            activations = np.full(len(self._leaves), np.nan)
            activations[list(self._largest)] = _read(self._largest.values())
            self._largest.clear()
        self._recorder.add(
            seen.norms,
            seen.present,
            clipped_total=seen.clipped_total,
            skipped=skipped,
            activations=activations,
        )
        if skipped:
            self._before = None

    def _raise(self, seen: _Seen) -> None:
        self._publish()
        raw = list(self._named)[int(np.argmax(seen.present & ~np.isfinite(seen.norms)))]
        owner = raw.rpartition(".")[0]
        kind = type(self._inner.get_submodule(owner)).__name__
        owner = _clean(owner) or "model"
        raise NonFiniteGradientError(self._recorder.count - 1, _clean(raw), f"{owner}: {kind}")

    def _hide(self) -> None:
        """Skip: an optimiser leaves a parameter without a gradient alone, its state too."""
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            if parameter.grad is not None:
                self._held_back[parameter] = parameter.grad
                parameter.grad = None

    def _give_back(self) -> None:
        """Gradients that were hidden from the optimiser stand in `.grad` again."""
        for parameter, gradient in self._held_back.items():
            parameter.grad = gradient
        self._held_back.clear()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._closed is not None:
            if self._undo is not None:
                self._undo()
            self._record(self._closed, skipped=self._undo is not None)
            self._closed = self._undo = None
        self._give_back()
        if self._before is not None:
            now = [p.detach() for p in self._named.values()]
            moved = gradient_norms(torch._foreach_sub(now, self._before))
            size = gradient_norms(self._before)
            ratios = np.divide(moved, size, out=np.full_like(moved, np.nan), where=size > 0)
            self._recorder.set_update_ratios(ratios)
            self._before = None
        self._publish()

    def _publish(self) -> None:
        if self._outlet.used:
            self._outlet.publish(self._recorder.count, self._history)
