"""Stacks of small transformers in PyTorch.  `gradlab.keras.transformer` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch.nn import functional as F

from gradlab.mlp import EPSILON
from gradlab.transformer import TransformerSpec

__all__ = ["cross_entropy_z", "network", "streams"]


@lru_cache(maxsize=32)
def network(spec: TransformerSpec) -> Callable:
    """The network of a spec, as `sweep.fit` wants it.

    Args:
        spec: the network; the same spec gives the same function.

    Returns:
        A function of weights, as `gradlab.transformer.initial_weights` names them, and x (members,
        batch, tokens, features).  It returns the logits (members, batch, classes), and what it
        noted, the largest size in the batch, (members,): "attention_logit", "output_logit" and
        "log_z", the logarithm of the softmax's denominator.
    """

    def outputs(weights: Mapping[str, torch.Tensor], x: torch.Tensor):
        _, logits, largest = _forward(spec, weights, x)
        noted = {
            "attention_logit": torch.stack(largest).amax(0),
            "output_logit": logits.detach().abs().amax((1, 2)),
            "log_z": torch.logsumexp(logits.detach(), -1).abs().amax(1),
        }
        return logits, noted

    return outputs


def streams(
    spec: TransformerSpec, weights: Mapping[str, torch.Tensor], x: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What runs from block to block: for gradients with respect to it.

    Args:
        spec: the network.
        weights: as `gradlab.transformer.initial_weights` names them.
        x: (members, batch, tokens, features).

    Returns:
        The embedded input and every block's output, depth + 1 tensors (members, batch · tokens,
        width), and the logits (members, batch, classes).
    """
    return _forward(spec, weights, x)[:2]


def cross_entropy_z(strength: float = 1e-4) -> Callable:
    """Cross-entropy plus `strength` · (log Z)², Z the sum of the exponentials.

    The z-loss of PaLM (Chowdhery et al. 2023).

    Args:
        strength: of the second term; 0 leaves plain cross-entropy.

    Returns:
        A function of logits (members, batch, classes) and classes (members, batch) that returns
        the mean over the batch, (members,): a `loss` for `sweep.fit`.
    """

    def loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        log_z = torch.logsumexp(logits, -1)
        right = logits.gather(-1, classes[..., None])[..., 0]
        return (log_z - right + strength * log_z.square()).mean(-1)

    return loss


def _forward(spec, weights, x):
    members, batch, tokens, features = x.shape
    h = x.reshape(members, batch * tokens, features) @ weights["embedding"]
    h = h + weights["positions"].repeat(1, batch, 1)
    stream, largest = [h], []
    parts = {name: weights[name].unbind(1) for name in _PER_BLOCK if name in weights}
    for number in range(spec.depth):
        block = {name: part[number] for name, part in parts.items()}
        scales = block["scale"].unbind(1)
        for sub_layer, scale in zip((_attention, _ffn), scales, strict=True):
            if spec.norm == "pre":
                h = h + sub_layer(spec, block, _norm(h, scale), tokens, largest)
            else:
                skipped = h if spec.alpha == 1 else spec.alpha * h
                h = _norm(skipped + sub_layer(spec, block, h, tokens, largest), scale)
        stream.append(h)
    if spec.norm == "pre":
        h = _norm(h, weights["last_scale"])
    pooled = h.view(members, batch, tokens, -1).mean(2)
    return stream, pooled @ weights["output"], largest


_PER_BLOCK = ("qkv", "out", "up", "down", "scale", "qk_scale")


def _norm(x, scale):
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON) * scale[:, None]


def _attention(spec, block, x, tokens, largest):
    """The largest absolute logit of each member joins `largest`."""
    members, rows, width = x.shape
    each = width // spec.heads
    qkv = (x @ block["qkv"]).view(members, rows // tokens, tokens, 3, spec.heads, each)
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # (members, batch, heads, tokens, each)
    if spec.qk_norm:
        scales = block["qk_scale"][:, :, None, None, None].unbind(1)
        query, key = (
            F.layer_norm(a, a.shape[-1:], eps=EPSILON) * s
            for a, s in zip((query, key), scales, strict=True)
        )
    # (members, batch, heads, keys, queries): softmax is four times as fast over columns.
    logits = key @ (query / each**0.5).transpose(-1, -2)
    largest.append(logits.detach().abs().flatten(1).amax(1))
    mixed = torch.softmax(logits, -2).transpose(-1, -2) @ value
    return mixed.transpose(2, 3).reshape(members, rows, width) @ block["out"]


def _ffn(spec, block, x, tokens, largest):
    return torch.relu(x @ block["up"]) @ block["down"]
