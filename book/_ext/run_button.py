"""Run a chapter: a control below its title, and a copy of its notebook that runs anywhere.

Three ways: Binder, which has the whole repository; Colab, and the reader's own Jupyter, which have
nothing.  For these two every chapter is written once more, beside its page, with a first code cell
that fetches the book where it is missing.  Colab opens that copy from the branch to which
`.github/workflows/book.yml` publishes the pages.

The control is a plain <details>, so that it needs no script.
"""

from __future__ import annotations

import html
import inspect
import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)

BINDER = "https://mybinder.org/v2/gh"
COLAB = "https://colab.research.google.com/github"
#: The branch that holds the published pages.
PUBLISHED = "gh-pages"

CONTROL = """
<details class="run-chapter">
<summary>Run this chapter</summary>
<ul>
<li><a href="{binder}">Binder</a>: nothing to install and no account. It takes some minutes to
start, and has 2 GB of memory at most.</li>
<li><a href="{colab}">Colab</a>: a Google account. The first cell fetches the book. PyTorch and
TensorFlow come in Colab’s versions: a number may differ from the page’s, or a check fail.</li>
<li><a href="{download}" download>Download</a> (.ipynb): for your own Jupyter. The first cell
fetches the book there, too.</li>
</ul>
</details>
"""

EXPLANATION = """\
*The next cell lets this chapter run anywhere*, on Google Colab for instance. Where the book's
library, `gradlab`, is missing, it clones [the book]({address}) into a folder beside this notebook
and installs the library from there. PyTorch and TensorFlow stay as they are; one that is missing
comes along, and takes a gigabyte or more. Where the library is at hand, the cell does nothing. It
needs git and a network. The chapter with its results: [{page}]({page})."""

#: A link in a notebook to another page of the book: path without suffix, heading.
INTERNAL_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)\.(?:ipynb|md)(#[^)\s]*)?\)")


def fetch_the_book(address: str, branch: str) -> None:
    """Clone the book beside this notebook and install its library, unless it is there already."""
    import importlib.util
    import subprocess
    import sys
    from pathlib import Path

    library = getattr(importlib.util.find_spec("gradlab"), "origin", None)
    # Without the rest of the book beside it, the library cannot find the list of claims.
    if library and Path(library).parents[2].joinpath("book/claims.yml").is_file():
        return
    folder = Path("exploding-gradients").resolve()
    clone = ["git", "clone", "--quiet", "--depth=1", f"--branch={branch}", address, str(folder)]
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    install += ["--editable", f"{folder}[torch,tensorflow]"]
    for command in [install] if folder.exists() else [clone, install]:
        print("Running", *command, flush=True)
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if run.returncode:
            raise RuntimeError(
                f"the book could not be fetched: {command[0]} failed. Mend what it complains of, "
                f"delete {folder} if it exists, and run this cell again. It said:\n{run.stdout}"
            )
    sys.path.insert(0, str(folder / "src"))  # this process has read its list of packages already
    importlib.invalidate_caches()


def run_anywhere(
    notebook: nbformat.NotebookNode, docname: str, address: str, branch: str, site: str
) -> nbformat.NotebookNode:
    """A chapter that can be run without a checkout of the book.

    Args:
        notebook: the chapter; it is changed.
        docname: its name, "notebooks/06_clipping".
        address: of the repository.
        branch: of the repository, from which the book is fetched.
        site: where the pages are published; ends with a slash.

    Returns:
        The same notebook, with two more cells before its first code cell, and with the site's
        addresses in place of links to files beside it.

    Raises:
        ValueError: it has no code cell.
    """
    first = next((i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), None)
    if first is None:
        raise ValueError(f"{docname} has no code cell, so there is nothing to run")

    def outside(link: re.Match[str]) -> str:
        page = posixpath.normpath(posixpath.join(posixpath.dirname(docname), link[1]))
        return f"]({site}{page}.html{link[2] or ''})"

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = INTERNAL_LINK.sub(outside, cell.source)
    text = EXPLANATION.format(address=address, page=f"{site}{docname}.html")
    code = f"{inspect.getsource(fetch_the_book)}\n\nfetch_the_book({address!r}, {branch!r})"
    notebook.cells[first:first] = [
        nbformat.v4.new_markdown_cell(text, id="run-anywhere-why"),
        nbformat.v4.new_code_cell(code, id="run-anywhere"),
    ]
    return notebook


def control(docname: str, address: str, branch: str) -> str:
    """The HTML of a chapter's control."""
    repository = urlsplit(address).path.strip("/")
    links = {
        "binder": f"{BINDER}/{repository}/{branch}?urlpath=lab/tree/{docname}.ipynb",
        "colab": f"{COLAB}/{repository}/blob/{PUBLISHED}/{docname}.ipynb",
        "download": f"{posixpath.basename(docname)}.ipynb",
    }
    return CONTROL.format(**{name: html.escape(link) for name, link in links.items()})


def repository(app) -> tuple[str, str]:
    """Address and branch of the repository, from `_config.yml`."""
    options = app.config.html_theme_options
    return options["repository_url"], options["repository_branch"]


def is_chapter(app, docname: str) -> bool:
    """Whether a page is a notebook."""
    return docname in app.env.found_docs and Path(app.env.doc2path(docname)).suffix == ".ipynb"


def add_control(app, pagename, templatename, context, doctree) -> None:
    """Put the control below the title of a chapter."""
    if app.builder.name != "html" or not is_chapter(app, pagename):
        return
    title, end, rest = context["body"].partition("</h1>")
    if not end:
        LOGGER.warning("no title to put the control below", location=pagename)
    context["body"] = title + end + control(pagename, *repository(app)) + rest


def write_copies(app, exception) -> None:
    """Write the copy of every chapter beside its page."""
    if exception or app.builder.name != "html":
        return
    for docname in filter(lambda name: is_chapter(app, name), sorted(app.env.found_docs)):
        notebook = nbformat.read(app.env.doc2path(docname), as_version=4)
        copy = run_anywhere(notebook, docname, *repository(app), app.config.ogp_site_url)
        nbformat.write(copy, Path(app.outdir) / f"{docname}.ipynb")


def setup(app):
    app.connect("html-page-context", add_control)
    app.connect("build-finished", write_copies)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
