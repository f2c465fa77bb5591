"""Many small networks trained at once, in PyTorch.  `gradlab.keras.sweep` is its twin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gradlab.sweep import SweepResult, check, judge

_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "linear": lambda z: z}


def train(
    weights: Sequence[np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    *,
    lr: float | np.ndarray,
    steps: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    activation: str = "relu",
    loss: str = "cross_entropy",
    output_scale: float = 1.0,
    x_test: np.ndarray | None = None,
    y_test: np.ndarray | None = None,
    record_layers: bool = False,
) -> SweepResult:
    """Train a stack of multilayer perceptrons without biases by minibatch gradient descent.

    A member's arithmetic never meets another's: one that overflows leaves the rest as they were.
    The arrays passed in are not changed.

    Args:
        weights: one array (members, fan_in, fan_out) per layer, all float32 or all float64, which
            is then the precision of the training.
        x: inputs, shape (n, features) for all members or (members, n, features).
        y: integer classes, shape (n,) or (members, n); for "mse" targets, shape (n, outputs) or
            (members, n, outputs).
        lr: learning rate, one for all or one per member.
        steps: number of updates.
        batch_size: examples per minibatch, drawn with replacement.
        seed: of the minibatches; the same seed gives both frameworks the same ones.
        activation: "relu", "tanh" or "linear", after every layer but the last.
        loss: "cross_entropy" of softmax outputs, or "mse", half the squared distance to the
            target; both averaged over the minibatch.
        output_scale: a constant that multiplies the outputs before the loss; it is not trained.
        x_test, y_test: the examples that the accuracy is measured on; None takes `x` and `y`.
        record_layers: whether to keep the gradient norm of each layer's pre-activation.

    Returns:
        A `SweepResult`.

    Raises:
        ValueError: an argument whose shape or value does not fit.

    Example:
        >>> w = [np.ones((2, 3, 3), "float32"), np.ones((2, 3, 2), "float32")]
        >>> x, y = np.eye(3), np.array([0, 1, 0])
        >>> train(w, x, y, lr=[0.1, 1e30], steps=5).failed.tolist()
        [False, True]
    """
    problem = check(
        weights, x, y, lr=lr, steps=steps, batch_size=batch_size, seed=seed,
        activation=activation, loss=loss, x_test=x_test, y_test=y_test,
    )  # fmt: skip
    act = _ACTIVATIONS[activation]
    w = [torch.tensor(array, requires_grad=True) for array in problem.weights]
    x, y, lr = (torch.from_numpy(array) for array in (problem.x, problem.y, problem.lr))
    x_rows, y_rows = torch.from_numpy(problem.x_rows), torch.from_numpy(problem.y_rows)

    losses, grad_norms, delta_norms = [], [], []
    for x_row, y_row in zip(x_rows, y_rows, strict=True):  # (members, batch)
        z = list(_pre_activations(w, x[x_row], act))
        loss_of_each = _LOSSES[loss](output_scale * z[-1], y[y_row])  # (members,)
        grads = torch.autograd.grad(loss_of_each.sum(), [*w, *z] if record_layers else w)
        norms = torch.stack([_norm(grad) for grad in grads], -1)  # (members, layers [+ layers])
        losses.append(loss_of_each.detach())
        grad_norms.append(norms[:, : len(w)].square().sum(-1).sqrt())
        delta_norms.append(norms[:, len(w) :])
        with torch.no_grad():
            for weight, grad in zip(w, grads[: len(w)], strict=True):
                weight -= lr * grad
    with torch.no_grad():
        for z in _pre_activations(w, torch.from_numpy(problem.x_test), act):
            outputs = z  # the last one stays
    return judge(
        problem,
        torch.stack(losses).numpy(),
        torch.stack(grad_norms).numpy(),
        torch.stack(delta_norms).numpy() if record_layers else None,
        [weight.detach().numpy() for weight in w],
        outputs.numpy(),
    )


def _pre_activations(w: Sequence[torch.Tensor], x: torch.Tensor, act) -> Iterator[torch.Tensor]:
    """Every layer's input to its activation, shape (members, batch, fan_out); the last: logits."""
    z = x @ w[0]
    yield z
    for weight in w[1:]:
        z = torch.bmm(act(z), weight)
        yield z


def _cross_entropy(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(logits, -1)
    return -log_p.gather(-1, classes[..., None])[..., 0].mean(-1)


def _half_square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().sum(-1).mean(-1) / 2


_LOSSES = {"cross_entropy": _cross_entropy, "mse": _half_square}


def _norm(stack: torch.Tensor) -> torch.Tensor:
    """Norm of each member's matrix, summed in float64: float32 squares overflow beyond 1e19."""
    return torch.linalg.vector_norm(stack, dim=(1, 2), dtype=torch.float64)
