"""Why a training step failed: rules from `gradlab.measurements` to kind, place and remedy.

Both frameworks measure, and this module alone judges.  No rule knows a case or an operation by
name; each compares measured numbers with the thresholds below.
"""

from __future__ import annotations

import html
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gradlab import theory
from gradlab._card import card
from gradlab.measurements import (
    Curvature,
    Event,
    LayerUse,
    Measurements,
    OptimizerFacts,
    TensorFacts,
)
from gradlab.remedies import REMEDIES

KINDS = {
    "bad input": "the step was given something that no network can learn from",
    "singularity": "one operation has no finite value or no finite slope at its input",
    "explosion": "the gradient grows as it is carried back through the network",
    "precision": "the numbers do not fit the number format; in float64 they would",
    "divergence": "the gradient is sound and the step is too large for the curvature",
    "vanishing": "the gradient does not reach the first layers",
    "healthy": "nothing is wrong with this step",
}
"""The kinds of trouble, most severe first, each in a clause."""

OUT_OF_RANGE = 1e6
"""Data or weights beyond this are suspects when the step also shows a symptom."""
LARGE_GRADIENT = 1e4
"""A total gradient norm beyond this is a symptom."""
GROWTH = 100.0
"""Total growth of the signal, spread over layers, that counts as an explosion …"""
STEADY_GROWTH = (20.0, 1.12)
"""… or this total, at this rate a layer or more, over ten layers or more."""
JUMP = 1e4
"""Growth at a single place that counts."""
NEAR_POLE = 1e-2
"""An input at most this large counts as next to 0, where it was not tried to move it."""
VANISHED = 1e-6
"""Signal at the first layers, relative to the last one, below which they do not learn."""
NARROW = ("float16", "bfloat16")
"""The formats of 16 bits."""
DIFFERENT = dict.fromkeys(NARROW, 0.5)
"""‖g − g₆₄‖/‖g₆₄‖ beyond which the format spoils the gradient; 0.1 for any other format."""
FAR_ABOVE = 10.0
"""Learning rate, in stability limits, beyond which the step is to blame and not lost digits."""
TRIAL_STEPS, LONG_TRIAL, SURE_AFTER = 10, 30, 4
"""Steps of the optimiser that are tried; the same above the stability limit, where the steep
direction may hold little at first; and after how many a loss that only falls is believed."""
LOST = 0.5
"""Share of the gradient's elements that underflow."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a key of `KINDS`.
        where: dotted module or layer name, parameter name, "loss", "model" or "batch".
        evidence: what was measured, with its figures.
        remedy: what to do.
        chapter: the chapter of the book that shows it.
        source: the user's line, "train.py:12: y = x.sqrt()"; "" where none applies.
    """

    kind: str
    where: str
    evidence: str
    remedy: str
    chapter: str
    source: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a training step.  Prints as a paragraph, shows as a card in a notebook.

    Attributes:
        kind: a key of `KINDS`: that of the most severe finding, or "healthy".
        where: the place of the most severe finding; "" for a healthy step.
        findings: what is wrong, most severe first.
        checks: what was measured and found in order, in sentences with their figures.
        notes: what could not be measured, and why.
        measurements: the numbers themselves.
    """

    kind: str
    where: str
    findings: tuple[Finding, ...] = ()
    checks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    measurements: Measurements | None = field(default=None, repr=False)

    def __str__(self) -> str:
        def fill(text: str, indent: str = "  ") -> str:
            return textwrap.fill(text, 88, initial_indent=indent, subsequent_indent=indent)

        lines = [fill(self._headline(), "")]
        for number, finding in enumerate(self.findings):
            if number:
                lines += [fill(f"Also {finding.kind}, {finding.where}.", "")]
            lines += [fill(finding.evidence)]
            lines += [f"  > {finding.source}"] * bool(finding.source)
            lines += [fill(f"What to do: {finding.remedy} (Chapter: {finding.chapter})")]
        lines += [fill(f"In order: {' '.join(self.checks)}")] * bool(self.checks)
        lines += [fill(f"Not measured: {note}") for note in self.notes]
        return "\n".join(lines)

    def _headline(self) -> str:
        where = f" at {self.where}" if self.where else ""
        return f"{self.kind.capitalize()}{where}: {KINDS[self.kind]}."

    def _repr_html_(self) -> str:
        text = html.escape
        parts = [f"<p><strong>{text(self._headline())}</strong></p>"]
        for number, finding in enumerate(self.findings):
            title = f"<strong>Also {finding.kind}, {text(finding.where)}.</strong> "
            parts += [f"<p>{title * bool(number)}{text(finding.evidence)}</p>"]
            parts += [f"<pre>{text(finding.source)}</pre>"] * bool(finding.source)
            parts += [
                f"<p><strong>What to do.</strong> {text(finding.remedy)} "
                f"<em>Chapter: {text(finding.chapter)}</em></p>"
            ]
        if self.checks:
            parts += [f"<p><strong>In order.</strong> {text(' '.join(self.checks))}</p>"]
        parts += [f"<p><em>Not measured: {text(note)}</em></p>" for note in self.notes]
        return card("diagnosis", self.kind.replace(" ", "-"), "".join(parts))


def judge(measurements: Measurements) -> Diagnosis:
    """From measurements to kind, place and remedy.

    Args:
        measurements: one step's, of either framework.

    Returns:
        The diagnosis, its findings sorted by the order of `KINDS`.
    """
    m = measurements
    found = [*_not_run(m), *_events(m), *_growth_findings(m), *_jumps(m), *_format(m)]
    found += [*_step_size(m), *_vanishing(m)]
    # Data and weights of an odd size are a cause only where there is a symptom.
    symptom = bool(found) or not finite_step(m) or total_norm(m) > LARGE_GRADIENT
    inputs = list(_inputs(m, symptom))
    if any(finding.where != "batch" for finding in inputs):
        # Weights that an earlier step has ruined: all else may follow from them.
        found = [finding for finding in found if finding.kind == "singularity"]
    found += inputs
    found.sort(key=lambda finding: _rank(m, finding))
    first = found[0] if found else None
    return Diagnosis(
        kind=first.kind if first else "healthy",
        where=first.where if first else "",
        findings=tuple(found),
        checks=tuple(_in_order(m, found)),
        notes=m.notes,
        measurements=m,
    )


def _rank(m: Measurements, finding: Finding) -> float:
    """Place in the list; kinds stand in the order of `KINDS`.

    But digits that are lost while the gradient still points downhill do not explain a step that is
    far too long: there the divergence comes first.
    """
    order, limit = list(KINDS), highest_rate(m.optimizer, m.curvature)
    far = limit is not None and m.optimizer.learning_rate > FAR_ABOVE * limit
    lost = finding.kind == "precision" and finding.remedy == REMEDIES["cancellation"].text
    if far and lost and (m.float64.difference or 0) < DIFFERENT["float16"]:
        return order.index("divergence") + 0.5
    return order.index(finding.kind)


def _finding(kind: str, where: str, evidence: str, remedy: str, source: str = "") -> Finding:
    return Finding(kind, where, evidence, *REMEDIES[remedy], source)


def _number(value: float) -> str:
    return f"{value:.3g}"


# ---------------------------------------------------------------------------------------------
# What the measurements amount to


def total_norm(m: Measurements) -> float:
    """L2 norm over all gradients; NaN or inf where one is."""
    return math.hypot(*(norm for _, norm in m.gradients))


def finite_step(m: Measurements) -> bool:
    """Whether the step ran, and its loss and all its gradients are finite."""
    return m.raised is None and math.isfinite(m.loss) and math.isfinite(total_norm(m))


@dataclass(frozen=True)
class Growth:
    """How the signal grows from the last weight back to where it is largest.

    Attributes:
        total: norm of the largest signal over that at the last weight.
        spread: the same without the largest single factor between two depths.
        layers: uses of weights between the two.
        start: the last weight.
        peak: the use with the largest signal.
        over_time: the layers between are mostly one weight, used again and again.
        in_float64: measured in float64, because it did not fit the model's own format.
    """

    total: float
    spread: float
    layers: int
    start: LayerUse
    peak: LayerUse
    over_time: bool
    in_float64: bool

    @property
    def rate(self) -> float:
        """Factor a layer."""
        return self.total ** (1 / max(self.layers, 1))

    @property
    def explodes(self) -> bool:
        """Whether it counts."""
        least, rate = STEADY_GROWTH
        steady = self.layers >= 10 and self.rate >= rate and self.total >= least
        return (self.total >= GROWTH and self.spread >= math.sqrt(GROWTH)) or (
            steady and self.spread >= least / 2
        )


def growth(m: Measurements) -> Growth | None:
    """Growth of the signal along the layers; None if no two depths were measured."""
    uses, in_float64 = m.layers, False
    if not uses or not all(math.isfinite(use.signal) for use in uses):
        uses, in_float64 = (m.float64.layers if m.float64 else ()), True
    at_depth: dict[int, LayerUse] = {}
    for use in uses:
        if not math.isfinite(use.signal):
            return None
        if use.depth not in at_depth or use.signal > at_depth[use.depth].signal:
            at_depth[use.depth] = use
    if len(at_depth) < 2:
        return None
    start = at_depth[min(at_depth)]
    peak = max(at_depth.values(), key=lambda use: use.signal)
    if start.signal == 0:
        return None
    reached, factors = start.signal, []
    for depth in sorted(at_depth):
        if depth <= peak.depth and at_depth[depth].signal > reached:
            factors.append(at_depth[depth].signal / reached)
            reached = at_depth[depth].signal
    total = reached / start.signal
    between = [use for use in uses if start.depth < use.depth <= peak.depth]
    same = sum(use.parameter == peak.parameter for use in between)
    depths = len({use.depth for use in between})
    return Growth(
        total=total,
        spread=total / max(factors, default=1.0),
        layers=peak.depth - start.depth,
        start=start,
        peak=peak,
        over_time=same >= 5 and same >= depths / 2,
        in_float64=in_float64,
    )


def _grows_forward(m: Measurements) -> tuple[LayerUse, float, int] | None:
    """The last finite output, its growth over the first, and the layers between, if it counts."""
    outputs = [use for use in m.layers if math.isfinite(use.output) and use.output > 0]
    if len(outputs) < 4:
        return None
    factor = outputs[-1].output / outputs[0].output
    largest = max(b.output / a.output for a, b in itertools.pairwise(outputs))
    if factor / max(largest, 1.0) < GROWTH:
        return None
    return outputs[-1], factor, len(outputs) - 1


# ---------------------------------------------------------------------------------------------
# The rules


def _inputs(m: Measurements, symptom: bool) -> Iterator[Finding]:
    if m.origin is not None and not m.origin.name:
        place = m.origin.place
        evidence = f"A tensor that {place.operation} reads, and that is neither in the batch nor a "
        evidence += "parameter or buffer, holds inf or NaN before the step begins."
        yield _finding("bad input", place.name, evidence, "bad batch", place.source)
    for role in ("batch", "parameter", "buffer"):
        suspects = []
        for facts in m.tensors:
            if facts.role != role:
                continue
            if facts.not_finite and _is_origin(m, facts):
                said = (
                    f"{facts.not_finite} of {facts.size} numbers are inf or NaN, before the step "
                )
                suspects.append((facts, said + "begins."))
            elif facts.largest >= OUT_OF_RANGE and facts.matters and symptom and not facts.integer:
                said = f"it holds numbers up to {_number(facts.largest)} in magnitude (from "
                said += f"{_number(facts.lowest)} to {_number(facts.highest)})."
                suspects.append((facts, said))
        if suspects:
            facts, said = suspects[0]
            others = f" {len(suspects) - 1} more are like it." if len(suspects) > 1 else ""
            where = "batch" if role == "batch" else facts.name
            yield _finding("bad input", where, f"{facts.name}: {said}{others}", f"bad {role}")


def _is_origin(m: Measurements, facts: TensorFacts) -> bool:
    """Whether a non-finite tensor is to blame: a finite step proves that it had no influence."""
    if finite_step(m) or m.forward is not None or m.backward is not None:
        return False
    return m.origin is None or m.origin.name == facts.name


def _indices(facts: TensorFacts) -> str:
    return f"{facts.name} from {facts.lowest:.0f} to {facts.highest:.0f}"


def _not_run(m: Measurements) -> Iterator[Finding]:
    raised = m.raised
    if raised is None:
        return
    evidence = f"The step raised in {raised.place.operation or 'the model'}: {raised.error}"
    if raised.one_sample:
        yield _finding(
            "singularity", raised.place.name, evidence, "empty statistic", raised.place.source
        )
    elif raised.by_value and not raised.integers:
        evidence += " On other numbers of the same shapes it runs: it has no value at these."
        yield _finding("singularity", raised.place.name, evidence, "pole", raised.place.source)
    elif raised.integers:
        seen = ", ".join(_indices(facts) for facts in raised.integers)
        evidence += f" The indices it got: {seen}."
        yield _finding("bad input", "batch", evidence, "bad index", raised.place.source)
    else:
        yield _finding("bad input", raised.place.name, evidence, "bad shape", raised.place.source)


def _described(event: Event) -> str:
    made = {"inf": "inf", "nan": "NaN"}[event.made]
    if event.phase == "forward":
        first = f"Forward pass: {event.place.operation} made the first {made}"
    else:
        first = f"The forward pass is finite. Backward, the slope of {event.place.operation} made "
        first += f"the first {made}"
    return first + (f", from {event.inputs}. " if event.inputs else ". ")


def _cure(m: Measurements) -> str:
    if m.float64 is None:
        return ""
    if m.float64.finite:
        return "In float64 the whole step is finite."
    return "In float64 the step fails too: it is not a matter of the number format."


def _events(m: Measurements) -> Iterator[Finding]:
    event = m.forward or m.backward
    if event is None:
        if m.raised is None and not finite_step(m) and m.origin is None and not _bad_before(m):
            bad = next((n for n, norm in m.gradients if not math.isfinite(norm)), "loss")
            fits = m.float64 is not None and m.float64.finite
            kind, remedy = ("precision", _overflow(m.dtype)) if fits else ("singularity", "pole")
            evidence = f"The first gradient that is inf or NaN is that of {bad}. "
            evidence += "The operation that made it could not be found. "
            yield _finding(kind, bad, evidence + _cure(m), remedy)
        return
    evidence = _described(event)
    where, source = event.place.name, event.place.source
    if event.masked:
        evidence += (
            "The signal that arrives there is 0, from an error that is exactly 0 or a branch "
        )
        evidence += "that `where` throws away, and 0 × inf is NaN. "
        yield _finding("singularity", where, evidence + _cure(m), "masked branch", source)
    elif event.in_float64 is False or (event.in_float64 is None and _undefined(m, event)):
        if event.in_float64 is False:
            evidence += "On the same inputs it is not finite in float64 either. "
        if m.float64 is not None and m.float64.finite:
            evidence += "In float64 the whole step is finite: something small became 0 on its way."
        yield _finding("singularity", where, evidence.strip(), "pole", source)
    elif not _explodes(m):
        dtype = event.dtype or m.dtype
        evidence += f"On the same inputs in float64 it is finite: {dtype} is too small for the "
        evidence += "result. "
        yield _finding("precision", where, evidence + _cure(m), _overflow(dtype), source)


def _overflow(dtype: str) -> str:
    """The remedy: float32 is one for a format of 16 bits only."""
    return "overflow" if dtype in NARROW else "too large"


def _undefined(m: Measurements, event: Event) -> bool:
    """Whether an operation that could not be tried alone lacks a value, for all that is known."""
    return event.made == "nan" or (m.float64 is not None and not m.float64.finite)


def _bad_before(m: Measurements) -> bool:
    return any(facts.not_finite for facts in m.tensors)


def _explodes(m: Measurements) -> bool:
    grown = growth(m)
    return bool(grown and grown.explodes) or bool(
        not finite_step(m) and grown is None and _grows_forward(m)
    )


def _growth_findings(m: Measurements) -> Iterator[Finding]:
    grown = growth(m)
    if grown is None:
        forward = None if finite_step(m) else _grows_forward(m)
        if forward and not _pole(m):
            use, factor, layers = forward
            yield _finding(
                "explosion",
                use.module or "model",
                f"The activations grow {_number(factor)}-fold over {layers} layers before they "
                f"overflow, {_number(factor ** (1 / layers))} a layer.",
                "depth",
            )
        yield from _chain(m)
        return
    alone = grown.total >= JUMP and grown.layers >= 2 and not _near_pole(m)
    if not grown.explodes and not alone:
        yield from _chain(m)
        return
    unit = "time step" if grown.over_time else "layer"
    start, peak = grown.start.module or "model", grown.peak.module or "model"
    evidence = (
        f"From {start} back to {peak} the gradient grows {_number(grown.total)}-fold over "
        f"{grown.layers} {unit}s, {_number(grown.rate)} a {unit}"
    )
    evidence += ", measured in float64. " if grown.in_float64 else ". "
    evidence += f"At the last layer its norm is {_number(grown.start.signal)}."
    if not finite_step(m):
        evidence += f" It does not fit {m.dtype}."
    remedy = "time" if grown.over_time else "depth" if grown.explodes else "one layer"
    yield _finding("explosion", peak, evidence, remedy)


def _chain(m: Measurements) -> Iterator[Finding]:
    """Growth that passes through no weight, as where one network makes another's weights."""
    chain = m.chain
    if chain is None or not finite_step(m) or _near_pole(m):
        return
    if chain.total >= JUMP and chain.spread >= GROWTH and chain.operations >= 6:
        yield _finding(
            "explosion",
            chain.place.name,
            f"Over {chain.operations} operations the gradient grows {_number(chain.total)}-fold on "
            f"its way back, the most at {chain.place.operation}.",
            "depth",
            chain.place.source,
        )


def _pole(m: Measurements) -> bool:
    event = m.forward or m.backward
    return event is not None and event.in_float64 is False


def _near_pole(m: Measurements) -> bool:
    jump = m.jump
    return bool(
        jump
        and not jump.linear
        and jump.factor >= JUMP
        and (jump.at <= NEAR_POLE if jump.sensitive is None else jump.sensitive)
        and total_norm(m) >= math.sqrt(JUMP)
        and finite_step(m)
    )


def _jumps(m: Measurements) -> Iterator[Finding]:
    if _near_pole(m):
        yield _finding(
            "singularity",
            m.jump.place.name,
            f"Everything is finite, but {m.jump.place.operation} alone multiplies the gradient by "
            f"{_number(m.jump.factor)}: its input there is {_number(m.jump.at)}.",
            "near pole",
            m.jump.place.source,
        )


def _format(m: Measurements) -> Iterator[Finding]:
    # Squares leave float16 at 256, which a scaled loss exceeds in good health.
    if m.norm_overflows and total_norm(m) > LARGE_GRADIENT:
        largest = max(m.gradients, key=lambda pair: pair[1])
        yield _finding(
            "precision",
            largest[0],
            f"All gradients are finite, the largest norm being {_number(largest[1])}, but the norm "
            "over them overflows their number format.",
            "norm",
        )
    wide = m.float64
    if wide is None or not wide.finite or not finite_step(m):
        return
    if wide.lost >= LOST and not _faded(m):
        yield _finding(
            "precision",
            "model",
            f"{wide.lost:.0%} of the gradient's elements are 0 in {m.dtype} and not in float64.",
            "underflow",
        )
    limit = DIFFERENT.get(m.dtype, 0.1)
    if wide.difference is None:
        return
    size = max(abs(wide.loss), abs(m.loss))
    loss_apart = size > 1e-4 and abs(m.loss - wide.loss) > limit * size
    if loss_apart or (wide.difference > limit and wide.total > 1e-4):
        yield _finding(
            "precision",
            "model",
            f"The gradient in {m.dtype} differs from that in float64 by "
            f"{_number(100 * wide.difference)} % of its norm; the loss is {m.loss:.6g} against "
            f"{wide.loss:.6g}.",
            "cancellation",
        )


def highest_rate(optimizer: OptimizerFacts | None, curvature: Curvature | None) -> float | None:
    """Largest stable learning rate on this batch; None if not known."""
    if optimizer is None or curvature is None or not optimizer.method:
        return None
    if not curvature.sharpness > 0:
        return None
    beta = 0.0 if optimizer.method == "gradient descent" else optimizer.momentum
    return theory.stability_limit(optimizer.method, beta) / curvature.sharpness


def tried_enough(
    losses: Sequence[float], optimizer: OptimizerFacts | None, curvature: Curvature | None
) -> bool:
    """Whether the losses of a trial so far say all that it can tell.

    So they do once one is not finite, and also if each of the first steps lowered the loss and the
    learning rate is not known to be above its limit.
    """
    limit = highest_rate(optimizer, curvature)
    above = limit is not None and optimizer.learning_rate > limit
    if not math.isfinite(losses[-1]) or len(losses) > (LONG_TRIAL if above else TRIAL_STEPS):
        return True
    falls = all(later < earlier for earlier, later in itertools.pairwise(losses))
    return falls and not above and len(losses) > SURE_AFTER


def _step_size(m: Measurements) -> Iterator[Finding]:
    limit = highest_rate(m.optimizer, m.curvature)
    rate = m.optimizer.learning_rate if m.optimizer else math.nan
    above = limit is not None and rate > limit
    losses = m.trial.losses if m.trial else ()
    blew_up = rises = False
    if losses and math.isfinite(losses[0]):
        finite = [loss for loss in losses if math.isfinite(loss)]
        broke = len(finite) < len(losses)
        scale = abs(losses[0]) + 1e-12
        climbed = (max(finite) - losses[0]) / scale
        # No optimiser that works moves the weights by their own size and gains nothing on the very
        # batch it is fed.
        blew_up = broke or (m.trial.moved >= 1 and (climbed > 9 or losses[-1] >= losses[0]))
        rises = broke or losses[-1] > losses[0] or climbed > 9
    if not (blew_up or (above and (rises or not losses))):
        return
    evidence = ""
    if limit is not None:
        name = "preconditioned curvature" if m.curvature.preconditioned else "curvature"
        least = "" if m.curvature.converged else "at least "  # Lanczos approaches it from below
        evidence += (
            f"The largest {name} is {least}{_number(m.curvature.sharpness)}, so "
            f"{m.optimizer.name} is stable up to a learning rate of {limit:.4g}; it is {rate:.4g}, "
            f"{_number(rate / limit)} times the limit. "
        )
        evidence += "" if above else "That would do on a quadratic, and still it does not: "
    if losses:
        last = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        course = f"from {_number(losses[0])} to {_number(finite[-1])}"
        peak = f", with a peak of {_number(max(finite))}," * (max(finite) > 1.01 * finite[-1])
        tried = "Tried" if above or not evidence else "tried"
        evidence += f"{tried} on this batch alone, the loss "
        if last == 1:
            evidence += f"is {_number(losses[0])}, and not finite after one step."
        else:
            steps = len(finite) - 1
            evidence += f"goes {course}{peak} in {steps} step{'s' * (steps > 1)}"
            evidence += " and is not finite after the next." if last is not None else "."
    if m.summed:
        evidence += " The loss is summed over the batch, not averaged."
    where = "loss" if m.summed else m.curvature.where if above else m.trial.where
    remedy = "summed loss" if m.summed else "step size"
    yield _finding("divergence", where or "model", evidence.strip(), remedy)


def _faded(m: Measurements) -> tuple[LayerUse, LayerUse, float] | None:
    """Last and first layer, and how much smaller the signal is at the first, if it counts."""
    uses = m.layers
    if not uses or not all(math.isfinite(use.signal) for use in uses):
        return None
    # A weight that is used at every time step learns from the strongest of its uses.
    strongest: dict[str, LayerUse] = {}
    for use in uses:
        known = strongest.get(use.parameter)
        if known is None or use.signal > known.signal:
            strongest[use.parameter] = use
    layers = sorted(strongest.values(), key=lambda use: use.depth)
    last = layers[0]
    if len(layers) < 2 or last.signal == 0:
        return None
    deepest = layers[-1].depth
    first = max(
        (use for use in layers if use.depth > last.depth and use.depth >= 0.75 * deepest),
        key=lambda use: use.signal,
        default=None,
    )
    if first is None or first.signal > VANISHED * last.signal:
        return None
    if first.signal == 0 and m.revives:
        return None  # behind a weight that begins at 0 and is about to leave it
    return last, layers[-1], first.signal / last.signal


def _vanishing(m: Measurements) -> Iterator[Finding]:
    if not finite_step(m):
        return
    if not m.gradients:
        yield _finding(
            "vanishing", "loss", "The loss depends on no trainable parameter.", "detached"
        )
    elif total_norm(m) == 0 and abs(m.loss) > 1e-3:
        yield _finding(
            "vanishing",
            "loss",
            f"The loss is {_number(m.loss)}, and the gradient of every parameter is exactly 0.",
            "dead",
        )
    elif faded := _faded(m):
        last, first, factor = faded
        apart = max(first.depth - last.depth, 1)
        where = first.module or "model"
        evidence = f"From {last.module or 'model'} back to {where} the gradient "
        if factor == 0:
            evidence += "falls to exactly 0."
        else:
            evidence += f"shrinks {_number(1 / factor)}-fold over {apart} layers, "
            evidence += f"{_number(factor ** (1 / apart))} a layer."
        yield _finding("vanishing", where, evidence, "vanishing" if factor else "dead")


def _in_order(m: Measurements, found: list[Finding]) -> Iterator[str]:
    """What was measured and gives no cause for concern."""
    kinds = {finding.kind for finding in found}
    if finite_step(m):
        yield (
            f"Loss {_number(m.loss)} and all {len(m.gradients)} gradients are finite, their total "
            f"norm is {_number(total_norm(m))}."
        )
        idle = [facts.name for facts in m.tensors if facts.not_finite]
        if idle:
            yield f"{', '.join(idle[:3])} holds inf or NaN, which has no influence on this step."
    grown = growth(m)
    if grown is not None and grown.total < GROWTH and not kinds & {"explosion", "vanishing"}:
        yield f"Along the layers the gradient grows at most {_number(grown.total)}-fold."
    limit = highest_rate(m.optimizer, m.curvature)
    if limit is not None and "divergence" not in kinds:
        share = m.optimizer.learning_rate / limit
        yield f"The learning rate is {_number(share)} of the stability limit {limit:.4g}."
        if share > 1:
            yield "Above 1 and yet the loss falls: at the edge of stability that is usual."
    if m.trial is not None and "divergence" not in kinds:
        losses = m.trial.losses
        yield (
            f"{len(losses) - 1} steps on this batch take the loss from {_number(losses[0])} to "
            f"{_number(losses[-1])}."
        )
    if m.float64 is not None and m.float64.difference is not None and "precision" not in kinds:
        yield f"{m.dtype} and float64 agree to {_number(m.float64.difference)} of the gradient."
