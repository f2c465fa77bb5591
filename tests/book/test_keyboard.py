"""What the mouse reaches, the keyboard reaches too, and one sees where one is."""

import pytest

#: What can be worked with, by a name of its own.  Of radio buttons, one of a group is reached.
STOPS = """() => {
    const stops = document.querySelectorAll(
        'a[href], button, input, select, textarea, summary, [tabindex="0"]');
    const groups = new Set();
    return [...stops].filter(stop => {
        if (!stop.checkVisibility({ visibilityProperty: true }) || stop.disabled) return false;
        if (stop.tabIndex < 0 || stop.closest('dialog:not([open])')) return false;
        const { width, height } = stop.getBoundingClientRect();
        if (!width || !height) return false;
        if (stop.type !== 'radio') return true;
        const first = !groups.has(stop.name);
        groups.add(stop.name);
        return first;
    }).map((stop, number) => {
        stop.dataset.stop = stop.type === 'radio' ? stop.name : number;
        return stop.dataset.stop;
    });
}"""

#: Which of them has the focus, and whether that can be seen.
FOCUS = """() => {
    const stop = document.activeElement;
    if (!stop || stop === document.body) return null;
    const radio = stop.type === 'radio';
    const shown = radio ? document.querySelector(`label[for="${stop.id}"]`) : stop;
    // A link stretched over a card shows the focus around all of it.
    const seen = [getComputedStyle(shown), getComputedStyle(shown, '::after')].some(
        style => style.outlineStyle !== 'none' || style.boxShadow !== 'none');
    return [radio ? stop.name : stop.dataset.stop ?? '', seen, stop.outerHTML.slice(0, 120)];
}"""


@pytest.mark.parametrize(
    "document",
    ["book/intro", "book/explorer", "book/claims", "search", "notebooks/06_clipping"],
)
def test_the_keyboard_reaches_everything_and_shows_where(page, document):
    page.goto(f"/{document}.html", wait_until="networkidle")
    page.evaluate(
        "document.activeElement.blur(); document.documentElement.style.scrollBehavior='auto'"
    )
    wanted = set(page.evaluate(STOPS))
    reached, unseen = set(), []
    for _ in range(3 * len(wanted) + 20):
        page.keyboard.press("Tab")
        focus = page.evaluate(FOCUS)
        if focus is None:
            break  # past the last one: the browser's own controls come next
        stop, seen, what = focus
        reached.add(stop)
        if not seen:
            unseen.append(what)
    missed = [
        page.evaluate(
            "s => document.querySelector(`[data-stop='${s}']`).outerHTML.slice(0, 160)", s
        )
        for s in sorted(wanted - reached)
    ]
    assert len(wanted) > 20
    assert not missed
    assert not unseen


def test_the_first_stop_skips_to_the_text(page):
    page.goto("/notebooks/06_clipping.html", wait_until="networkidle")
    page.keyboard.press("Tab")
    assert "Skip to main content" in page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("!!document.activeElement.closest('#main-content, main')")
