"""The registry, the verdict and the ledger."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from gradlab import claims
from gradlab.claims import Undecided, far_above, far_below, verdict, within

ROW = {
    "id": "A1.1",
    "kind": "claim",
    "article": 1,
    "chapter": "02_causes",
    "statement": "It <always> explodes.",
    "correction": "Only if the growth factor is above 1.",
}


def rows():
    return [
        dict(ROW),
        ROW | {"id": "A1.2", "kind": "definition", "chapter": "01_what_explodes"},
        ROW | {"id": "P1", "kind": "program", "chapter": "01_what_explodes"},
        ROW | {"id": "A9.9", "chapter": "99_not_written"},
    ]


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A checkout with a registry of its own; the test runs in a folder deep inside it."""
    path = tmp_path / "book" / "claims.yml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(rows()), encoding="utf-8")
    inside = tmp_path / "notebooks" / "deeper"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    return path


# -- the registry --------------------------------------------------------------------------------


def test_registry_is_found_above_and_keeps_its_order(registry):
    assert claims.find_registry() == registry
    loaded = claims.load()
    assert list(loaded) == ["A1.1", "A1.2", "P1", "A9.9"]
    assert loaded["A1.1"] == claims.Claim(**ROW)


def test_the_books_own_registry_is_sound():
    book = claims.load(Path(__file__).resolve().parent.parent / "book" / "claims.yml")
    assert len(book) > 50
    assert {c.kind for c in book.values()} == set(claims.WORDS)
    assert {c.article for c in book.values()} == {1, 2, 3, 4, 5}
    assert all(c.statement and c.correction for c in book.values())


def test_no_registry_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "__file__", str(tmp_path / "site-packages" / "claims.py"))
    with pytest.raises(claims.RegistryError, match="run from a checkout"):
        claims.find_registry(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "cannot read the claims"),
        ("a: 1", "expected a list of claims, got dict"),
        (["words"], "row 1 has words"),
        ([{k: v for k, v in ROW.items() if k != "kind"}], r"row 1 has \['article'.*expected"),
        ([ROW, ROW | {"id": "A1.2", "colour": "red"}], "row 2 has .*colour"),
        ([ROW | {"kind": "rumour"}], r"A1.1 is a 'rumour', not one of \['claim'"),
        ([ROW, ROW], "A1.1 occurs twice"),
        ([ROW | {"statement": None}], "A1.1: its statement is None"),
        ([ROW | {"correction": 3}], "A1.1: its correction is 3"),
    ],
)
def test_a_broken_registry_names_file_and_row(content, message, tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(claims.RegistryError, match=message) as caught:
        claims.load(path)
    assert "claims.yml" in str(caught.value)


def test_a_missing_registry_is_a_registry_error(tmp_path):
    with pytest.raises(claims.RegistryError, match="cannot read the claims"):
        claims.load(tmp_path / "none.yml")


# -- the verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "word"),
    [
        ({"supported": True}, "supported"),
        ({"supported": np.True_, "refuted": False}, "supported"),
        ({"supported": np.array([True, False]), "refuted": [True, True]}, "refuted"),
        ({"conditional": np.ones((2, 3), bool), "meaningless": False}, "conditional"),
    ],
)
def test_the_word_whose_condition_holds(registry, conditions, word):
    result = verdict("A1.1", **conditions)
    assert result.word == word
    assert result.claim.id == "A1.1"
    assert str(result) == f"A1.1: {word}"


def test_a_program_is_mended_or_answered(registry):
    assert verdict("P1", mended=True).word == "mended"
    with pytest.raises(TypeError, match=r"P1 is a program: 'refuted' is none of .*'mended'"):
        verdict("P1", refuted=True)
    with pytest.raises(TypeError, match=r"'mended' is none of .*'supported'"):
        verdict("A1.1", mended=True)


@pytest.mark.parametrize(
    ("conditions", "held"),
    [
        ({"supported": False, "refuted": False}, "none of"),
        ({"supported": [True, False]}, "none of"),
        ({"supported": True, "conditional": True}, r"\['supported', 'conditional'\]"),
    ],
)
def test_a_rule_that_does_not_decide_raises(registry, conditions, held):
    with pytest.raises(Undecided, match=f"A1.1: the experiment does not decide.*{held}"):
        verdict("A1.1", **conditions)


@pytest.mark.parametrize("condition", [1, 0.0, None, "yes", np.nan, [], [1, 1], [True, None]])
def test_a_condition_is_a_bool_and_nothing_that_resembles_one(registry, condition):
    with pytest.raises(TypeError, match=r"A1\.1: the condition for 'supported' must be a bool"):
        verdict("A1.1", supported=condition)


def test_unknown_claims_and_empty_rules(registry):
    with pytest.raises(KeyError, match=r"no claim 'A7.7' in claims.yml; it has A1.1, A1.2"):
        verdict("A7.7", supported=True)
    with pytest.raises(TypeError, match=r"A1.1: no condition given; allowed words.*supported"):
        verdict("A1.1")


def test_a_verdict_shows_a_card_and_a_record(registry):
    bundle = verdict("A1.1", refuted=True)._repr_mimebundle_()
    assert bundle["text/plain"] == "A1.1: refuted"
    assert bundle[claims.MIME] == json.loads(json.dumps(bundle[claims.MIME]))
    assert bundle[claims.MIME]["id"] == "A1.1"
    assert bundle[claims.MIME]["verdict"] == "refuted"
    assert "It &lt;always&gt; explodes." in bundle["text/html"]
    assert ROW["correction"] in bundle["text/html"]
    assert "<always>" not in bundle["text/html"]


# -- effects over seeds --------------------------------------------------------------------------


def test_far_means_four_standard_deviations_of_one_seed():
    values = np.array([9.0, 10.0, 11.0])  # mean 10, standard deviation 1
    assert far_above(values, 5.99)
    assert not far_above(values, 6.01)
    assert not far_above(values, 6.0)  # more than, not as much as
    assert far_below(values, 14.01)
    assert not far_below(values, 13.99)
    assert far_above(values, 7.9, spreads=2)
    assert not far_above(values, 8.1, spreads=2)


def test_the_verdict_does_not_firm_up_by_repeating_the_same_seeds():
    values = np.tile([9.0, 10.0, 11.0], 1000)
    assert not far_above(values, 8)


def test_far_without_any_spread():
    assert far_above([2.0, 2, 2], 1.9)
    assert not far_above([2.0, 2, 2], 2)
    assert not far_below([2.0, 2, 2], 2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_never_far(bad):
    for values in ([1.0, 2.0, bad], [1.0, 2.0, -bad], [bad] * 3):
        assert not far_above(values, -1e9)
        assert not far_below(values, 1e9)


@pytest.mark.parametrize("values", [3.0, [1.0, 2.0], np.ones((3, 3))])
def test_far_wants_one_number_per_seed(values):
    for far in (far_above, far_below):
        with pytest.raises(ValueError, match="one number per seed, at least 3"):
            far(values, 0)


@pytest.mark.parametrize(
    ("values", "target", "relative", "expected"),
    [
        (1.01, 1, 0.02, True),
        (0.97, 1, 0.02, False),
        (1.03, 1, 0.02, False),
        (-101, -100, 0.02, True),
        (101, -100, 0.02, False),
        ([[1.0, 2.0], [1.01, 2.01]], [1.0, 2.0], 0.02, True),
        ([1.0, 2.1], [1.0, 2.0], 0.02, False),
        ([1.0, np.nan], 1, 0.5, False),
        ([1.0, np.inf], 1, 0.5, False),
        (1.0, np.nan, 0.5, False),
    ],
)
def test_within_is_relative_and_holds_for_all_values(values, target, relative, expected):
    assert within(values, target, relative) is expected


# -- the ledger ----------------------------------------------------------------------------------


def executed(path: Path, *verdicts: tuple[str, str]) -> Path:
    """A notebook with prose, a cell without output, and the verdicts given."""
    outputs = [
        {
            "output_type": "execute_result",
            "data": {"text/plain": "", claims.MIME: {"id": claim_id, "verdict": word}},
        }
        for claim_id, word in verdicts
    ]
    cells = [
        {"cell_type": "markdown", "source": "prose"},
        {"cell_type": "code", "outputs": [{"output_type": "stream", "text": "A1.1: supported"}]},
        *({"cell_type": "code", "outputs": [output]} for output in outputs),
    ]
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return path


def test_a_complete_ledger_has_no_problem(registry, tmp_path):
    books = [
        executed(tmp_path / "01_what_explodes.ipynb", ("P1", "mended"), ("A1.2", "conditional")),
        executed(tmp_path / "02_causes.ipynb", ("A1.1", "refuted")),
    ]
    ledger, problems = claims.collect(books, claims.load())
    assert problems == []
    assert list(ledger) == ["A1.1", "A1.2", "P1"]  # as registered; the open one is not in it
    assert ledger["A1.1"] == {
        "verdict": "refuted",
        "chapter": "02_causes",
        "notebook": "notebooks/02_causes.ipynb",
    }


@pytest.mark.parametrize(
    ("chapter", "verdicts", "problem"),
    [
        ("02_causes", [], "A1.1: no verdict, although its chapter 02_causes exists"),
        ("02_causes", [("A1.1", "refuted")] * 2, "A1.1: decided 2 times"),
        ("02_causes", [("A1.1", "refuted"), ("A7", "refuted")], "02_causes.ipynb: verdict for A7"),
        (
            "02_causes",
            [("A1.1", "refuted"), ("A9.9", "refuted")],
            "A9.9: decided in 02_causes, but assigned to 99_not_written",
        ),
    ],
)
def test_what_is_wrong_with_a_ledger_is_said(registry, tmp_path, chapter, verdicts, problem):
    book = executed(tmp_path / f"{chapter}.ipynb", *verdicts)
    _, problems = claims.collect([book], claims.load())
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_claim_decided_in_two_chapters_is_a_problem(registry, tmp_path):
    books = [
        executed(tmp_path / "02_causes.ipynb", ("A1.1", "refuted")),
        executed(tmp_path / "03_more.ipynb", ("A1.1", "supported")),
    ]
    _, problems = claims.collect(books, claims.load())
    assert any("decided 2 times, in ['02_causes', '03_more']" in p for p in problems)


def test_nothing_written_yet_is_no_problem(registry):
    assert claims.collect([], claims.load()) == ({}, [])


def test_what_a_cell_shows_is_what_the_ledger_reads(registry, tmp_path):
    bundle = verdict("A1.1", supported=True)._repr_mimebundle_()
    path = tmp_path / "02_causes.ipynb"
    path.write_text(json.dumps({"cells": [{"outputs": [{"data": bundle}]}]}))
    assert claims.verdicts_in(path) == [("A1.1", "supported")]
