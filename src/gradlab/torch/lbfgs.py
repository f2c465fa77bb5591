"""L-BFGS in PyTorch, with a budget.  `gradlab.keras.lbfgs` is its twin."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gradlab.lbfgs import NO_PROGRESS, LBFGSResult, Recorder, Stop, check_arguments


def minimize(
    model: torch.nn.Module,
    loss_fn: Callable[[], torch.Tensor],
    *,
    max_evaluations: int,
    history: int = 10,
    tolerance: float = 1e-6,
    on_evaluation: Callable[[int, float, float], object] | None = None,
    progress: bool = False,
) -> LBFGSResult:
    """Lower a loss by L-BFGS (`torch.optim.LBFGS` with a strong Wolfe line search).

    At the end, also after an interruption, the trainable parameters are those of the best
    evaluation and their `.grad` is what it was.  Nothing else that `loss_fn` changes, such as
    running statistics, is put back.

    Args:
        model: the parameters that require a gradient are changed; those that the loss does not
            depend on stay.
        loss_fn: returns the loss, a scalar, of the model as it is now.  It must not vary by itself:
            the same data at every call, and no dropout.
        max_evaluations: budget: how often the loss and its gradient may be computed.
        history: number of pairs of step and gradient change kept, two vectors each as long as the
            parameters together.
        tolerance: the run ends when no component of the gradient is larger.  Below about 1e-9 it
            may never be met on a badly conditioned problem, whatever the budget: PyTorch drops
            every pair of step s and gradient change y with s·y ≤ 1e-10, so near the minimum it
            learns no more curvature.
        on_evaluation: called after every evaluation with its number from 0, loss and gradient norm.
        progress: whether to show a progress bar over the evaluations.

    Returns:
        An `LBFGSResult`.  A loss or gradient that is not finite ends the run; the message says so.

    Raises:
        ValueError: a model without trainable parameters, a loss that is no scalar, a budget or a
            history below 1, or a negative tolerance.

    Example:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> result = minimize(model, lambda: (model.weight - 2).square().sum(), max_evaluations=20)
        >>> result.converged, model.weight.detach().numpy().round(5).tolist()
        (True, [[2.0, 2.0, 2.0]])
    """
    check_arguments(history, tolerance)
    recorder = Recorder(max_evaluations, on_evaluation, progress)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")

    def copy() -> list[torch.Tensor]:
        return [p.detach().clone() for p in parameters]

    def evaluate() -> torch.Tensor:
        recorder.check_budget()
        loss = loss_fn()
        if loss.numel() != 1:
            raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}, expected a scalar")
        grads = torch.autograd.grad(loss.reshape(()), parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        flat = torch.cat([grad.reshape(-1) for grad in grads if grad is not None])
        norm = torch.linalg.vector_norm(flat, dtype=torch.float64).item()
        recorder.record(loss.item(), norm, flat.abs().max().item(), copy)
        return loss

    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_evaluations + 1,
        max_eval=max_evaluations + 25,  # the recorder ends the run, on the evaluation
        history_size=history,
        tolerance_grad=tolerance,
        tolerance_change=1e-20,  # in effect: the loss is the same number as before
        line_search_fn="strong_wolfe",
    )
    initial, grads, message = copy(), [p.grad for p in parameters], NO_PROGRESS
    try:
        optimizer.step(evaluate)
    except Stop as stop:
        message = str(stop)
    finally:
        best = initial if recorder.point is None else recorder.point
        with torch.no_grad():
            for parameter, value, grad in zip(parameters, best, grads, strict=True):
                parameter.copy_(value)
                parameter.grad = grad
    return recorder.result(message, tolerance)
