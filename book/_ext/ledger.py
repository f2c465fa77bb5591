"""The ledger of claims: `{claims-ledger}` renders it, {claim}`A3.2` links to a row of it.

On other pages, `{claims-ledger}` with `:article: 3` lists that article's verdicts, word by word,
{verdict}`A3.2` is the word of one claim, with a link to its row, {verdict-count}`refuted` the
number of claims that ended with a word, and {verdict-count}`all` the number of claims.

The statements come from `book/claims.yml`, the verdicts from the executed notebooks of this build,
so the page cannot say what no cell decided.  The table is laid out when the page is read; the
verdicts are filled in when it is written, after every notebook has been read.  A claim of an
existing chapter without exactly one verdict is a warning, and warnings fail the build.

Also writes `_build/ledger.json`: `{id: {verdict, chapter, notebook}}`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.nodes import make_refnode

import executed
from gradlab import claims as registry

LOGGER = logging.getLogger(__name__)

REGISTRY = Path("book/claims.yml")
OPEN = "open"  # the word for a claim whose chapter is not written yet
HEADERS = ("ID", "What is claimed", "Verdict", "What is so")
WIDTHS = (6, 38, 14, 42)


def anchor(claim_id: str) -> str:
    """The HTML id of a claim's row."""
    return f"claim-{claim_id}"


class Slot(nodes.General, nodes.Element):
    """A place that is filled once every verdict is known: `fill` says with what."""


# ---------------------------------------------------------------------------------------------
# Reading: the table without its verdicts


class ClaimsLedger(SphinxDirective):
    """`{claims-ledger}`: a summary, then one table per article; or one article's verdicts."""

    option_spec = {"article": directives.positive_int}  # noqa: RUF012 (docutils' own type)

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / REGISTRY
        self.env.note_dependency(str(path))
        if article := self.options.get("article"):
            if all(claim.article != article for claim in registry.load(path).values()):
                raise self.error(f"no claim of article {article} in {REGISTRY}")
            verdict_pages(self.env).add(self.env.docname)
            return [Slot(fill="article", article=article)]
        self.env.ledger_page = self.env.docname
        found: list[nodes.Node] = [Slot(fill="summary")]
        by_article: dict[int, list[registry.Claim]] = {}
        for claim in registry.load(path).values():
            by_article.setdefault(claim.article, []).append(claim)
        for article, claims in sorted(by_article.items()):
            section = nodes.section(ids=[f"article-{article}"], names=[f"article {article}"])
            section += nodes.title("", f"Article {article}")
            section += nodes.container("", self.table(claims), classes=["ledger-scroll"])
            found.append(section)
        return found

    def table(self, claims: list[registry.Claim]) -> nodes.table:
        table = nodes.table(classes=["ledger"])
        group = nodes.tgroup(cols=len(HEADERS))
        group += [nodes.colspec(colwidth=width) for width in WIDTHS]
        head, body = nodes.thead(), nodes.tbody()
        head += nodes.row("", *(nodes.entry("", nodes.paragraph("", text)) for text in HEADERS))
        for claim in claims:
            row = nodes.row(ids=[anchor(claim.id)])
            row += nodes.entry("", nodes.paragraph("", "", nodes.strong("", claim.id)))
            row += nodes.entry("", self.text(claim.statement))
            row += nodes.entry("", Slot(fill="verdict", claim=claim.id, chapter=claim.chapter))
            correction = Slot("", self.text(claim.correction), fill="correction", claim=claim.id)
            row += nodes.entry("", correction)
            body += row
        group += [head, body]
        table += group
        return table

    def text(self, markdown: str) -> nodes.paragraph:
        """A statement's inline markup."""
        children, messages = self.state.inline_text(" ".join(markdown.split()), self.lineno)
        return nodes.paragraph("", "", *children, *messages)


class ClaimRole(SphinxRole):
    """{claim}`A3.2` links to the claim's row."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        from sphinx.addnodes import pending_xref

        reference = pending_xref(
            "", nodes.inline("", self.text), reftype="claim", refdomain="", reftarget=self.text,
            refdoc=self.env.docname, refwarn=True,
        )  # fmt: skip
        self.set_source_info(reference)
        return [reference], []


class VerdictRole(SphinxRole):
    """{verdict}`A3.2` is the claim's verdict, and links to its row."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        path = Path(self.env.srcdir) / REGISTRY
        self.env.note_dependency(str(path))
        if self.text not in registry.load(path):
            message = self.inliner.reporter.error(f"no claim {self.text!r} in {REGISTRY}")
            return [], [message]
        verdict_pages(self.env).add(self.env.docname)
        return [Slot(fill="word", claim=self.text)], []


class VerdictCountRole(SphinxRole):
    """{verdict-count}`refuted` is how many claims ended with that word; `all` counts them all."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        words = ["all", OPEN, *(word for kind in registry.WORDS.values() for word in kind)]
        if self.text not in words:
            message = self.inliner.reporter.error(
                f"no verdict {self.text!r}; there are {', '.join(dict.fromkeys(words))}"
            )
            return [], [message]
        self.env.note_dependency(str(Path(self.env.srcdir) / REGISTRY))
        verdict_pages(self.env).add(self.env.docname)
        return [Slot(fill="count", word=self.text)], []


def verdict_pages(env) -> set[str]:
    """The pages beside the ledger that show verdicts."""
    if not hasattr(env, "verdict_pages"):
        env.verdict_pages = set()
    return env.verdict_pages


def forget_page(app, env, docname: str) -> None:
    """A page that is read again may show no verdict any more."""
    verdict_pages(env).discard(docname)


def resolve_claim(app, env, node, contnode):
    """The link of a `{claim}` role; None, hence a warning, when there is no such claim."""
    page = getattr(env, "ledger_page", None)
    claim_id = node.get("reftarget")
    if node.get("reftype") != "claim" or page is None:
        return None
    if claim_id not in registry.load(Path(app.srcdir) / REGISTRY):
        return None
    return make_refnode(app.builder, node["refdoc"], page, anchor(claim_id), contnode, claim_id)


# ---------------------------------------------------------------------------------------------
# After reading: the verdicts


def depend_on_execution(app, doctree) -> None:
    """Read a notebook's page again whenever the notebook has been executed again."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix == ".ipynb":
        cache = executed.cache_of(Path(app.srcdir))
        if record := executed.record_of(path, cache):
            app.env.note_dependency(str(executed.result_file(record, cache)))


def collect(app, env) -> list[str]:
    """Take the verdicts from the executed notebooks; pages that show them are always written."""
    page = getattr(env, "ledger_page", None)
    pages = sorted(({page} | verdict_pages(env)) & env.found_docs)
    if not pages:
        return []
    root = Path(app.srcdir)
    cache = executed.cache_of(root)
    copies = []
    for name in sorted(env.found_docs):
        path = Path(env.doc2path(name))
        if path.suffix != ".ipynb":
            continue
        copy = root / "_build" / "executed" / f"{name}.ipynb"
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            nbformat.write(executed.executed(path, cache), copy)
        except KeyError:
            LOGGER.warning("not executed: no result in the cache", location=name)
            continue
        copies.append(copy)
    claims = registry.load(root / REGISTRY)
    ledger, problems = registry.collect(copies, claims)
    for problem in problems:
        LOGGER.warning("claims: %s", problem, location=page or pages[0])
    (root / "_build" / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n")
    app.ledger = ledger
    return pages


def fill_slots(app, doctree, docname) -> None:
    """Put the verdicts where the table waits for them."""
    for slot in list(doctree.findall(Slot)):
        if slot["fill"] == "summary":
            claims = registry.load(Path(app.srcdir) / REGISTRY)
            slot.replace_self(summary(app.ledger, len(claims)))
            continue
        if slot["fill"] == "article":
            claims = registry.load(Path(app.srcdir) / REGISTRY).values()
            own = [claim.id for claim in claims if claim.article == slot["article"]]
            slot.replace_self(by_word(app, docname, own))
            continue
        if slot["fill"] == "word":
            word = app.ledger.get(slot["claim"], {}).get("verdict", OPEN)
            link = row_link(app, docname, slot["claim"], mark(word))
            slot.replace_self(link)
            continue
        if slot["fill"] == "count":
            claims = registry.load(Path(app.srcdir) / REGISTRY)
            number = count(app.ledger, claims, slot["word"])
            slot.replace_self(nodes.inline("", str(number), classes=["verdict-count"]))
            continue
        decided = app.ledger.get(slot["claim"])
        if slot["fill"] == "correction":
            # What no cell has shown yet is not asserted.
            slot.replace_self(slot.children if decided else nodes.paragraph("", "Not tested yet."))
        else:
            word = decided["verdict"] if decided else OPEN
            slot.replace_self([badge(word), chapter(app, docname, slot["chapter"])])


def summary(ledger: dict[str, dict[str, str]], total: int) -> nodes.paragraph:
    """How many claims are decided, with which word, and how many are open."""
    counts = Counter(row["verdict"] for row in ledger.values())
    words = [word for kind in registry.WORDS.values() for word in kind]
    parts = [f"{counts[word]} {word}" for word in dict.fromkeys(words) if counts[word]]
    parts.append(f"{total - len(ledger)} {OPEN}")
    text = f" of {total} statements are decided so far: {', '.join(parts)}."
    paragraph = nodes.paragraph(classes=["ledger-summary"])
    paragraph += [nodes.strong("", str(len(ledger))), nodes.Text(text)]
    return paragraph


def count(ledger: dict[str, dict[str, str]], claims: Iterable[str], word: str) -> int:
    """How many of the claims ended with a word; `all` counts every one."""
    words = [ledger.get(claim_id, {}).get("verdict", OPEN) for claim_id in claims]
    return len(words) if word == "all" else words.count(word)


def by_word(app, docname: str, claim_ids: list[str]) -> nodes.bullet_list:
    """One article's verdicts: every word with the claims that ended with it."""
    groups: dict[str, list[str]] = {}
    for claim_id in claim_ids:
        word = app.ledger.get(claim_id, {}).get("verdict", OPEN)
        groups.setdefault(word, []).append(claim_id)
    words = [word for kind in registry.WORDS.values() for word in kind]
    items = nodes.bullet_list()
    for word in dict.fromkeys([*words, OPEN]):
        if own := groups.get(word):
            line = nodes.paragraph("", "", mark(word), nodes.Text(f" {len(own)}: "))
            for number, claim_id in enumerate(own):
                line += [nodes.Text(", ")] if number else []
                line += row_link(app, docname, claim_id, nodes.inline("", claim_id))
            items += nodes.list_item("", line)
    return items


def row_link(app, docname: str, claim_id: str, shown: nodes.Node) -> nodes.Node:
    """A link to the claim's row in the ledger; in a book without one, what would be linked."""
    page = getattr(app.env, "ledger_page", None)
    if page not in app.env.found_docs:
        return shown
    return make_refnode(app.builder, docname, page, anchor(claim_id), shown, claim_id)


def mark(word: str) -> nodes.inline:
    return nodes.inline("", word, classes=["verdict-badge", f"verdict-badge-{word}"])


def badge(word: str) -> nodes.paragraph:
    return nodes.paragraph("", "", mark(word))


def chapter(app, docname: str, name: str) -> nodes.paragraph:
    """The chapter that decides a claim: a link when it exists, else its name."""
    paragraph = nodes.paragraph(classes=["ledger-chapter"])
    for candidate in (f"notebooks/{name}", f"book/{name}"):
        if candidate in app.env.found_docs:
            title = app.env.titles[candidate].astext()
            uri = app.builder.get_relative_uri(docname, candidate)
            paragraph += nodes.reference("", title, refuri=uri, internal=True)
            return paragraph
    paragraph += nodes.Text(re.sub(r"^\d+_", "", name).replace("_", " ") + ", to come")
    return paragraph


def setup(app):
    app.add_node(Slot)
    app.add_directive("claims-ledger", ClaimsLedger)
    app.add_role("claim", ClaimRole())
    app.add_role("verdict", VerdictRole())
    app.add_role("verdict-count", VerdictCountRole())
    app.connect("env-purge-doc", forget_page)
    app.connect("doctree-read", depend_on_execution)
    app.connect("env-updated", collect)
    app.connect("doctree-resolved", fill_slots)
    app.connect("missing-reference", resolve_claim)
    # One environment per process keeps the page's name; reading in parallel would lose it.
    return {"parallel_read_safe": False, "parallel_write_safe": True, "env_version": 4}
