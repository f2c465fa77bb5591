"""How a result shows in a notebook: a box, also where the book's style sheet is not."""

#: Without a colour: that of the text, whatever the theme.
STYLE = "border-left: 0.3rem solid; padding: 0.6rem 0.9rem"


def card(name: str, kind: str, content: str) -> str:
    """The HTML of a card.

    Args:
        name: what it is a card of, "verdict" or "diagnosis".
        kind: which one, "refuted"; the book's style sheet colours by it.
        content: HTML.
    """
    return f'<div class="{name} {name}-{kind}" style="{STYLE}">{content}</div>'
