"""The network that the page `book/explorer` computes, against gradlab; and the page itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import log, log10
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from fresh import ROOT
from gradlab import theory
from gradlab.backprop import Tensor
from gradlab.mlp import EPSILON
from gradlab.residual import ResidualSpec, predicted_growth

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "linear")
NORMS = ("none", "layer", "batch")
PIECES = {"relu": 0.0, "leaky_relu": 0.2, "linear": 1.0}  # slope of the left one of two
SAMPLES, WIDTH = 16, 100
FLOAT32 = float(np.finfo(np.float32).max)

# One window, opened once.
pytestmark = [pytest.mark.xdist_group("explorer"), pytest.mark.usefixtures("book")]
every_norm = pytest.mark.parametrize("norm", NORMS)
every_skip = pytest.mark.parametrize("skip", [0, 1, 0.5])


def setting(activation="relu", norm="none", skip=0.0, gain=1.5, depth=30) -> dict:
    return {"activation": activation, "norm": norm, "skip": skip, "gain": gain, "depth": depth}


@pytest.fixture(scope="module")
def window(browser: Browser, site: str) -> Iterator[Page]:
    context = browser.new_context(base_url=site, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto("/book/explorer.html")
    yield page
    context.close()


@pytest.fixture
def explorer(window: Page) -> Page:
    """The page as it is first shown."""
    window.reload()
    return window


def choose(page: Page, gain=2.0, depth=30, skip="0", norm="none", activation="relu") -> dict:
    """Move the controls, wait until the page has followed, and return what it shows."""
    page.locator("#explorer-gain").fill(str(gain))
    page.locator("#explorer-depth").fill(str(depth))
    for name, value in (("skip", skip), ("norm", norm), ("activation", activation)):
        page.locator(f"#explorer-{name}").select_option(value)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    shown = page.evaluate("Explorer.shown")
    assert (shown["settings"]["gain"], shown["settings"]["depth"]) == (gain, depth)
    return shown


# ---------------------------------------------------------------------------------------------
# What it computes


def test_the_random_numbers_are_normal_and_come_from_the_seed(window):
    draws = "[1, 1, 2].map(seed => [...Explorer.normals(seed)(40000)])"
    first, again, other = np.array(window.evaluate(draws))
    assert np.array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.02
    for drawn in (first, other):
        moments = [np.mean(drawn**power) for power in (1, 2, 3, 4)]
        np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.1)
        assert abs(np.corrcoef(drawn[::2], drawn[1::2])[0, 1]) < 0.02  # the pairs of Box and Muller


def activate(x: Tensor, name: str) -> Tensor:
    if name == "leaky_relu":
        return x.apply(theory.leaky_relu(PIECES[name]))
    return x.apply(name)


def normalize(x: Tensor, axis: int) -> Tensor:
    centred = x - x.mean(axis, keepdims=True)
    return centred * ((centred * centred).mean(axis, keepdims=True) + EPSILON) ** -0.5


@every_skip
@every_norm
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gradient_is_that_of_reverse_accumulation(window, activation, norm, skip):
    """The same weights in gradlab.backprop, in float64."""
    chosen = setting(activation, norm, skip, depth=4)
    exported = window.evaluate(
        """chosen => {
            const network = Explorer.draw(7), weights = network.layers(chosen.depth - 1);
            const { outputs, gradients } = Explorer.run(network, chosen), target = [network.target];
            const lists = arrays => arrays.map(array => [...array]);
            return Object.fromEntries(Object.entries({ outputs, gradients, target, weights })
                .map(([name, arrays]) => [name, lists(arrays)]));
        }""",
        chosen,
    )
    shape = (SAMPLES, WIDTH)
    h = Tensor(np.reshape(exported["outputs"][0], shape))
    states = [h]
    for flat in exported["weights"]:
        weight = np.reshape(flat, (WIDTH, WIDTH)) * chosen["gain"] / np.sqrt(WIDTH)
        read = normalize(h, 1) if norm == "layer" else h
        branch = activate(read, activation) @ Tensor(weight)
        branch = normalize(branch, 0) if norm == "batch" else branch
        h = h + skip * branch if skip else branch
        states.append(h)
    (h * np.reshape(exported["target"][0], shape)).sum().backward()
    assert len(exported["gradients"]) == chosen["depth"]
    for name, ours in (
        ("outputs", [s.data for s in states]),
        ("gradients", [s.grad for s in states]),
    ):
        for array, expected in zip(exported[name], ours, strict=True):
            scale = np.abs(expected).max()
            np.testing.assert_allclose(np.reshape(array, shape), expected, atol=2e-5 * scale)


# ---------------------------------------------------------------------------------------------
# What it predicts


def expected_sizes(chosen: dict) -> list[float]:
    """Size of the gradient by layer, relative to the last, from gradlab.theory."""
    name, norm, skip, gain = (chosen[key] for key in ("activation", "norm", "skip", "gain"))
    phi = theory.leaky_relu(PIECES[name]) if name == "leaky_relu" else theory.activation(name)
    q = 1 if norm == "batch" else theory.variance_map(1, phi, gain)
    factors = []
    for _ in range(chosen["depth"] - 1):
        if norm == "none":
            added, through = theory.variance_map(q, phi, gain), theory.chi(phi, gain, q=q)
        elif (name, norm) == ("tanh", "batch"):  # an odd function: its variance is its mean square
            added, through = 1, theory.chi(phi, 1, q=q) / theory.variance_map(q, phi, 1)
        else:
            added = 1 if norm == "batch" else theory.variance_map(1, phi, gain)
            size = SAMPLES if norm == "batch" else None
            through = theory.normalization_growth(norm, phi, size) ** 2 * added / q
        factors.append((1 + skip**2 * through) if skip else through)
        q = q + skip**2 * added if skip else added
    return [float(np.sqrt(np.prod(factors[layer:]))) for layer in range(chosen["depth"])]


@every_skip
@every_norm
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gain", [0.9, 2.5])
def test_the_line_is_the_theory_s(window, activation, norm, skip, gain):
    chosen = setting(activation, norm, skip, gain, depth=60)
    line = window.evaluate("chosen => Explorer.predict(chosen)", chosen)
    np.testing.assert_allclose(np.array(line, float), expected_sizes(chosen), rtol=1e-4)


@pytest.mark.parametrize("skip", [0, 1, 0.13])
@every_norm
def test_the_line_is_that_of_the_residual_networks(window, norm, skip):
    chosen = setting("relu", norm, skip, gain=1.7, depth=51)
    spec = ResidualSpec(
        1, 1, depth=50, skip=float(skip > 0), scale=skip or 1, gain=1.7,
        normalization=None if norm == "none" else norm,
    )  # fmt: skip
    q0 = 1.0 if norm == "batch" else theory.variance_map(1, "relu", 1.7)
    line = window.evaluate("chosen => Explorer.predict(chosen)", chosen)
    assert line[0] == pytest.approx(predicted_growth(spec, q0, batch=SAMPLES), rel=1e-4)


@pytest.mark.parametrize("skip", [0, 1, 40**-0.5])
@every_norm
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_dots_lie_on_the_line(window, activation, norm, skip):
    """Growth per layer, mean of five networks: within 2.5 %, or 4 % for tanh in a small batch."""
    chosen = setting(activation, norm, skip, depth=40)
    totals = window.evaluate(
        """chosen => [1, 2, 3, 4, 5].map(seed =>
            Explorer.measure(Explorer.draw(100 * seed), chosen).gradient[0])""",
        chosen,
    )
    line = window.evaluate("chosen => Explorer.predict(chosen)", chosen)
    difference = (np.mean(np.log(totals)) - log(line[0])) / (chosen["depth"] - 1)
    allowed = 0.04 if (activation, norm, skip) == ("tanh", "batch", 0) else 0.025
    assert abs(difference) < allowed


# ---------------------------------------------------------------------------------------------
# What it shows


def readout(page: Page) -> str:
    return page.locator(".explorer-readout").inner_text()


def test_the_picture_and_the_sentence_say_what_was_computed(explorer):
    shown = choose(explorer, gain=1.8, depth=20)
    dots = explorer.locator(".explorer-plot circle")
    assert dots.count() == 20
    heights = np.array(
        [float(y) for y in dots.evaluate_all("all => all.map(c => c.cy.baseVal.value)")]
    )
    points = explorer.locator(".explorer-plot polyline").get_attribute("points").split()
    line = np.array([float(point.split(",")[1]) for point in points])
    # One scale for both, on which a decade is as high everywhere.
    logs = np.log10([*shown["measured"], *shown["predicted"]])
    slope, offset = np.polyfit(logs, np.concatenate([heights, line]), 1)
    assert slope < 0
    np.testing.assert_allclose(np.concatenate([heights, line]), slope * logs + offset, atol=0.11)
    growth, measured, predicted = re.fullmatch(
        r"Back to layer 1 the gradient grows (\S+)-fold, or (\S+) a layer. "
        r"Predicted: (\S+) a layer.",
        readout(explorer),
    ).groups()
    assert float(growth) == pytest.approx(shown["measured"][0], rel=5e-3)
    assert float(measured) == pytest.approx(shown["measured"][0] ** (1 / 19), abs=0.006)
    assert float(predicted) == pytest.approx(theory.growth_factor("relu", 1.8), abs=0.006)


def test_a_vanishing_gradient_is_said_to_shrink(explorer):
    shown = choose(explorer, gain=0.9, depth=60)
    exponent = str(int(np.floor(log10(shown["measured"][0]))))
    superscript = exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    assert re.search(rf"shrinks to \d\.\d × 10{superscript} of its size", readout(explorer))


@pytest.mark.parametrize(("activation", "gain", "start"), [("relu", 4, 8), ("linear", 3.5, 12.25)])
def test_float32_ends_where_it_must(explorer, activation, gain, start):
    """`start` is the first layer's variance; h grows by the growth factor per layer."""
    shown = choose(explorer, gain=gain, depth=100, activation=activation)
    growth = theory.growth_factor(activation, gain, q=1)
    layer = 1 + log(FLOAT32 / start**0.5) / log(growth)
    assert shown["overflow"] == pytest.approx(layer, rel=0.05)
    assert f"layer {shown['overflow']} exceeds the largest float32 number" in readout(explorer)
    assert explorer.locator(".explorer-plot .explorer-cross").count() == 99
    assert explorer.locator(".explorer-failed").is_visible()
    # The layers before it are still finite, and so is their gradient.
    shown = choose(explorer, gain=gain, depth=shown["overflow"] - 4, activation=activation)
    assert shown["overflow"] == 0
    assert explorer.locator(".explorer-plot .explorer-cross").count() == 0
    assert not explorer.locator(".explorer-failed").is_visible()


def test_a_scaled_skip_bounds_the_growth_and_normalisation_cancels_the_gain(explorer):
    """What the page's text and solution assert."""
    for depth in (20, 100):
        for line in ("measured", "predicted"):
            shown = choose(explorer, gain=1.4, depth=depth, skip="scaled")
            assert 1 < shown[line][0] < 1.1 * np.sqrt(np.e)
    for norm in ("layer", "batch"):
        small, large = (choose(explorer, gain=gain, norm=norm)["measured"] for gain in (1, 4))
        # Per layer, for the share of the normalisation's ε explodes with the gradient.
        assert (small[0] / large[0]) ** (1 / 29) == pytest.approx(1, rel=1e-2)
        level = large[0] ** (1 / 29)
        assert abs(level - 1) < 0.05 if norm == "layer" else level > 1.2
    assert choose(explorer, gain=1.4, depth=100, skip="1")["measured"][0] > 1e9


def test_new_weights_move_the_dots_and_not_the_line(explorer):
    before = explorer.evaluate("Explorer.shown")
    explorer.get_by_role("button", name="New weights").click()
    explorer.wait_for_function(
        "total => Explorer.shown.measured[0] !== total", arg=before["measured"][0]
    )
    assert explorer.evaluate("Explorer.shown.predicted") == before["predicted"]


# ---------------------------------------------------------------------------------------------
# How it is reached


def test_every_control_is_reached_and_moved_by_keyboard(explorer):
    explorer.locator("#explorer-activation").focus()
    focused = "document.activeElement.id || document.activeElement.textContent"
    order = [explorer.evaluate(focused)]
    for _ in range(5):
        explorer.keyboard.press("Tab")
        order.append(explorer.evaluate(focused))
    names = ("activation", "gain", "depth", "skip", "norm")
    assert order == [*(f"explorer-{name}" for name in names), "New weights"]
    total = "Explorer.shown.measured[0]"
    for name, key in (("gain", "ArrowRight"), ("skip", "ArrowDown"), ("norm", "ArrowDown")):
        before = explorer.evaluate(total)
        explorer.locator(f"#explorer-{name}").focus()
        explorer.keyboard.press(key)
        explorer.wait_for_function(f"before => {total} !== before", arg=before)
    assert explorer.locator(".explorer-gain").inner_text() == "2.05"
    before = explorer.evaluate(total)
    explorer.get_by_role("button", name="New weights").focus()
    explorer.keyboard.press("Enter")
    explorer.wait_for_function(f"before => {total} !== before", arg=before)


def test_every_control_has_a_name(explorer):
    names = {
        "combobox": ("Activation", "Skip", "Normalisation"),
        "slider": ("Gain", "Depth"),
        "button": ("New weights",),
    }
    for role, name in ((role, name) for role, own in names.items() for name in own):
        assert explorer.get_by_role(role, name=name, exact=True).count() == 1


def test_on_a_phone_nothing_is_wider_than_the_screen(explorer):
    explorer.set_viewport_size({"width": 390, "height": 844})
    try:
        choose(explorer, gain=4, depth=100, norm="batch", activation="tanh", skip="scaled")
        root = "document.documentElement"
        assert explorer.evaluate(f"{root}.scrollWidth - {root}.clientWidth") <= 0
        width = "document.querySelector('.explorer-plot').viewBox.baseVal.width"
        explorer.wait_for_function(f"{width} < 390")  # drawn anew, not shrunk
    finally:
        explorer.set_viewport_size({"width": 1280, "height": 900})


def test_it_works_from_a_file(browser, book):
    context = browser.new_context()
    page, errors, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((book / "book" / "explorer.html").as_uri())
    page.wait_for_function("Explorer.shown")
    assert page.locator(".explorer-plot circle").count() == 30
    assert not page.locator(".explorer-without").count()
    assert errors == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_without_a_script_a_sentence_stands_in(browser, site):
    context = browser.new_context(base_url=site, java_script_enabled=False)
    page = context.new_page()
    page.goto("/book/explorer.html")
    assert not page.locator(".explorer").is_visible()
    instead = page.locator(".explorer-without")
    assert "needs JavaScript" in instead.inner_text()
    assert instead.get_by_role("link").get_attribute("href").endswith("#how-fast-should-it-grow")
    context.close()


def test_no_other_page_loads_it(book):
    pages = [
        path for path in Path(book).rglob("*.html") if "_static/explorer.js" in path.read_text()
    ]
    assert [path.relative_to(book).as_posix() for path in pages] == ["book/explorer.html"]
    assert (ROOT / "book" / "assets" / "explorer.js").stat().st_size < 16_000
