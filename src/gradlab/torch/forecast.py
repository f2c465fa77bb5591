"""A recurrent network that forecasts, in PyTorch.  `gradlab.keras.forecast` is its twin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from gradlab.forecast import Fit, Task, cell_of, check_fit, collect, minibatches
from gradlab.torch import lbfgs

__all__ = ["fit", "mse", "network"]


class _Recurrent(torch.nn.Module):
    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        kind = torch.nn.LSTM if cell == "LSTM" else torch.nn.RNN
        options = {} if cell == "LSTM" else {"nonlinearity": "relu"}
        self.cell = kind(1, hidden, batch_first=True, **options)
        self.read = torch.nn.Linear(hidden, 1)
        # PyTorch adds two biases where one does; both trained would move twice as fast as one.
        self.cell.bias_hh_l0.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (windows, length)
        states, _ = self.cell(x[..., None])
        return self.read(states[:, -1])[:, 0]


def network(weights: Sequence[np.ndarray]) -> torch.nn.Module:
    """A recurrent layer, and a linear read-out of its last state.

    Args:
        weights: as `gradlab.forecast.initial_weights` draws them; they tell the kind of layer.

    Returns:
        A module that maps windows (n, length) to the next values (n,).  PyTorch's second bias is
        frozen at zero.

    Raises:
        ValueError: weights of other shapes.
    """
    model = _Recurrent(*cell_of(weights))
    kernel, recurrent, bias, read, shift = map(torch.as_tensor, weights)
    values = (kernel.T, recurrent.T, bias, torch.zeros_like(bias), read.T, shift)
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


def mse(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean squared error over a batch of windows (n, length) and targets (n,)."""
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def fit(
    task: Task,
    starts: Iterable[Sequence[np.ndarray]],
    method: str,
    *,
    evaluations: int = 70,
    lr: float = 0.1,
    batch_size: int | None = None,
    seed: int = 0,
) -> list[Fit]:
    """Train a network from every start, on all training windows at once.

    Args:
        task: what to learn.
        starts: initial weights of one network each.
        method: "Adam" or "L-BFGS" (`gradlab.torch.lbfgs`).
        evaluations: budget: how often the loss and its gradient over all training windows may be
            computed, those of a line search included.
        lr: Adam's learning rate; L-BFGS has none.
        batch_size: windows in one of Adam's minibatches, None for all.  One pass over the training
            windows, dealt out anew each time, then counts as one evaluation; noted are loss and
            outputs before it.
        seed: of that dealing out.

    Returns:
        One `Fit` per start.

    Raises:
        ValueError: an unknown method, a budget below 1, or a batch size below 1 or for L-BFGS.
    """
    check_fit(method, evaluations, batch_size)
    batch = tuple(torch.tensor(a[task.train]) for a in (task.x, task.y))
    later = torch.tensor(task.x[~task.train])
    results = []
    for weights in starts:
        model, notes = network(weights), []

        @torch.no_grad()
        def note(number: int, loss: float, norm: float, model=model, notes=notes) -> None:
            notes.append((loss, model(later).numpy()))

        if method == "L-BFGS":
            lbfgs.minimize(
                model,
                lambda model=model: mse(model, batch),
                max_evaluations=evaluations,
                tolerance=0,
                on_evaluation=note,
            )
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            adam = torch.optim.Adam(trained, lr=lr)
            rng = np.random.default_rng(seed)
            for number in range(evaluations):
                parts = [batch]
                if batch_size is not None:
                    with torch.no_grad():
                        note(number, mse(model, batch).item(), 0.0)
                    deal = minibatches(len(batch[1]), batch_size, rng)
                    parts = [tuple(a[rows] for a in batch) for rows in deal]
                for part in parts:
                    adam.zero_grad()
                    loss = mse(model, part)
                    loss.backward()
                    if batch_size is None:
                        note(number, loss.item(), 0.0)
                    adam.step()
        results.append(collect(task, notes))
    return results
