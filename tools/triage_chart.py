"""Draw book/assets/triage.svg, the decision chart of the triage page."""

from html import escape
from pathlib import Path

WIDTH, ROW, BOX = 440, 104, 232
KINDS = {
    "bad input": ("#7f1d1d", "#fee2e2"),
    "singularity": ("#713f12", "#fef3c7"),
    "explosion": ("#3b0764", "#f3e8ff"),
    "precision": ("#1e3a8a", "#dbeafe"),
    "divergence": ("#7c2d12", "#ffedd5"),
    "vanishing": ("#334155", "#e2e8f0"),
    "healthy": ("#14532d", "#dcfce7"),
}
# The question; the answer that leads to the right, to which kind, with what to do; the other one.
ROWS = [
    (["Are batch, weights and", "buffers finite, labels in", "range, inputs below 10⁶?"], "no",
     "bad input", "mend the data, or go back to a checkpoint", "yes"),
    (["Are loss and gradients finite?", "If not, are they in float64?"], "not even there",
     "singularity", "safe form of that operation", "yes, here or in float64"),
    (["Does the gradient grow more", "than 100-fold along the", "layers (or time steps)?"], "yes",
     "explosion", "initial gain, normalisation, scaled skips", "no"),
    (["Was float64 needed, or does", "the gradient differ there?"], "yes",
     "precision", "wider format here, loss scaling, safe order", "no"),
    (["Is the learning rate above the", "limit, and does the loss rise", "on this very batch?"],
     "yes", "divergence", "smaller rate, warm-up, clipping", "no"),
    (["Do the first layers get less", "than a millionth of the last", "layer's gradient?"], "yes",
     "vanishing", "gain, activation, skips", "no"),
]  # fmt: skip


def text(x: float, y: float, lines: list[str], color: str, *, size: int, bold: bool = False) -> str:
    """Centred lines of text around a point."""
    top = y - (len(lines) - 1) * (size + 3) / 2
    weight = ' font-weight="bold"' * bold
    return "".join(
        f'<text x="{x}" y="{top + i * (size + 3) + size * 0.36:.0f}" font-size="{size}" '
        f'fill="{color}"{weight}>{escape(line)}</text>'
        for i, line in enumerate(lines)
    )


def box(x: float, y: float, width: float, height: float, ink: str, paper: str) -> str:
    """A box with rounded corners."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{paper}" '
        f'stroke="{ink}" stroke-width="1.5"/>'
    )


def folded(line: str, length: int) -> list[str]:
    """Break a line at spaces."""
    lines = [""]
    for word in line.split():
        lines = [*lines, word] if len(lines[-1]) + len(word) > length else [
            *lines[:-1], f"{lines[-1]} {word}".strip()]  # fmt: skip
    return lines


def chart() -> str:
    """The whole drawing."""
    height = ROW * len(ROWS) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" text-anchor="middle" '
        'font-family="DejaVu Sans, Verdana, sans-serif">',
        "<title>Which kind of blow-up is it? A decision chart</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#334155"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    line = '<path d="M{} {}L{} {}" stroke="#334155" stroke-width="1.5" marker-end="url(#tip)"/>'
    for i, (question, answer, kind, remedy, other) in enumerate(ROWS):
        y, ink_paper = 8 + i * ROW, KINDS[kind]
        parts += [box(6, y, BOX, 66, "#334155", "#f8fafc"),
                  text(6 + BOX / 2, y + 33, question, "#0f172a", size=13)]  # fmt: skip
        parts += [box(292, y, 142, 66, *ink_paper)]
        parts += [text(363, y + 14, [kind], ink_paper[0], size=13, bold=True)]
        parts += [text(363, y + 43, folded(remedy, 23), ink_paper[0], size=10)]
        parts += [line.format(6 + BOX, y + 33, 290, y + 33)]
        parts += [text(265, y + 18, folded(answer, 9), "#334155", size=10)]
        parts += [line.format(6 + BOX / 2, y + 66, 6 + BOX / 2, y + ROW - 2)]
        parts += [text(20 + BOX / 2 + len(other) * 3, y + 66 + 18, [other], "#334155", size=10)]
    y, ink_paper = 8 + len(ROWS) * ROW, KINDS["healthy"]
    parts += [box(6, y, BOX, 44, *ink_paper)]
    parts += [text(6 + BOX / 2, y + 14, ["healthy"], ink_paper[0], size=13, bold=True)]
    parts += [text(6 + BOX / 2, y + 31, ["this batch is not the one: ask another"],
                   ink_paper[0], size=10)]  # fmt: skip
    return "".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "book/assets/triage.svg"
    path.write_text(chart(), encoding="utf-8")
    print(path)
