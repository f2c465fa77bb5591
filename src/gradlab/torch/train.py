"""The part of `gradlab train` that trains in PyTorch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F

from gradlab.convnet import ConvNetSpec
from gradlab.diagnosis import Diagnosis
from gradlab.history import GradientHistory
from gradlab.torch import convnet, models
from gradlab.torch.diagnose import diagnose
from gradlab.torch.probe import GradientProbe
from gradlab.training import Options, Part, Problem, processes

_HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_AT_ONCE = 4096  # samples that are evaluated together
_SUMMED = 1024  # steps whose losses are added up together: adding each takes as long as a probe


def _optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    match name:
        case "adam":
            return torch.optim.Adam(parameters, lr=0.0)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=0.0)
    momentum = 0.0 if name == "sgd" else 0.9
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, nesterov=name == "nesterov")


class _Mean:
    """Mean loss over the samples of the steps that were taken.

    Args:
        probe: which knows the steps that were left out.
        device: of the losses.
    """

    def __init__(self, probe: GradientProbe, device: torch.device | str) -> None:
        self.probe, self.samples = probe, 0
        self.total = torch.zeros((), device=device, dtype=torch.float64)
        self.waiting: list[tuple[torch.Tensor, float, int]] = []

    def add(self, loss: torch.Tensor, share: float, samples: int) -> None:
        """A step that the probe has seen: its loss, what that was divided by, its samples."""
        self.waiting.append((loss, share, samples))
        if len(self.waiting) == _SUMMED:
            self._sum()

    def _sum(self) -> None:
        # (The probe keeps as many steps as wait here, or more.)
        skipped = self.probe.history.skipped[-len(self.waiting) :]
        taken = [step for step, left in zip(self.waiting, skipped, strict=True) if not left]
        self.waiting.clear()
        if taken:
            losses, shares, samples = zip(*taken, strict=True)
            stacked = torch.stack(losses).double()
            self.total += stacked @ torch.tensor(shares, dtype=torch.float64, device=stacked.device)
            self.samples += sum(samples)

    def result(self) -> float:
        """The mean; NaN where no step was taken."""
        if self.waiting:
            self._sum()
        if distributed.is_initialized():
            distributed.all_reduce(self.total)
        return float(self.total) / self.samples if self.samples else math.nan


class Trainer:
    """A network, its optimiser and its data, on one device.

    Under `torchrun` each process takes its share of every batch, and all take the same steps.

    Args:
        options: of the run.
        problem: what is trained.
    """

    def __init__(self, options: Options, problem: Problem) -> None:
        self.options, self.problem = options, problem
        self.rank, self.world = processes()
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
        if self.world > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if cuda else "gloo")
        dtype = torch.float64 if options.precision == "float64" else torch.float32
        if isinstance(problem.spec, ConvNetSpec):
            self.names, model = convnet, convnet.ConvNet(problem.spec, problem.weights, dtype)
        else:
            self.names, model = models, models.MLP(problem.spec, dtype=dtype)
            models.load_weights(model, problem.weights)
        self.inner = model.to(self.device)
        self.model = nn.parallel.DistributedDataParallel(model) if self.world > 1 else model
        self.optimizer = _optimizer(options.optimizer, list(model.parameters()))
        kind = torch.device(self.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=options.precision == "float16")
        half = _HALF.get(options.precision)
        self.autocast = (lambda: torch.autocast(kind, half)) if half else nullcontext
        self.probe = GradientProbe(
            self.model,
            self.optimizer,
            capacity=min(max(1000, problem.steps_per_epoch), 10_000),
            on_nonfinite=options.on_nonfinite,
            scaler=self.scaler if self.scaler.is_enabled() else None,
        )
        self.x = torch.as_tensor(problem.train.x, dtype=dtype, device=self.device)
        self.y = torch.as_tensor(problem.train.y, device=self.device)

    @property
    def history(self) -> GradientHistory:
        """What the probe recorded."""
        return self.probe.history

    def _loss(self, logits: torch.Tensor, y: torch.Tensor, count: float) -> torch.Tensor:
        """The sum over the samples, divided by `count`."""
        if self.options.loss == "cross-entropy":
            if count == len(y):
                return F.cross_entropy(logits, y)  # the usual step, in one operation
            return F.cross_entropy(logits, y, reduction="sum") / count
        wanted = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        return F.mse_loss(logits, wanted, reduction="sum") / count

    def _mean_loss(
        self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        x, y = batch
        with self.autocast():
            return self._loss(model(x).float(), y, len(y))

    def fit(
        self,
        first: int,
        last: int,
        after_step: Callable[[], object],
        after_epoch: Callable[[int, float], object],
    ) -> None:
        """Train epochs first to last − 1.

        Args:
            first, last: epochs, from 0.
            after_step: called after every step.
            after_epoch: called with the epoch and its mean loss over the steps that were taken.

        Raises:
            FloatingPointError: the probe's, with on_nonfinite="raise".
        """
        size, scaler = self.options.batch_size, self.scaler
        # (As Python's own numbers, with which the optimiser's arithmetic is faster.)
        rates = map(float, self.problem.rates[first * self.problem.steps_per_epoch :])
        with self.probe:
            for epoch in range(first, last):
                self.model.train()
                order = torch.from_numpy(self.problem.order(epoch)).to(self.device)
                mean = _Mean(self.probe, self.device)
                for rows in order.split(size):
                    mine = rows[self.rank :: self.world] if self.world > 1 else rows
                    rate = next(rates)
                    for group in self.optimizer.param_groups:
                        group["lr"] = rate
                    self.optimizer.zero_grad()
                    with self.autocast():
                        logits = self.model(self.x[mine])
                    # DistributedDataParallel averages over the processes: with this count the
                    # result is the mean over the whole batch, also where shares differ by one.
                    share = len(rows) / self.world
                    loss = self._loss(logits.to(self.x.dtype), self.y[mine], share)
                    scaler.scale(loss).backward()
                    if self.options.clip_norm is not None:
                        self.probe.clip_(self.options.clip_norm)
                    scaler.step(self.optimizer)
                    scaler.update()
                    mean.add(loss.detach(), share, len(rows))
                    after_step()
                after_epoch(epoch, mean.result())

    def evaluate(self, part: Part) -> tuple[float, float]:
        """Mean loss and accuracy.

        Args:
            part: any samples.
        """
        self.inner.eval()
        total = right = 0.0
        with torch.no_grad(), self.autocast():
            for start in range(0, len(part.y), _AT_ONCE):
                here = slice(start, start + _AT_ONCE)
                x = torch.as_tensor(part.x[here], dtype=self.x.dtype, device=self.device)
                y = torch.as_tensor(part.y[here], device=self.device)
                logits = self.inner(x).to(self.x.dtype)
                total += float(self._loss(logits, y, 1))
                right += int((logits.argmax(1) == y).sum())
        return total / len(part.y), right / len(part.y)

    def state(self) -> tuple[dict[str, np.ndarray], dict]:
        """All numbers that training goes on from.

        Returns:
            Name to array, and the rest as JSON holds it.
        """
        arrays = {f"model.{k}": v for k, v in self.names.get_weights(self.inner).items()}
        for place, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if value is not None:
                    arrays[f"optimizer.{place}.{name}"] = np.asarray(torch.as_tensor(value).cpu())
        scaler = self.scaler.state_dict()
        return arrays, {"scaler": scaler}

    def restore(self, arrays: dict[str, np.ndarray], record: dict) -> None:
        """The inverse of `state`.

        Raises:
            KeyError, ValueError: arrays that do not fit the network or the optimiser.
        """
        prefix = "model."
        self.names.load_weights(
            self.inner, {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
        )
        whole = self.optimizer.state_dict()
        whole["state"] = {}
        shapes = [p.shape for p in self.inner.parameters()]
        for name, array in arrays.items():
            if name.startswith("optimizer."):
                _, place, key = name.split(".")
                if array.shape not in ((), tuple(shapes[int(place)])):
                    raise ValueError(f"{name} has shape {array.shape}")
                value = torch.from_numpy(array.copy())
                whole["state"].setdefault(int(place), {})[key] = value
        self.optimizer.load_state_dict(whole)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(record["scaler"])

    def diagnose(self, rows: np.ndarray) -> Diagnosis:
        """What `gradlab.torch.diagnose` says of a step.

        Args:
            rows: the training samples of its batch.
        """
        self.inner.train()
        batch = self.x[rows], self.y[rows]
        return diagnose(self.inner, self._mean_loss, batch, optimizer=self.optimizer)
