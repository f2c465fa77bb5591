"""Many small networks trained at once: what both frameworks' `sweep.train` share.

A *member* is one network with its own weights, learning rate, settings and minibatches.  All
members have the same shape, so that one stacked matrix product serves them all: forty networks
cost little more than one, where one is too small to keep a processor busy.  `train` trains
multilayer perceptrons and `fit` any network that you can write as a function of stacked weights.
This module holds the arguments' checks, the minibatches and the result, and `distribute`, which
spreads the members over processes or machines; the training itself is in `gradlab.torch.sweep` and
`gradlab.keras.sweep`, under the same names and signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from gradlab import theory
from gradlab.updates import NUMBERS, Number, Plan, Update, per_member

__all__ = ["MembersFailed", "SweepResult", "Update", "distribute", "dropout_draws", "minibatches"]

ACTIVATIONS = tuple(theory.activation_names())
LOSSES = ("cross_entropy", "mse")
NORMALIZATIONS = (None, "batch", "layer")
EVALUATED = 256
"""How many examples `fit` evaluates at a time: what a batch normalisation sees."""
LARGEST = 2**20
"""How many numbers a layer of a share of the members may have in an evaluation."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep measured.  "Step t" means before the t-th update, counted from 0.

    Attributes:
        loss: mean minibatch loss, without penalties, shape (steps, members).
        grad_norm: Euclidean norm of that loss's gradient over all weights, before any clipping,
            shape (steps, members).
        delta_norm: Euclidean norm over the minibatch of the gradient of the mean loss with respect
            to each layer's output before normalisation and activation, shape (steps, members,
            layers); None unless recorded.
        update_norm: Euclidean norm of what the step adds to the weights, shape (steps, members);
            None unless recorded.
        weight_norm: Euclidean norm of all weights, shape (steps, members); None unless recorded.
        array_norm: Euclidean norm of the loss's gradient over each weight array, shape (steps,
            members, arrays); None unless recorded.
        noted: what the network of `fit` noted at each step, by name, shape (steps, members) each.
        accuracy: share of the test examples (of the training examples when no test set is given)
            that the trained member classifies right, shape (members,); NaN for a failed member and
            for a regression.
        train_accuracy: the same of the training examples, all of them, with the trained weights:
            where there is a test set, one more pass over them at the end.  Its outputs are held
            together, members × examples × outputs numbers.
        failed: whether the loss, a gradient or a weight stopped being finite, shape (members,).
        first_nonfinite: the first step at which that showed, shape (members,); -1 if never.
        weights: the trained weights, shaped like those given: one array (members, fan_in, fan_out)
            per layer from `train`, a dict of arrays from `fit`.
    """

    loss: np.ndarray
    grad_norm: np.ndarray
    delta_norm: np.ndarray | None
    update_norm: np.ndarray | None
    weight_norm: np.ndarray | None
    array_norm: np.ndarray | None
    noted: dict[str, np.ndarray]
    accuracy: np.ndarray
    train_accuracy: np.ndarray
    failed: np.ndarray
    first_nonfinite: np.ndarray
    weights: tuple[np.ndarray, ...] | dict[str, np.ndarray]


class Network(NamedTuple):
    """A network of `fit`: its function, and how its weights are called and shaped."""

    function: Callable
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # with the leading axis of members

    def __call__(self, matrices: Sequence, x, reshape: Callable) -> tuple:
        """Its outputs and what it noted, given the weights as stacked matrices."""
        named = zip(self.names, matrices, self.shapes, strict=True)
        result = self.function({name: reshape(w, shape) for name, w, shape in named}, x)
        return result if isinstance(result, tuple) else (result, {})


class Setting(NamedTuple):
    """What is computed, whatever the numbers: fixed when a graph is traced."""

    plan: Plan
    loss: str | Callable
    activation: str = "relu"
    output_scale: float = 1.0
    normalization: str | None = None
    skip: float | None = None
    dropout: bool = False
    network: Network | None = None  # of `fit`; `train` builds its own from the rest
    record_layers: bool = False
    record_arrays: bool = False
    record_updates: bool = False


@dataclass(frozen=True)
class Problem:
    """The checked arguments of a sweep, as arrays of one floating dtype."""

    weights: tuple[np.ndarray, ...]  # (members, fan_in, fan_out) each
    x: np.ndarray  # (n, features) or (members, n, features); of `fit`, (n, …)
    y: np.ndarray  # (n,) classes or (n, outputs) targets, or stacked likewise
    x_rows: np.ndarray  # (steps, members, batch) int64: each minibatch's rows of `flat_x`
    y_rows: np.ndarray  # its rows of `flat_y`: y may be stacked when x is shared, and vice versa
    rates: np.ndarray  # (steps, members, 1, 1)
    numbers: dict[str, np.ndarray]  # of the update, "slope" and "dropout", (members, 1, 1) each
    draws: np.ndarray  # (steps, batch, hidden units) numbers in [0, 1); no units without dropout
    x_test: np.ndarray  # (n_test, features) or (members, n_test, features)
    y_test: np.ndarray
    setting: Setting
    progress: bool

    def flat_x(self) -> np.ndarray:
        """All members' inputs below each other, (rows, features): what `x_rows` counts."""
        if self.setting.network is not None:
            return self.x
        return self.x.reshape(-1, self.x.shape[-1])

    def flat_y(self) -> np.ndarray:
        """The same of the targets: what `y_rows` counts."""
        if self.setting.network is not None:
            return self.y
        tail = () if self.setting.loss == "cross_entropy" else self.y.shape[-1:]
        return self.y.reshape(-1, *tail)


class Measured(NamedTuple):
    """What a framework measures while it trains; shapes as in `SweepResult`."""

    loss: np.ndarray
    grad_norm: np.ndarray
    delta_norm: np.ndarray | None
    update_norm: np.ndarray | None
    weight_norm: np.ndarray | None
    array_norm: np.ndarray | None
    noted: dict[str, np.ndarray]
    weights: Sequence[np.ndarray]
    outputs: np.ndarray  # of the trained members on the test set, (members, n_test, outputs)
    train_outputs: np.ndarray  # on the training set


def shares(weights: Sequence[np.ndarray], examples: int) -> list[slice]:
    """Equal shares of the members of `train`, to be evaluated one after another: all at once would
    be the largest thing in memory.
    """
    members, widest = len(weights[0]), max(w.shape[2] for w in weights)
    fits = max(1, LARGEST // (examples * widest))
    size = max(size for size in range(1, members + 1) if members % size == 0 and size <= fits)
    return [slice(start, start + size) for start in range(0, members, size)]


class Train(Protocol):
    """A framework's `sweep.train`."""

    def __call__(self, weights, x, y, *, lr, **settings) -> SweepResult: ...


class Fit(Protocol):
    """A framework's `sweep.fit`."""

    def __call__(self, network, weights, x, y, *, lr, **settings) -> SweepResult: ...


def minibatches(n: int, members: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Indices of every minibatch, drawn uniformly with replacement.

    Args:
        n: number of training examples.
        members, steps, batch_size: the shape wanted.
        seed: of NumPy's generator, so that both frameworks see the same examples.

    Returns:
        int64 array, shape (steps, members, batch_size), values in [0, n).
    """
    return np.random.default_rng(seed).integers(n, size=(steps, members, batch_size))


def dropout_draws(steps: int, batch: int, units: int, seed: int) -> np.ndarray:
    """A number for every hidden unit of every example of every step: kept where ≥ the rate.

    All members of a sweep share them, so that a share of the members sees what all would see, and a
    unit that a low rate drops is dropped at every higher one.

    Args:
        steps, batch, units: the shape wanted; units of all hidden layers, the first layer's first.
        seed: the one that `minibatches` gets; the two are independent.

    Returns:
        float32 array, shape (steps, batch, units), uniform in [0, 1).
    """
    return np.random.default_rng([seed, 1]).random((steps, batch, units), dtype=np.float32)


def adds_input(setting: Setting, weights: Sequence, layer: int) -> bool:
    """Whether layer number `layer` adds its input to its output."""
    _, fan_in, fan_out = weights[layer].shape
    return setting.skip is not None and fan_in == fan_out and layer + 1 < len(weights)


def trainer(engine: Callable[[Problem], Measured], module: str) -> Train:
    """A framework's `train`: one signature, one check and one judgement around its engine.

    Args:
        engine: trains a checked problem and returns what it measured.
        module: the module that calls it; processes look `train` up there.
    """

    def train(
        weights: Sequence[np.ndarray],
        x: np.ndarray,
        y: np.ndarray,
        *,
        lr: Number,
        update: Update = Update(),  # noqa: B008 (frozen)
        steps: int = 200,
        batch_size: int = 64,
        seed: int = 0,
        rows: np.ndarray | None = None,
        activation: str = "relu",
        loss: str = "cross_entropy",
        output_scale: float = 1.0,
        normalization: str | None = None,
        skip: float | None = None,
        slope: Number = 0.01,
        dropout: Number = 0.0,
        x_test: np.ndarray | None = None,
        y_test: np.ndarray | None = None,
        record_layers: bool = False,
        record_updates: bool = False,
        progress: bool = False,
    ) -> SweepResult:
        """Train a stack of multilayer perceptrons without biases on minibatches.

        A member's arithmetic never meets another's: one that overflows leaves the rest as they
        were.  The arrays passed in are not changed.

        Args:
            weights: one array (members, fan_in, fan_out) per layer, all float32 or all float64,
                which is then the precision of the training.
            x: inputs, shape (n, features) for all members or (members, n, features).
            y: integer classes, shape (n,) or (members, n); for "mse" targets, shape (n, outputs)
                or (members, n, outputs).
            lr: learning rate, one for all or one per member.
            update: penalties, clipping, rule and schedule; plain gradient descent when left out.
            steps: number of updates.
            batch_size: examples per minibatch, drawn with replacement.
            seed: of the minibatches; the same seed gives both frameworks the same ones.
            rows: the minibatches themselves, shape (steps, members, batch), as `minibatches` gives
                them; `steps` and `batch_size` then have no say, and `seed` only in the dropout.
            activation: a name that `theory.activation` knows, after every layer but the last.
            loss: "cross_entropy" of softmax outputs, or "mse", half the squared distance to the
                target; both averaged over the minibatch.
            output_scale: a constant that multiplies the outputs before the loss; not trained.
            normalization: None, "batch" or "layer", before the activation of every layer but the
                last, without learned scale and shift; "batch" always takes the statistics of the
                examples at hand, in the evaluation too.
            skip: None, or s for x + s·layer(x) in every layer but the last whose input and output
                have the same width.
            slope: of "leaky_relu" for negative inputs, one for all or one per member.
            dropout: the share of every hidden layer's outputs that a training step sets to zero,
                0 ≤ dropout < 1, one for all or one per member.  What is kept is divided by
                1 - dropout ("inverted dropout", as in both frameworks).  The masks come from
                `dropout_draws`; the evaluation drops nothing.
            x_test, y_test: the examples that the accuracy is measured on; None takes `x` and `y`.
                The accuracy on all of `x` and `y` is measured in either case, after the last step;
                a share of the members at a time keeps large layers out of memory.
            record_layers: whether to keep the gradient norm of each layer's output.
            record_updates: whether to keep the norms of updates and weights.
            progress: whether to show a progress bar over the steps.

        Returns:
            A `gradlab.sweep.SweepResult`.

        Raises:
            ValueError: an argument whose shape or value does not fit.

        Example:
            >>> w = [np.ones((2, 3, 3), "float32"), np.ones((2, 3, 2), "float32")]
            >>> x, y = np.eye(3), np.array([0, 1, 0])
            >>> train(w, x, y, lr=[0.1, 1e30], steps=5).failed.tolist()
            [False, True]
        """
        problem = _check(
            weights, x, y, lr=lr, update=update, steps=steps, batch_size=batch_size, seed=seed,
            rows=rows, activation=activation, loss=loss, output_scale=output_scale,
            normalization=normalization, skip=skip, slope=slope, dropout=dropout, x_test=x_test,
            y_test=y_test, record_layers=record_layers, record_updates=record_updates,
            progress=progress,
        )  # fmt: skip
        return _judge(problem, engine(problem))

    train.__module__, train.__qualname__ = module, "train"
    return train


def _check(
    weights, x, y, *, lr, update, steps, batch_size, seed, rows, activation, loss, output_scale,
    normalization, skip, slope, dropout, x_test, y_test, record_layers, record_updates, progress,
) -> Problem:  # fmt: skip
    """The arguments of `train` as a problem; a ValueError if one does not fit."""
    for name, value, allowed in (
        ("activation", activation, ACTIVATIONS),
        ("loss", loss, LOSSES),
        ("normalization", normalization, NORMALIZATIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is none of {allowed}")
    if not isinstance(update, Update):
        raise ValueError(f"update must be a gradlab.sweep.Update, got {update!r}")
    weights = _check_weights(weights)
    dtype = weights[0].dtype
    members, features = weights[0].shape[:2]
    outputs = weights[-1].shape[2]
    x, y = _check_data("x", x, "y", y, dtype, members, features, outputs, loss)
    if (x_test is None) != (y_test is None):
        raise ValueError("x_test and y_test belong together, got only one of them")
    if x_test is None:
        x_test, y_test = x, y
    else:
        names = ("x_test", x_test, "y_test", y_test)
        x_test, y_test = _check_data(*names, dtype, members, features, outputs, loss)
    own = {"slope": per_member("slope", slope, members, dtype)}
    own["dropout"] = per_member("dropout", dropout, members, dtype)
    if not ((own["dropout"] >= 0) & (own["dropout"] < 1)).all():
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
    setting = Setting(
        update.plan(),
        loss,
        activation,
        output_scale,
        normalization,
        skip,
        dropout=bool(own["dropout"].any()),
        record_layers=record_layers,
        record_updates=record_updates,
    )
    return _problem(
        setting, weights, (x, y), (x_test, y_test), x.shape[-2], own=own, lr=lr, update=update,
        rows=rows, steps=steps, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip


def _problem(
    setting: Setting, weights, data, test_data, n: int, *, own, lr, update, rows, steps, batch_size,
    seed, progress,
) -> Problem:  # fmt: skip
    """Checked weights and data, with the minibatches and every step's numbers."""
    members, dtype = len(weights[0]), weights[0].dtype
    (x, y), (x_test, y_test) = data, test_data
    if rows is None:
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        rows = minibatches(n, members, steps, batch_size, seed)
    else:
        rows = _check_rows(rows, members, n)
    stacked_rows = rows + n * np.arange(members)[:, None]
    rates = update.rates(lr, len(rows), members, dtype)
    units = sum(w.shape[2] for w in weights[:-1]) if setting.dropout else 0
    own_x = setting.network is None and x.ndim == 3
    own_y = setting.network is None and y.ndim == (2 if setting.loss == "cross_entropy" else 3)
    return Problem(
        weights=weights,
        x=x,
        y=y,
        x_rows=stacked_rows if own_x else rows,
        y_rows=stacked_rows if own_y else rows,
        rates=np.broadcast_to(rates, (len(rows), members, 1, 1)).copy(),
        numbers=update.numbers(members, dtype) | own,
        draws=dropout_draws(len(rows), rows.shape[2], units, seed),
        x_test=x_test,
        y_test=y_test,
        setting=setting,
        progress=progress,
    )


def _check_rows(rows: np.ndarray, members: int, n: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 3 or rows.shape[1] != members or 0 in rows.shape:
        raise ValueError(f"rows have shape {rows.shape}, expected (steps, {members}, batch)")
    if not np.issubdtype(rows.dtype, np.integer) or rows.min() < 0 or rows.max() >= n:
        raise ValueError(f"rows must be integers from 0 to {n - 1}, got {rows.dtype} {rows!r}")
    return rows.astype(np.int64)


def _check_weights(weights: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    weights = tuple(map(np.asarray, weights))
    shapes = [w.shape for w in weights]
    if not weights or any(len(shape) != 3 for shape in shapes):
        raise ValueError(
            f"weights have shapes {shapes}, expected one (members, fan_in, fan_out) array a layer"
        )
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"weights have shapes {shapes}, expected the same number of members")
    for number, (before, after) in enumerate(pairwise(shapes), 1):
        if before[2] != after[1]:
            raise ValueError(
                f"layer {number} has fan_in {after[1]}, expected {before[2]}: the fan_out of the "
                f"layer before it (shapes {shapes})"
            )
    _check_dtypes(weights)
    return weights


def _check_dtypes(weights: Sequence[np.ndarray]) -> None:
    dtypes = {w.dtype for w in weights}
    if dtypes not in ({np.dtype(np.float32)}, {np.dtype(np.float64)}):
        raise ValueError(f"weights are {sorted(map(str, dtypes))}, expected all float32 or float64")


def _check_data(
    x_name: str,
    x: np.ndarray,
    y_name: str,
    y: np.ndarray,
    dtype: np.dtype,
    members: int,
    features: int,
    outputs: int,
    loss: str,
) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype), np.asarray(y)
    n = x.shape[-2] if x.ndim >= 2 else 0
    if n == 0 or x.shape not in ((n, features), (members, n, features)):
        raise ValueError(
            f"{x_name} has shape {x.shape}, expected (n, {features}) or ({members}, n, {features})"
        )
    tail = () if loss == "cross_entropy" else (outputs,)
    if y.shape not in ((n, *tail), (members, n, *tail)):
        raise ValueError(
            f"{y_name} has shape {y.shape}, expected {(n, *tail)} or {(members, n, *tail)} "
            f"for loss {loss!r} and {n} rows of {x_name}"
        )
    if loss == "mse":
        return x, y.astype(dtype)
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{y_name} is {y.dtype}, expected integer classes for 'cross_entropy'")
    if y.min() < 0 or y.max() >= outputs:
        raise ValueError(
            f"{y_name} runs from {y.min()} to {y.max()}, expected classes 0 to {outputs - 1}: "
            "the last layer's fan_out"
        )
    return x, y.astype(np.int64)


def _judge(problem: Problem, measured: Measured) -> SweepResult:
    """The result of a sweep, from what a framework measured."""
    loss, grad_norm, weights = measured.loss, measured.grad_norm, tuple(measured.weights)
    bad = ~(np.isfinite(loss) & np.isfinite(grad_norm))  # (steps, members)
    bad[-1] |= ~np.all([np.isfinite(w).all((1, 2)) for w in weights], axis=0)
    failed = bad.any(0)

    def accuracy(outputs: np.ndarray, y: np.ndarray) -> np.ndarray:
        if not np.issubdtype(y.dtype, np.integer):
            return np.full(failed.shape, np.nan)
        return np.where(failed, np.nan, (outputs.argmax(-1) == y).mean(-1))

    network = problem.setting.network
    if network is not None:
        named = zip(network.names, weights, network.shapes, strict=True)
        weights = {name: w.reshape(shape) for name, w, shape in named}
    return SweepResult(
        loss=loss,
        grad_norm=grad_norm,
        delta_norm=measured.delta_norm,
        update_norm=measured.update_norm,
        weight_norm=measured.weight_norm,
        array_norm=measured.array_norm,
        noted=measured.noted,
        accuracy=accuracy(measured.outputs, problem.y_test),
        train_accuracy=accuracy(measured.train_outputs, problem.y),
        failed=failed,
        first_nonfinite=np.where(failed, bad.argmax(0), -1),
        weights=weights,
    )


# ---------------------------------------------------------------------------------------------
# Networks of any kind


def fitter(engine: Callable[[Problem], Measured], module: str) -> Fit:
    """A framework's `fit`: one signature, one check and one judgement around its engine.

    Args:
        engine: trains a checked problem and returns what it measured.
        module: the module that calls it.
    """

    def fit(
        network: Callable,
        weights: Mapping[str, np.ndarray],
        x: np.ndarray,
        y: np.ndarray,
        *,
        lr: Number,
        update: Update = Update(),  # noqa: B008 (frozen)
        steps: int = 200,
        batch_size: int = 64,
        seed: int = 0,
        rows: np.ndarray | None = None,
        loss: str | Callable = "cross_entropy",
        x_test: np.ndarray | None = None,
        y_test: np.ndarray | None = None,
        record_arrays: bool = False,
        record_updates: bool = False,
        progress: bool = False,
    ) -> SweepResult:
        """Train a stack of networks of any kind on minibatches.

        As `train`, with the network given as a function of its weights.

        Args:
            network: takes a dict from name to tensor (members, …) and inputs (members, batch, …),
                and returns outputs (members, batch, classes), or a pair: these, and a dict of
                numbers to note at each step, a tensor (members,) by name.  It is written in the
                framework's own terms and must keep the members apart.
            weights: the initial weights by name, arrays (members, …), all float32 or all float64,
                which is then the precision of the training.
            x: inputs, shape (n, …), the same for all members; integers stay integers.
            y: integer classes, shape (n,); for other losses targets, (n, outputs).
            lr, update, steps, batch_size, seed, rows: as in `train`.  "layer" and "adaptive"
                clipping take each array for a layer, and its last axis for the units.
            loss: "cross_entropy", "mse", or a function of outputs and targets, (members, batch, …)
                each, that returns one loss per member, (members,).
            x_test, y_test: the examples that the accuracy is measured on; None takes `x` and `y`.
                The accuracy on all of `x` and `y` is measured in either case, after the last step.
                The evaluation takes 256 examples at a time, the first ones once more to fill up.
            record_arrays: whether to keep the gradient norm of each weight array.
            record_updates: whether to keep the norms of updates and weights.
            progress: whether to show a progress bar over the steps.

        Returns:
            A `gradlab.sweep.SweepResult`, whose weights are a dict again.

        Raises:
            ValueError: an argument whose shape or value does not fit, or outputs that do not.

        Example:
            >>> def network(weights, x):
            ...     return x @ weights["matrix"]
            >>> x, y = np.eye(3), np.array([0, 1, 0])
            >>> weights = {"matrix": np.zeros((2, 3, 2), "float32")}
            >>> fit(network, weights, x, y, lr=[0.1, np.nan], steps=5).failed.tolist()
            [False, True]
        """
        problem = _check_fit(
            network, weights, x, y, lr=lr, update=update, steps=steps, batch_size=batch_size,
            seed=seed, rows=rows, loss=loss, x_test=x_test, y_test=y_test,
            record_arrays=record_arrays, record_updates=record_updates, progress=progress,
        )  # fmt: skip
        return _judge(problem, engine(problem))

    fit.__module__, fit.__qualname__ = module, "fit"
    return fit


def _check_fit(
    network, weights, x, y, *, lr, update, steps, batch_size, seed, rows, loss, x_test, y_test,
    record_arrays, record_updates, progress,
) -> Problem:  # fmt: skip
    """The arguments of `fit` as a problem; a ValueError if one does not fit."""
    if not callable(network):
        raise ValueError(f"network must be a function of weights and inputs, got {network!r}")
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is none of {LOSSES} and no function")
    if not isinstance(update, Update):
        raise ValueError(f"update must be a gradlab.sweep.Update, got {update!r}")
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"weights must be a dict from name to array, got {type(weights).__name__}")
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len({shape[:1] for shape in shapes.values()}) > 1 or () in shapes.values():
        raise ValueError(f"weights have shapes {shapes}, expected (members, …) with equal members")
    _check_dtypes(list(arrays.values()))
    matrices = tuple(_as_matrices(array) for array in arrays.values())
    if (x_test is None) != (y_test is None):
        raise ValueError("x_test and y_test belong together, got only one of them")
    x, y = _check_examples("x", x, "y", y, matrices[0].dtype, loss)
    if x_test is None:
        x_test, y_test = x, y
    else:
        x_test, y_test = _check_examples(
            "x_test", x_test, "y_test", y_test, matrices[0].dtype, loss
        )
    setting = Setting(
        update.plan(),
        loss,
        network=Network(network, tuple(arrays), tuple(shapes.values())),
        record_arrays=record_arrays,
        record_updates=record_updates,
    )
    return _problem(
        setting, matrices, (x, y), (x_test, y_test), len(x), own={}, lr=lr, update=update,
        rows=rows, steps=steps, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip


def _as_matrices(array: np.ndarray) -> np.ndarray:
    """Stacked arrays as stacked matrices (members, rows, last axis), which updates work on."""
    if array.ndim == 1:
        return array[:, None, None]
    return array.reshape(len(array), -1, array.shape[-1])


def _check_examples(x_name, x, y_name, y, dtype, loss) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim < 2 or not len(x) or len(y) != len(x):
        raise ValueError(
            f"{x_name} has shape {x.shape} and {y_name} {y.shape}, expected (n, …) each with the "
            f"same n ≥ 1"
        )
    is_integer = np.issubdtype(y.dtype, np.integer)
    if loss == "cross_entropy" and (not is_integer or y.ndim != 1 or y.min() < 0):
        raise ValueError(
            f"{y_name} is {y.dtype} of shape {y.shape}, expected classes (n,), integers ≥ 0"
        )
    x = x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else dtype)
    return x, y.astype(np.int64 if is_integer and loss != "mse" else dtype)


def check_outputs(problem: Problem, shape: tuple[int, ...]) -> None:
    """Whether a network's outputs on one minibatch have the shape that the loss needs.

    Raises:
        ValueError: they have not; or a class has no output.
    """
    _, members, batch = problem.x_rows.shape
    if callable(problem.setting.loss):
        return
    expected = (members, batch, *problem.y.shape[1:]) if problem.setting.loss == "mse" else None
    if tuple(shape) != (expected or (members, batch, *shape[2:3])) or len(shape) != 3:
        raise ValueError(
            f"the network's outputs have shape {tuple(shape)}, expected "
            f"{expected or f'({members}, {batch}, classes)'}"
        )
    largest = max(problem.y.max(), problem.y_test.max())
    if expected is None and largest >= shape[2]:
        raise ValueError(f"y goes up to class {largest}, but the network has {shape[2]} outputs")


def evaluated(n: int) -> np.ndarray:
    """Rows of n examples in equal pieces, (pieces, `EVALUATED`), the first ones once more at the
    end: one size is one graph.
    """
    pieces = -(-n // EVALUATED)
    return (np.arange(pieces * EVALUATED) % n).reshape(pieces, EVALUATED)


# ---------------------------------------------------------------------------------------------
# Members spread over processes or machines


class MembersFailed(RuntimeError):
    """Some members could not be trained; the others were.

    Attributes:
        errors: from the first member of a failed share to what it raised.
        results: from the first member of a trained share to its `SweepResult`.
    """

    def __init__(self, errors: dict[int, BaseException], results: dict[int, SweepResult]) -> None:
        first, error = next(iter(sorted(errors.items())))
        super().__init__(
            f"{len(errors)} of {len(errors) + len(results)} shares of the members failed, the "
            f"first from member {first} on: {type(error).__name__}: {error}. What the others gave "
            "is in this error's `results`"
        )
        self.errors = errors
        self.results = results


def distribute(
    train: Train,
    weights: Sequence[np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    *,
    lr: Number,
    update: Update = Update(),  # noqa: B008 (frozen)
    steps: int = 200,
    batch_size: int = 64,
    seed: int = 0,
    rows: np.ndarray | None = None,
    slope: Number = 0.01,
    dropout: Number = 0.0,
    share: int = 16,
    executor: Executor | None = None,
    progress: bool = True,
    **settings: object,
) -> SweepResult:
    """`train(...)`, a share of the members at a time, wherever an executor runs them.

    The result is the one that `train` gives for all members at once: the minibatches are drawn
    once for all, and members do not meet.  It needs the memory of one share per worker.

    Args:
        train: `gradlab.torch.sweep.train` or `gradlab.keras.sweep.train`.
        weights, x, y, lr, update, steps, batch_size, seed, rows, slope, dropout, settings: as
            `train` takes them.
        share: members per task, ≥ 1.
        executor: anything that implements `concurrent.futures.Executor`: a `ProcessPoolExecutor`
            (with the "spawn" or "forkserver" start method: TensorFlow does not survive a fork), a
            Dask cluster's `client.get_executor()`, `mpi4py.futures.MPIPoolExecutor`.  Give each
            worker one framework thread (OMP_NUM_THREADS=1).  None trains here, one share after
            another.
        progress: whether to show a bar over the members.

    Raises:
        ValueError: as `train`; a share below 1.
        MembersFailed: a worker died or raised; what the others computed is not lost.
    """
    if share < 1:
        raise ValueError(f"share must be at least 1, got {share}")
    weights = _check_weights(weights)
    members, n = len(weights[0]), np.shape(x)[-2]
    if rows is None:
        rows = minibatches(n, members, steps, batch_size, seed)
    tasks = {}
    for start in range(0, members, share):
        part = slice(start, start + share)
        tasks[start] = {
            "weights": [w[part] for w in weights],
            "x": x,
            "y": y,
            "lr": _part(lr, part, members),
            "update": _part_of_update(update, part, members),
            "rows": rows[:, part],
            "seed": seed,  # of the dropout
            "slope": _part(slope, part, members),
            "dropout": _part(dropout, part, members),
            **settings,
        }
        targets = 3 if settings.get("loss") == "mse" else 2
        for name, stacked in (("x", 3), ("x_test", 3), ("y", targets), ("y_test", targets)):
            array = tasks[start].get(name)
            if array is not None and np.ndim(array) == stacked:
                tasks[start][name] = np.asarray(array)[part]

    results, errors = {}, {}
    with tqdm(total=members, unit="network", disable=not progress) as bar:
        for start, outcome in _outcomes(train, tasks, executor):
            if isinstance(outcome, BaseException):
                errors[start] = outcome
            else:
                results[start] = outcome
                bar.update(len(outcome.failed))
    if errors and executor is None:
        raise next(iter(errors.values()))
    if errors:
        raise MembersFailed(errors, results) from next(iter(errors.values()))
    return _joined([results[start] for start in sorted(results)])


def _outcomes(train: Train, tasks: dict[int, dict], executor: Executor | None):
    """(first member, result or error) of every task, as they end."""
    if executor is None:
        for start, task in tasks.items():
            try:
                yield start, train(**task)
            except Exception as error:
                yield start, error
                return
        return
    futures = {executor.submit(train, **task): start for start, task in tasks.items()}
    for future in as_completed(futures):
        yield futures[future], future.exception() or future.result()


def _part(number: Number, part: slice, members: int) -> Number:
    return np.asarray(number)[part] if np.shape(number) == (members,) else number


def _part_of_update(update: Update, part: slice, members: int) -> Update:
    own = {name: _part(getattr(update, name), part, members) for name in NUMBERS}
    if np.ndim(update.schedule) == 2:
        own["schedule"] = np.asarray(update.schedule)[:, part]
    return replace(update, **own)


def _joined(results: Sequence[SweepResult]) -> SweepResult:
    """The results of consecutive members as one."""

    def join(name: str):
        parts = [getattr(result, name) for result in results]
        if name == "weights":
            return tuple(np.concatenate(layer) for layer in zip(*parts, strict=True))
        if name == "noted":
            return {}  # `train` notes nothing
        if parts[0] is None:
            return None
        return np.concatenate(parts, axis=min(1, parts[0].ndim - 1))  # members, after steps if any

    return SweepResult(**{field.name: join(field.name) for field in fields(SweepResult)})
