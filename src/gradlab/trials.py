"""Remedies against patients: every case of the two trained side by side, as members of one stack.

A `Patient` is a set of networks that share a fault.  A remedy is a name and the settings that it
changes; `REMEDIES` holds those of the book's table, in three groups.  `treat` gives every remedy to
every network of every patient, in as few calls of a framework's `sweep.train` as the settings
allow: what is a number may differ from member to member, what changes the computation may not.
Whoever trains networks of another form with `sweep.fit` finds the parts in `each`, `groups` and
`how`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gradlab.sweep import Train, Update

__all__ = [
    "ARITHMETIC",
    "MODEL",
    "REMEDIES",
    "TRAINING",
    "Patient",
    "Trial",
    "each",
    "groups",
    "how",
    "treat",
]

Settings = Mapping[str, Any]

TRAINING: dict[str, dict[str, Any]] = {
    "rate ÷ 10": {"lr": 0.1},
    "rate ÷ 100": {"lr": 0.01},
    "warm-up": {"warm": 0.5},
    "momentum 0.9": {"momentum": 0.9},
    "Adam at 0.001": {"adam": 0.001},
    "L2 penalty 0.1": {"l2": 0.1},
    "clip norm to 1": {"threshold": 1.0},
    "dropout 0.5": {"dropout": 0.5},
}
"""Settings of the training, by name.

Factor of the learning rate (`lr`), share of the steps over which the
rate rises in a straight line (`warm`), β of the heavy ball (`momentum`), Adam in place of gradient
descent, at this rate (`adam`), strength of l2/2·Σw² (`l2`), largest norm of the gradient
(`threshold`), share of the hidden outputs set to zero in a step (`dropout`)."""

MODEL: dict[str, dict[str, Any]] = {
    "leak 0.3": {"slope": 0.3},
    "critical start": {"critical": True},
    "layer norm": {"normalization": "layer"},
    "batch norm": {"normalization": "batch"},
    "scaled skips": {"skip": True},
}
"""Changes of the model, by name.

Slope of a leaky ReLU for negative inputs (`slope`), weights that stay at
the critical gain (`critical`), normalisation before the activation (`normalization`), each layer
added to its input, times one over the root of the number of layers (`skip`)."""

ARITHMETIC: dict[str, dict[str, Any]] = {
    "wider format": {"wide": True},
    "safe root": {"safe": 1e-6},
    "loss factor ÷ 2¹⁴": {"scale": 2.0**10},
}
"""Changes of the arithmetic, by name.

The next wider format (`wide`), a constant under a root (`safe`), the
factor of a loss that was scaled with 2²⁴ (`scale`).  `treat` knows the first alone: a multilayer
perceptron of `sweep.train` has no root and no factor."""

REMEDIES: dict[str, dict[str, Any]] = {"nothing": {}} | TRAINING | MODEL | ARITHMETIC
"""The control and all remedies, in the order of the table."""

OF_TRAIN = frozenset(name for group in (TRAINING, MODEL) for s in group.values() for name in s)
"""The settings that `treat` knows, with "wide"."""


@dataclass(frozen=True)
class Patient:
    """Networks with one fault: how they start and how they are trained.

    Attributes:
        weights: one array (networks, fan_in, fan_out) per layer, at the critical gain.
        gain: what multiplies every layer's weights; the critical start leaves it out.
        rate: learning rate of plain gradient descent.
        activation: a name that `gradlab.theory.activation` knows; "leaky_relu" is a ReLU unless a
            remedy gives it a slope.
    """

    weights: Sequence[np.ndarray]
    gain: float = 1.0
    rate: float = 0.1
    activation: str = "leaky_relu"


class Trial(NamedTuple):
    """What became of one patient under one remedy.

    Attributes:
        accuracy: share of the held-out examples read, shape (networks,); NaN where a number
            stopped being finite.
        grad_norm: norm of the loss's gradient at every step, shape (steps, networks).
    """

    accuracy: np.ndarray
    grad_norm: np.ndarray


def each(cases: Sequence[Settings], name: str, networks: int, default: Any = 0.0) -> np.ndarray:
    """One setting of every member, shape (cases · networks,): a case's networks lie together.

    Args:
        cases: the settings of every case.
        name: which one.
        networks: members of each case.
        default: its value in a case that does not name it.

    Example:
        >>> each([{}, {"momentum": 0.9}], "momentum", 2)
        array([0. , 0. , 0.9, 0.9])
    """
    return np.repeat([case.get(name, default) for case in cases], networks)


def groups(remedies: Mapping[str, Settings], *names: str) -> list[list[str]]:
    """The remedies that agree in the named settings, and so may be trained side by side.

    Example:
        >>> groups({"none": {}, "Adam": {"adam": 0.001}, "clip": {"threshold": 1.0}}, "adam")
        [['none', 'clip'], ['Adam']]
    """
    found: dict[tuple, list[str]] = {}
    for remedy, settings in remedies.items():
        found.setdefault(tuple(settings.get(name) for name in names), []).append(remedy)
    return list(found.values())


def how(
    cases: Sequence[Settings], rate: float | np.ndarray, rows: np.ndarray
) -> dict[str, np.ndarray | Update]:
    """Rate, update and minibatches of every member, as `sweep.train` and `sweep.fit` take them.

    Args:
        cases: the settings of every case; either all or none of them with "adam".
        rate: learning rate of gradient descent, one for all or one per case.
        rows: minibatches of one case's networks, shape (steps, networks, batch); every case sees
            the same ones.

    Returns:
        The arguments `lr`, `update` and `rows`.

    Raises:
        ValueError: Adam beside gradient descent.
    """
    steps, networks, _ = rows.shape
    every = {"rows": np.tile(rows, (1, len(cases), 1))}
    adam = ["adam" in case for case in cases]
    if all(adam):
        return every | {"lr": each(cases, "adam", networks), "update": Update("adam")}
    if any(adam):
        raise ValueError(f"Adam and gradient descent cannot share a call, got the cases {cases!r}")
    warm = np.maximum(1, steps * each(cases, "warm", networks))  # steps of the rise
    update = Update(
        "momentum",
        momentum=each(cases, "momentum", networks),
        l2=each(cases, "l2", networks),
        clip="norm",
        threshold=each(cases, "threshold", networks, np.inf),
        schedule=np.minimum(1, np.arange(1, steps + 1)[:, None] / warm),
    )
    rates = np.repeat(np.broadcast_to(rate, len(cases)), networks)
    return every | {"lr": rates * each(cases, "lr", networks, 1.0), "update": update}


def treat(
    train: Train,
    patients: Mapping[str, Patient],
    remedies: Mapping[str, Settings],
    x: np.ndarray,
    y: np.ndarray,
    *,
    rows: np.ndarray | Mapping[str, np.ndarray],
    x_test: np.ndarray,
    y_test: np.ndarray,
    seed: int = 0,
) -> dict[str, dict[str, Trial]]:
    """Train every network of every patient under every remedy.

    Args:
        train: `gradlab.torch.sweep.train` or `gradlab.keras.sweep.train`.
        patients: by name, with as many networks each, and layers and activation alike.
        remedies: by name, with settings of `TRAINING`, `MODEL` or "wide".
        x, y: training inputs, shape (n, features), and classes, shape (n,).
        rows: minibatches of a patient's networks, shape (steps, networks, batch), values in
            [0, n); one array for all patients, or one for each by name.  Every remedy sees the
            same ones.
        x_test, y_test: the held-out examples.
        seed: of the dropout's masks.

    Returns:
        {patient: {remedy: Trial}}, in the order of `patients` and `remedies`.

    Raises:
        ValueError: patients that differ in shape or activation, or a setting that `sweep.train`
            does not have.
    """
    every = list(patients.values())
    looks = {(tuple(w.shape for w in p.weights), p.activation) for p in every}
    if len(looks) != 1:
        raise ValueError(
            f"patients must have the same shapes and activation, got {len(looks)} kinds: {looks}"
        )
    unknown = {name for settings in remedies.values() for name in settings} - OF_TRAIN - {"wide"}
    if unknown:
        raise ValueError(
            f"sweep.train has no {sorted(unknown)}; a remedy may set {sorted(OF_TRAIN | {'wide'})}"
        )
    networks, layers = len(every[0].weights[0]), len(every[0].weights)
    batches = [rows[p] if isinstance(rows, Mapping) else rows for p in patients]
    found: dict[str, dict[str, Trial]] = {patient: {} for patient in patients}
    for group in groups(remedies, "adam", "normalization", "skip", "wide"):
        first = remedies[group[0]]
        cases = [remedies[remedy] for _ in every for remedy in group]
        owner = np.repeat(np.arange(len(every)), len(group))  # whose case it is
        gain = np.repeat(np.array([p.gain for p in every])[owner], networks)
        gain = np.where(each(cases, "critical", networks, False), 1.0, gain)[:, None, None]
        starts = [np.concatenate([every[p].weights[n] for p in owner]) for n in range(layers)]
        dtype = "float64" if first.get("wide") else "float32"
        told = how(cases, np.array([p.rate for p in every])[owner], batches[0])
        told["rows"] = np.concatenate([batches[p] for p in owner], axis=1)
        run = train(
            [(start * gain).astype(dtype) for start in starts],
            x,
            y,
            **told,
            activation=every[0].activation,
            slope=each(cases, "slope", networks),
            dropout=each(cases, "dropout", networks),
            normalization=first.get("normalization"),
            skip=layers**-0.5 if first.get("skip") else None,
            x_test=x_test,
            y_test=y_test,
            seed=seed,
        )
        names = [(patient, remedy) for patient in patients for remedy in group]
        for n, (patient, remedy) in enumerate(names):
            own = slice(n * networks, (n + 1) * networks)
            found[patient][remedy] = Trial(run.accuracy[own], run.grad_norm[:, own])
    return {patient: {r: found[patient][r] for r in remedies} for patient in patients}
