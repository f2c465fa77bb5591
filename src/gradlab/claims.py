"""The registry of claims, and the verdict that turns measured effects into one word.

`book/claims.yml` holds every statement that the book puts to the test.  A verdict cell calls
`verdict` with one condition per word; exactly one must hold.  `collect` reads the verdicts back
from executed notebooks, which is where the ledger page takes its words from.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from gradlab._card import card

MIME = "application/vnd.gradlab.verdict+json"

#: The words that each kind of row may end with.
WORDS = {
    "claim": ("supported", "conditional", "refuted", "meaningless"),
    "definition": ("supported", "conditional", "refuted", "meaningless"),
    "program": ("mended", "answered"),
}

#: An effect counts when its mean is more than this many standard deviations over seeds away.
FAR = 4.0


class RegistryError(ValueError):
    """`claims.yml` is missing or malformed."""


class Undecided(AssertionError):
    """The measurement satisfies none of the rule's conditions, or more than one."""


@dataclass(frozen=True)
class Claim:
    """One statement under test.

    Attributes:
        id: the statement's name, "A3.2" is the second of article 3.
        kind: "claim", "definition" or "program".
        article: number of the article, 1 to 5.
        chapter: name of the notebook (or page) that decides it, "02_causes".
        statement: what is claimed, in our words.
        correction: what is so instead, or what the condition is.
    """

    id: str
    kind: str
    article: int
    chapter: str
    statement: str
    correction: str


@dataclass(frozen=True)
class Verdict:
    """The word that a measurement gave a claim.  Shown as a card in a notebook."""

    claim: Claim
    word: str

    def __str__(self) -> str:
        return f"{self.claim.id}: {self.word}"

    __repr__ = __str__

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, object]:
        return {
            "text/plain": str(self),
            "text/html": self._repr_html_(),
            MIME: {"id": self.claim.id, "verdict": self.word},
        }

    def _repr_html_(self) -> str:
        claim = self.claim
        content = (
            f"<p><strong>{claim.id}</strong> {html.escape(claim.statement)}</p>"
            f"<p><strong>{self.word.capitalize()}.</strong> {html.escape(claim.correction)}</p>"
        )
        return card("verdict", self.word, content)


# ---------------------------------------------------------------------------------------------
# The registry


def find_registry(start: Path | None = None) -> Path:
    """Path of `book/claims.yml`: looked for upwards from `start`, then beside this package."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, *Path(__file__).resolve().parents):
        candidate = folder / "book" / "claims.yml"
        if candidate.is_file():
            return candidate
    raise RegistryError(
        f"no book/claims.yml in {here} or above it; run from a checkout of the book, "
        "or pass the registry's path to load()"
    )


def load(path: str | Path | None = None) -> dict[str, Claim]:
    """All claims by ID, in the file's order.

    Args:
        path: the registry; None finds `book/claims.yml`.

    Raises:
        RegistryError: a file that cannot be read, a row without one of its fields, a row with an
            unknown field or kind or a value of the wrong type, or an ID that occurs twice.
    """
    path = Path(path) if path is not None else find_registry()
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RegistryError(f"cannot read the claims in {path}: {error}") from error
    if not isinstance(rows, list):
        raise RegistryError(f"{path}: expected a list of claims, got {type(rows).__name__}")
    fields = set(Claim.__dataclass_fields__)
    claims: dict[str, Claim] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or set(row) != fields:
            got = sorted(row) if isinstance(row, dict) else row
            raise RegistryError(f"{path}: row {number} has {got}, expected {sorted(fields)}")
        for name, value in row.items():
            if not isinstance(value, int if name == "article" else str):
                raise RegistryError(f"{path}: {row['id']}: its {name} is {value!r}")
        claim = Claim(**{**row, "statement": row["statement"].strip(),
                         "correction": row["correction"].strip()})  # fmt: skip
        if claim.kind not in WORDS:
            raise RegistryError(f"{path}: {claim.id} is a {claim.kind!r}, not one of {[*WORDS]}")
        if claim.id in claims:
            raise RegistryError(f"{path}: {claim.id} occurs twice")
        claims[claim.id] = claim
    return claims


# ---------------------------------------------------------------------------------------------
# The verdict


def verdict(claim_id: str, **conditions: object) -> Verdict:
    """Decide a claim: the word whose condition holds.

    Args:
        claim_id: a row of `claims.yml`.
        conditions: one per word that the rule allows.  A condition is a bool, or an array of
            bools (one per seed or setting) of which every one must be true.

    Raises:
        KeyError: the ID is not in the registry.
        TypeError: a word that this kind of row cannot end with, or a condition that is no bool.
        Undecided: no condition holds, or more than one.

    Example:
        >>> verdict("A3.2", supported=far_above(ratio, 1.05), refuted=within(ratio, 1, 0.02))
        ... # doctest: +SKIP
        A3.2: refuted
    """
    claims = load()
    if claim_id not in claims:
        raise KeyError(f"no claim {claim_id!r} in claims.yml; it has {', '.join(claims)}")
    claim = claims[claim_id]
    if not conditions:
        raise TypeError(f"{claim_id}: no condition given; allowed words: {WORDS[claim.kind]}")
    truths = {}
    for word, condition in conditions.items():
        if word not in WORDS[claim.kind]:
            raise TypeError(
                f"{claim_id} is a {claim.kind}: {word!r} is none of {WORDS[claim.kind]}"
            )
        values = np.asarray(condition)
        if values.dtype != bool or values.size == 0:
            raise TypeError(
                f"{claim_id}: the condition for {word!r} must be a bool or a non-empty array of "
                f"bools, got {condition!r}"
            )
        truths[word] = bool(values.all())
    held = [word for word, truth in truths.items() if truth]
    if len(held) != 1:
        raise Undecided(
            f"{claim_id}: the experiment does not decide. Conditions that hold: {held or 'none'} "
            f"of {list(truths)}. Measure more, or write a rule whose conditions exclude each other."
        )
    return Verdict(claim, held[0])


def _over_seeds(values: object) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size < 3:
        raise ValueError(
            f"expected one number per seed, at least 3 of them, got an array of shape {array.shape}"
        )
    return array


def far_above(values: object, threshold: float, *, spreads: float = FAR) -> bool:
    """Whether measurements over seeds lie above `threshold` by far more than their spread.

    Args:
        values: one number per seed, shape (seeds,), at least 3.
        threshold: what the mean must exceed.
        spreads: by how many standard deviations over seeds (one seed's spread, not the mean's).

    Returns:
        True when mean − threshold > spreads × standard deviation.  False with any NaN.
    """
    array = _over_seeds(values)
    return bool(array.mean() - threshold > spreads * array.std(ddof=1))


def far_below(values: object, threshold: float, *, spreads: float = FAR) -> bool:
    """Whether measurements over seeds lie far below `threshold`; see `far_above`."""
    return far_above(-_over_seeds(values), -threshold, spreads=spreads)


def within(values: object, target: object, relative: float) -> bool:
    """Whether every value is within a relative distance of its target.

    Args:
        values: any shape.
        target: broadcastable to it, non-zero.
        relative: the largest distance of value / target from 1 that is allowed.
    """
    ratio = np.asarray(values, dtype=float) / np.asarray(target, dtype=float)
    return bool((np.abs(ratio - 1) <= relative).all())


# ---------------------------------------------------------------------------------------------
# The ledger


def verdicts_in(notebook: str | Path | Mapping) -> list[tuple[str, str]]:
    """(ID, word) of every verdict among the outputs of an executed notebook, in order.

    Args:
        notebook: its path, or its content as `nbformat.read` gives it.
    """
    if not isinstance(notebook, Mapping):
        notebook = json.loads(Path(notebook).read_text(encoding="utf-8"))
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", ()))
    records = (output.get("data", {}).get(MIME) for output in outputs)
    return [(record["id"], record["verdict"]) for record in records if record]


def collect(
    notebooks: Iterable[str | Path], claims: Mapping[str, Claim]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The ledger of a set of executed notebooks, and what is wrong with it.

    Args:
        notebooks: paths of executed notebooks; a chapter is known by its file's stem.
        claims: the registry.

    Returns:
        `{id: {"verdict", "chapter", "notebook"}}` for every decided claim, in the registry's
        order, and a list of problems: a verdict for an unknown ID, in a chapter that the registry
        does not assign it to, given twice, or missing although the chapter exists.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    problems: list[str] = []
    chapters = []
    for path in map(Path, notebooks):
        chapters.append(path.stem)
        for claim_id, word in verdicts_in(path):
            if claim_id not in claims:
                problems.append(
                    f"{path.name}: verdict for {claim_id}, which claims.yml does not have"
                )
            else:
                found.setdefault(claim_id, []).append((word, path.stem))
    ledger = {}
    for claim_id, claim in claims.items():
        given = found.get(claim_id, [])
        if len(given) > 1:
            problems.append(f"{claim_id}: decided {len(given)} times, in {[c for _, c in given]}")
        elif not given and claim.chapter in chapters:
            problems.append(f"{claim_id}: no verdict, although its chapter {claim.chapter} exists")
        for word, chapter in given:
            if chapter != claim.chapter:
                problems.append(
                    f"{claim_id}: decided in {chapter}, but assigned to {claim.chapter}"
                )
            ledger[claim_id] = {
                "verdict": word,
                "chapter": chapter,
                "notebook": f"notebooks/{chapter}.ipynb",
            }
    return ledger, problems
