"""What `diagnose` measures on one training step; `gradlab.diagnosis` judges it.

Both frameworks fill the same record.
Every norm is an L2 norm, computed so that its square neither over- nor underflows.  A *signal* is
the gradient of the loss with respect to the output of an operation: what backpropagation carries.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


def source_line(filename: str, number: int) -> str:
    """A line of a program, "train.py:12: y = x.sqrt()", or of a notebook, "cell line 3: …"."""
    text = linecache.getline(filename, number).strip()
    where = f"{Path(filename).name}:{number}"
    if "ipykernel" in filename or filename.startswith("<ipython"):
        where = f"cell line {number}"
    return f"{where}: {text}" if text else where


@dataclass(frozen=True)
class Place:
    """Where in the user's program something happened.

    Attributes:
        module: dotted module name (PyTorch) or layer path (Keras); "" in the model's own forward
            function, "loss" outside the model.
        operation: the framework's name of the operation, "sqrt".
        source: the user's line, "train.py:12: y = x.sqrt()"; "" where none could be found.
    """

    module: str
    operation: str = ""
    source: str = ""

    @property
    def name(self) -> str:
        """The module, or "model" for the model's own forward function."""
        return self.module or "model"


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of the batch, a parameter or a buffer, as found.

    Attributes:
        name: "batch[0]", "batch['mask']", a parameter's or a buffer's name.
        role: "batch", "parameter" or "buffer".
        size: number of elements.
        not_finite: how many of them are inf or NaN; an additive mask of 0 and −inf counts none.
        largest: the largest finite magnitude.
        lowest: the smallest finite value.
        highest: the largest finite value.
        integer: whether it holds integers (labels, tokens).
        matters: for large numbers, whether the step becomes finite or its gradient falls a
            thousandfold once they are scaled down to 1, alone or, where no tensor does it alone,
            all large ones together; True if that was not tried.
    """

    name: str
    role: str
    size: int
    not_finite: int
    largest: float
    lowest: float = 0.0
    highest: float = 0.0
    integer: bool = False
    matters: bool = True


ALONE = 4
"""Tensors with large numbers that are tried one at a time; more are only tried together."""


def which_matter(
    tensors: Sequence[TensorFacts],
    large: Sequence[TensorFacts],
    helps: Callable[[set[str]], bool],
) -> tuple[TensorFacts, ...]:
    """Of the tensors with large numbers, those to which the step owes its trouble.

    Two tensors of 1e20 overflow whichever of them is scaled down, so no one alone would matter.

    Args:
        tensors: all of them.
        large: those of them to try.
        helps: runs the step with the named tensors scaled down to 1; whether that mended it.

    Returns:
        All of them, with `matters` filled in.
    """
    few = list(large) if len(large) <= ALONE else []
    guilty = {facts.name for facts in few if helps({facts.name})}
    together = {facts.name for facts in large}
    if not guilty and len(together) > 1 and helps(together):
        guilty = together
    return tuple(
        replace(facts, matters=facts.name in guilty) if facts.name in together else facts
        for facts in tensors
    )


@dataclass(frozen=True)
class Raised:
    """The step did not run to its end: the model or the loss raised.

    Attributes:
        place: the operation that raised, as far as known.
        error: class and message of the exception.
        integers: the integer tensors that the operation got, the suspects where an index is out
            of range.
        one_sample: the operation needs statistics, and got a single value for each of them.
        by_value: the same operation runs on other numbers of the same shapes: it is the values
            that it cannot take.
    """

    place: Place
    error: str
    integers: tuple[TensorFacts, ...] = ()
    one_sample: bool = False
    by_value: bool = False


@dataclass(frozen=True)
class Event:
    """The first operation that made an inf or a NaN out of numbers.

    Attributes:
        place: the operation.
        phase: "forward" or "backward".
        made: "inf" or "nan".
        masked: backward only: the incoming signal was 0 wherever the result is not finite, as
            behind a `where` that discards the branch.
        in_float64: whether the same operation on the same inputs is finite in float64; None if
            that could not be tried.
        inputs: the operation's inputs in words, "float32 (64, 10), 0 to 3.2".
        dtype: number format of its result; "" if not known.
    """

    place: Place
    phase: str
    made: str
    masked: bool = False
    in_float64: bool | None = None
    inputs: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class LayerUse:
    """One use of a weight matrix (or kernel, or table) in the step.

    Attributes:
        module: whose weight it is.
        parameter: the weight's name.
        depth: 1 for the last weight before the loss; otherwise one more than the deepest use
            between it and the loss.
        signal: norm of the signal at its output.
        output: norm of its output; NaN if not measured.
    """

    module: str
    parameter: str
    depth: int
    signal: float
    output: float = float("nan")


@dataclass(frozen=True)
class Jump:
    """The operation without a weight that multiplied the signal most.

    Attributes:
        place: the operation.
        factor: norm of the signal behind it over that before it, but no more than what is left of
            that at the weights behind it: a normalisation magnifies in one operation and takes it
            back in the next.
        linear: it multiplies by a constant, whatever the data (a loss scale, a temperature).
        at: the smallest magnitude among its inputs, at the element with the largest signal.
        sensitive: whether the factor falls tenfold, or is lost, when the inputs are moved by a
            thousandth of their size, as it does near a pole; None if that was not tried.
    """

    place: Place
    factor: float
    linear: bool = False
    at: float = float("nan")
    sensitive: bool | None = None


@dataclass(frozen=True)
class Chain:
    """Growth of the signal from operation to operation, where no weights show it.

    Attributes:
        place: the operation with the largest signal.
        total: that signal over the one at the model's end, but no more than the largest gradient
            of a parameter over that.
        spread: the same without the largest single factor.
        operations: how many operations raised it.
    """

    place: Place
    total: float
    spread: float
    operations: int


def chain_growth(norms: Sequence[float], largest: float) -> tuple[int, float, float, int] | None:
    """How much signals grow on their way back.

    Args:
        norms: of the signal at one operation after the other, from the loss on.
        largest: norm of the largest gradient of a parameter, beyond which no growth counts.

    Returns:
        Where the largest signal is, and a `Chain`'s total, spread and number of operations; None
        without any signal.
    """
    known = [i for i, norm in enumerate(norms) if norm > 0]
    if not known:
        return None
    base = reached = norms[known[0]]
    peak, factors = known[0], []
    for i in known:
        if norms[i] > 1.02 * reached:
            factors.append(norms[i] / reached)
            reached, peak = norms[i], i
    total = min(reached, largest) / base
    return peak, total, total / max(factors, default=1.0), len(factors)


@dataclass(frozen=True)
class Origin:
    """A tensor that was not finite before the step, and from which the loss became so.

    Attributes:
        name: "batch[0]", a parameter's or a buffer's name; "" for a tensor from elsewhere.
        place: who read it.
    """

    name: str
    place: Place


@dataclass(frozen=True)
class Float64:
    """The same step with parameters, buffers and batch in float64.

    Attributes:
        loss: its loss.
        total: norm over all its gradients.
        finite: whether loss and gradients are.
        difference: ‖g − g₆₄‖ / ‖g₆₄‖ over all gradients; None where a step draws random numbers.
        lost: share of the gradient's elements that are 0 in the model's own format only.
        layers: its layer uses.
    """

    loss: float
    total: float
    finite: bool
    difference: float | None = None
    lost: float = 0.0
    layers: tuple[LayerUse, ...] = ()


@dataclass(frozen=True)
class OptimizerFacts:
    """What the stability limit depends on.

    Attributes:
        name: the optimiser's class.
        method: "gradient descent", "momentum", "nesterov", "adam" (any method that divides by a
            running size of the gradient), or "" for one that is not known.
        learning_rate: the largest over the parameter groups.
        momentum: β, or Adam's β₁.
        steps: how many steps it has taken, 0 if it is new; None if unknown.
    """

    name: str
    method: str
    learning_rate: float
    momentum: float = 0.0
    steps: int | None = None


@dataclass(frozen=True)
class Curvature:
    """Largest eigenvalue of the loss's Hessian, on this batch.

    Attributes:
        sharpness: the eigenvalue, of P^-½ H P^-½ if `preconditioned`.
        preconditioned: whether Adam's denominators P were taken into account.
        where: the parameter that carries most of the eigenvector.
        converged: whether the iteration settled, to `lanczos.SETTLED`.
    """

    sharpness: float
    preconditioned: bool = False
    where: str = ""
    converged: bool = True


@dataclass(frozen=True)
class Trial:
    """A few steps of the user's own optimiser on this batch, taken back afterwards.

    Attributes:
        losses: loss before each step, and after the last.
        moved: ‖w_after − w_before‖ / ‖w_before‖ over all trained parameters.
        where: the parameter that moved most, relative to its norm.
    """

    losses: tuple[float, ...]
    moved: float
    where: str = ""


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured on one step.

    Attributes:
        framework: "PyTorch" or "Keras".
        dtype: the narrowest number format that the step computes in, "bfloat16" under autocast or
            mixed precision; the parameters' own without either.
        loss: its value; NaN if the step raised.
        gradients: (name, norm) of every trainable parameter that got a gradient, in the model's
            order; the norm is inf or NaN only where the gradient holds one.
        norm_overflows: every gradient is finite, and the norm over them, taken in the gradients'
            own format, is not.
        tensors: batch, parameters and buffers.
        raised: what stopped the step, if something did.
        origin: the tensor that brought a non-finite number in, if one did.
        forward: the first non-finite operation of the forward pass, if it reached the loss.
        backward: that of the backward pass, after a finite forward pass.
        layers: uses of weights, in the order of the forward pass; empty if not measured.
        revives: after one small step down the gradient, the signal reaches every weight; None if
            it reached them all before, or was not measured.
        jump: the largest gain of one operation.
        chain: growth along the operations; None if not measured.
        float64: the step in float64; None if it could not be run.
        optimizer: None without one.
        curvature: None without an optimiser, or if not measured.
        trial: None without an optimiser, or if not measured.
        summed: the loss of the batch is the sum of the losses of its halves, not their mean;
            None if not measured.
        notes: what could not be measured, and why, in sentences.
    """

    framework: str
    dtype: str
    loss: float
    gradients: tuple[tuple[str, float], ...] = ()
    norm_overflows: bool = False
    tensors: tuple[TensorFacts, ...] = ()
    raised: Raised | None = None
    origin: Origin | None = None
    forward: Event | None = None
    backward: Event | None = None
    layers: tuple[LayerUse, ...] = field(default=(), repr=False)
    revives: bool | None = None
    jump: Jump | None = None
    chain: Chain | None = None
    float64: Float64 | None = None
    optimizer: OptimizerFacts | None = None
    curvature: Curvature | None = None
    trial: Trial | None = None
    summed: bool | None = None
    notes: tuple[str, ...] = ()
