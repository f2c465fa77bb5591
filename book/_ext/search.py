"""What a reader may type into the search field, beyond the words of the pages.

Sphinx's own search does the work, also without a server.  This adds

* one form for each word, in the index and in the query: Greek letters are their names (σ_w is
  `\\sigma_w` of a formula), British spelling is American spelling, fp16 is float16;
* entries that lead to one place: the ID of a claim (its row of the ledger, and the cell that
  decides it), a symbol of the glossary, the number or topic of a chapter, and other spellings of
  the glossary's words;
* `search.js`: pages whose own title has the words come before pages that only mention them.

The entries go into the search alone, not into the printed index, so they are added when a page is
written.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.search import js_index
from sphinx.search.en import SearchEnglish

#: Greek letters by name.  Unicode calls λ LAMDA, and has further forms of φ and ε.
GREEK = {
    letter: unicodedata.name(letter).split()[-1].lower().replace("lamda", "lambda")
    for letter in map(chr, range(0x3B1, 0x3CA))
    if letter != "ς"
} | {"ς": "sigma", "ϕ": "phi", "ϵ": "epsilon"}

#: Several words for one thing.
SAME = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "grey": "gray",
    "learnt": "learned",
    "varepsilon": "epsilon",
    "varphi": "phi",
}

#: British endings and their American ones, of which the stemmer of English knows more.
SPELLING = [
    (r"^(.+[dglmnrt])is(e[drs]?|ing|ations?|able)$", r"\1iz\2"),
    (r"^(anal|catal|paral)ys(e[drs]?|ing)$", r"\1yz\2"),
    (r"^(behavi|col|fav|flav|lab|neighb)our", r"\1or"),
    (r"^(cancel|channel|label|level|model|signal|total)l(ed|ing|er)$", r"\1\2"),
    (r"^(cent|fib|met)re([ds]?)$", r"\1er\2"),
]

#: What else a chapter or a word of the glossary is looked for as.
ALSO = {
    "06_clipping": {"gradient clipping"},
    "13c_loss_scaling": {"GradScaler", "loss scale", "LossScaleOptimizer"},
    "clipping by norm": {"gradient clipping"},
    "explosion": {"exploding gradient", "exploding gradients", "gradient explosion"},
    "Glorot's rule": {"Glorot initialization", "Xavier initialization"},
    "He's gain": {"He initialization", "Kaiming initialization"},
    "initialisation": {"weight initialization"},
    "loss scaling": {"loss scale", "GradScaler"},
    "NaN": {"loss is NaN", "NaN loss", "not a number"},
    "overflow": {"inf", "infinity"},
    "vanishing": {"vanishing gradient", "vanishing gradients"},
}

#: A symbol such as `\sigma_w` or `\lambda_{\max}`, or several with other signs between them.
SYMBOL = re.compile(r"\\?([A-Za-z]+)(?:_\{?\\?([A-Za-z]+)\}?)?")
#: Commands of LaTeX that are no symbols.
DRESS = {"sqrt", "mathcal", "mathbb", "mathrm", "lVert", "rVert", "cdot", "odot"}


#: The card that a verdict cell shows.
VERDICT = re.compile(r'\s*<div class="verdict .*?<strong>([^<]+)</strong>', re.DOTALL)


def american(word: str) -> str:
    """The American spelling of a word in small letters."""
    for pattern, ending in SPELLING:
        word = re.sub(pattern, ending, word)
    return word


def one_form(word: str) -> str:
    """The form under which the index keeps a word, before its ending is cut off."""
    word = "".join(GREEK.get(letter, letter) for letter in word.lower())
    word = SAME.get(word.strip("_"), word.strip("_") or word)
    return american(word)


class SearchPlain(SearchEnglish):
    """English, with one form for each word; the browser does the same to what is typed."""

    def split(self, text: str) -> list[str]:
        """Words; a subscript belongs to its letter, however LaTeX writes it."""
        return super().split(re.sub(r"_\{?\\?([A-Za-z0-9]+)\}?", r"_\1", text))

    def stem(self, word: str) -> str:
        return super().stem(one_form(word))

    js_stemmer_code = "\n".join(
        [
            SearchEnglish.js_stemmer_code,
            f"const GREEK = {json.dumps(GREEK)};",
            f"const SAME = {json.dumps(SAME)};",
            f"const SPELLING = {json.dumps([[p, r.replace(chr(92), '$')] for p, r in SPELLING])};",
            Path(__file__).with_suffix(".js").read_text(encoding="utf-8"),
        ]
    )


# ---------------------------------------------------------------------------------------------
# Entries that lead to one place


def other_spellings(term: str) -> Iterator[str]:
    """What else a word of the glossary, or the topic of a chapter, is typed as."""
    small = term.lower()
    yield from (part.strip() for part in small.split(","))
    yield from ALSO.get(term, ())
    yield " ".join(american(word) for word in small.split())
    yield re.sub(r"(?<=[dglmnrt])iz(?=e|ing|ation)", "is", small)
    yield from (small.replace("-", ""), small.replace("-", " "))
    yield from (short for short, long in SAME.items() if long == small)


def entries(target: str, terms: set[str]) -> addnodes.index:
    """Index entries that come before all pages: the reader typed exactly this."""
    return addnodes.index(
        entries=[("single", term, target, "main", None) for term in sorted(terms)]
    )


def names_of(latex: str) -> set[str]:
    """Every way to type the symbols of a formula: `\\sigma_w` is sigma_w and σ_w."""
    letters: dict[str, str] = {}
    for letter, name in GREEK.items():
        letters.setdefault(name, letter)
    found = set()
    for letter, index in SYMBOL.findall(latex):
        name = SAME.get(letter, letter)
        if letter not in DRESS:
            for tail in {"", f"_{index}" if index else ""}:
                found |= {name + tail, letters.get(name, name) + tail}
    return found


def add_entries(app, doctree: nodes.document, docname: str) -> None:
    """Add the entries of one page, each with an address that the search can show an excerpt of."""
    for node in list(doctree.findall(addnodes.index)):
        for _, term, target, main, _ in node["entries"]:
            others = set(other_spellings(term)) - {term.lower()}
            if main and others:
                doctree += entries(target, others)

    for row in doctree.findall(nodes.row):
        name = next(iter(row["ids"]), "")
        if name.startswith("claim-"):
            # A dot in an address is more than the search's excerpts can read.
            claim_id = name.removeprefix("claim-")
            statement = row[1][0]
            statement["ids"].append(f"statement-{claim_id.replace('.', '-')}")
            doctree += entries(statement["ids"][0], {claim_id})

    for raw in doctree.findall(nodes.raw):
        if verdict := VERDICT.match(raw.astext()):
            claim_id = html.unescape(verdict[1])
            target = f"verdict-{claim_id.replace('.', '-')}"
            marked = raw.astext().replace("<div ", f'<div id="{target}" ', 1)
            raw.children, raw.rawsource = [nodes.Text(marked)], marked
            doctree += entries(target, {claim_id})

    for section in doctree.findall(nodes.section):
        if "symbols" in section["ids"]:
            said: Counter[str] = Counter()
            for row in section.findall(nodes.row):
                formulas = row[0].findall(nodes.math)
                if found := set().union(*(names_of(formula.astext()) for formula in formulas)):
                    address = nodes.make_id(f"symbol {row[1].astext()}")
                    said[address] += 1  # N and n are said alike
                    address += f"-{said[address]}" * (said[address] > 1)
                    row["ids"].append(address)
                    doctree += entries(address, found)

    stem = docname.rpartition("/")[2]
    if chapter := re.match(r"0*(\d+[a-z]?)_", stem):
        # The title is a question; the name of the file says what it is about.
        topic = stem.partition("_")[2].replace("_", " ")
        own = {stem, topic, f"chapter {chapter[1]}", *other_spellings(topic)}
        doctree += entries("", own | ALSO.get(stem, set()))


def keep_entries(app, env) -> list[str]:
    """Take the entries of the last build over: Sphinx forgets those of pages not written again."""
    last = Path(app.outdir) / "searchindex.js"
    if app.builder.format == "html" and last.exists():
        index = js_index.loads(last.read_text(encoding="utf-8"))
        kept: dict[str, list[tuple[str, str, str]]] = {}
        for entry, places in index.get("indexentries", {}).items():
            for page, target, main in places:
                place = (entry, target, "main" if main else "")
                kept.setdefault(index["docnames"][page], []).append(place)
        for docname in kept.keys() & env.found_docs:
            env._search_index_index_entries[docname] = sorted(kept[docname])
    return []


def setup(app):
    app.add_search_language(SearchPlain)
    app.connect("env-updated", keep_entries)
    app.connect("doctree-resolved", add_entries, priority=900)  # the ledger is filled by then
    # Raise the version with every change of the words' forms: pages keep them from build to build.
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 1}
