"""What `gradlab train` does in either framework: options, data, epochs, checkpoints, a verdict.

`gradlab.torch.train` and `gradlab.keras.train` hold the part that trains, a `Trainer` each; all
that decides what is trained, in which order and at which rate stands here, once.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from gradlab import checkpoint, convnet, data, mlp
from gradlab.history import ON_NONFINITE, GradientHistory

FRAMEWORKS = {"torch": "torch", "tensorflow": "keras"}
"""Which half of gradlab the command's word for a framework names."""

OPTIMIZERS = ("sgd", "momentum", "nesterov", "adam", "rmsprop")
LOSSES = ("cross-entropy", "mse")
SCHEDULES = ("constant", "cosine", "step", "warmup-cosine")
PRECISIONS = ("float32", "float64", "bfloat16", "float16")
MODELS = {
    "nn": "two convolutions, two dense layers; on blobs: 10 features, 100 classes, 100,000 samples",
    "mlp": "two hidden layers of 64 ReLU units; on the handwritten digits",
    "deep": "thirty hidden layers of 64 ReLU units; on the handwritten digits",
}
"""Name to what it is, and the data that it is trained on unless `--data` says otherwise."""

#: The mean loss of an epoch that is this many times the untrained network's is called a blow-up.
BLOWN_UP = 10.0


#: The gradient norms of a run that blew up, beside its checkpoints.
AT_THE_END = "history-at-the-end.npz"

#: What a run writes into its folder, and all that it ever deletes there.
_OWN = re.compile(
    r"checkpoint-\d{6,}\.(json|safetensors)|history-\d{6,}\.npz|" + re.escape(AT_THE_END)
)

#: TensorBoard gets the gradient norms of every so many steps.
LOG_EVERY = 50

#: Seconds after which a run that draws no progress bar says how far it is.
SPEAK_EVERY = 30.0

#: The most steps that a run may have, for the rate of each is kept.
MOST_STEPS = 50_000_000


class BadOption(ValueError):
    """Something that the command cannot do; the message says what was given and what to give."""


def processes() -> tuple[int, int]:
    """This process's number among those that `torchrun` started together, and how many they are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Options:
    """What to train, and how; see `gradlab train --help`.

    Raises:
        BadOption: a value out of its range.
    """

    framework: str = "torch"
    model_name: str = "nn"
    data: str | None = None
    num_epochs: int = 10
    batch_size: int = 32
    train_load_size: float = 1.0
    validation_load_size: float = 1.0
    test_load_size: float = 1.0
    save_interval: int = 1
    save_path: str = "runs/train"
    optimizer: str = "adam"
    loss: str = "cross-entropy"
    lr: float = 1e-3
    lr_schedule: str = "constant"
    weight_initialization: str = "he"
    clip_norm: float | None = None
    precision: str = "float32"
    seed: int = 0
    resume: bool = False
    reset: bool = False
    logdir: str | None = None
    on_nonfinite: str = "raise"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("framework", tuple(FRAMEWORKS)),
            ("model_name", tuple(MODELS)),
            ("optimizer", OPTIMIZERS),
            ("loss", LOSSES),
            ("lr_schedule", SCHEDULES),
            ("weight_initialization", convnet.SCHEMES),
            ("precision", PRECISIONS),
            ("on_nonfinite", ON_NONFINITE),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise BadOption(
                    f"{_flag(name)} must be one of {', '.join(allowed)}, got {value!r}"
                    + _HINTS.get((name, value), "")
                )
        for name in ("data", "save_path", "logdir"):
            value = getattr(self, name)
            if value is not None:
                if not value:
                    raise BadOption(f"{_flag(name)} names nothing: it is empty")
                object.__setattr__(self, name, os.path.expanduser(value))
        for name in ("num_epochs", "batch_size", "save_interval"):
            value = getattr(self, name)
            if not 1 <= value <= 10**9:
                raise BadOption(f"{_flag(name)} must be a whole number from 1 up, got {value!r}")
        for name in ("train_load_size", "validation_load_size", "test_load_size"):
            value = getattr(self, name)
            if not (0 < value <= 1 or (1 < value <= 10**9 and float(value).is_integer())):
                raise BadOption(
                    f"{_flag(name)} must be a share above 0 and up to 1 (1 is all), or a whole "
                    f"number of samples from 2 up, got {value!r}"
                )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise BadOption(f"--lr must be a finite number above 0, got {self.lr!r}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise BadOption(
                f"--clip-norm must be above 0 and finite, got {self.clip_norm!r}: leave it out to "
                "clip nothing"
            )
        if not 0 <= self.seed < 2**32:
            raise BadOption(f"--seed must be a whole number from 0 to 2³²−1, got {self.seed!r}")
        if self.resume and self.reset:
            raise BadOption("--resume goes on with a run and --reset deletes it: give one of them")


_HINTS = {
    ("loss", "gradient-descent"): (
        ". Gradient descent is no loss, it is how a loss is made smaller: --optimizer sgd"
    ),
    ("framework", "pytorch"): ". PyTorch's name in Python is torch",
    ("framework", "keras"): ". Keras runs on TensorFlow here: tensorflow",
    ("framework", "tf"): ". It is written in full: tensorflow",
}

#: What may differ between a run and its resumption without changing a weight.
_FREE = {"num_epochs", "save_interval", "save_path", "resume", "reset", "logdir", "on_nonfinite"}
#: What may differ because it is how a run that blew up is mended; it is said.
_CURES = {"lr", "lr_schedule", "clip_norm"}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _several(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


# ---------------------------------------------------------------------------------------------
# What is trained


class Part(NamedTuple):
    """Samples: x (samples, features), float32, and y (samples,), int64 class numbers."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Problem:
    """All that a `Trainer` needs beside the options.

    Attributes:
        train: the training samples, each feature with mean 0 and standard deviation 1.
        standard: what made them so of the training samples as they were given.
        validation: what is looked at after every epoch, shifted and scaled as `train`.
        test: what is looked at in the end, the same.
        spec: the network, a `convnet.ConvNetSpec` or an `mlp.MLPSpec`.
        weights: its initial weights.
        rates: (steps,), float64: the learning rate of every step of the whole run.
        steps_per_epoch: the last batch of an epoch may be smaller than the others.
        order: epoch to the order of the training samples, (samples,).
        remarks: what somebody should know of the data, a sentence each.
    """

    train: Part
    validation: Part
    test: Part
    spec: convnet.ConvNetSpec | mlp.MLPSpec
    weights: dict[str, np.ndarray]
    rates: np.ndarray
    steps_per_epoch: int
    order: Callable[[int], np.ndarray]
    standard: data.Standardization
    remarks: tuple[str, ...] = ()


def learning_rates(options: Options, steps: int) -> np.ndarray:
    """The learning rate of every step, (steps,), float64.

    "cosine" falls from `lr` to 0 along half a cosine; "step" divides by ten after half and after
    three quarters of the steps; "warmup-cosine" rises from lr/n to lr over the first n = 5 % of
    the steps, then falls as "cosine" does.
    """
    position = np.arange(steps) / steps
    match options.lr_schedule:
        case "constant":
            factors = np.ones(steps)
        case "step":
            factors = 0.1 ** ((position >= 0.5).astype(float) + (position >= 0.75))
        case "cosine":
            factors = (1 + np.cos(np.pi * position)) / 2
        case _:
            rising = max(1, round(0.05 * steps))
            rest = np.arange(steps - rising) / max(1, steps - rising)
            factors = np.concatenate(
                [np.arange(1, rising + 1) / rising, (1 + np.cos(np.pi * rest)) / 2]
            )
    return options.lr * factors


def _array(path: Path, file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """One of the arrays in a file, unless it holds objects, which only pickle could read."""
    try:
        return np.asarray(file[name])
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        number = "float" if name == "x" else "int"
        raise BadOption(
            f"--data {path}: {name} holds Python objects, not numbers. Save {name}.astype({number})"
        ) from None


def _from_file(path: Path) -> Part:
    """x and y of a user's own .npz file."""
    try:
        with path.open("rb") as file:
            begins = file.read(6)
        if begins == b"\x93NUMPY":
            raise BadOption(
                f"--data {path}: this is an .npy file, which holds one array. "
                "np.savez('data.npz', x=x, y=y) writes both into one file"
            )
        if not begins.startswith((b"PK\x03\x04", b"PK\x05\x06")):  # as a zip does
            raise BadOption(
                f"--data {path}: this is no .npz file. np.savez('data.npz', x=x, y=y) writes one"
            )
        with np.load(path, allow_pickle=False) as file:
            if not {"x", "y"} <= set(file.files):
                small = ". Write them in small letters" * bool({"X", "Y"} & set(file.files))
                raise BadOption(
                    f"--data {path}: it needs arrays named x and y, and holds "
                    f"{', '.join(file.files) or 'none'}{small}"
                )
            x, y = (_array(path, file, name) for name in ("x", "y"))
    except BadOption:
        raise
    except FileNotFoundError:
        raise BadOption(
            f"--data {path}: there is no such file. Give digits, blobs, mnist, or an .npz file "
            "with arrays x (samples, features) and y (samples,)"
        ) from None
    except Exception as error:  # whatever NumPy and zipfile raise for another kind of file
        raise BadOption(f"--data {path}: this cannot be read as an .npz file: {error}") from None
    if x.ndim != 2 or y.shape != x.shape[:1] or x.shape[1] == 0:
        flat = ". x.reshape(len(x), -1) makes one row of each sample" * (x.ndim > 2)
        if y.ndim == 2:
            flat += (
                ". y.ravel() makes one row of y"
                if y.shape[1] == 1
                else ". y.argmax(1) makes class numbers of rows with a single 1"
            )
        raise BadOption(
            f"--data {path}: x must be (samples, features) and y (samples,), got {x.shape} and "
            f"{y.shape}{flat}"
        )
    if not np.issubdtype(y.dtype, np.integer):
        real = np.issubdtype(y.dtype, np.floating)
        whole = real and bool(np.all(np.isfinite(y) & (y == np.round(y))))
        how = (
            "y.astype(int) makes them of whole numbers"
            if whole
            else "A number to be predicted is none: what is trained here tells classes apart"
            if real
            else "np.unique(y, return_inverse=True)[1] makes them of names"
        )
        raise BadOption(
            f"--data {path}: y must hold class numbers 0, 1, 2, …, got {y.dtype}. {how}"
        )
    if not np.issubdtype(x.dtype, np.number) or np.iscomplexobj(x):
        raise BadOption(f"--data {path}: x must hold real numbers, got {x.dtype}")
    if len(x) < 10:
        raise BadOption(f"--data {path}: ten samples are the least, got {len(x)}")
    classes = np.unique(y)
    if len(classes) < 2 or classes[0] < 0 or classes[-1] >= len(y):
        raise BadOption(
            f"--data {path}: y must hold class numbers 0, 1, 2, … of two classes or more, got "
            f"{len(classes)} from {classes[0]} to {classes[-1]} for {len(y)} samples"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is reported below
        x = x.astype(np.float32)
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        row, column = bad[0]
        raise BadOption(
            f"--data {path}: x[{row}, {column}] is {x[row, column]}, the first of {len(bad)} "
            "numbers that are not finite. A run on them ends in NaN: mend or drop those rows"
        )
    return Part(x, y.astype(np.int64))


def _parts(options: Options) -> tuple[Part, Part, Part, int, tuple[str, ...]]:
    """Training, validation and test samples as they come, the number of classes, remarks."""
    source = options.data or ("blobs" if options.model_name == "nn" else "digits")
    rng = np.random.default_rng(0)  # the data do not depend on the run's seed
    if source in ("blobs", "digits", "mnist"):
        if source == "blobs":
            split = data.blobs(125_000, features=10, classes=100)
            left = len(split.x_test) // 2
            held = Part(split.x_test[:left], split.y_test[:left])
            test = Part(split.x_test[left:], split.y_test[left:])
            train = Part(split.x_train, split.y_train)
        else:
            split = data.digits("unit") if source == "digits" else data.mnist()
            left = len(split.x_train) * 5 // 6
            train = Part(split.x_train[:left], split.y_train[:left])
            held = Part(split.x_train[left:], split.y_train[left:])
            test = Part(split.x_test, split.y_test)
        return train, held, test, split.classes, ()
    x, y = _from_file(Path(source))
    order = rng.permutation(len(x))
    cuts = len(x) * 8 // 10, len(x) * 9 // 10
    train, held, test = (Part(x[rows], y[rows]) for rows in np.split(order, cuts))
    return train, held, test, int(y.max()) + 1, _remarks(y)


def _remarks(y: np.ndarray) -> tuple[str, ...]:
    """What is allowed of class numbers, and seldom meant."""
    counts = np.bincount(y)
    lacking = np.flatnonzero(counts == 0)
    if lacking.tolist() == [0]:
        return ("Class 0 has no sample. Do yours count from 1? Then save y - 1.",)
    if len(lacking):
        return (
            f"{len(lacking)} of {len(counts)} classes have no sample, {lacking[0]} first. "
            "np.unique(y, return_inverse=True)[1] numbers those that there are from 0.",
        )
    if 2 * len(counts) > len(y):
        return (
            f"{len(counts)} classes for {len(y)} samples: each has one or two. Is y a number to be "
            "predicted? What is trained here tells classes apart.",
        )
    return ()


def _sized(part: Part, size: float, name: str) -> Part:
    """The first samples of a part: a share of it, or a number."""
    wanted = max(1, round(size * len(part.x))) if size <= 1 else int(size)
    if wanted > len(part.x):
        raise BadOption(
            f"{_flag(name)} asks for {wanted} samples, and there are {len(part.x)}: give a smaller "
            "number, or 1 for all"
        )
    return Part(part.x[:wanted], part.y[:wanted])


def problem(options: Options) -> Problem:
    """Data, network, initial weights, order and rates of a run.

    Raises:
        BadOption: data that cannot be read or are too few.
        DataUnavailable: MNIST without a network.
    """
    train, held, test, classes, remarks = _parts(options)
    train = _sized(train, options.train_load_size, "train_load_size")
    held = _sized(held, options.validation_load_size, "validation_load_size")
    test = _sized(test, options.test_load_size, "test_load_size")
    standard = data.Standardization.of(train.x)
    train, held, test = (Part(standard(part.x), part.y) for part in (train, held, test))
    features = train.x.shape[1]
    if options.model_name == "nn":
        spec: convnet.ConvNetSpec | mlp.MLPSpec = convnet.ConvNetSpec(features, classes)
        shapes = spec.shapes
    else:
        spec = mlp.MLPSpec(features, classes, depth=30 if options.model_name == "deep" else 2)
        shapes = {name: array.shape for name, array in mlp.initial_weights(spec).items()}
    n = len(train.x)
    steps_per_epoch = -(-n // options.batch_size)
    if steps_per_epoch * options.num_epochs > MOST_STEPS:
        raise BadOption(
            f"--num-epochs {options.num_epochs} would take {steps_per_epoch * options.num_epochs} "
            f"steps, and {MOST_STEPS} are the most: give {MOST_STEPS // steps_per_epoch} or fewer"
        )
    return Problem(
        train,
        held,
        test,
        spec,
        convnet.initial_weights(shapes, options.weight_initialization, options.seed),
        learning_rates(options, steps_per_epoch * options.num_epochs),
        steps_per_epoch,
        lambda epoch: np.random.default_rng([options.seed, epoch]).permutation(n),
        standard,
        remarks,
    )


# ---------------------------------------------------------------------------------------------
# The run


class Trainer(Protocol):
    """What `gradlab.torch.train.Trainer` and `gradlab.keras.train.Trainer` do.

    Attributes:
        rank: this process's number among those that train together; 0 writes and speaks.
        history: what the probe recorded.
    """

    rank: int
    history: GradientHistory

    def __init__(self, options: Options, problem: Problem) -> None: ...

    def fit(
        self,
        first: int,
        last: int,
        after_step: Callable[[], object],
        after_epoch: Callable[[int, float], object],
    ) -> None:
        """Train epochs first to last − 1.

        `after_epoch` gets the epoch and its mean loss over the steps that were taken, NaN if none.
        """

    def evaluate(self, part: Part) -> tuple[float, float]:
        """Mean loss and accuracy."""

    def state(self) -> tuple[dict[str, np.ndarray], dict]:
        """All numbers that training goes on from, as arrays and as JSON."""

    def restore(self, arrays: dict[str, np.ndarray], record: dict) -> None:
        """The inverse of `state`."""

    def diagnose(self, rows: np.ndarray) -> object:
        """`gradlab.diagnose` of a step on these training samples; print it."""


class Epoch(NamedTuple):
    """What an epoch left: its number from 1, losses and the accuracy on the validation part."""

    epoch: int
    loss: float
    validation_loss: float
    validation_accuracy: float


class Change(NamedTuple):
    """What a resumption changed: after so many epochs, which option, from what to what."""

    epochs_done: int
    option: str
    before: object
    now: object

    def __str__(self) -> str:
        after = _several(self.epochs_done, "epoch")
        return f"after {after}, {_flag(self.option)} from {self.before!r} to {self.now!r}"


class BlownUp(RuntimeError):
    """The run ended because its numbers are no longer finite, or its loss grew out of hand."""


class NotSaved(RuntimeError):
    """The run ended because a checkpoint could not be written; older ones are as they were."""


def _check_folder(flag: str, folder: Path) -> None:
    """Refuse a folder that could not be made or written to; nothing is made.

    Raises:
        BadOption: such a folder.
    """
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise _unwritable(flag, folder, error) from None
    if not there.is_dir():
        raise BadOption(f"{flag} {folder}: {there} is a file, not a folder. Name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadOption(f"{flag} {folder} cannot be written: {there} may not be changed by you")


def _unwritable(flag: str, folder: Path, error: OSError) -> BadOption:
    return BadOption(f"{flag} {folder} cannot be written: {error.strerror or error}. Name another")


class Place:
    """The folder of a run: which checkpoints it holds and which it may take.

    Args:
        options: of the run.

    Raises:
        BadOption: a folder that cannot be written, or holds what would be overwritten.
        BadCheckpoint: one to be resumed that must not be.
    """

    def __init__(self, options: Options) -> None:
        self.options, self.folder = options, Path(options.save_path)
        self.changes: list[Change] = []  # at all resumptions, this one's last
        self.remarks: list[str] = []  # what is allowed, and seldom meant
        _check_folder("--save-path", self.folder)
        if options.logdir is not None:
            log = Path(options.logdir)
            _check_folder("--logdir", log)
            if not options.resume and any(log.glob("events.out.tfevents.*")):
                self.remarks.append(
                    f"--logdir {log} already holds the events of a run, and TensorBoard draws all "
                    f"that are in one folder as one run. A folder for each, such as "
                    f"{log / self.folder.name}, keeps them apart."
                )
        self.there = checkpoint.numbered(self.folder)
        self.resumed: checkpoint.Checkpoint | None = None
        if options.resume:
            if not self.folder.is_dir():
                raise BadOption(f"--resume: there is no folder {self.folder}, see --save-path")
            if not self.there:
                raise BadOption(
                    f"--resume: {self.folder} holds no checkpoint. Leave --resume out to begin, or "
                    "name the folder of the run with --save-path"
                )
            self.resumed = checkpoint.load(self.newest)
            self._check_same()
        elif self.there and not options.reset:
            raise BadOption(
                f"--save-path {self.folder} already holds a run, {self.newest.name}: "
                "--resume goes on with it, --reset deletes its checkpoints and begins anew, "
                "another --save-path leaves it alone"
            )

    @property
    def newest(self) -> Path:
        """The last checkpoint that was found."""
        return list(self.there.values())[-1]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, for this run alone; if nothing is written, it is removed again.

        Raises:
            BadOption: it cannot be made or written, or another run has it.
        """
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
            except OSError as error:
                raise _unwritable("--save-path", self.folder, error) from None
            with self._locked():
                yield
        finally:
            with suppress(OSError):  # it holds something, or was never made
                for path in made:
                    path.rmdir()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other runs out, where the system can: a lock that ends with the process."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        if processes()[0] != 0:  # the first process writes, and has it
            yield
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise self._busy() from None
            if checkpoint.numbered(self.folder) != self.there:  # since it was looked at
                raise self._busy()
            yield
        finally:
            os.close(folder)

    def _busy(self) -> BadOption:
        return BadOption(
            f"--save-path {self.folder}: another run is writing there. Wait for its end, or name "
            "another folder"
        )

    def _check_same(self) -> None:
        """The run to be resumed is this one."""
        assert self.resumed is not None
        path, record = self.resumed.path, self.resumed.record
        before, now = record.get("options"), asdict(self.options)
        if not isinstance(before, dict) or not isinstance(record.get("epochs_done"), int):
            raise checkpoint.BadCheckpoint(f"{path} does not say what run it belongs to: --reset")
        different = {
            f.name: f"{_flag(f.name)} was {before.get(f.name)!r} and is {now[f.name]!r}"
            for f in fields(Options)
            if f.name not in _FREE and before.get(f.name) != now[f.name]
        }
        done, wanted = record["epochs_done"], self.options.num_epochs
        try:
            self.changes = [Change(**change) for change in record.get("changes", [])]
        except TypeError as error:
            raise checkpoint.BadCheckpoint(f"{path} holds no list of changes: {error}") from None
        noted = _CURES & set(different)
        different = {name: how for name, how in different.items() if name not in noted}
        if "lr_schedule" in noted and before.get("num_epochs") != wanted:
            noted |= {"num_epochs"}  # which a schedule is laid over
        self.changes += [Change(done, name, before.get(name), now[name]) for name in sorted(noted)]
        if different:
            raise BadOption(
                f"--resume: {path} belongs to another run: {'; '.join(different.values())}. Repeat "
                "its options, or give another --save-path"
            )
        if done > wanted:
            raise BadOption(
                f"--resume: {path} has {done} epochs behind it, --num-epochs asks for {wanted}"
            )
        schedule, epochs = self.options.lr_schedule, before.get("num_epochs")
        if epochs != wanted and schedule == before.get("lr_schedule") != "constant":
            raise BadOption(
                f"--resume: --num-epochs was {epochs} and is {wanted}, and --lr-schedule "
                f"{schedule} is laid over all epochs: the rates would be those of neither. Repeat "
                f"--num-epochs {epochs}, or go on with --lr-schedule constant and an --lr of your "
                "choice"
            )

    def tidy(self) -> int:
        """Delete what killed runs left half-written and, to begin anew, their checkpoints too.

        Returns:
            How many files that were.  No name that the command does not write is among them.
        """
        found = [
            path
            for path in checkpoint.partials(self.folder)
            if _OWN.fullmatch(checkpoint.name_of_partial(path))
        ]
        if self.options.reset:
            own = [path for path in self.folder.iterdir() if _OWN.fullmatch(path.name)]
            # The JSON first: without it the arrays stand for nothing.
            found += sorted(own, key=lambda path: (path.suffix != ".json", path.name))
        for path in found:
            path.unlink()
        return len(found)

    def room(self, arrays: dict[str, np.ndarray]) -> None:
        """Refuse to begin a run whose first checkpoint would not fit on the disk."""
        needed = 2 * sum(array.nbytes for array in arrays.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise BadOption(
                f"--save-path {self.folder}: a checkpoint needs {needed} bytes, {free} are free. "
                "Make room, or name a folder on another disk"
            )


def _say(line: str) -> None:
    """Print at once, also into a file."""
    print(line, flush=True)


def run(options: Options, say: Callable[[str], object] = _say) -> list[Epoch]:
    """Train a network as `options` say, save it, and say how it went.

    Args:
        options: the run.
        say: gets each line of the report.

    Returns:
        What each epoch left, those before a resumption included.

    Raises:
        BadOption, BadCheckpoint, DataUnavailable, ImportError: nothing was trained or overwritten.
        NotSaved: a checkpoint could not be written.
        BlownUp: the numbers stopped being finite, or an epoch's mean loss was `BLOWN_UP` times that
            of the untrained network.  The last checkpoint is from before.
    """
    place = Place(options)
    task = problem(options)
    trainer_class = import_module(f"gradlab.{FRAMEWORKS[options.framework]}.train").Trainer
    # Whatever is refused is refused by now, or before the log is opened.
    with place.held():
        trainer: Trainer = trainer_class(options, task)
        speaks = trainer.rank == 0
        going = _Run(options, task, place, trainer, say if speaks else _say_nothing)
        with _log(options.logdir if speaks else None, going.first * task.steps_per_epoch) as log:
            return going.finish(log)


def _say_nothing(line: str) -> None:
    """What the other processes of a data-parallel run say."""


class _Run:
    """A run on its way: what it has done so far, and what it does after each epoch."""

    def __init__(
        self,
        options: Options,
        task: Problem,
        place: Place,
        trainer: Trainer,
        say: Callable[[str], object],
    ) -> None:
        self.options, self.task, self.place, self.trainer = options, task, place, trainer
        self.say, self.speaks = say, trainer.rank == 0
        self.first, self.epochs, start_loss = 0, [], None
        if place.resumed is not None:
            record = place.resumed.record
            try:
                trainer.restore(place.resumed.arrays, record["trainer"])
                self.epochs = [Epoch(**epoch) for epoch in record["epochs"]]
                start_loss = float(record["start_loss"])
                if len(self.epochs) != record["epochs_done"]:
                    raise ValueError(f"it tells of {_several(len(self.epochs), 'epoch')}")
            except (LookupError, ValueError, TypeError, RuntimeError) as error:
                raise checkpoint.BadCheckpoint(
                    f"{place.resumed.path} does not fit this network: {error}"
                ) from None
            self.first = record["epochs_done"]
        #: Of the untrained network, also after a resumption: both judge an epoch alike.
        if start_loss is None:
            start_loss, _ = trainer.evaluate(task.validation)
        self.start_loss = start_loss
        #: Where training could go on from: the last epoch's end, and how many epochs that was.
        self.good, self.good_epochs = trainer.state(), self.first
        place.room(self.good[0])

    def finish(self, log: Callable[[Epoch, GradientHistory], None]) -> list[Epoch]:
        """Train the epochs that are left.

        Args:
            log: gets each epoch, and what the probe holds after it.
        """
        from tqdm import tqdm

        options, task, trainer = self.options, self.task, self.trainer
        self.log = log
        if self.speaks:
            deleted = self.place.tidy()
            if options.reset and deleted:
                self.say(f"--reset: {_several(deleted, 'file')} of {options.save_path} deleted")
        self.say(
            f"{options.model_name} in {options.framework}: {len(task.train.x)} training samples of "
            f"{task.spec.features} features and {task.spec.classes} classes, "
            f"{_several(task.steps_per_epoch, 'step')} an epoch, {options.num_epochs - self.first} "
            f"of {_several(options.num_epochs, 'epoch')} to go"
        )
        for remark in (*task.remarks, *self.place.remarks):
            self.say(remark)
        if self.place.changes:
            self.say(f"Changed on the way: {'; '.join(map(str, self.place.changes))}.")
        if self.first < options.num_epochs:
            with tqdm(
                total=len(task.rates),
                initial=task.steps_per_epoch * self.first,
                unit="step",
                disable=None if self.speaks else True,  # None: where nobody sees it
            ) as self.bar:
                self.steps, self.spoke = 0, time.monotonic()  # since the resumption
                try:
                    trainer.fit(self.first, options.num_epochs, self._after_step, self._after_epoch)
                except FloatingPointError as error:  # the probe's, on either side
                    self.bar.close()
                    step = getattr(error, "step", 0)
                    what = str(error).removeprefix(f"step {step}: ")
                    self._explain(f"{self._named(step)}: {what}", self._rows(*self._at(step)))
            bad = trainer.history.first_nonfinite
            if bad:
                self.say(
                    f"The gradient of {bad.name} was not finite at {self._named(bad.step)}. Of "
                    f"the last {len(trainer.history.steps)} steps, "
                    f"{trainer.history.skipped.sum()} were left out."
                )
        if self.speaks:  # what an earlier attempt left would mislead now
            (self.place.folder / AT_THE_END).unlink(missing_ok=True)
        loss, accuracy = trainer.evaluate(task.test)
        self.say(f"test loss {loss:.4g}, test accuracy {accuracy:.1%}. {self._left()}")
        return self.epochs

    def _at(self, step: int) -> tuple[int, int]:
        """The epoch, and the step of it, of a step as the probe counts: from 0, as these are, and
        from the resumption.
        """
        return divmod(self.first * self.task.steps_per_epoch + step, self.task.steps_per_epoch)

    def _named(self, step: int) -> str:
        """The same in words, from 1, as in the report and in TensorBoard."""
        epoch, step_of_it = self._at(step)
        return f"epoch {epoch + 1}, step {step_of_it + 1} of {self.task.steps_per_epoch}"

    def _after_step(self) -> None:
        """Show how far it is: on a terminal a bar does, elsewhere a line now and then."""
        self.steps += 1
        self.bar.update()
        if self.bar.disable and time.monotonic() - self.spoke >= SPEAK_EVERY:
            self.say(self._named(self.steps - 1))
            self.spoke = time.monotonic()

    def _after_epoch(self, number: int, loss: float) -> None:
        """Look at the network, log and save it; `number` counts from 0."""
        task, options, history = self.task, self.options, self.trainer.history
        done = number + 1
        epoch = Epoch(done, loss, *self.trainer.evaluate(task.validation))
        self.epochs.append(epoch)
        self.bar.clear()
        self.say(
            f"epoch {done}: loss {loss:.4g}, validation loss {epoch.validation_loss:.4g}, "
            f"validation accuracy {epoch.validation_accuracy:.1%}"
        )
        self.spoke = time.monotonic()
        self.log(epoch, history)
        arrays, numbers = self.trainer.state()
        self._check(done, loss, arrays, history)
        self.good, self.good_epochs = (arrays, numbers), done
        if self.speaks and (done % options.save_interval == 0 or done == options.num_epochs):
            self._save(arrays, numbers, history)

    def _check(
        self, done: int, loss: float, arrays: dict[str, np.ndarray], history: GradientHistory
    ) -> None:
        """A checkpoint of a network that is lost would only bury the last good one."""
        lost = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        if lost:
            bad = history.first_nonfinite
            since = f", since {self._named(bad.step)} ({bad.name})" if bad else ""
            self._explain(f"{len(lost)} arrays are no longer finite, {lost[0]} first{since}.")
        if history.skipped[-self.task.steps_per_epoch :].all():
            self._explain(
                "Every step of this epoch was left out, for no gradient was finite.",
                self._left_out(done, history),
            )
        if self.options.on_nonfinite == "record":
            return
        # Where steps are left out, the mean of the others hides that the network is lost.
        held, left_out = self.epochs[-1].validation_loss, self._left_out(done, history)
        if not math.isfinite(held) and left_out is not None:
            self._explain(
                f"The validation loss after this epoch is {held:.4g}, and steps of it were left "
                "out, for their gradient was not finite.",
                left_out,
            )
        if not loss <= BLOWN_UP * self.start_loss:
            self._explain(
                f"The mean loss of this epoch is {loss:.4g}, from {self.start_loss:.4g}.",
                None if math.isfinite(loss) else left_out,
            )

    def _left_out(self, done: int, history: GradientHistory) -> np.ndarray | None:
        """The samples of this epoch's first step that was left out, among those still known."""
        steps = self.task.steps_per_epoch
        begin = (done - 1 - self.first) * steps
        left_out = history.steps[history.skipped & (history.steps >= begin)]
        return self._rows(done - 1, left_out[0] - begin) if len(left_out) else None

    def _explain(self, sentence: str, rows: np.ndarray | None = None) -> None:
        """Say what went wrong: before it went wrong at all, then at a step that was not taken."""
        self.bar.close()
        self.say(sentence)
        of_the_step = None if rows is None else self.trainer.diagnose(rows)
        history = self.place.folder / AT_THE_END
        written = f"The gradients of its last steps are in {history}"
        if self.speaks:
            try:
                self.trainer.history.save(history)
            except OSError as error:
                written = f"{history} could not be written: {error.strerror or error}"
        # First the cause: what fails is often only the last of a series.
        self.trainer.restore(*self.good)
        after = _several(self.good_epochs, "epoch")
        begun = (
            f"network after {after}, on its next"
            if self.good_epochs
            else "untrained network, on its first"
        )
        self.say(f"\nThe {begun} batch:")
        self.say(str(self.trainer.diagnose(self._rows(self.good_epochs, 0))))
        if of_the_step is not None:
            self.say("\nWhat had become of it, at the step that was left out:")
            self.say(str(of_the_step))
        saved = checkpoint.numbered(self.place.folder)
        again = (
            "--resume goes on, also with another --lr, --lr-schedule or --clip-norm"
            if saved
            else "begin again with what the diagnosis says"
        )
        if not saved and self.good_epochs and self.options.save_interval > 1:
            again += ", or save more often with --save-interval"
        raise BlownUp(f"the run blew up. {self._left()} {written}; {again}") from None

    def _rows(self, epoch: int, batch: int) -> np.ndarray:
        """The training samples of one batch."""
        size = self.options.batch_size
        return self.task.order(epoch)[batch * size : (batch + 1) * size]

    def _left(self) -> str:
        there = list(checkpoint.numbered(self.place.folder).values())
        return f"The last checkpoint is {there[-1]}." if there else "No checkpoint was saved."

    def _save(self, arrays: dict[str, np.ndarray], numbers: dict, history: GradientHistory) -> None:
        done = len(self.epochs)
        record = {
            "options": asdict(self.options),
            "epochs_done": done,
            "start_loss": self.start_loss,
            "changes": [change._asdict() for change in self.place.changes],
            "epochs": [epoch._asdict() for epoch in self.epochs],
            "trainer": numbers,
        }
        try:
            history.save(self.place.folder / f"history-{done:06d}.npz")
            given = {f"input.{k}": v for k, v in self.task.standard._asdict().items()}
            checkpoint.save(self.place.folder, done, arrays | given, record)
        except OSError as error:
            raise NotSaved(
                f"epoch {done} could not be saved in {self.place.folder}: "
                f"{error.strerror or error}. {self._left()} Mend that, and --resume goes on from it"
            ) from None


@contextmanager
def _log(logdir: str | None, before: int) -> Iterator[Callable[[Epoch, GradientHistory], None]]:
    """Write TensorBoard's events, or nothing without a folder for them.

    Args:
        logdir: the folder.
        before: steps before those that the probe counts.  What the folder tells of later ones is of
            a run that went on from there too, and is not drawn any more.
    """
    if logdir is None:
        yield lambda epoch, history: None
        return
    from tensorboardX import SummaryWriter

    try:
        writer = SummaryWriter(
            logdir,
            purge_step=before + 1 if before else None,
            # By itself it names a file by the second, and overwrites that of a run as old.
            filename_suffix=f".{time.time_ns()}",
        )
    except OSError as error:
        raise _unwritable("--logdir", Path(logdir), error) from None
    written = -1

    def log(epoch: Epoch, history: GradientHistory) -> None:
        nonlocal written
        for step, total, norms in zip(history.steps, history.total, history.norms, strict=True):
            if step > written and step % LOG_EVERY == 0:
                number = before + step + 1  # so that an epoch's last step has the epoch's place
                writer.add_scalar("grad_norm/total", total, number)
                for name, norm in zip(history.names, norms, strict=True):
                    writer.add_scalar(f"grad_norm/{name}", norm, number)
        written = history.steps[-1]
        last = before + written + 1
        for name, value in epoch._asdict().items():
            if name != "epoch":
                writer.add_scalar(name.replace("_", "/"), value, last)

    with writer:
        yield log
