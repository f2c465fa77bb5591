"""The clinic in PyTorch: every failure fires, is diagnosed in kind and place, and can be mended."""

from __future__ import annotations

import math

import pytest
import torch
from torch_cases import CASES, CONTROLS, RAISING, SINGULAR, Around, around

from gradlab.torch import diagnose


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


def run(model, loss_fn, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, without any of our code."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = loss_fn(model, batch)
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.item(), {n: g for n, g in zip(named, grads, strict=True) if g is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_failure_fires(case):
    model, loss_fn, batch, _ = case.failing()
    if case.symptom is None:
        with pytest.raises((IndexError, ValueError)):
            run(model, loss_fn, batch)
    else:
        assert case.symptom(*run(model, loss_fn, batch))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_failure_is_explained(case):
    diagnosis = diagnose(*case.failing()[:3], optimizer=None)
    if case.kind == "divergence":
        assert diagnosis.kind == "healthy", f"without an optimiser: {diagnosis}"
        model, loss_fn, batch, optimizer = case.failing()
        diagnosis = diagnose(model, loss_fn, batch, optimizer=optimizer)
    assert diagnosis.kind == case.kind, str(diagnosis)
    assert diagnosis.where in case.where, str(diagnosis)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.mended], ids=lambda case: case.name
)
def test_the_mended_step_learns(case):
    model, loss_fn, batch, optimizer = case.mended()
    first = run(model, loss_fn, batch)[0]
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
    last = loss_fn(model, batch).item()
    assert math.isfinite(last)
    assert last < first
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", SINGULAR)
def test_other_singular_operations(name):
    function, x = SINGULAR[name]
    model, loss_fn, batch, _ = around(function, x)()
    loss, grads = run(model, loss_fn, batch)
    assert not (math.isfinite(loss) and all(bool(g.isfinite().all()) for g in grads.values()))
    diagnosis = diagnose(model, loss_fn, batch)
    assert (diagnosis.kind, diagnosis.where) == ("singularity", "op"), str(diagnosis)
    assert "torch_cases.py" in diagnosis.findings[0].source


@pytest.mark.parametrize("name", CONTROLS)
def test_no_false_alarm(name):
    model, loss_fn, batch, optimizer = CONTROLS[name]()
    diagnosis = diagnose(model, loss_fn, batch, optimizer=optimizer)
    assert diagnosis.kind == "healthy", str(diagnosis)
    assert not diagnosis.notes, diagnosis.notes


@pytest.mark.parametrize("name", RAISING)
def test_operations_that_raise_where_they_have_no_value(name):
    function, x = RAISING[name]
    model, loss_fn, batch, _ = around(function, x)()
    with pytest.raises(torch.linalg.LinAlgError):
        run(model, loss_fn, batch)
    diagnosis = diagnose(model, loss_fn, batch)
    assert (diagnosis.kind, diagnosis.where) == ("singularity", "op"), str(diagnosis)
    assert "torch_cases.py" in diagnosis.findings[0].source


def test_a_model_that_does_not_fit_its_batch():
    model = Around(lambda h: h)
    diagnosis = diagnose(model, lambda m, b: m(b).mean(), torch.ones(3, 5))
    assert (diagnosis.kind, diagnosis.where) == ("bad input", "lin")
    assert "shapes cannot be multiplied" in diagnosis.findings[0].evidence
