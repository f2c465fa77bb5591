"""Training steps that really fail, in PyTorch: the failing one, what it shows, the mended one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Step = tuple[nn.Module, Callable, Any, torch.optim.Optimizer | None]


@dataclass(frozen=True)
class Case:
    """One failure.

    Attributes:
        name: what users call it.
        failing: makes model, loss function, batch and optimiser.
        kind, where: what `diagnose` must answer; any of several places.
        symptom: what the failing step shows, from (loss, gradients by name); None if it raises.
        mended: makes the same step without the fault; None where the remedy is another batch.
    """

    name: str
    failing: Callable[[], Step]
    kind: str
    where: tuple[str, ...]
    symptom: Callable[[float, dict], bool] | None
    mended: Callable[[], Step] | None = None


def sgd(model: nn.Module, lr: float = 0.1, **keywords) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **keywords)


def step(model: nn.Module, loss_fn: Callable, batch: Any, lr: float | None = 0.1) -> Step:
    return model, loss_fn, batch, None if lr is None else sgd(model, lr)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Around(nn.Module):
    """features → `lin` (the identity at first) → `op` → output."""

    def __init__(self, op: Callable, width: int = 4, dtype=torch.float32) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width, dtype=dtype)
        with torch.no_grad():
            self.lin.weight.copy_(torch.eye(width))
            self.lin.bias.zero_()
        self.op = Lambda(op)

    def forward(self, x):
        return self.op(self.lin(x))


def around(op: Callable, x: Any, width: int = 4, **keywords) -> Callable[[], Step]:
    def make() -> Step:
        model = Around(op, width, **keywords)
        batch = torch.as_tensor(x, dtype=model.lin.weight.dtype)
        return step(model, lambda m, b: (m(b) ** 2).mean(), batch, 0.01)

    return make


def nan_gradient(loss: float, grads: dict) -> bool:
    return math.isfinite(loss) and any(bool(g.isnan().any()) for g in grads.values())


def bad_gradient(loss: float, grads: dict) -> bool:
    return math.isfinite(loss) and not all(bool(g.isfinite().all()) for g in grads.values())


def bad_loss(loss: float, grads: dict) -> bool:
    return not math.isfinite(loss)


def huge(loss: float, grads: dict) -> bool:
    return math.isfinite(loss) and max(float(g.abs().max()) for g in grads.values()) > 1e4


def plain(loss: float, grads: dict) -> bool:
    return math.isfinite(loss) and all(bool(g.isfinite().all()) for g in grads.values())


def zeros_row(n: int = 3, width: int = 4) -> list[list[float]]:
    """Rows of data, one of them all zeros."""
    rows = [[0.5, -1.0, 2.0, 0.25][:width] for _ in range(n)]
    rows[1] = [0.0] * width
    return rows


# ---------------------------------------------------------------------------------------------
# Networks


def deep(
    gain: float = 1.0,
    depth: int = 20,
    width: int = 64,
    *,
    batch_norm: bool = False,
    activation: type[nn.Module] = nn.ReLU,
    inputs: int = 64,
    classes: int = 10,
) -> nn.Sequential:
    """A plain network of He initialisation times a gain."""
    layers: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(inputs if i == 0 else width, width)
        nn.init.normal_(linear.weight, std=gain * math.sqrt(2 / linear.in_features))
        nn.init.zeros_(linear.bias)
        layers += [linear, *([nn.BatchNorm1d(width)] * batch_norm), activation()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


class Residual(nn.Module):
    """x + scale · (ReLU of a He layer of x), block after block."""

    def __init__(self, blocks: int, scale: float = 1.0, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        for block in self.blocks:
            nn.init.kaiming_normal_(block.weight, nonlinearity="relu")
            nn.init.zeros_(block.bias)
        self.scale, self.head = scale, nn.Linear(width, 10)

    def forward(self, x):
        for block in self.blocks:
            x = x + self.scale * F.relu(block(x))
        return self.head(x)


class Recurrent(nn.Module):
    """A recurrent layer, its last state to one number."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = cell, nn.Linear(cell.hidden_size, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def simple_rnn(nonlinearity: str, sd: float, width: int = 32) -> Recurrent:
    rnn = nn.RNN(8, width, nonlinearity=nonlinearity, batch_first=True)
    nn.init.normal_(rnn.weight_hh_l0, std=sd)
    return Recurrent(rnn)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def squared_error(model, batch):
    return F.mse_loss(model(batch[0]).squeeze(-1), batch[1])


def digits(samples: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised handwritten digits."""
    from gradlab import data

    split = data.digits()
    x = torch.as_tensor(split.x_train[:samples], dtype=torch.float32)
    return x, torch.as_tensor(split.y_train[:samples], dtype=torch.long)


def series(length: int, samples: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, length, 8), torch.randn(samples)


class Quadratic(nn.Module):
    """(3w)², whose curvature is 18."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self):
        return (3 * self.w) ** 2


def quadratic(lr: float, **keywords) -> Step:
    model = Quadratic()
    return model, lambda m, _: m(), None, sgd(model, lr, **keywords)


class Attention(nn.Module):
    """One head of attention, a score of −inf where the mask says so."""

    def __init__(self, safe: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.safe = safe

    def forward(self, x, mask):
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / math.sqrt(8)
        if self.safe:
            mask = mask & ~mask.all(-1, keepdim=True)
        weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
        return weights @ self.v(x)


def attention(safe: bool) -> Step:
    mask = torch.zeros(2, 5, 5, dtype=torch.bool)
    mask[1] = True  # one row of the batch is padding only
    batch = torch.randn(2, 5, 8), mask
    return step(Attention(safe), lambda m, b: m(*b).pow(2).mean(), batch)


class HandBatchNorm(nn.Module):
    """Batch normalisation by hand, with the unbiased variance."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.lin, self.biased = nn.Linear(4, 4), biased

    def forward(self, x):
        h = self.lin(x)
        return (h - h.mean(0)) / torch.sqrt(h.var(0, correction=0 if self.biased else 1) + 1e-5)


def poisoned_batch_norm() -> Step:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(8, 4)
    x[0, 0] = math.inf
    model(x)  # one bad batch is enough
    model.eval()
    return step(model, lambda m, b: m(b).pow(2).mean(), torch.randn(8, 4))


def large_inputs(scale: float) -> Step:
    x, y = digits()
    return step(deep(1.0, 3), cross_entropy, (x * scale, y), 0.1)


def targets_in_thousands(scaled: bool) -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    x, y = digits()
    target = y.float() * 1000
    if scaled:
        target = (target - target.mean()) / target.std()
    return step(model, squared_error, (x, target), 0.05)


def summed(reduction: str) -> Step:
    torch.manual_seed(0)
    model = deep(1.0, 2)
    return step(
        model, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction=reduction), digits(256), 0.1
    )


def two_layer(lr: float) -> Step:
    torch.manual_seed(0)
    return step(deep(1.0, 1), cross_entropy, digits(), lr)


def large_finite_gradient(scale: float) -> Step:
    model = Around(lambda h: h)
    return step(model, lambda m, b: (m(b) * scale).mean(), torch.ones(3, 4), None)


def half(function: Callable, x: Any) -> Callable[[], Step]:
    return around(function, x, dtype=torch.float16, width=len(x[0]))


def ones(n: int, width: int, value: float) -> list[list[float]]:
    return [[value] * width for _ in range(n)]


class Hyper(nn.Module):
    """A dozen layers whose weights another layer makes."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.maker, self.head = nn.Linear(8, 12 * 64 * 64), nn.Linear(64, 10)
        nn.init.normal_(self.maker.weight, std=gain * math.sqrt(2 / 64) / math.sqrt(8))
        nn.init.zeros_(self.maker.bias)
        self.register_buffer("code", torch.ones(8))

    def forward(self, x):
        for weight in self.maker(self.code).reshape(12, 64, 64):
            x = F.relu(x @ weight)
        return self.head(x)


def linear_regression(share: float) -> Step:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8) * torch.tensor([3.0] + [1.0] * 7), torch.randn(64)
    model = nn.Linear(8, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    features = torch.cat([x, torch.ones(64, 1)], 1)
    sharpness = torch.linalg.eigvalsh(2 * features.T @ features / 64)[-1].item()
    return step(model, squared_error, (x, y + x[:, 1]), share * 2 / sharpness)


def closure_nan() -> Step:
    scale = torch.tensor([math.nan])
    return step(deep(1.0, 1), lambda m, b: (cross_entropy(m, b) * scale).sum(), digits())


CASES = [
    Case(
        "1 sqrt of 0",
        around(torch.sqrt, [[0.0, 1.0, 2.0, 3.0]]),
        "singularity",
        ("op",),
        bad_gradient,
        around(lambda h: torch.sqrt(h.clamp(min=1e-2)), [[0.0, 1.0, 2.0, 3.0]]),
    ),
    Case(
        "1 sqrt of a squared norm at 0",
        around(lambda h: (h**2).sum(-1).sqrt(), zeros_row()),
        "singularity",
        ("op",),
        nan_gradient,
        around(lambda h: ((h**2).sum(-1) + 1e-12).sqrt(), zeros_row()),
    ),
    Case(
        "2 normalising a zero vector",
        around(lambda h: F.normalize(h, dim=-1) + 1, zeros_row()),
        "singularity",
        ("op",),
        huge,
        around(lambda h: h / torch.sqrt((h**2).sum(-1, keepdim=True) + 1e-2), zeros_row()),
    ),
    Case(
        "3 std of constants",
        around(lambda h: h.var(-1).sqrt(), ones(2, 4, 1.0)),
        "singularity",
        ("op",),
        nan_gradient,
        around(lambda h: (h.var(-1) + 1e-2).sqrt(), [[0.9, 1.0, 1.1, 1.2]]),
    ),
    Case(
        "3 std of one element",
        around(lambda h: h[:, :1].std(-1), ones(2, 4, 1.0)),
        "singularity",
        ("op",),
        bad_loss,
        around(lambda h: h[:, :1].std(0), [[0.3, 1, 2, 3], [1, 2, 3, 4]]),
    ),
    Case(
        "4 p log p at p = 0",
        around(lambda h: -(h * torch.log(h)).sum(-1), [[0.5, 0.5, 0.0, 0.0]]),
        "singularity",
        ("op",),
        bad_loss,
        around(lambda h: -(h * torch.log(h.clamp(min=1e-6))).sum(-1), [[0.5, 0.5, 0.0, 0.0]]),
    ),
    Case(
        "5 log of softmax",
        around(lambda h: torch.log(torch.softmax(h, -1))[:, 1:], [[200.0, 0.0, 0.0, 0.0]]),
        "singularity",
        ("op",),
        bad_loss,
        around(lambda h: torch.log_softmax(h, -1)[:, 1:] / 100, [[200.0, 0.0, 0.0, 0.0]]),
    ),
    Case(
        "6 where around sqrt",
        around(lambda h: torch.where(h > 0, torch.sqrt(h), 0.0), zeros_row()),
        "singularity",
        ("op",),
        bad_gradient,
        around(
            lambda h: torch.where(h > 0, torch.sqrt(torch.where(h > 0, h, 1.0)), 0.0), zeros_row()
        ),
    ),
    Case(
        "6 where around exp",
        around(lambda h: torch.where(h <= 0, torch.exp(h), 1 + h), [[100.0, -1.0, 0.5, 2.0]]),
        "singularity",
        ("op",),
        nan_gradient,
        around(
            lambda h: torch.where(h <= 0, torch.exp(torch.where(h <= 0, h, 0.0)), 1 + h),
            [[1.0, -1.0, 0.5, 2.0]],
        ),
    ),
    Case(
        "7 twice the gain",
        lambda: step(deep(2.0, 24), cross_entropy, digits(), 0.05),
        "explosion",
        ("0", "2", "4"),
        plain,
        lambda: step(deep(1.0, 24), cross_entropy, digits(), 0.01),
    ),
    Case(
        "8 batch norm without skips",
        lambda: step(deep(1.0, 50, batch_norm=True), cross_entropy, digits(), 0.05),
        "explosion",
        ("0", "3", "6"),
        plain,
        lambda: step(Residual(50, 1 / math.sqrt(50)), cross_entropy, digits(), 0.01),
    ),
    Case(
        "9 unnormalised residual",
        lambda: step(Residual(50), cross_entropy, digits(), 1e-3),
        "explosion",
        ("blocks.0", "blocks.1", "blocks.2"),
        plain,
        lambda: step(Residual(50, 1 / math.sqrt(50)), cross_entropy, digits(), 0.01),
    ),
    Case(
        "10 recurrent relu",
        lambda: step(simple_rnn("relu", 1.0), squared_error, series(200), 0.01),
        "explosion",
        ("rnn",),
        bad_loss,
        lambda: step(simple_rnn("relu", 0.1), squared_error, series(200), 0.01),
    ),
    Case(
        "10 recurrent tanh",
        lambda: step(simple_rnn("tanh", 0.35), squared_error, series(200), 0.01),
        "explosion",
        ("rnn",),
        plain,
        lambda: step(simple_rnn("tanh", 0.1), squared_error, series(200), 0.01),
    ),
    Case(
        "11 learning rate 20",
        lambda: two_layer(20.0),
        "divergence",
        ("0.weight", "2.weight", "0.bias", "2.bias"),
        plain,
        lambda: two_layer(0.2),
    ),
    Case("12 quadratic above its limit", lambda: quadratic(0.112), "divergence", ("w",), plain,
         lambda: quadratic(0.11)),
    Case("12 with momentum", lambda: quadratic(3.8 / 18 * 1.01, momentum=0.9), "divergence", ("w",),
         plain, lambda: quadratic(3.8 / 18 * 0.5, momentum=0.9)),
    Case(
        "12 with Nesterov's momentum",
        lambda: quadratic(3.8 / 2.8 / 18 * 1.02, momentum=0.9, nesterov=True),
        "divergence",
        ("w",),
        plain,
        lambda: quadratic(3.8 / 2.8 / 18 * 0.5, momentum=0.9, nesterov=True),
    ),
    Case(
        "13 targets in thousands",
        lambda: targets_in_thousands(False),
        "divergence",
        ("2.weight", "2.bias", "0.weight", "0.bias", "loss"),
        plain,
        lambda: targets_in_thousands(True),
    ),
    Case("14 summed loss", lambda: summed("sum"), "divergence", ("loss",), plain,
         lambda: summed("mean")),
    Case(
        "15 finite gradients whose norm overflows",
        lambda: large_finite_gradient(1e21),
        "precision",
        ("lin.weight", "lin.bias"),
        plain,
        lambda: large_finite_gradient(1e-2),
    ),
    Case(
        "several weights that earlier steps ruined",
        lambda: swollen(1e20),
        "bad input",
        ("0.weight", "0.bias", "2.weight", "2.bias"),
        bad_loss,
        lambda: swollen(1.0),
    ),
    Case(
        "19 a square in half precision",
        half(torch.square, ones(2, 4, 300.0)),
        "precision",
        ("op",),
        bad_loss,
        half(lambda h: torch.square(h / 300), ones(2, 4, 300.0)),
    ),
    Case(
        "19 a dot product in half precision",
        half(lambda h: (h * 12).sum(-1) * 12, ones(2, 512, 12.0)),
        "precision",
        ("op",),
        bad_loss,
        half(lambda h: h.mean(-1) / 12, ones(2, 512, 12.0)),
    ),
    Case("20 a masked row", lambda: attention(False), "singularity", ("model",), bad_loss,
         lambda: attention(True)),
    Case(
        "21 every target ignored",
        lambda: step(
            deep(1.0, 1),
            lambda m, b: F.cross_entropy(m(b[0]), b[1], ignore_index=-1),
            (digits()[0], torch.full((64,), -1)),
        ),
        "singularity",
        ("loss",),
        bad_loss,
        lambda: step(deep(1.0, 1), cross_entropy, digits()),
    ),
    Case(
        "21 mean of an empty slice",
        lambda: step(
            deep(1.0, 1), lambda m, b: m(b[0])[b[1] > 99].pow(2).mean(), digits()
        ),
        "singularity",
        ("loss",),
        bad_loss,
        lambda: step(deep(1.0, 1), lambda m, b: m(b[0])[b[1] > 5].pow(2).mean(), digits()),
    ),
    Case(
        "22 a label too high",
        lambda: step(deep(1.0, 1, classes=9), cross_entropy, digits()),
        "bad input",
        ("batch",),
        None,
        lambda: step(deep(1.0, 1), cross_entropy, digits()),
    ),
    Case(
        "23 batch norm with one sample",
        lambda: step(deep(1.0, 1, batch_norm=True), cross_entropy, digits(1)),
        "singularity",
        ("1",),
        None,
        lambda: step(deep(1.0, 1, batch_norm=True), cross_entropy, digits(8)),
    ),
    Case(
        "23 variance of one sample",
        lambda: step(HandBatchNorm(False), lambda m, b: m(b).mean(), torch.randn(1, 4)),
        "singularity",
        ("model",),
        bad_loss,
        lambda: step(HandBatchNorm(True), lambda m, b: (m(b) - 1).pow(2).mean(), torch.randn(6, 4)),
    ),
    Case("24 inputs of 1e10", lambda: large_inputs(1e10), "bad input", ("batch",), huge,
         lambda: large_inputs(1.0)),
    Case(
        "one network makes the other's weights",
        lambda: step(Hyper(2.0), cross_entropy, digits(), None),
        "explosion",
        ("model", "maker"),
        huge,
        lambda: step(Hyper(0.5), cross_entropy, digits(), 0.01),
    ),
    Case(
        "a step above the limit that falls at first",
        lambda: linear_regression(1.1),
        "divergence",
        ("weight", "bias"),
        plain,
        lambda: linear_regression(0.5),
    ),
    Case(
        "NaN in a tensor of the loss function's own",
        closure_nan,
        "bad input",
        ("loss",),
        bad_loss,
    ),
    Case(
        "24 poisoned running statistics",
        poisoned_batch_norm,
        "bad input",
        ("1.running_mean", "1.running_var"),
        bad_loss,
    ),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Other operations, where no slope or no value exists.  One row of data, what to do with it.

TWINS = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
EYE = torch.eye(4).tolist()

SINGULAR = {
    "a pole away from 0": (lambda h: 1 / (h - 3), [[3.0, 1.0, 2.0, 4.0]]),
    "1/x": (lambda h: 1 / h, [[0.0, 1.0, 2.0, 3.0]]),
    "x/x": (lambda h: h / h.detach(), [[0.0, 1.0, 2.0, 3.0]]),
    "x/std": (lambda h: (h - h.mean()) / h.std(), [[1.0, 1.0, 1.0, 1.0]]),
    "log": (torch.log, [[0.0, 1.0, 2.0, 3.0]]),
    "log of a negative number": (torch.log, [[-1.0, 1.0, 2.0, 3.0]]),
    "log1p": (torch.log1p, [[-1.0, 1.0, 2.0, 3.0]]),
    "log2": (torch.log2, [[0.0, 1.0, 2.0, 3.0]]),
    "logit": (torch.logit, [[1.0, 0.5, 0.2, 0.3]]),
    "acos": (torch.acos, [[1.0, 0.5, 0.2, 0.3]]),
    "asin": (torch.asin, [[-1.0, 0.5, 0.2, 0.3]]),
    "acosh": (torch.acosh, [[1.0, 1.5, 2.0, 3.0]]),
    "atanh": (torch.atanh, [[1.0, 0.5, 0.2, 0.3]]),
    "erfinv": (torch.erfinv, [[1.0, 0.5, 0.2, 0.3]]),
    "rsqrt": (torch.rsqrt, [[0.0, 1.0, 2.0, 3.0]]),
    "reciprocal": (torch.reciprocal, [[0.0, 1.0, 2.0, 3.0]]),
    "cube root": (lambda h: h ** (1 / 3), [[0.0, 1.0, 2.0, 3.0]]),
    "power of a negative number": (lambda h: h**0.5, [[-1.0, 1.0, 2.0, 3.0]]),
    "pow of two tensors": (lambda h: torch.pow(h, torch.full_like(h, 0.5)), [[0.0, 1.0, 2.0, 3.0]]),
    "geometric mean": (lambda h: h.prod(-1) ** 0.25, [[0.0, 1.0, 2.0, 3.0]]),
    "log of a sum": (lambda h: torch.log(h.sum(-1)), [[0.0, 0.0, 0.0, 0.0]]),
    "sqrt of a variance": (lambda h: torch.sqrt(h.var(-1)), [[2.0, 2.0, 2.0, 2.0]]),
    "distance by hand": (
        lambda h: torch.sqrt(((h[:, None] - h[None]) ** 2).sum(-1)),
        [[1.0, 2.0, 3.0, 4.0], [2.0, 0.0, 1.0, 1.0]],
    ),
    "cosine by hand": (
        lambda h: h @ h.T / (h.pow(2).sum(-1).sqrt() * h.pow(2).sum(-1).sqrt()[:, None]),
        [[0.0] * 4, [1.0, 2.0, 3.0, 4.0]],
    ),
    "entropy": (lambda h: -(h * h.log()).sum(-1), [[1.0, 0.0, 0.0, 0.0]]),
    "softmax by hand of nothing": (lambda h: h / h.sum(-1, keepdim=True), [[0.0] * 4]),
    "log of a determinant": (torch.logdet, TWINS),
    "eigenvectors of equal eigenvalues": (lambda h: torch.linalg.eigh(h + h.T)[1][:, :2], EYE),
    "singular vectors of equal values": (lambda h: torch.linalg.svd(h)[0][:, :2], EYE),
    "xlogy": (lambda h: torch.xlogy(h, h), [[0.0, 1.0, 2.0, 3.0]]),
    "normal log density": (
        lambda h: -0.5 * (h / torch.relu(h)) ** 2, [[-1.0, 1.0, 2.0, 3.0]]
    ),
    "a mask of log 0": (
        lambda h: torch.softmax(h + torch.log(torch.zeros(4)), -1), [[1.0, 1.0, 2.0, 3.0]]
    ),
    "double where forgotten": (
        lambda h: torch.where(h > 0, torch.log(h), h), [[-1.0, 0.0, 2.0, 3.0]]
    ),
    "nan_to_num hides it": (lambda h: torch.nan_to_num(torch.sqrt(h)), [[0.0, 1.0, 2.0, 3.0]]),
    "log of one minus": (lambda h: torch.log(1 - torch.sigmoid(h)), [[200.0, 1.0, 2.0, 3.0]]),
    "binary cross-entropy by hand": (
        lambda h: -torch.log(torch.sigmoid(h)), [[-200.0, 1.0, 2.0, 3.0]]
    ),
}  # fmt: skip

# Operations that raise where they have no value.
RAISING = {
    "matrix inverse": (torch.inverse, TWINS),
    "solve": (lambda h: torch.linalg.solve(h, h), TWINS),
    "Cholesky factor": (torch.linalg.cholesky, [[1.0, 2.0, 0, 0], [2.0, 1.0, 0, 0], *EYE[2:]]),
}


# ---------------------------------------------------------------------------------------------
# Steps with nothing wrong


class Block(nn.Module):
    """A pre-LN transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A small causal language model."""

    def __init__(self, depth: int = 6, width: int = 32, tokens: int = 50) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embedding(x))))


class ConvBlock(nn.Module):
    """Two convolutions with batch norm, and a skip around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class LowRank(nn.Module):
    """A frozen layer and a low-rank update that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 10).requires_grad_(False)
        self.a, self.b = nn.Linear(64, 4, bias=False), nn.Linear(4, 10, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class ReZero(nn.Module):
    """Residual branches whose weight starts at 0."""

    def __init__(self, blocks: int = 20) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(blocks))
        self.alpha = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(blocks))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for block, alpha in zip(self.blocks, self.alpha, strict=True):
            x = x + alpha * F.relu(block(x))
        return self.head(x)


class MaskedAttention(nn.Module):
    """Attention with a causal mask of −inf."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x, mask):
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def tokens_step(model: nn.Module, lr: float = 1e-3) -> Step:
    tokens = torch.randint(0, 50, (8, 17))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    return model, loss_fn, tokens, torch.optim.AdamW(model.parameters(), lr=lr)


def recurrent(cell: nn.Module, length: int) -> Step:
    model = Recurrent(cell)
    return model, squared_error, series(length), torch.optim.Adam(model.parameters(), lr=1e-3)


def trained(optimizer: Callable, steps: int, depth: int = 2) -> Step:
    model, batch = deep(1.0, depth), digits(128)
    made = optimizer(model.parameters())
    for _ in range(steps):
        made.zero_grad()
        cross_entropy(model, batch).backward()
        made.step()
    return model, cross_entropy, batch, made


def conv_net() -> Step:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), *(ConvBlock(16) for _ in range(8)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    x, y = digits(32)
    return step(model, cross_entropy, (x.reshape(-1, 1, 8, 8), y), 0.05)


def masked() -> Step:
    mask = torch.triu(torch.full((6, 6), -math.inf), 1)
    batch = torch.randn(4, 6, 16), mask
    return step(MaskedAttention(), lambda m, b: m(*b).pow(2).mean(), batch)


def with_layers(*extra: nn.Module) -> Step:
    layers = [nn.Sequential(nn.Linear(64, 64), *extra) for _ in range(6)]
    return step(nn.Sequential(*layers, nn.Linear(64, 10)), cross_entropy, digits(), 0.05)


def zero_head() -> Step:
    model = deep(1.0, 4)
    nn.init.zeros_(model[-1].weight)
    return step(model, cross_entropy, digits(), 0.05)


def bfloat16() -> Step:
    model = deep(1.0, 4).bfloat16()
    x, y = digits()
    return step(model, cross_entropy, (x.bfloat16(), y), 0.01)


def spectral() -> Step:
    model = nn.Sequential(
        *(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64)), nn.Tanh())
          for _ in range(4)), nn.Linear(64, 10),
    )  # fmt: skip
    return step(model, cross_entropy, digits(), 0.05)


def swollen(factor: float) -> Step:
    """All weights times a factor: whichever single one were mended, the step would overflow."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    with torch.no_grad():
        for p in model.parameters():
            p *= factor
    x, y = digits()
    return step(model, squared_error, (x, y.float()), 1e-3)


def autocast(depth: int) -> Step:
    """Layers in bfloat16, weights in float32."""

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            z = model(batch[0])
        return F.cross_entropy(z.float(), batch[1])

    return step(deep(1.0, depth, 128), loss_fn, digits(), 1e-3)


def scaled_in_half() -> Step:
    """A gradient in float16, scaled up for the backward pass: its norm squared exceeds 65504."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).half()
    x, y = digits()

    def loss_fn(model, batch):
        return 1024 * F.cross_entropy(model(batch[0]).float(), batch[1])

    return step(model, loss_fn, (x.half(), y), 1e-6)


def regression(target: float, lr: float) -> Step:
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1))
    x, y = digits()
    return step(model, squared_error, (x, y.float() * target), lr)


class TwoGates(nn.Module):
    """A branch behind two factors that both start at 0, and a head that does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.gate = nn.Parameter(torch.zeros(64))
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        x = F.relu(self.one(x))
        return self.head(x + self.gate * F.relu(self.two(x)))


def with_buffer(buffer: torch.Tensor) -> Step:
    model = deep(1.0, 1)
    model.register_buffer("extra", buffer)
    return step(model, cross_entropy, digits(), 0.05)


def noisy(generator: torch.Generator) -> Step:
    def loss_fn(model, batch):
        return cross_entropy(
            model, (batch[0] + torch.randn(batch[0].shape, generator=generator), batch[1])
        )

    return step(deep(1.0, 2), loss_fn, digits(), 0.01)


def tiny_layer_norm(h: torch.Tensor) -> torch.Tensor:
    h = h * 1e-3
    centred = h - h.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred**2).mean(-1, keepdim=True) + 1e-12)


CONTROLS: dict[str, Callable[[], Step]] = {
    "default LSTM": lambda: recurrent(nn.LSTM(8, 32, batch_first=True), 100),
    "default GRU": lambda: recurrent(nn.GRU(8, 32, batch_first=True), 100),
    "default tanh RNN": lambda: recurrent(nn.RNN(8, 32, batch_first=True), 30),
    "pre-LN transformer": lambda: tokens_step(Transformer()),
    "encoder of PyTorch": lambda: step(
        nn.Sequential(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4),
            nn.Linear(16, 3),
        ),
        lambda m, b: m(b).pow(2).mean(),
        torch.randn(4, 7, 16),
        0.01,
    ),
    "residual batch-norm net": conv_net,
    "bfloat16 autocast, 10 layers": lambda: autocast(10),
    "bfloat16 autocast, 30 layers": lambda: autocast(30),
    "a scaled loss in float16": scaled_in_half,
    "deep He ReLU net": lambda: step(deep(1.0, 30, 128), cross_entropy, digits(), 1e-3),
    "deep tanh net": lambda: step(
        deep(2**-0.5, 20, 128, activation=nn.Tanh), cross_entropy, digits(), 1e-2
    ),
    "shallow batch norm": lambda: step(
        deep(1.0, 6, batch_norm=True), cross_entropy, digits(), 0.05
    ),
    "layer norm": lambda: with_layers(nn.LayerNorm(64), nn.ReLU()),
    "dropout": lambda: with_layers(nn.ReLU(), nn.Dropout(0.3)),
    "Adam on digits, new": lambda: trained(lambda p: torch.optim.Adam(p, lr=1e-3), 0),
    "Adam on digits, after 50 steps": lambda: trained(lambda p: torch.optim.Adam(p, lr=1e-3), 50),
    "converged with Adam": lambda: trained(lambda p: torch.optim.Adam(p, lr=1e-2), 400),
    "converged with SGD": lambda: trained(lambda p: torch.optim.SGD(p, lr=0.2), 1000),
    "momentum after 100 steps": lambda: trained(
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), 100
    ),
    "RMSprop after 50 steps": lambda: trained(lambda p: torch.optim.RMSprop(p, lr=1e-3), 50),
    "L-BFGS": lambda: trained(lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5), 0),
    "large loss, small rate": lambda: (
        lambda model: (
            model, lambda m, b: 1000 * cross_entropy(m, b), digits(), sgd(model, 1e-5)
        )
    )(deep(1.0, 2)),
    "targets in tens of thousands, small rate": lambda: regression(1e4, 1e-10),
    "mask of −inf": masked,
    "zero head": zero_head,
    "bfloat16": bfloat16,
    "low-rank update": lambda: step(LowRank(), cross_entropy, digits(), 0.1),
    "branches that start at 0": lambda: step(ReZero(), cross_entropy, digits(), 0.05),
    "spectral norm": spectral,
    "weight norm": lambda: step(
        nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 10)
        ),
        cross_entropy, digits(), 0.05,
    ),
    "no optimiser": lambda: step(deep(1.0, 5), cross_entropy, digits(), None),
    "evaluation mode": lambda: (lambda s: (s[0].eval(), *s[1:]))(conv_net()),
    "log of probabilities, clamped": around(
        lambda h: torch.log(torch.softmax(h, -1).clamp(min=1e-6)), [[3.0, 0.0, 1.0, 2.0]]
    ),
    "mask of −inf in a buffer": lambda: with_buffer(torch.full((4, 4), -math.inf).triu(1)),
    "best loss so far": lambda: with_buffer(torch.tensor(math.inf)),
    "NaN where nobody looks": lambda: step(
        deep(1.0, 1),
        lambda m, b: cross_entropy(m, (b[0][:32], b[1][:32])),
        (torch.cat([digits()[0][:32], torch.full((32, 64), math.nan)]), digits()[1]),
    ),
    "two gates that start at 0": lambda: step(TwoGates(), cross_entropy, digits(), 0.05),
    "reentrant checkpoint": lambda: step(
        deep(1.0, 3),
        lambda m, b: F.cross_entropy(
            torch.utils.checkpoint.checkpoint(
                m, b[0].clone().requires_grad_(), use_reentrant=True
            ),
            b[1],
        ),
        digits(),
        0.01,
    ),
    "noise of a generator": lambda: noisy(torch.Generator().manual_seed(0)),
    "layer norm by hand, tiny inputs": lambda: step(
        nn.Sequential(nn.Linear(64, 32), Lambda(tiny_layer_norm), nn.Linear(32, 10)),
        lambda m, b: 64 * cross_entropy(m, b),
        digits(),
        None,
    ),
    "norm at 0": lambda: (
        *around(lambda h: torch.linalg.vector_norm(h, dim=-1), zeros_row())()[:3], None
    ),
}  # fmt: skip
