"""Small transformers: what to build, and the initial weights of a stack of them, in NumPy.

A *member* is one network of a stack, as in `gradlab.sweep`.  `gradlab.torch.transformer` and
`gradlab.keras.transformer` hold the networks, as functions that `sweep.fit` trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NORMS = ("post", "pre", "deepnorm")


@dataclass(frozen=True)
class TransformerSpec:
    """An encoder that classifies a sequence: embedding, blocks, mean over tokens, output layer.

    A block has two sub-layers f, attention and a two-layer ReLU network (FFN), each with a skip
    connection and a layer normalisation N.  There are no biases and no dropout; N has a learned
    scale and no shift.

    Attributes:
        tokens: length of the sequence.
        features: width of an input token.
        classes: number of outputs.
        width: width d of the stream that runs through all blocks.
        hidden: width of the FFN's hidden layer.
        depth: number of blocks L, two sub-layers each.
        heads: attention heads; they divide the width.
        norm: "post", N(x + f(x)); "pre", x + f(N(x)) and a last N before the output layer; or
            "deepnorm", N(αx + f(x)) with values, attention output and FFN scaled by β at the start
            (Wang et al. 2022; α and β as implementations set them for an encoder alone).
        qk_norm: whether queries and keys are normalised within each head (Dehghani et al. 2023).

    Raises:
        ValueError: a field out of its range; the message names it.
    """

    tokens: int = 8
    features: int = 8
    classes: int = 10
    width: int = 16
    hidden: int = 32
    depth: int = 12
    heads: int = 2
    norm: str = "post"
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "features", "classes", "width", "hidden", "depth", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {self.norm!r}")
        if self.width % self.heads:
            raise ValueError(
                f"heads must divide the width, got {self.heads} heads and a width of {self.width}"
            )

    @property
    def alpha(self) -> float:
        """What multiplies the skip connection, (2L)^¼ in DeepNorm and else 1."""
        return (2 * self.depth) ** 0.25 if self.norm == "deepnorm" else 1.0

    @property
    def beta(self) -> float:
        """What multiplies some initial weights, (8L)^-¼ in DeepNorm and else 1."""
        return (8 * self.depth) ** -0.25 if self.norm == "deepnorm" else 1.0


def initial_weights(
    spec: TransformerSpec,
    seeds: Iterable[int],
    *,
    query_scale: float = 1.0,
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Random initial weights of one member per seed.

    Matrices have the variance 2/(fan-in + fan-out) of Glorot and Bengio (2010); all scales are 1.
    Of one seed, "post", "pre" and "deepnorm" get the same draws, whatever the depth: a
    shallower network's blocks are the first of a deeper one's.

    Args:
        spec: the network.
        seeds: one per member.
        query_scale: multiplies the query and key matrices; the attention logits grow with its
            square.
        dtype: of the result.

    Returns:
        "embedding" (members, features, width), "positions" (members, tokens, width); for all blocks
        at once "qkv" (members, depth, width, 3 · width), queries first, "out" (members, depth,
        width, width), "up" (…, width, hidden), "down" (…, hidden, width), "scale" (members, depth,
        2, width), with `qk_norm` "qk_scale" (members, depth, 2, width / heads); "last_scale"
        (members, width) for "pre"; and "output" (members, width, classes).

    Raises:
        ValueError: `seeds` is empty.
    """
    d, members = spec.width, []
    for seed in seeds:
        ends, blocks = (np.random.default_rng([seed, part]) for part in (0, 1))
        own = {
            "embedding": ends.normal(size=(spec.features, d)) / np.sqrt(spec.features),
            "positions": ends.normal(size=(spec.tokens, d)),
        }
        per_block = [_block(spec, blocks, query_scale) for _ in range(spec.depth)]
        own |= {name: np.stack([block[name] for block in per_block]) for name in per_block[0]}
        own["scale"] = np.ones((spec.depth, 2, d))
        if spec.qk_norm:
            own["qk_scale"] = np.ones((spec.depth, 2, d // spec.heads))
        if spec.norm == "pre":
            own["last_scale"] = np.ones(d)
        own["output"] = ends.normal(size=(d, spec.classes)) / np.sqrt(d)
        members.append(own)
    if not members:
        raise ValueError("seeds is empty: at least one member is needed")
    return {name: np.stack([own[name] for own in members]).astype(dtype) for name in members[0]}


def _block(spec: TransformerSpec, rng: np.random.Generator, query_scale: float) -> dict:
    d, hidden = spec.width, spec.hidden

    def glorot(rows: int, columns: int) -> np.ndarray:
        return rng.normal(size=(rows, columns)) * np.sqrt(2 / (rows + columns))

    query, key, value = (glorot(d, d) for _ in range(3))
    scaled = [query_scale * query, query_scale * key, spec.beta * value]
    return {
        "qkv": np.concatenate(scaled, 1),
        "out": spec.beta * glorot(d, d),
        "up": spec.beta * glorot(d, hidden),
        "down": spec.beta * glorot(hidden, d),
    }
