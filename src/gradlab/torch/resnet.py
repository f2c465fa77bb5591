"""A bottleneck ResNet in PyTorch, at any width, with and without skips."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from gradlab import mlp
from gradlab import resnet as plan

__all__ = [
    "ResNet",
    "block_gradients",
    "get_weights",
    "gradients",
    "load_weights",
    "recalibrate",
]


class ResNet(nn.Module):
    """The network of a `gradlab.resnet.ResNetSpec`.

    Args:
        spec: the network.
        seed: of the initial weights, which equal Keras's; None leaves PyTorch's own draw, which is
            quicker at full size and the only choice on the device "meta".

    Shapes:
        input (samples, height, width, channels), as in Keras; output (samples, classes): logits.
    """

    def __init__(self, spec: plan.ResNetSpec, seed: int | None = 0) -> None:
        super().__init__()
        self.spec, self.blocks = spec, plan.blocks(spec)
        self.layers, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for conv in plan.convolutions(spec):
            self.layers[_key(conv.name)] = nn.Conv2d(
                *conv.fan, conv.kernel, conv.stride, padding=conv.kernel // 2, bias=False
            )
            if spec.normalization:
                norm = nn.BatchNorm2d(conv.fan[1], eps=spec.epsilon, momentum=spec.momentum)
                self.norms[_key(conv.name)] = norm
                if spec.zero_scale and conv.name.endswith("conv2"):
                    nn.init.zeros_(norm.weight)
        self.layers["output"] = nn.Linear(plan.features(spec), spec.classes)
        if seed is not None:
            load_weights(self, plan.initial_weights(spec, seed))

    def forward(self, x: torch.Tensor, record: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Logits of a batch; `record` receives every block's input and the last block's output."""
        x = self._activate(self._convolve(plan.stem(self.spec), x.permute(0, 3, 1, 2)))
        if self.spec.stem == "large":
            x = F.max_pool2d(x, 3, 2, padding=1)
        for block in self.blocks:
            if record is not None:
                record.append(x)
            branch = x
            for number, conv in enumerate(block.convs):
                branch = self._convolve(conv, self._activate(branch) if number else branch)
            if self.spec.skip:
                branch = branch + (self._convolve(block.project, x) if block.project else x)
            x = self._activate(branch)
        if record is not None:
            record.append(x)
        return self.layers["output"](x.mean((2, 3)))

    def _convolve(self, conv: plan.Conv, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[_key(conv.name)](x)
        return self.norms[_key(conv.name)](x) if self.spec.normalization else x

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(x, self.spec.slope) if self.spec.slope else F.relu(x)


def _key(name: str) -> str:
    return name.replace(".", "_")  # a module's name may hold no point


def _parameters(model: ResNet) -> dict[str, nn.Parameter]:
    """The model's parameters under the names that both frameworks share."""
    found = {}
    for name in plan.shapes(model.spec):
        layer, part = name.rsplit(".", 1)
        if part in ("scale", "shift"):
            found[name] = getattr(model.norms[_key(layer)], {"scale": "weight"}.get(part, "bias"))
        else:
            found[name] = getattr(model.layers[_key(layer)], part)
    return found


def _ours(value: torch.Tensor) -> np.ndarray:
    """As an array in our orientation: (height, width, in, out) or (in, out)."""
    array = value.detach().cpu().numpy()
    return (array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T).copy()


def load_weights(model: ResNet, weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights into a model, in place; running statistics stay as they are.

    Args:
        model: a `ResNet`.
        weights: as `gradlab.resnet.initial_weights` or `get_weights` of either framework give them.

    Raises:
        ValueError: a missing, unexpected or misshapen array; the message names each.
    """
    mlp.check_weights(weights, plan.shapes(model.spec))
    with torch.no_grad():
        for name, parameter in _parameters(model).items():
            array = np.asarray(weights[name])
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
            parameter.copy_(torch.tensor(array))


def get_weights(model: ResNet) -> dict[str, np.ndarray]:
    """The model's weights as arrays; the inverse of `load_weights`."""
    return {name: _ours(parameter) for name, parameter in _parameters(model).items()}


def _differentiate(model: ResNet, x: np.ndarray, y: np.ndarray, which: str) -> tuple:
    """Loss, and its derivatives by "parameters" or "blocks", in training mode, nothing changed."""
    parameters, record = _parameters(model), []
    was_training = model.training
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inputs = torch.as_tensor(x, dtype=model.layers["output"].weight.dtype)
    logits = torch.func.functional_call(model, buffers, (inputs,), {"record": record})
    model.train(was_training)
    loss = F.cross_entropy(logits, torch.as_tensor(y, dtype=torch.long))
    by = list(parameters.values()) if which == "parameters" else record
    return loss, torch.autograd.grad(loss, by)


def gradients(model: ResNet, x: np.ndarray, y: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Cross-entropy loss and its gradients, in training mode.

    It touches neither `.grad` nor the running statistics.

    Args:
        model: a `ResNet`.
        x: (samples, height, width, channels).
        y: (samples,), class numbers.

    Returns:
        The loss, and a dict from name to gradient, shaped like `get_weights`.
    """
    loss, grads = _differentiate(model, x, y, "parameters")
    names = plan.shapes(model.spec)
    return loss.item(), {name: _ours(grad) for name, grad in zip(names, grads, strict=True)}


def block_gradients(model: ResNet, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Norms of dL/d(block input) in training mode, over all samples, pixels and channels.

    Args:
        model: a `ResNet`.
        x: (samples, height, width, channels).
        y: (samples,), class numbers.

    Returns:
        (blocks + 1,): for each block's input, and last for the last block's output.
    """
    _, grads = _differentiate(model, x, y, "blocks")
    return np.array([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads])


def recalibrate(model: ResNet, x: np.ndarray, batch_size: int = 128) -> None:
    """Replace the running statistics by means over one pass, in place; no weight changes.

    Args:
        model: a `ResNet` with normalisation.
        x: (samples, height, width, channels), training inputs.  Samples beyond the last full batch
            are left out.
        batch_size: at least 2, at most the number of samples.

    Raises:
        ValueError: a batch size out of range, or a model without normalisation.
    """
    if not model.spec.normalization:
        raise ValueError("recalibrate needs normalization='batch', got None")
    if not 2 <= batch_size <= len(x):
        raise ValueError(f"batch_size must be between 2 and {len(x)}, got {batch_size!r}")
    was_training = model.training
    model.train()
    with torch.no_grad():
        for norm in model.norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over all batches
        for start in range(0, len(x) - batch_size + 1, batch_size):
            model(torch.as_tensor(x[start : start + batch_size]))
    for norm in model.norms.values():
        norm.momentum = model.spec.momentum
    model.train(was_training)
