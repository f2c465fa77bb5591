"""Exercises: plain headings in a notebook, numbered boxes with folded solutions on its page.

In JupyterLab, on GitHub and in any other program that shows notebooks, an exercise reads as what it
is, and JupyterLab folds the solution below its heading:

    ### Exercise                 a cell; the comment names the exercise: {ref}`ex-one` leads here
    <!-- ex-one -->

    What is one and one?

    ### Solution                 a cell of its own, folded (jp-MarkdownHeadingCollapsed)

    Two.                         cells of text and code, up to the next that starts with a heading

Before a notebook is read, this turns them into the gated directives of sphinx-exercise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

EXERCISE = re.compile(r"### Exercise\n<!-- *([\w-]+) *-->\n")
SOLUTION = "### Solution"
HEADING = re.compile(r"#{1,6} ")

EXERCISE_BOX = "````{{exercise-start}}\n:label: {}\n````\n{}\n````{{exercise-end}}\n````"
SOLUTION_START = "````{{solution-start}} {}\n:class: dropdown\n````"
SOLUTION_END = "````{solution-end}\n````"


def boxes(cells: list[dict]) -> Iterator[dict]:
    """A notebook's cells with directives in the place of headings."""
    label, inside = None, False
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] != "markdown":
            yield cell
            continue
        if inside and HEADING.match(text):
            inside = False
            yield _markdown(f"{label}-end", SOLUTION_END)
        if exercise := EXERCISE.match(text):
            label = exercise[1]
            cell = cell | {"source": EXERCISE_BOX.format(label, text[exercise.end() :].strip())}
        elif label and text.strip() == SOLUTION:
            inside = True
            cell = cell | {"source": SOLUTION_START.format(label)}
        yield cell
    if inside:
        yield _markdown(f"{label}-end", SOLUTION_END)


def _markdown(name: str, source: str) -> dict:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": source}


def read(app, docname: str, source: list[str]) -> None:
    """Sphinx's hook: the text of a file, before it is read."""
    if app.env.doc2path(docname).endswith(".ipynb"):
        notebook = json.loads(source[0])
        notebook["cells"] = list(boxes(notebook["cells"]))
        source[0] = json.dumps(notebook)


def setup(app) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
