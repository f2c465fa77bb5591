"""`diagnose` in PyTorch leaves everything as it was, and survives every model."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch_cases import (
    CASES,
    CONTROLS,
    Around,
    Recurrent,
    cross_entropy,
    deep,
    digits,
    sgd,
    squared_error,
)

from gradlab.torch import GradientProbe, diagnose


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


def bits(value: object) -> object:
    """Comparable to the bit, NaN included."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = value.coalesce().values() if value.is_sparse else value
        return (
            value.dtype,
            tuple(value.shape),
            value.contiguous().view(torch.uint8).tolist()
            if (value.dim())
            else value.reshape(1).view(torch.uint8).tolist(),
        )
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [bits(each) for each in value]
    return copy.deepcopy(value)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        "values": bits(dict(model.state_dict(keep_vars=True))),
        "storage": {n: p.data_ptr() for n, p in model.named_parameters()},
        "grads": {
            n: (id(p.grad), None if p.grad is None else bits(p.grad))
            for n, p in model.named_parameters()
        },
        "versions": {n: p._version for n, p in model.named_parameters()},
        "training": [module.training for module in model.modules()],
        "optimizer": None if optimizer is None else bits(optimizer.state_dict()),
        "random": (torch.get_rng_state().tolist(), bits(list(numpy_state)[1].tolist()),
                   random.getstate()),
        "modes": (torch.is_grad_enabled(), torch.get_default_dtype(),
                  torch.is_anomaly_enabled(), torch.backends.mkldnn.enabled),
    }  # fmt: skip


def assert_untouched(model, loss_fn, batch, optimizer) -> None:
    before, batch_before = everything(model, optimizer), bits(batch)
    diagnose(model, loss_fn, batch, optimizer=optimizer)
    after = everything(model, optimizer)
    for key, value in before.items():
        assert after[key] == value, key
    assert bits(batch) == batch_before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_failing_step_is_left_as_it_was(case):
    assert_untouched(*case.failing())


@pytest.mark.parametrize("name", CONTROLS)
def test_a_healthy_step_is_left_as_it_was(name):
    model, loss_fn, batch, optimizer = CONTROLS[name]()
    loss_fn(model, batch).backward()  # gradients that must survive
    assert_untouched(model, loss_fn, batch, optimizer)


def test_training_goes_on_as_if_nobody_had_looked():
    def trained(look: bool) -> list:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        for _ in range(8):
            optimizer.zero_grad()
            cross_entropy(model, digits()).backward()
            if look:
                diagnose(model, cross_entropy, digits(), optimizer=optimizer)
            optimizer.step()
            scheduler.step()
        return bits(list(model.state_dict().values()))

    assert trained(True) == trained(False)


def test_a_probe_on_the_same_optimiser_sees_none_of_it():
    model = deep(1.0, 2)
    optimizer = sgd(model)
    with GradientProbe(model, optimizer) as probe:
        diagnose(model, cross_entropy, digits(), optimizer=optimizer)
        assert len(probe.history.steps) == 0


def test_a_graph_that_waits_for_its_backward_pass_still_works():
    model = deep(1.0, 2)
    loss = cross_entropy(model, digits())
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    diagnose(model, cross_entropy, digits(), optimizer=sgd(model))
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


class Stateful(nn.Module):
    """Counts its calls, keeps its last state and draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.calls = nn.Linear(4, 4), 0
        self.hidden = torch.zeros(4)
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.hidden = (self.lin(x) + self.hidden).mean(0).detach()
        self.mean = 0.9 * self.mean + 0.1 * self.hidden
        noise = torch.rand(4, generator=self.generator)
        return self.lin(x) + self.hidden + noise


def test_a_model_that_remembers_forgets_the_examination():
    model = Stateful()
    model(torch.ones(2, 4))
    hidden, mean = model.hidden, model.mean
    state = model.generator.get_state()
    diagnose(model, lambda m, b: m(b).pow(2).mean(), torch.ones(2, 4), optimizer=sgd(model))
    assert model.calls == 1
    assert model.hidden is hidden
    assert model.mean is mean
    assert torch.equal(model.generator.get_state(), state)


# ---------------------------------------------------------------------------------------------
# It never raises because of the model


class Strange(nn.Module):
    """A linear layer, and whatever the test wants done with it."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.lin, self.function = nn.Linear(4, 4), forward

    def forward(self, x):
        return self.function(self, x)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, signal):
        return signal * torch.nan


def fails(*_):
    raise KeyError("no such key")


STRANGE = {
    "raises": fails,
    "stops": lambda m, x: (_ for _ in ()).throw(StopIteration("done")),
    "detaches": lambda m, x: m.lin(x).detach(),
    "no gradient": lambda m, x: torch.no_grad()(m.lin)(x),
    "inference mode": lambda m, x: torch.inference_mode()(m.lin)(x),
    "NumPy inside": lambda m, x: m.lin(x) + torch.from_numpy(np.ones(4, "f")),
    "in place": lambda m, x: m.lin(x).relu_().mul_(2).add_(1),
    "writes into a slice": lambda m, x: _sliced(m.lin(x)),
    "complex numbers": lambda m, x: torch.fft.fft(m.lin(x)).abs(),
    "a view that is written to": lambda m, x: _viewed(m.lin(x)),
    "half inside": lambda m, x: m.lin(x).half().float(),
    "autocast": lambda m, x: torch.autocast("cpu", torch.bfloat16)(m.lin)(x).float(),
    "checkpointed": lambda m, x: torch.utils.checkpoint.checkpoint(m.lin, x, use_reentrant=False),
    "sorted": lambda m, x: m.lin(x).sort(-1)[0].cumsum(-1),
    "vmap": lambda m, x: torch.vmap(lambda row: m.lin(row))(x),
    "gradient inside": lambda m, x: _inner_gradient(m, x),
    "sparse": lambda m, x: torch.sparse.mm(torch.eye(4).to_sparse(), m.lin(x).T),
    "float64 inside": lambda m, x: m.lin(x).double(),
    "random": lambda m, x: m.lin(x) + torch.randn(4),
    "script": lambda m, x: torch.jit.script(_scripted)(m.lin(x)),
    "backward of its own": lambda m, x: Twice.apply(m.lin(x)),
}  # fmt: skip


def _sliced(h):
    out = torch.zeros_like(h)
    out[:, :2] = h[:, :2]
    out[:, 2:] = h[:, 2:].sqrt().nan_to_num()
    return out


def _viewed(h):
    h = h * 1
    h.view(-1)[0] = 3.0
    return h


def _inner_gradient(m, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(m.lin(x).sum(), x, create_graph=True)[0]


def _scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.filterwarnings("ignore")
def test_no_model_makes_it_raise(name):
    model = Strange(STRANGE[name])
    optimizer = sgd(model)
    batch = torch.ones(4, 4)
    before = everything(model, optimizer)
    diagnosis = diagnose(model, lambda m, b: m(b).pow(2).mean(), batch, optimizer=optimizer)
    assert everything(model, optimizer) == before
    assert str(diagnosis)
    assert diagnosis._repr_html_()


def test_a_backward_pass_of_its_own_is_found():
    model = Strange(STRANGE["backward of its own"])
    diagnosis = diagnose(model, lambda m, b: m(b).pow(2).mean(), torch.ones(2, 4))
    assert diagnosis.kind == "singularity"
    assert diagnosis.measurements.backward.place.operation == "Twice"


def test_a_wrapped_model_and_a_wrapped_optimiser():
    model = torch.compile(deep(2.0, 24), backend="eager")

    class Wrapper:
        optimizer = sgd(model)

    diagnosis = diagnose(model, cross_entropy, digits(), optimizer=Wrapper())
    assert (diagnosis.kind, diagnosis.where) == ("explosion", "0")


def test_sparse_and_shared_and_frozen_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True)
            self.one = nn.Linear(4, 4)
            self.two = self.one
            self.frozen = nn.Linear(4, 1).requires_grad_(False)
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            return self.frozen(self.two(self.one(self.table(x))))

    model = Model()
    tokens = torch.randint(0, 10, (6, 3))
    assert_untouched(model, lambda m, b: m(b).pow(2).mean(), tokens, sgd(model))
    diagnosis = diagnose(model, lambda m, b: m(b).pow(2).mean(), tokens, optimizer=sgd(model, 0.01))
    assert diagnosis.kind == "healthy", str(diagnosis)
    tokens[0, 0] = 10
    diagnosis = diagnose(model, lambda m, b: m(b).pow(2).mean(), tokens)
    assert (diagnosis.kind, diagnosis.where) == ("bad input", "batch")
    assert "from 0 to 10" in diagnosis.findings[0].evidence or "to 10" in str(diagnosis)


def test_a_batch_of_any_shape():
    model = deep(1.0, 2)
    x, y = digits()
    batch = {"x": x, "more": [y, None, "text", 3]}
    x[3, 2] = torch.nan
    diagnosis = diagnose(model, lambda m, b: cross_entropy(m, (b["x"], b["more"][0])), batch)
    assert (diagnosis.kind, diagnosis.where) == ("bad input", "batch")
    assert "batch['x']: 1 of 4096 numbers" in diagnosis.findings[0].evidence


def test_a_loss_function_may_eat_its_batch():
    model, batch = deep(1.0, 2), dict(zip(("x", "labels"), digits(), strict=True))
    kept = batch["x"].clone()

    def loss_fn(model, batch):
        batch["x"].div_(2)
        return F.cross_entropy(model(batch["x"]), batch.pop("labels"))

    diagnosis = diagnose(model, loss_fn, batch, optimizer=sgd(model, 0.01))
    assert (diagnosis.kind, diagnosis.notes) == ("healthy", ())
    assert set(batch) == {"x", "labels"}
    assert torch.equal(batch["x"], kept)


def test_it_asks_the_loss_function_a_few_dozen_times_at_most():
    for case in CASES:
        model, loss_fn, batch, optimizer = case.failing()
        calls = []

        def counted(m, b, loss_fn=loss_fn, calls=calls):
            calls.append(1)
            return loss_fn(m, b)

        diagnose(model, counted, batch, optimizer=optimizer)
        assert len(calls) <= 48, case.name


def test_a_model_without_weights_yet():
    model = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="run the model once"):
        diagnose(model, lambda m, b: m(b).sum(), torch.ones(2, 4))


def test_parameters_that_are_already_lost():
    model = deep(1.0, 3)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    diagnosis = diagnose(model, cross_entropy, digits(), optimizer=sgd(model))
    assert (diagnosis.kind, diagnosis.where) == ("bad input", "2.weight")


def test_bad_arguments_are_named():
    model = deep(1.0, 1)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        diagnose({}, cross_entropy, digits())
    with pytest.raises(TypeError, match=r"loss_fn must be a function of \(model, batch\), got int"):
        diagnose(model, 3, digits())
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got str"):
        diagnose(model, cross_entropy, digits(), optimizer="sgd")
    before = everything(model, None)
    with pytest.raises(ValueError, match=r"must return one number as a tensor, got \(64, 10\)"):
        diagnose(model, lambda m, b: m(b[0]), digits())
    with pytest.raises(ValueError, match=r"must return one number as a tensor, got float"):
        diagnose(model, lambda m, b: 3.0, digits())
    assert everything(model, None) == before


def test_the_source_line_is_the_users():
    model = Around(lambda h: h.sqrt())
    diagnosis = diagnose(model, lambda m, b: m(b).sum(), torch.zeros(1, 4))
    assert diagnosis.findings[0].source.startswith("test_torch_bystander.py:")
    assert "h.sqrt()" in diagnosis.findings[0].source


def test_a_fused_recurrent_layer_is_seen_step_by_step(recwarn):
    model = Recurrent(nn.LSTM(8, 16, batch_first=True))
    with torch.no_grad():
        model.rnn.weight_hh_l0.mul_(40)
    torch.manual_seed(1)
    batch = torch.randn(4, 60, 8), torch.randn(4)
    diagnosis = diagnose(model, squared_error, batch)
    uses = [use for use in diagnosis.measurements.layers if "weight_hh" in use.parameter]
    assert len(uses) == 60
    assert [str(warning.message) for warning in recwarn] == []
