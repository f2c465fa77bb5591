"""The rules of diagnosis, on measurements written by hand, around each threshold."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gradlab import diagnosis
from gradlab.diagnosis import KINDS, judge
from gradlab.measurements import (
    Chain,
    Curvature,
    Event,
    Float64,
    Jump,
    LayerUse,
    Measurements,
    OptimizerFacts,
    Origin,
    Place,
    Raised,
    TensorFacts,
    Trial,
    chain_growth,
    source_line,
    which_matter,
)
from gradlab.remedies import REMEDIES

HEALTHY = Measurements(
    "PyTorch", "float32", 1.0, gradients=(("a.weight", 0.3), ("a.bias", 0.4)),
    float64=Float64(1.0, 0.5, True, difference=1e-7),
)  # fmt: skip
HERE = Place("block.norm", "sqrt", "train.py:12: y = x.sqrt()")


def layers(*signals: float, name: str = "layer") -> tuple[LayerUse, ...]:
    """Uses of weights from the last layer back to the first."""
    return tuple(
        LayerUse(f"{name}{d}", f"{name}{d}.weight", d, signal)
        for d, signal in enumerate(signals, 1)
    )


def geometric(factor: float, count: int) -> tuple[LayerUse, ...]:
    return layers(*(factor**i for i in range(count)))


def facts(name: str = "batch[0]", role: str = "batch", **keywords) -> TensorFacts:
    return TensorFacts(name, role, 100, **({"not_finite": 0, "largest": 1.0} | keywords))


def kinds(measurements: Measurements) -> list[str]:
    return [finding.kind for finding in judge(measurements).findings]


def test_nothing_wrong_is_healthy():
    found = judge(HEALTHY)
    assert (found.kind, found.where, found.findings) == ("healthy", "", ())
    assert "total norm is 0.5" in str(found)


def test_findings_come_most_severe_first():
    everything = replace(
        HEALTHY,
        gradients=(("a.weight", 1e30),),
        norm_overflows=True,
        tensors=(facts(largest=1e9),),
        layers=geometric(3, 10),
        optimizer=OptimizerFacts("SGD", "gradient descent", 1.0),
        curvature=Curvature(10.0, where="a.weight"),
    )
    order = kinds(everything)
    assert order == ["bad input", "explosion", "precision", "divergence"]
    assert sorted(order, key=list(KINDS).index) == order
    assert judge(everything).where == "batch"


# -- growth ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "count", "explodes"),
    [(2, 12, True), (2, 6, False), (1.2, 40, True), (1.2, 15, False), (1.0, 100, False),
     (1.13, 30, True), (1.05, 60, False)],
)  # fmt: skip
def test_growth_that_is_spread_over_layers_is_an_explosion(factor, count, explodes):
    found = judge(replace(HEALTHY, layers=geometric(factor, count)))
    assert (found.kind == "explosion") == explodes
    if explodes:
        assert found.where == f"layer{count}"
        assert f"{factor ** (count - 1):.3g}-fold over {count - 1} layers" in str(found)


def test_one_large_factor_is_no_explosion_unless_it_is_enormous():
    assert judge(replace(HEALTHY, layers=layers(1, 1, 300, 300))).kind == "healthy"
    found = judge(replace(HEALTHY, layers=layers(1, 1, 3e5, 3e5)))
    assert (found.kind, found.where) == ("explosion", "layer3")
    assert "One layer alone" in found.findings[0].remedy


def test_growth_along_one_weight_is_growth_along_time():
    uses = tuple(LayerUse("rnn", "rnn.weight_hh", d, 1.3**d) for d in range(1, 50))
    found = judge(replace(HEALTHY, layers=uses))
    assert (found.kind, found.where) == ("explosion", "rnn")
    assert "time step" in found.findings[0].evidence


def test_growth_is_read_in_float64_where_the_own_format_overflows():
    wide = Float64(1e60, 1e60, True, layers=geometric(3, 200))
    event = Event(HERE, "forward", "inf", in_float64=True)
    found = judge(replace(HEALTHY, loss=math.inf, forward=event, float64=wide))
    assert found.kind == "explosion"
    assert "measured in float64" in str(found)


def test_growth_of_the_outputs_counts_where_even_float64_overflows():
    uses = tuple(LayerUse(f"l{i}", f"l{i}.weight", 30 - i, math.nan, 10.0**i) for i in range(1, 30))
    event = Event(HERE, "forward", "inf", in_float64=True)
    wide = Float64(math.inf, math.nan, False)
    found = judge(replace(HEALTHY, loss=math.inf, forward=event, layers=uses, float64=wide))
    assert (found.kind, found.where) == ("explosion", "l29")


def test_vanishing_counts_a_weights_strongest_use():
    found = judge(replace(HEALTHY, layers=geometric(0.1, 10)))
    assert (found.kind, found.where) == ("vanishing", "layer10")
    # A recurrent weight whose last use gets a signal learns, however little reaches its first.
    uses = tuple(LayerUse("rnn", "rnn.w", d, 0.5**d) for d in range(2, 100))
    head = LayerUse("head", "head.weight", 1, 1.0)
    assert judge(replace(HEALTHY, layers=(head, *uses))).kind == "healthy"


def test_a_weight_that_starts_at_zero_is_not_dead():
    silent = replace(HEALTHY, layers=layers(1.0, 0.0, 0.0), revives=True)
    assert judge(silent).kind == "healthy"
    assert judge(replace(silent, revives=False)).kind == "vanishing"


def test_no_gradient_at_all():
    assert judge(replace(HEALTHY, gradients=())).where == "loss"
    still = replace(HEALTHY, gradients=(("a", 0.0),))
    assert kinds(still) == ["vanishing"]
    converged = replace(still, loss=0.0, float64=Float64(0.0, 0.0, True, difference=0.0))
    assert judge(converged).kind == "healthy"


# -- events ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (Event(HERE, "forward", "inf", in_float64=False), "singularity"),
        (Event(HERE, "forward", "inf", in_float64=True), "precision"),
        (Event(HERE, "forward", "inf", in_float64=None), "precision"),
        (Event(HERE, "forward", "nan", in_float64=None), "singularity"),
        (Event(HERE, "backward", "nan", in_float64=True, masked=True), "singularity"),
        (Event(HERE, "backward", "inf", in_float64=False), "singularity"),
        (Event(HERE, "backward", "inf", in_float64=True), "precision"),
    ],
)
def test_the_first_bad_operation(event, kind):
    bad = replace(HEALTHY, gradients=(("a", math.nan),), float64=None)
    bad = replace(bad, **{event.phase: event}, loss=math.nan if event.phase == "forward" else 1.0)
    found = judge(bad)
    assert (found.kind, found.where) == (kind, "block.norm")
    assert found.findings[0].source == HERE.source
    assert HERE.source in str(found)
    assert HERE.source in found._repr_html_()


def test_a_bad_gradient_that_nobody_could_place():
    bad = replace(HEALTHY, gradients=(("a", 1.0), ("b", math.nan)), float64=None)
    assert (judge(bad).kind, judge(bad).where) == ("singularity", "b")
    fits = replace(bad, float64=Float64(1.0, 1.0, True))
    assert judge(fits).kind == "precision"


def test_a_step_that_raised():
    def kind(**keywords):
        raised = Raised(HERE, "IndexError: no", **keywords)
        found = judge(replace(HEALTHY, loss=math.nan, raised=raised))
        return found.kind, found.where

    assert kind() == ("bad input", "block.norm")
    assert kind(integers=(facts(integer=True, highest=10.0),)) == ("bad input", "batch")
    assert kind(one_sample=True) == ("singularity", "block.norm")
    assert kind(by_value=True) == ("singularity", "block.norm")


def test_an_operation_next_to_a_pole():
    steep = replace(HEALTHY, gradients=(("a", 1e5),), jump=Jump(HERE, 1e6, at=1e-12))
    assert (judge(steep).kind, judge(steep).where) == ("singularity", "block.norm")
    for harmless in (
        replace(steep, jump=Jump(HERE, 1e6, at=10.0)),  # a large slope at a large input
        replace(steep, jump=Jump(HERE, 1e6, linear=True, at=1e-12)),  # a loss scale
        replace(steep, jump=Jump(HERE, 1e3, at=1e-12)),
        replace(steep, gradients=(("a", 1.0),)),  # taken back by what follows
        replace(steep, jump=Jump(HERE, 1e6, at=1e-3, sensitive=False)),
    ):
        assert judge(harmless).kind == "healthy"


# -- numbers that go in ------------------------------------------------------------------------


def test_a_bad_batch_needs_a_symptom_and_a_bad_parameter_does_not():
    odd = replace(HEALTHY, tensors=(facts(not_finite=1),))
    assert judge(odd).kind == "healthy"  # masked out, on purpose
    assert judge(replace(odd, loss=math.nan)).kind == "bad input"
    lost = replace(odd, loss=math.nan, tensors=(facts("a.weight", "parameter", not_finite=1),))
    assert (judge(lost).kind, judge(lost).where) == ("bad input", "a.weight")
    running = replace(lost, tensors=(facts("bn.running_var", "buffer", not_finite=1),))
    assert judge(running).where == "bn.running_var"
    # Finite numbers come out, so none of it had a say.
    assert judge(replace(running, loss=1.0)).kind == "healthy"
    assert "bn.running_var holds inf or NaN" in str(judge(replace(running, loss=1.0)))


def test_only_the_tensor_that_brought_it_in_is_to_blame():
    two = (facts("batch[0]", not_finite=1), facts("batch[1]", not_finite=1))
    bad = replace(HEALTHY, loss=math.nan, tensors=two, origin=Origin("batch[1]", HERE))
    assert [f.evidence.split(":")[0] for f in judge(bad).findings] == ["batch[1]"]
    elsewhere = replace(bad, origin=Origin("", HERE))
    assert (judge(elsewhere).kind, judge(elsewhere).where) == ("bad input", "block.norm")
    event = Event(HERE, "forward", "nan", in_float64=False)
    assert kinds(replace(bad, origin=None, forward=event)) == ["singularity"]


def test_chain_growth_counts_what_raises_the_signal():
    assert chain_growth([0.0, 1.0, 2.0, 1.0, 8.0, 0.5], 1e9) == (4, 8.0, 2.0, 2)
    assert chain_growth([1.0, 100.0], 10.0) == (1, 10.0, 0.1, 1)  # most of it never arrives
    assert chain_growth([0.0], 1.0) is None


def test_growth_without_weights():
    chain = Chain(HERE, 1e6, 1e5, 20)
    assert (judge(replace(HEALTHY, chain=chain)).kind) == "explosion"
    for harmless in (Chain(HERE, 1e3, 1e2, 20), Chain(HERE, 1e6, 10, 20), Chain(HERE, 1e6, 1e5, 2)):
        assert judge(replace(HEALTHY, chain=harmless)).kind == "healthy"


def test_large_numbers_that_make_no_difference():
    large = replace(HEALTHY, gradients=(("a", 1e5),), tensors=(facts(largest=1e9, matters=False),))
    assert judge(large).kind == "healthy"


def test_large_numbers_need_a_symptom():
    large = replace(HEALTHY, tensors=(facts(largest=1e7),))
    assert judge(large).kind == "healthy"
    assert judge(replace(large, gradients=(("a", 1e5),))).kind == "bad input"
    tokens = replace(large, tensors=(facts(largest=1e7, integer=True),))
    assert judge(replace(tokens, gradients=(("a", 1e5),))).kind == "healthy"


# -- number format -----------------------------------------------------------------------------


def test_a_gradient_that_float64_contradicts():
    for dtype, difference, kind in [
        ("float32", 0.2, "precision"), ("float32", 0.05, "healthy"),
        ("bfloat16", 0.2, "healthy"), ("float16", 0.7, "precision"),
    ]:  # fmt: skip
        wide = Float64(1.0, 0.5, True, difference=difference)
        assert judge(replace(HEALTHY, dtype=dtype, float64=wide)).kind == kind
    # Where the gradient is all but 0, its digits are noise.
    noise = Float64(1.0, 1e-6, True, difference=3.0)
    assert judge(replace(HEALTHY, float64=noise)).kind == "healthy"
    assert judge(replace(HEALTHY, float64=Float64(3.0, 0.5, True, difference=0.0))).kind == (
        "precision"
    )
    random = Float64(3.0, 0.5, True, difference=None)
    assert judge(replace(HEALTHY, float64=random)).kind == "healthy"


def test_underflow_and_a_norm_that_overflows():
    lost = Float64(1.0, 0.5, True, difference=0.0, lost=0.9)
    assert judge(replace(HEALTHY, float64=lost)).kind == "precision"
    large = replace(HEALTHY, gradients=(("a", 1e21), ("b", 2e21)), norm_overflows=True)
    assert (judge(large).kind, judge(large).where) == ("precision", "b")
    # In float16 the square of 300 overflows, and a scaled gradient of 300 is sound.
    scaled = replace(HEALTHY, dtype="float16", gradients=(("a", 300.0),), norm_overflows=True)
    assert judge(scaled).kind == "healthy"


@pytest.mark.parametrize(
    ("event", "model", "remedy"),
    [("float32", "float32", "too large"), ("float16", "float32", "overflow"),
     ("float32", "float16", "too large"), ("", "bfloat16", "overflow"),
     ("", "float32", "too large")],
)  # fmt: skip
def test_float32_is_no_remedy_for_what_overflows_float32(event, model, remedy):
    bad = Event(HERE, "forward", "inf", in_float64=True, dtype=event)
    m = replace(
        HEALTHY, dtype=model, loss=math.nan, gradients=(), forward=bad, float64=Float64(1, 1, True)
    )
    found = judge(m).findings[0]
    assert (found.kind, found.remedy) == ("precision", REMEDIES[remedy].text)
    assert f"{event or model} is too small" in found.evidence


@pytest.mark.parametrize(
    ("rate", "difference", "first"),
    [(10.0, 0.2, "divergence"), (1.0, 0.2, "precision"), (10.0, 0.9, "precision")],
)
def test_a_step_far_too_long_comes_before_lost_digits(rate, difference, first):
    m = stepping(rate, losses=(1.0, 5.0, 50.0))
    m = replace(m, float64=Float64(1.0, 0.5, True, difference=difference))
    assert judge(m).kind == first
    assert sorted(kinds(m)) == ["divergence", "precision"]


LARGE = (facts("a", largest=1e20), facts("b", "parameter", largest=1e20), facts("c"))


@pytest.mark.parametrize(
    ("needed", "guilty"),
    [([{"a"}], "a"), ([{"a"}, {"b"}], "ab"), ([{"a", "b"}], "ab"), ([{"c"}], "")],
)
def test_large_numbers_are_tried_alone_and_then_together(needed, guilty):
    tried = []

    def helps(names: set[str]) -> bool:
        tried.append(names)
        return any(names >= some for some in needed)

    found = which_matter(LARGE, LARGE[:2], helps)
    assert "".join(f.name for f in found[:2] if f.matters) == guilty
    assert found[2] == LARGE[2]
    assert ({"a", "b"} in tried) == (guilty == "" or needed == [{"a", "b"}])


def test_many_large_tensors_are_only_tried_together():
    many, tried = [facts(name, largest=1e20) for name in "abcde"], []
    found = which_matter(many, many, lambda names: bool(tried.append(names)) or len(names) == 5)
    assert tried == [set("abcde")]
    assert all(f.matters for f in found)


# -- step size ---------------------------------------------------------------------------------


def stepping(rate: float, losses=(1.0, 0.9, 0.8), moved=0.1, sharpness=10.0, **keywords):
    return replace(
        HEALTHY,
        optimizer=OptimizerFacts("SGD", "gradient descent", rate),
        curvature=Curvature(sharpness, where="a.weight"),
        trial=Trial(losses, moved, "b.weight"),
        **keywords,
    )


@pytest.mark.parametrize(
    ("measurements", "kind"),
    [
        (stepping(0.19), "healthy"),
        (stepping(0.21, losses=(1.0, 1.1, 1.2)), "divergence"),
        (stepping(0.21), "healthy"),  # the edge of stability
        (stepping(0.19, losses=(1.0, 1.1, 1.2)), "healthy"),  # momentum's first steps
        (stepping(0.21, losses=(1.0, 20.0, 0.5)), "divergence"),  # what a catapult costs
        (stepping(0.01, losses=(1.0, 5.0, math.nan)), "divergence"),
        (stepping(0.01, losses=(1e-9, 1e-6, 1e-7), moved=0.01), "healthy"),  # converged, new Adam
        (stepping(0.01, losses=(1.0, 3.0, 2.0), moved=2.0), "divergence"),
        (stepping(10.0, sharpness=-1.0), "healthy"),
    ],
)
def test_the_step_is_too_large(measurements, kind):
    assert judge(measurements).kind == kind, str(judge(measurements))


@pytest.mark.parametrize(
    ("losses", "course"),
    [
        ((2.0, math.inf), "the loss is 2, and not finite after one step."),
        ((2.0, 9.0, math.nan), "the loss goes from 2 to 9 in 1 step and is not finite after the"),
        ((2.0, 9.0, 5.0), "the loss goes from 2 to 5, with a peak of 9, in 2 steps."),
    ],
)
def test_the_course_of_a_trial_in_words(losses, course):
    assert course in " ".join(str(judge(stepping(10.0, losses=losses))).split())


def test_a_trial_ends_when_it_has_told_all():
    facts, sharp = OptimizerFacts("SGD", "gradient descent", 0.1), Curvature(10.0)
    falls = [1.0 - 0.1 * i for i in range(9)]
    assert not diagnosis.tried_enough(falls[:4], facts, sharp)
    assert diagnosis.tried_enough(falls[:5], facts, sharp)
    assert diagnosis.tried_enough(falls[:5], facts, None)
    assert not diagnosis.tried_enough(falls[:5], facts, Curvature(30.0))  # above the limit
    assert not diagnosis.tried_enough([1.0, 2.0, 1.0, 0.9, 0.8, 0.7], facts, sharp)
    assert diagnosis.tried_enough([1.0, math.nan], facts, sharp)
    assert diagnosis.tried_enough([1.0, 2.0] * 6, facts, sharp)


def test_divergence_says_where_and_how_far():
    found = judge(stepping(0.3, losses=(1.0, 2.0, 4.0)))
    assert found.where == "a.weight"
    assert "stable up to a learning rate of 0.2; it is 0.3, 1.5 times" in " ".join(
        str(found).split()
    )
    unsettled = replace(
        stepping(0.3, losses=(1.0, 2.0, 4.0)), curvature=Curvature(10.0, converged=False)
    )
    assert "is at least 10" in str(judge(unsettled))
    assert "at least" not in str(found)
    summed = judge(stepping(0.3, losses=(1.0, 2.0, 4.0), summed=True))
    assert summed.where == "loss"
    assert "Average it" in summed.findings[0].remedy


@pytest.mark.parametrize(
    ("method", "beta", "limit"),
    [("momentum", 0.9, 3.8), ("nesterov", 0.9, 3.8 / 2.8), ("adam", 0.9, 38.0)],
)
def test_each_method_has_its_own_limit(method, beta, limit):
    def kind(rate):
        optimizer = OptimizerFacts("X", method, rate, beta)
        rising = stepping(rate, losses=(1.0, 1.1, 1.2), sharpness=1.0)
        return judge(replace(rising, optimizer=optimizer)).kind

    assert kind(0.99 * limit) == "healthy"
    assert kind(1.01 * limit) == "divergence"


# -- how it reads ------------------------------------------------------------------------------


def test_every_remedy_has_a_text_and_a_chapter():
    from gradlab.remedies import REMEDIES

    assert all(r.text.endswith(".") and len(r.text) > 40 and r.chapter for r in REMEDIES.values())
    source = Path(diagnosis.__file__).read_text(encoding="utf-8")
    named = set(re.findall(r'"([a-z ]+)"', source)) | {"bad batch", "bad parameter", "bad buffer"}
    assert set(REMEDIES) <= named


def test_a_remedy_names_a_chapter_that_exists():
    from gradlab.remedies import REMEDIES

    book = Path(__file__).resolve().parent.parent / "notebooks"
    titles = {
        "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0]
        for path in book.glob("*.ipynb")
    }
    assert {f"# {remedy.chapter}" for remedy in REMEDIES.values()} <= titles


def test_a_card_escapes_what_the_model_says():
    raised = Raised(Place("<b>", "f"), "ValueError: a < b & c")
    card = judge(replace(HEALTHY, loss=math.nan, raised=raised))._repr_html_()
    assert "&lt;b&gt;" in card
    assert "a &lt; b &amp; c" in card
    assert 'class="diagnosis diagnosis-bad-input"' in card


def test_notes_are_shown():
    found = judge(replace(HEALTHY, notes=("curvature: no second derivative",)))
    assert "Not measured: curvature: no second derivative" in str(found)


def test_source_lines(tmp_path):
    file = tmp_path / "train.py"
    file.write_text("a = 1\n    b = a.sqrt()\n")
    assert source_line(str(file), 2) == "train.py:2: b = a.sqrt()"
    assert source_line(str(file), 9) == "train.py:9"
    assert source_line("/tmp/ipykernel_12/34.py", 3) == "cell line 3"
