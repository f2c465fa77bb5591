"""Watch a training loop's gradients without changing the loop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gradlab.history import GradientHistory, Recorder

ON_NONFINITE = ("record", "skip", "raise")


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


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient's numbers, in at least float32."""
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient


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
    dense = [_dense(g.detach()) for g in gradients]
    if not dense:
        return np.zeros(0)
    norms = torch.stack(torch._foreach_norm(dense)).double().cpu().numpy()
    for i in np.flatnonzero(~(norms > _TINY) | ~np.isfinite(norms)):
        norms[i] = _exact_norm(dense[i])
    return norms


def total_norm(norms: np.ndarray) -> float:
    """√Σ norm², without overflow for norms up to the largest float64."""
    return float(np.linalg.norm(norms / m) * m) if 0 < (m := norms.max(initial=0)) < np.inf else m


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
        model: names the parameters.
        optimizer: whose `step` is watched.
        capacity: steps kept; older ones are overwritten.
        activations: also record the largest absolute output of every leaf module.
        update_ratio_every: every so many steps, also record ‖Δw‖/‖w‖ of every parameter; 0 never.
        on_nonfinite: what to do when a gradient holds an inf or NaN: "record" it, "skip" the step
            (weights and optimiser state stay as they are), or "raise" before the step.

    The probe sees gradients as they are when `step` is called.  If the loop clips them first, it
    sees them clipped; call `probe.clip_(max_norm)` instead of `clip_grad_norm_` to record both.

    Raises:
        ValueError: an argument out of range.
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
    ) -> None:
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {ON_NONFINITE}, got {on_nonfinite!r}")
        if update_ratio_every < 0:
            raise ValueError(f"update_ratio_every must be ≥ 0, got {update_ratio_every!r}")
        self.model, self.optimizer = model, optimizer
        self.on_nonfinite, self.update_ratio_every = on_nonfinite, update_ratio_every
        self._named = dict(model.named_parameters())
        self._recorder = Recorder(list(self._named), capacity)
        self._record_activations = activations
        self._largest: dict[str, float] = {}
        self._pending: tuple[np.ndarray, np.ndarray, float] | None = None
        self._held_back: dict[nn.Parameter, torch.Tensor] = {}
        self._before: list[torch.Tensor] | None = None
        self._handles: list = []

    # -- attaching -----------------------------------------------------------------------------

    def __enter__(self) -> GradientProbe:
        if self._handles:
            raise RuntimeError("this probe is already attached; leave its `with` block first")
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        if self._record_activations:
            self._handles += [
                module.register_forward_hook(self._watch_output(name))
                for name, module in self.model.named_modules()
                if not any(module.children())
            ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._give_back()  # where the step itself raised, this is still to be done
        self._pending = self._before = None

    def _watch_output(self, name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
                self._largest[name] = output.detach().abs().max().item()

        return hook

    # -- what was seen -------------------------------------------------------------------------

    @property
    def history(self) -> GradientHistory:
        """What has been recorded so far."""
        return self._recorder.history()

    def save(self, path: str | Path) -> Path:
        """Write the history to an .npz file; see `GradientHistory.save`."""
        return self.history.save(path)

    # -- at each step --------------------------------------------------------------------------

    def _measure(self) -> tuple[np.ndarray, np.ndarray]:
        """Norms (parameters,), and which parameters have a gradient."""
        parameters = self._named.values()
        present = np.array([p.grad is not None for p in parameters], dtype=bool)
        norms = np.full(len(present), np.nan)
        norms[present] = gradient_norms(p.grad for p in parameters if p.grad is not None)
        return norms, present

    def clip_(self, max_norm: float) -> float:
        """Scale the gradients to a total norm of at most `max_norm`, and record both norms.

        Call it where `torch.nn.utils.clip_grad_norm_` would stand.  Gradients that hold an inf or
        NaN are left as they are, for `on_nonfinite` to deal with: scaling would spread the NaN.

        Args:
            max_norm: > 0.

        Returns:
            The total norm before clipping.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm must be > 0, got {max_norm!r}")
        norms, present = self._measure()
        total = total_norm(norms[present])
        if np.isfinite(total) and total > max_norm:
            gradients = [p.grad for p in self._named.values() if p.grad is not None]
            # A sparse gradient's rows may repeat; scaling each scales their sum.
            gradients = [g._values() if g.is_sparse else g for g in gradients]
            with torch.no_grad():
                torch._foreach_mul_(gradients, max_norm / total)
        self._pending = (norms, present, min(total, max_norm) if np.isfinite(total) else total)
        return total

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._pending is None:
            norms, present = self._measure()
            clipped_total = total_norm(norms[present])
        else:
            norms, present, clipped_total = self._pending
            self._pending = None
        bad = present & ~np.isfinite(norms)
        act = bool(bad.any()) and self.on_nonfinite != "record"
        if act and self.on_nonfinite == "skip":
            # An optimiser leaves a parameter without a gradient alone, its state too.
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    self._held_back[parameter] = parameter.grad
                    parameter.grad = None
        if (
            self.update_ratio_every
            and self._recorder.count % self.update_ratio_every == 0
            and not act
        ):
            self._before = [p.detach().clone() for p in self._named.values()]
        step = self._recorder.count
        self._recorder.add(
            norms,
            present,
            clipped_total=clipped_total,
            skipped=act,
            activations=self._largest or None,
        )
        if act and self.on_nonfinite == "raise":
            name = list(self._named)[int(np.argmax(bad))]
            owner = name.rpartition(".")[0]
            kind = type(self.model.get_submodule(owner)).__name__
            raise NonFiniteGradientError(step, name, f"{owner or 'model'}: {kind}")

    def _give_back(self) -> None:
        """Gradients that were hidden from the optimiser stand in `.grad` again."""
        for parameter, gradient in self._held_back.items():
            parameter.grad = gradient
        self._held_back.clear()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._give_back()
        if self._before is not None:
            now = [p.detach() for p in self._named.values()]
            moved = gradient_norms(torch._foreach_sub(now, self._before))
            size = gradient_norms(self._before)
            ratios = np.divide(moved, size, out=np.full_like(moved, np.nan), where=size > 0)
            self._recorder.set_update_ratios(ratios)
            self._before = None
