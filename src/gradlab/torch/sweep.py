"""Many small networks trained at once, in PyTorch.  `gradlab.keras.sweep` is its twin."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from gradlab.mlp import EPSILON
from gradlab.sweep import (
    Measured,
    Problem,
    Setting,
    adds_input,
    check_outputs,
    evaluated,
    fitter,
    shares,
    trainer,
)
from gradlab.torch.models import ACTIVATIONS
from gradlab.updates import Functions, memory, move

_NORMALIZED_AXIS = {"batch": 1, "layer": 2}


def _norm(stack: torch.Tensor, axes: tuple[int, ...] = (1, 2)) -> torch.Tensor:
    """Norm of each member's matrix, summed in float64: float32 squares overflow beyond 1e19."""
    return torch.linalg.vector_norm(stack, dim=axes, keepdim=True, dtype=torch.float64)


_FUNCTIONS = Functions(
    sign=torch.sign,
    sqrt=torch.sqrt,
    between=torch.clamp,
    at_least=torch.clamp_min,
    norm=_norm,
    cast=lambda a, like: a.to(like.dtype),
)


def _train(problem: Problem) -> Measured:
    w = [torch.tensor(array, requires_grad=True) for array in problem.weights]
    layers, setting = len(w), problem.setting
    x, y = torch.from_numpy(problem.flat_x()), torch.from_numpy(problem.flat_y())
    x_rows, y_rows = torch.from_numpy(problem.x_rows), torch.from_numpy(problem.y_rows)
    numbers = {name: torch.from_numpy(array) for name, array in problem.numbers.items()}
    kept = memory(setting.plan, w, torch.zeros_like)

    if setting.network is not None:
        with torch.no_grad():
            check_outputs(problem, _forward(setting, w, x[x_rows[0]], numbers)[0].shape)
    losses, grad_norms, delta_norms, update_norms, weight_norms = [], [], [], [], []
    array_norms, noted = [], []
    by_step = problem.rates, problem.draws
    steps = zip(x_rows, y_rows, *map(torch.from_numpy, by_step), strict=True)
    bar = tqdm(steps, total=len(x_rows), unit="step", disable=not problem.progress)
    for number, (x_row, y_row, rate, draws) in enumerate(bar, 1):  # rows are (members, batch)
        outputs, z, notes = _forward(setting, w, x[x_row], numbers, draws)
        loss = _LOSSES.get(setting.loss, setting.loss)
        loss_of_each = loss(setting.output_scale * outputs, y[y_row])  # (members,)
        of = [*w, *z] if setting.record_layers else w
        grads = torch.autograd.grad(loss_of_each.sum(), of, materialize_grads=True)
        norms = _norms(grads)  # (members, layers [+ layers])
        losses.append(loss_of_each.detach())
        grad_norms.append(torch.linalg.vector_norm(norms[:, :layers], dim=1))
        delta_norms.append(norms[:, layers:])
        array_norms.append(norms[:, :layers])
        noted.append({name: note.detach() for name, note in notes.items()})
        with torch.no_grad():
            changes, kept = move(
                setting.plan, numbers, rate, float(number), w, grads[:layers], kept, _FUNCTIONS
            )
            if setting.record_updates:
                update_norms.append(torch.linalg.vector_norm(_norms(changes), dim=1))
                weight_norms.append(torch.linalg.vector_norm(_norms(w), dim=1))
            for weight, change in zip(w, changes, strict=True):
                weight += change

    def stacked(norms: list[torch.Tensor], recorded: bool) -> np.ndarray | None:
        return torch.stack(norms).numpy() if recorded else None

    outputs = _outputs(setting, w, problem.x_test, numbers)
    alike = problem.x_test is problem.x
    names = noted[0]
    return Measured(
        loss=torch.stack(losses).numpy(),
        grad_norm=torch.stack(grad_norms).numpy(),
        delta_norm=stacked(delta_norms, setting.record_layers),
        update_norm=stacked(update_norms, setting.record_updates),
        weight_norm=stacked(weight_norms, setting.record_updates),
        array_norm=stacked(array_norms, setting.record_arrays),
        noted={name: torch.stack([notes[name] for notes in noted]).numpy() for name in names},
        weights=[weight.detach().numpy() for weight in w],
        outputs=outputs,
        train_outputs=outputs if alike else _outputs(setting, w, problem.x, numbers),
    )


def _forward(
    setting: Setting,
    w: Sequence[torch.Tensor],
    x: torch.Tensor,
    numbers: dict[str, torch.Tensor],
    draws: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Sequence[torch.Tensor], dict[str, torch.Tensor]]:
    """A minibatch's outputs, every layer's own, and what the network noted."""
    if setting.network is not None:
        outputs, notes = setting.network(w, x, torch.reshape)
        return outputs, (), notes
    z = list(_pre_activations(setting, w, x, numbers, draws))
    return z[-1], z, {}


def _pre_activations(
    setting: Setting,
    w: Sequence[torch.Tensor],
    x: torch.Tensor,
    numbers: dict[str, torch.Tensor],
    draws: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Every matrix product's result, shape (members, batch, fan_out); the last: logits.

    Units are dropped where there are draws, (batch, hidden units).
    """
    act, used = ACTIVATIONS[setting.activation], 0
    if setting.activation == "leaky_relu":
        act = partial(_leaky_relu, slope=numbers["slope"])
    for layer, weight in enumerate(w):
        z = x @ weight
        yield z
        if layer + 1 == len(w):
            return
        if setting.normalization:
            axis = _NORMALIZED_AXIS[setting.normalization]
            variance, mean = torch.var_mean(z, axis, correction=0, keepdim=True)
            z = (z - mean) * torch.rsqrt(variance + EPSILON)
        branch = act(z)
        if setting.dropout and draws is not None:
            used, first = used + z.shape[-1], used
            kept = draws[:, first:used] >= numbers["dropout"]  # (members, batch, fan_out)
            branch = branch * kept / (1 - numbers["dropout"])
        x = x + setting.skip * branch if adds_input(setting, w, layer) else branch


def _leaky_relu(z: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The slope of `torch.nn.functional.leaky_relu` is one number, and here every member's own."""
    return torch.where(z > 0, z, slope * z)


@torch.no_grad()
def _outputs(
    setting: Setting, w: Sequence[torch.Tensor], x: np.ndarray, numbers: dict[str, torch.Tensor]
) -> np.ndarray:
    if setting.network is not None:
        inputs, members = torch.from_numpy(x), len(w[0])
        pieces = (inputs[rows].expand(members, *inputs[rows].shape) for rows in evaluated(len(x)))
        outputs = [_forward(setting, w, piece, numbers)[0] for piece in pieces]
        return torch.cat(outputs, 1)[:, : len(x)].numpy()
    outputs = []
    for share in shares(w, x.shape[-2]):
        inputs = torch.from_numpy(x if x.ndim == 2 else x[share])
        own = {name: number[share] for name, number in numbers.items()}
        layers = _pre_activations(setting, [weight[share] for weight in w], inputs, own)
        outputs.append(deque(layers, maxlen=1).pop())  # only the last layer's are kept
    return torch.cat(outputs).numpy()


def _cross_entropy(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(logits, -1)
    return -log_p.gather(-1, classes[..., None])[..., 0].mean(-1)


def _half_square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().sum(-1).mean(-1) / 2


_LOSSES = {"cross_entropy": _cross_entropy, "mse": _half_square}


def _norms(stacks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Norm of every member's every matrix, (members, matrices)."""
    return torch.stack([_norm(stack)[:, 0, 0] for stack in stacks], -1)


train = trainer(_train, __name__)
fit = fitter(_train, __name__)
