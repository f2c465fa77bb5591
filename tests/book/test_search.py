"""What a reader types into the search field: the right page is among the first three."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
import yaml

import executed
from fresh import ROOT
from gradlab import claims

HTML = ROOT / "_build" / "html"

SYMBOLS = [
    "σ",
    "σ_w",
    "sigma",
    "sigma_w",
    "ρ",
    "rho",
    "ε",
    "η",
    "χ",
    "λ_max",
    "lambda_max",
    "φ",
    "δ",
    "β",
]

#: What is typed, and how the address of the right page begins.
QUERIES = [
    # claims
    ("A1.16", "book/claims.html#statement-A1-16"),
    ("a1.16", "notebooks/12_xla.html#verdict-A1-16"),
    ("A5.8", "notebooks/17c_few_lines.html#verdict-A5-8"),
    # symbols: by letter, by name, as LaTeX writes them
    *((symbol, "book/glossary.html#symbol-") for symbol in SYMBOLS),
    # the library and the frameworks
    ("GradientProbe", "book/api.html#gradlab.torch.probe.GradientProbe"),
    ("diagnose", "book/api.html#module-gradlab.torch.diagnose"),
    ("gradlab.torch.diagnose", "book/api.html#gradlab.torch.diagnose.diagnose"),
    ("on_nonfinite", "book/triage.html"),
    ("clip_by_global_norm", "notebooks/06b_clipping_in_practice.html"),
    ("clipnorm", "notebooks/06b_clipping_in_practice.html"),
    ("GradScaler", "notebooks/13c_loss_scaling.html"),
    # what a log says
    ("nan", "book/glossary.html#term-NaN"),
    ("NaN loss", "book/glossary.html#term-NaN"),
    ("my loss is NaN", "notebooks/18_faq.html#my-loss-is-nan"),
    ("inf", "book/glossary.html#term-overflow"),
    ("overflow", "book/glossary.html#term-overflow"),
    # topics
    ("gradient clipping", "notebooks/06_clipping.html"),
    ("exploding gradients", "book/glossary.html#term-explosion"),
    ("vanishing gradients", "book/glossary.html#term-vanishing"),
    ("residual network", "notebooks/09_residual_networks.html"),
    # American and British
    ("normalization", "notebooks/04b_normalization.html"),
    ("normalisation", "notebooks/04b_normalization.html"),
    ("initialization", "book/glossary.html#term-initialisation"),
    ("initialisation", "book/glossary.html#term-initialisation"),
    ("optimizer", "book/glossary.html#term-optimiser"),
    # short and hyphenated
    ("fp16", "notebooks/13c_loss_scaling.html"),
    ("float16", "notebooks/13c_loss_scaling.html"),
    ("bf16", "book/glossary.html#term-bfloat16"),
    ("L2", "book/glossary.html#term-L1-L2"),
    ("warmup", "book/glossary.html#term-warm-up"),
    ("warm-up", "book/glossary.html#term-warm-up"),
    # chapters
    ("chapter 6", "notebooks/06_clipping.html"),
    ("chapter 13c", "notebooks/13c_loss_scaling.html"),
    ("06_clipping", "notebooks/06_clipping.html"),
]


@pytest.fixture(params=["server", "disk"])
def start(request, book, site) -> str:
    """The address of the book: on a server, and without one."""
    return site if request.param == "server" else book.as_uri()


@pytest.fixture
def errors(page) -> list[str]:
    """What the page complains of while it is open."""
    found: list[str] = []
    page.on("console", lambda m: found.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


def results(page, start: str, query: str) -> list[str]:
    """The addresses that the search page lists, best first."""
    page.goto(f"{start}/search.html?q={quote(query)}")
    page.wait_for_function(
        "/finished|did not match/.test(document.querySelector('.search-summary')?.innerText)"
    )
    links = page.locator("ul.search > li > a")
    return [
        href.removeprefix(f"{start}/") for href in links.evaluate_all("ls => ls.map(l => l.href)")
    ]


@pytest.mark.parametrize(("query", "right"), QUERIES, ids=[query for query, _ in QUERIES])
def test_the_right_page_is_among_the_first_three(page, start, errors, query, right):
    found = results(page, start, query)
    assert any(address.startswith(right) for address in found[:3]), found[:6]
    assert errors == []


def test_every_result_can_be_opened(page, start, errors):
    page.goto(f"{start}/search.html")
    for query in ("A1.16", "σ_w", "bf16", "chapter 6"):
        for address in results(page, start, query)[:2]:
            page.goto(f"{start}/{address}")
            if "#" in address:
                target = page.locator(f"[id='{address.partition('#')[2]}']")
                assert target.inner_text().strip()
    assert errors == []


def test_the_field_on_every_page_leads_to_the_results(page, site):
    page.goto("/notebooks/06_clipping.html")
    page.wait_for_load_state("networkidle")
    page.keyboard.press("Control+k")
    page.keyboard.type("A1.16")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=A1.16*")
    first = page.locator("ul.search > li").first
    assert "XLA" in first.locator("p.context").inner_text()  # an excerpt: the statement itself


# ---------------------------------------------------------------------------------------------
# In the index


@pytest.fixture(scope="module")
def entries(book) -> dict[str, list[str]]:
    """Every entry that leads to one place: {what is typed: addresses}."""
    text = (book / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    pages = index["docnames"]
    return {
        entry: [f"{pages[page]}#{anchor}" for page, anchor, main in found if main]
        for entry, found in index["indexentries"].items()
    }


def test_every_claim_is_found_in_the_ledger_and_where_it_is_decided(entries):
    for claim_id, claim in claims.load(ROOT / "book" / "claims.yml").items():
        anchor = claim_id.replace(".", "-")
        row = f"book/claims#statement-{anchor}"
        chapter = f"notebooks/{claim.chapter}#verdict-{anchor}"
        assert set(entries[claim_id.lower()]) == {row, chapter}, claim_id


def test_every_chapter_is_found_by_its_number(entries):
    documents = executed.documents(yaml.safe_load((ROOT / "_toc.yml").read_text()))
    for name in (name for name in documents if name.startswith("notebooks/")):
        number = name.removeprefix("notebooks/").partition("_")[0].lstrip("0")
        assert entries[f"chapter {number}"] == [f"{name}#"]


def test_the_browser_gives_every_word_the_form_that_the_index_has(page, site, book):
    text = (book / "searchindex.js").read_text(encoding="utf-8")
    terms = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))["terms"]
    page.goto("/search.html")
    forms = {
        "normalisation": "normalization", "optimiser": "optimizer", "behaviour": "behavior",
        "modelling": "modeling", "analyse": "analyze", "centre": "center", "fp16": "float16",
        "Σ": "sigma", "σ_w": "sigma_w", "λ_max": "lambda_max", "ϕ": "varphi", "learnt": "learned",
    }  # fmt: skip
    stem = "words => words.map(word => new Stemmer().stemWord(word))"
    one, other = page.evaluate(stem, list(forms)), page.evaluate(stem, list(forms.values()))
    assert one == other
    rare = {"modeling", "analyze", "center", "behavior"}  # need not be in the book
    for form, word in zip(one, forms.values(), strict=True):
        assert form in terms or word in rare, form
