"""Stacks of small transformers in TensorFlow.  `gradlab.torch.transformer` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import tensorflow as tf

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

    def outputs(weights: Mapping[str, tf.Tensor], x: tf.Tensor):
        _, logits, largest = _forward(spec, weights, x)
        noted = {
            "attention_logit": tf.reduce_max(tf.stack(largest), 0),
            "output_logit": tf.reduce_max(tf.abs(tf.stop_gradient(logits)), (1, 2)),
            "log_z": tf.reduce_max(tf.abs(tf.reduce_logsumexp(tf.stop_gradient(logits), -1)), 1),
        }
        return logits, noted

    return outputs


def streams(
    spec: TransformerSpec, weights: Mapping[str, tf.Tensor], x: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor]:
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

    def loss(logits: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
        log_z = tf.reduce_logsumexp(logits, -1)
        right = tf.gather(logits, classes, batch_dims=2)
        return tf.reduce_mean(log_z - right + strength * tf.square(log_z), -1)

    return loss


def _forward(spec, weights, x):
    members, batch, tokens = x.shape[0], tf.shape(x)[1], spec.tokens
    h = tf.reshape(x, (members, batch * tokens, spec.features)) @ weights["embedding"]
    h = h + tf.tile(weights["positions"], (1, batch, 1))
    stream, largest = [h], []
    parts = {name: tf.unstack(weights[name], axis=1) for name in _PER_BLOCK if name in weights}
    for number in range(spec.depth):
        block = {name: part[number] for name, part in parts.items()}
        scales = tf.unstack(block["scale"], axis=1)
        for sub_layer, scale in zip((_attention, _ffn), scales, strict=True):
            if spec.norm == "pre":
                h = h + sub_layer(spec, block, _norm(h, scale), largest)
            else:
                skipped = h if spec.alpha == 1 else spec.alpha * h
                h = _norm(skipped + sub_layer(spec, block, h, largest), scale)
        stream.append(h)
    if spec.norm == "pre":
        h = _norm(h, weights["last_scale"])
    pooled = tf.reduce_mean(tf.reshape(h, (members, batch, tokens, spec.width)), 2)
    return stream, pooled @ weights["output"], largest


_PER_BLOCK = ("qkv", "out", "up", "down", "scale", "qk_scale")


def _norm(x, scale):
    return _normalized(x) * scale[:, None]


def _normalized(x):
    mean = tf.reduce_mean(x, -1, keepdims=True)
    centered = x - mean
    variance = tf.reduce_mean(tf.square(centered), -1, keepdims=True)
    return centered * tf.math.rsqrt(variance + EPSILON)


def _attention(spec, block, x, largest):
    """The largest absolute logit of each member joins `largest`."""
    members, rows, each = x.shape[0], tf.shape(x)[1], spec.width // spec.heads
    shape = (members, rows // spec.tokens, spec.tokens, 3, spec.heads, each)
    qkv = tf.transpose(tf.reshape(x @ block["qkv"], shape), (3, 0, 1, 4, 2, 5))
    query, key, value = tf.unstack(qkv)  # (members, batch, heads, tokens, each)
    if spec.qk_norm:
        scales = tf.unstack(block["qk_scale"][:, :, None, None, None], axis=1)
        query, key = (_normalized(a) * s for a, s in zip((query, key), scales, strict=True))
    # (members, batch, heads, queries, keys)
    logits = tf.matmul(query / each**0.5, key, transpose_b=True)
    largest.append(tf.reduce_max(tf.abs(tf.stop_gradient(logits)), (1, 2, 3, 4)))
    mixed = tf.transpose(tf.nn.softmax(logits) @ value, (0, 1, 3, 2, 4))
    return tf.reshape(mixed, (members, rows, spec.width)) @ block["out"]


def _ffn(spec, block, x, largest):
    return tf.nn.relu(x @ block["up"]) @ block["down"]
