"""What a probe records: the gradient norm of every parameter at every step."""

from __future__ import annotations

import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from gradlab.checkpoint import replacing

# What NumPy, the zip format and our own reading raise for a file that holds something else.
_UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


ON_NONFINITE = ("record", "skip", "raise")


def check_options(*, capacity: int, update_ratio_every: int, on_nonfinite: str) -> None:
    """Refuse what neither side's probe can do.

    Raises:
        ValueError: an option out of range.
    """
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite must be one of {ON_NONFINITE}, got {on_nonfinite!r}")
    if update_ratio_every < 0:
        raise ValueError(f"update_ratio_every must be ≥ 0, got {update_ratio_every!r}")
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity!r}")


class NonFinite(NamedTuple):
    """Where a gradient first stopped being a number."""

    step: int
    name: str


@dataclass(frozen=True)
class GradientHistory:
    """Gradient norms of a run, steps × parameters.

    Attributes:
        steps: (steps,), int64, the optimiser steps recorded, ascending.  Shorter than the run
            when the probe's capacity was: then the last ones.
        names: the parameters, in the model's order.
        norms: (steps, parameters), float64, L2 norms of the gradients that `seen` describes.  NaN
            or inf where a gradient held one; NaN too for a parameter that had no gradient at that
            step, see `present`.
        present: (steps, parameters), bool: whether the parameter had a gradient.
        total: (steps,), the norm over all parameters.
        skipped: (steps,), bool: steps that the probe, or loss scaling, kept from the optimiser.
        clipped_total: (steps,), the total norm after clipping by the probe's `clip_` or by a Keras
            optimiser, equal to `total` at a step that was left alone.
        first_nonfinite: the first bad step of the whole run and its first bad parameter, even
            if that step is no longer among the recorded ones; None if there was none.
        update_ratios: (steps, parameters), ‖Δw‖/‖w‖ of the steps at which the probe measured it
            and NaN elsewhere; None if it never did.
        activations: (steps, modules), largest absolute output of each module since the step
            before, NaN where it held one or the module was not used; None unless the probe was
            asked for it.
        activation_names: the modules.
        seen: in words, which gradients these are: before or after which clipping and scaling.
    """

    steps: np.ndarray
    names: list[str]
    norms: np.ndarray
    present: np.ndarray = field(repr=False)
    skipped: np.ndarray = field(repr=False)
    clipped_total: np.ndarray | None = field(default=None, repr=False)
    first_nonfinite: NonFinite | None = None
    update_ratios: np.ndarray | None = field(default=None, repr=False)
    activations: np.ndarray | None = field(default=None, repr=False)
    activation_names: list[str] = field(default_factory=list, repr=False)
    seen: str = ""

    def __post_init__(self) -> None:
        shape = (len(self.steps), len(self.names))
        for name in ("norms", "present"):
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} has shape {getattr(self, name).shape}, expected {shape} "
                    "(steps, parameters)"
                )

    @property
    def total(self) -> np.ndarray:
        """(steps,), the L2 norm over all parameters that had a gradient."""
        squares = np.where(self.present, self.norms, 0.0)
        largest = np.abs(squares).max(axis=1, initial=0.0, keepdims=True)
        # Scaled, so that a norm whose square overflows does not: 1e200 is a number.
        scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1.0)
        with np.errstate(invalid="ignore", over="ignore"):
            return scale[:, 0] * np.sqrt(((squares / scale) ** 2).sum(axis=1))

    def save(self, path: str | Path) -> Path:
        """Write to an .npz file, at once or not at all.

        Args:
            path: the file; its folder must exist.

        Returns:
            The path written.
        """
        path = Path(path)
        arrays = {name: getattr(self, name) for name in ("steps", "norms", "present", "skipped")}
        for name in ("clipped_total", "update_ratios", "activations"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        about = {
            "names": self.names,
            "activation_names": self.activation_names,
            "first_nonfinite": self.first_nonfinite,
            "seen": self.seen,
        }
        with replacing(path, survives_power_loss=False) as partial, partial.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> GradientHistory:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no saved history.
            OSError: it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays.pop("about")))
            bad = about.pop("first_nonfinite")
            return cls(**arrays, **about, first_nonfinite=NonFinite(*bad) if bad else None)
        except _UNREADABLE as error:
            raise ValueError(f"{path} is no saved GradientHistory: {error}") from error

    def to_dict(self) -> dict[str, object]:
        """Plain Python values: step by step, `{"grad_norm/<name>": …, "grad_norm/total": …}`.

        A step at which update ratios were measured has `update_ratio/<name>` too.
        """
        total = self.total
        rows = []
        for i, step in enumerate(self.steps):
            row: dict[str, object] = {"step": int(step), "skipped": bool(self.skipped[i])}
            row |= {
                f"grad_norm/{name}": float(norm)
                for name, norm, here in zip(self.names, self.norms[i], self.present[i], strict=True)
                if here
            }
            row["grad_norm/total"] = float(total[i])
            if self.clipped_total is not None:
                row["grad_norm/clipped_total"] = float(self.clipped_total[i])
            if self.update_ratios is not None:
                row |= {
                    f"update_ratio/{name}": float(ratio)
                    for name, ratio in zip(self.names, self.update_ratios[i], strict=True)
                    if not np.isnan(ratio)
                }
            rows.append(row)
        return {"first_nonfinite": self.first_nonfinite, "seen": self.seen, "steps": rows}

    def plot(self, axis=None, **keywords: object):
        """Draw parameter × step as a heat map; see `gradlab.plot.history`."""
        from gradlab import plot

        return plot.history(self, axis, **keywords)


def ring_order(count: int, capacity: int, since: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """How to read a ring of `capacity` rows after `count` of them were written.

    Returns:
        order (kept,): the rows from number `since` on, oldest first; and (kept,), the number of
        each, counted from 0.
    """
    numbers = np.arange(max(0, count - capacity, since), count)
    return numbers % capacity, numbers


class Recorder:
    """The ring that a probe in Python writes to, row by row.

    Args:
        names: the parameters.
        capacity: rows kept, ≥ 1; older ones are overwritten.
        activation_names: the modules whose outputs are recorded; None records none.
    """

    def __init__(
        self, names: Sequence[str], capacity: int, activation_names: Sequence[str] | None = None
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity!r}")
        self.names, self.capacity = list(names), capacity
        self.count = 0
        self.seen = ""
        self.first_nonfinite: NonFinite | None = None
        self._norms = np.full((capacity, len(names)), np.nan)
        self._present = np.zeros((capacity, len(names)), bool)
        self._clipped = np.zeros(capacity)
        self._skipped = np.zeros(capacity, bool)
        self._ratios: np.ndarray | None = None
        self._activation_names = list(activation_names or ())
        self._activations: np.ndarray | None = None
        if activation_names is not None:
            self._activations = np.full((capacity, len(activation_names)), np.nan)

    def add(
        self,
        norms: np.ndarray,
        present: np.ndarray,
        *,
        clipped_total: float,
        skipped: bool = False,
        activations: np.ndarray | float = np.nan,
    ) -> None:
        """Record the next step: norms (parameters,), which are present, activations (modules,)."""
        row = self.count % self.capacity
        self._norms[row], self._present[row] = norms, present
        self._clipped[row], self._skipped[row] = clipped_total, skipped
        if self._ratios is not None:
            self._ratios[row] = np.nan
        if self._activations is not None:
            self._activations[row] = activations
        if self.first_nonfinite is None:
            bad = ~np.isfinite(norms)
            # Counted, and looked at closely only then: `any` takes longer than all the rest here.
            if np.count_nonzero(bad) and (bad & present).any():
                self.first_nonfinite = NonFinite(self.count, self.names[np.argmax(bad & present)])
        self.count += 1

    def set_update_ratios(self, ratios: np.ndarray) -> None:
        """‖Δw‖/‖w‖ (parameters,) of the step that was added last."""
        if self._ratios is None:
            self._ratios = np.full_like(self._norms, np.nan)
        self._ratios[(self.count - 1) % self.capacity] = ratios

    def history(self, since: int = 0) -> GradientHistory:
        """What has been recorded from step `since` on, as copies."""
        order, steps = ring_order(self.count, self.capacity, since)

        def rows(ring: np.ndarray | None) -> np.ndarray | None:
            return None if ring is None else ring[order]

        return GradientHistory(
            steps=steps,
            names=list(self.names),
            norms=rows(self._norms),
            present=rows(self._present),
            clipped_total=rows(self._clipped),
            skipped=rows(self._skipped),
            first_nonfinite=self.first_nonfinite,
            update_ratios=rows(self._ratios),
            activations=rows(self._activations),
            activation_names=list(self._activation_names),
            seen=self.seen,
        )


class AddScalar(Protocol):
    """How TensorBoard's SummaryWriter takes a number, and everything made after its shape."""

    def __call__(self, tag: str, value: float, step: int) -> object:
        """Keep one value of the curve `tag`."""


class Outlet:
    """Where a probe's records go while the run still goes on: a file, a writer of scalars.

    Args:
        save_to: the file that is replaced; None writes none.
        save_every: every so many steps, ≥ 1.

    Raises:
        ValueError: `save_every` out of range.
        FileNotFoundError: no such folder: better heard now than a hundred steps into the run.
    """

    def __init__(self, save_to: str | Path | None, save_every: int) -> None:
        if save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {save_every!r}")
        self.save_to = None if save_to is None else Path(save_to)
        if self.save_to is not None and not self.save_to.absolute().parent.is_dir():
            raise FileNotFoundError(f"save_to: there is no folder {self.save_to.absolute().parent}")
        self.save_every = save_every
        self._writers: list[tuple[AddScalar, int]] = []
        self._count = 0  # steps that were passed on

    @property
    def used(self) -> bool:
        """Whether anything has to be passed on."""
        return self.save_to is not None or bool(self._writers)

    def log_to(self, add_scalar: AddScalar, every: int) -> None:
        """Call `add_scalar(tag, value, step)` for each number of every `every`-th step.

        Raises:
            ValueError: `every` below 1.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}")
        self._writers.append((add_scalar, every))

    def publish(self, count: int, history: Callable[[int], GradientHistory]) -> None:
        """Pass on the steps that are new, `count` being recorded by now.

        Args:
            count: steps recorded since the probe was made.
            history: gives the steps from a number on.
        """
        first, self._count = self._count, count
        for add_scalar, every in self._writers:
            due = range(first + -first % every, count, every)
            if due:
                for row in history(due[0]).to_dict()["steps"]:
                    for tag, value in row.items() if row["step"] in due else ():
                        if "/" in tag:
                            add_scalar(tag, value, row["step"])
        if count // self.save_every > first // self.save_every:
            self.save(history)

    def save(self, history: Callable[[int], GradientHistory]) -> None:
        """Replace the file, if there is one to write; a full disk does not end the training."""
        if self.save_to is None:
            return
        try:
            history(0).save(self.save_to)
        except OSError as error:
            warnings.warn(f"the gradient history was not saved: {error}", stacklevel=2)
