"""What watching gradients costs, ours and other people's, as a ratio to the plain training step.

    python benchmarks/probe.py                           # every model, every tool that is installed
    python benchmarks/probe.py --models mlp --only probe clip_ --repeats 200
    python benchmarks/probe.py --growth                  # from 10 to 10,000 parameter tensors
    python benchmarks/probe.py --diagnose                # what one diagnosis costs, in steps
    python benchmarks/probe.py --json cost.json

Each repeat times the plain step and the watched step next to each other, in alternating order; the
ratio is the median over these pairs, so that a machine that slows down slows both.  "extra" is the
median difference, and "floors" that difference over the time that NumPy takes to read every
gradient once.  Tools that are not installed are left out with a line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

MODELS = ("mlp", "resnet", "transformer")
Step = Callable[[], object]


@dataclass
class Row:
    """One tool on one model."""

    side: str
    model: str
    tool: str
    plain_ms: float
    ratio: float
    low: float  # quartiles of the ratio
    high: float
    extra_ms: float
    floors: float


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def keep_memory() -> None:
    """Ask glibc not to give freed memory back: whether it does so at the end of a step hangs on
    where the last small object happens to lie, and costs more than any tool measured here."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 1 << 30)


def seconds(step: Step, times: int = 1) -> float:
    """Wall time of one step, the mean over a few in a row."""
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


def pairs(plain: Step, other: Callable, repeats: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of both, (repeats,) each, measured next to each other; `other` is a context."""
    found = np.empty((repeats, 2))
    for _ in range(3):
        plain()
    for i in range(repeats):
        for which in (0, 1) if i % 2 else (1, 0):
            if which == 0:
                plain()  # each time both start warm
                found[i, 0] = seconds(plain, inner)
            else:
                with other() as step:
                    step()
                    found[i, 1] = seconds(step, inner)
    return found[:, 0], found[:, 1]


def floor(gradients: list[np.ndarray], repeats: int = 21) -> float:
    """Seconds to read every gradient once from memory."""
    flat = [g.ravel() for g in gradients]
    return statistics.median(seconds(lambda: [np.dot(g, g) for g in flat]) for _ in range(repeats))


def row(side: str, model: str, tool: str, plain, watched, least: float) -> Row:
    """The medians of paired measurements."""
    low, ratio, high = np.quantile(watched / plain, [0.25, 0.5, 0.75])
    extra = float(np.median(watched - plain))
    plain_ms = 1e3 * float(np.median(plain))
    return Row(side, model, tool, plain_ms, ratio, low, high, 1e3 * extra, extra / least)


# -- PyTorch -------------------------------------------------------------------------------------


class TorchJob:
    """A model, its optimiser and a batch; `step` trains on it."""

    def __init__(self, name: str) -> None:
        import torch

        torch.manual_seed(0)
        self.model, x, self.y = torch_model(name)
        self.x = x
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-4, momentum=0.9)
        self.step()

    @staticmethod
    def loss(model, batch):
        """Cross-entropy, as `diagnose` wants it."""
        import torch

        x, y = batch
        return torch.nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())

    def step(self, before_update: Step | None = None) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.loss(self.model, (self.x, self.y)).backward()
        if before_update is not None:
            before_update()
        self.optimizer.step()


def torch_model(name: str):
    """The model, a batch and its labels."""
    import torch
    from torch import nn

    if name == "mlp":
        layers = [m for _ in range(19) for m in (nn.Linear(256, 256), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(256, 10)), *batch(torch, (64, 256), 10)
    if name == "resnet":

        class Block(nn.Module):
            def __init__(self, before, width, stride):
                super().__init__()
                self.body = nn.Sequential(
                    nn.Conv2d(before, width, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(width),
                )
                self.skip = nn.Identity()
                if stride > 1:
                    self.skip = nn.Conv2d(before, width, 1, stride, bias=False)

            def forward(self, x):
                return torch.relu(self.body(x) + self.skip(x))

        blocks = [
            Block(before, width, stride)
            for before, width, first in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
            for before, stride in ((before, first), (width, 1))
        ]
        net = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        return net, *batch(torch, (4, 3, 32, 32), 10)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    net = nn.Sequential(
        nn.Embedding(1000, 256), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    )
    net.append(nn.Linear(256, 1000))
    tokens = torch.randint(1000, (8, 129))
    return net, tokens[:, :-1], tokens[:, 1:]


def batch(torch, shape: tuple[int, ...], classes: int):
    """Random inputs and labels."""
    return torch.randn(shape), torch.randint(classes, shape[:1])


@contextmanager
def torch_probe(job: TorchJob) -> Iterator[Step]:
    """Ours."""
    from gradlab.torch import GradientProbe

    with GradientProbe(job.model, job.optimizer):
        yield job.step


@contextmanager
def torch_probe_clip(job: TorchJob) -> Iterator[Step]:
    """Ours, recording and clipping in one."""
    from gradlab.torch import GradientProbe

    with GradientProbe(job.model, job.optimizer) as probe:
        yield lambda: job.step(lambda: probe.clip_(0.1))


@contextmanager
def torch_probe_activations(job: TorchJob) -> Iterator[Step]:
    """Ours, with the largest output of every module."""
    from gradlab.torch import GradientProbe

    with GradientProbe(job.model, job.optimizer, activations=True):
        yield job.step


@contextmanager
def torch_clip(job: TorchJob) -> Iterator[Step]:
    """PyTorch's own clipping, which records nothing."""
    from torch.nn.utils import clip_grad_norm_

    yield lambda: job.step(lambda: clip_grad_norm_(job.parameters, 0.1))


@contextmanager
def torch_naive(job: TorchJob) -> Iterator[Step]:
    """The loop that everybody writes first."""
    yield lambda: job.step(lambda: [p.grad.norm().item() for p in job.parameters])


@contextmanager
def torch_anomaly(job: TorchJob) -> Iterator[Step]:
    """PyTorch's anomaly detection."""
    import torch

    with torch.autograd.set_detect_anomaly(True):
        yield job.step


@contextmanager
def torch_lightning(job: TorchJob) -> Iterator[Step]:
    """Lightning's function for logging, values left where they are."""
    from lightning.pytorch.utilities import grad_norm

    yield lambda: job.step(lambda: grad_norm(job.model, 2))


@contextmanager
def torch_like_lightning(job: TorchJob) -> Iterator[Step]:
    """What Lightning's `grad_norm` does, written out, for a machine without it."""
    import torch

    def norms() -> dict:
        found = {
            f"grad_2.0_norm/{name}": p.grad.data.norm(2)
            for name, p in job.model.named_parameters()
            if p.grad is not None
        }
        total = torch.tensor(list(found.values())).norm(2)
        return found | {"grad_2.0_norm_total": total}

    yield lambda: job.step(norms)


@contextmanager
def torch_histograms(job: TorchJob) -> Iterator[Step]:
    """A histogram of every gradient for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:

        def write() -> None:
            for name, p in job.model.named_parameters():
                writer.add_histogram(name, p.grad, 0)

        yield lambda: job.step(write)


@contextmanager
def torch_wandb(job: TorchJob) -> Iterator[Step]:
    """Weights & Biases' watch at every step, offline."""
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True))
        run.watch(job.model, log="gradients", log_freq=1)

        def step() -> None:
            job.step()
            run.log({})

        yield step
        run.unwatch(job.model)
        run.finish()


@contextmanager
def torch_underflow(job: TorchJob) -> Iterator[Step]:
    """The detector of Hugging Face's transformers, which watches weights and activations."""
    from transformers.debug_utils import DebugUnderflowOverflow

    hooks = {m: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in job.model.modules()}
    DebugUnderflowOverflow(job.model)
    yield job.step
    for module, (after, before) in hooks.items():  # it does not say how to take it off
        for ours, kept in ((module._forward_hooks, after), (module._forward_pre_hooks, before)):
            for key in set(ours) - set(kept):
                del ours[key]


TORCH = {
    "probe": torch_probe,
    "probe.clip_": torch_probe_clip,
    "probe, activations": torch_probe_activations,
    "clip_grad_norm_": torch_clip,
    "naive .norm().item()": torch_naive,
    "Lightning-like grad_norm": torch_like_lightning,
    "Lightning grad_norm": torch_lightning,
    "set_detect_anomaly": torch_anomaly,
    "TensorBoard histograms": torch_histograms,
    "wandb.watch": torch_wandb,
    "DebugUnderflowOverflow": torch_underflow,
}


def measure_torch(name: str, wanted: Callable, repeats: int, inner: int) -> Iterator[Row]:
    """One row per tool."""
    job = TorchJob(name)
    least = floor([p.grad.numpy() for p in job.parameters])
    for tool, context in TORCH.items():
        if not wanted(tool):
            continue
        say(f"torch {name}: {tool}")
        try:
            plain, watched = pairs(job.step, lambda c=context: c(job), repeats, inner)
        except ImportError as error:
            say(f"  left out, not installed: {error}")
            continue
        yield row("torch", name, tool, plain, watched, least)


# -- Keras ---------------------------------------------------------------------------------------


def keras_model(name: str):
    """The same three models, not compiled, and a batch."""
    from gradlab.keras import keras

    layers, rng = keras.layers, np.random.default_rng(0)
    if name == "mlp":
        stack = [keras.Input((256,)), *(layers.Dense(256, "relu") for _ in range(19))]
        x, y = rng.normal(size=(64, 256)), rng.integers(10, size=64)
        return keras.Sequential([*stack, layers.Dense(10)]), x.astype("float32"), y
    if name == "resnet":
        inputs = h = keras.Input((32, 32, 3))

        def conv(h, width, size=3, stride=1):
            return layers.Conv2D(width, size, stride, "same", use_bias=False)(h)

        h = layers.ReLU()(layers.BatchNormalization()(conv(h, 64)))
        for width, first in ((64, 1), (128, 2), (256, 2), (512, 2)):
            for stride in (first, 1):
                skip = conv(h, width, 1, stride) if stride > 1 else h
                h = layers.ReLU()(layers.BatchNormalization()(conv(h, width, 3, stride)))
                h = layers.ReLU()(layers.BatchNormalization()(conv(h, width)) + skip)
        h = layers.Dense(10)(layers.GlobalAveragePooling2D()(h))
        x, y = rng.normal(size=(4, 32, 32, 3)), rng.integers(10, size=4)
        return keras.Model(inputs, h), x.astype("float32"), y
    inputs = keras.Input((128,), dtype="int32")
    h = layers.Embedding(1000, 256)(inputs)
    for _ in range(4):
        z = layers.LayerNormalization()(h)
        h = h + layers.MultiHeadAttention(4, 64)(z, z)
        z = layers.Dense(1024, "relu")(layers.LayerNormalization()(h))
        h = h + layers.Dense(256)(z)
    tokens = rng.integers(1000, size=(8, 129))
    return keras.Model(inputs, layers.Dense(1000)(h)), tokens[:, :-1], tokens[:, 1:]


class KerasJob:
    """One step of `fit` at a time, callbacks included, without retracing for each measurement."""

    def __init__(self, name: str, callback: Callable | None = None, numerics: bool = False) -> None:
        import tensorflow as tf

        from gradlab.keras import keras

        self.model, self.x, self.y = keras_model(name)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.SGD(1e-4, momentum=0.9), loss, jit_compile=False)
        watching = [callback()] if callback else []
        self.callbacks = keras.callbacks.CallbackList(watching, model=self.model)
        self.batches = iter(tf.data.Dataset.from_tensors((self.x, self.y)).repeat())
        self.model.make_train_function()
        self.callbacks.on_train_begin()
        self.callbacks.on_epoch_begin(0)
        if numerics:
            tf.debugging.enable_check_numerics()
        self.step()  # traces; the checks are in the graph from here on
        if numerics:
            tf.debugging.disable_check_numerics()

    def step(self) -> None:
        """What `fit` does with one batch."""
        self.callbacks.on_train_batch_begin(0)
        self.callbacks.on_train_batch_end(0, self.model.train_function(self.batches))

    def gradients(self) -> list[np.ndarray]:
        """Arrays of the gradients' shapes."""
        return [np.ones(v.shape, "float32") for v in self.model.trainable_variables]


def keras_tools() -> dict[str, dict]:
    """How each tool is put on a model."""
    import gradlab.keras

    callbacks = gradlab.keras.keras.callbacks
    return {
        "probe": {"callback": gradlab.keras.GradientProbe},
        "probe, activations": {"callback": lambda: gradlab.keras.GradientProbe(activations=True)},
        "TerminateOnNaN": {"callback": callbacks.TerminateOnNaN},
        "enable_check_numerics": {"numerics": True},
    }


def measure_keras(name: str, wanted: Callable, repeats: int, inner: int) -> Iterator[Row]:
    """One row per tool."""
    plain_job = KerasJob(name)
    least = floor(plain_job.gradients())
    for tool, how in keras_tools().items():
        if not wanted(tool):
            continue
        say(f"keras {name}: {tool}")
        job = KerasJob(name, **how)

        @contextmanager
        def watched_step(job: KerasJob = job) -> Iterator[Step]:
            yield job.step

        plain, watched = pairs(plain_job.step, watched_step, repeats, inner)
        yield row("keras", name, tool, plain, watched, least)


# -- growth and diagnosis ------------------------------------------------------------------------


def growth(repeats: int) -> list[dict]:
    """Milliseconds that a tool adds to a step, by the number of parameter tensors (1,000 numbers
    each): the part that Python and the calls cost, however fast the memory is."""
    import torch

    tools = ("probe", "probe.clip_", "clip_grad_norm_", "naive .norm().item()")
    found = []
    for count in (10, 100, 1000, 10_000):
        job = TorchJob.__new__(TorchJob)
        job.model = torch.nn.ParameterList(torch.randn(1000) for _ in range(count))
        job.parameters = list(job.model.parameters())
        job.optimizer = torch.optim.SGD(job.parameters, lr=1e-6)
        for p in job.parameters:
            p.grad = torch.randn(1000)

        def step(before_update: Step | None = None, job: TorchJob = job) -> None:
            if before_update is not None:
                before_update()
            job.optimizer.step()

        job.step = step
        inner = max(1, 200 // count)
        entry = {"tensors": count, "floor": 1e3 * floor([p.grad.numpy() for p in job.parameters])}
        for tool in tools:
            say(f"growth: {count} tensors, {tool}")
            plain, watched = pairs(step, lambda t=tool, j=job: TORCH[t](j), repeats, inner)
            entry[tool] = 1e3 * float(np.median(watched - plain))
        found.append(entry)
    return found


def diagnosis(sides: list[str], models: list[str], repeats: int) -> list[dict]:
    """What one call of `diagnose` costs, in training steps."""
    found = []
    for side in sides:
        try:
            if side == "torch":
                from gradlab.torch import diagnose
            else:
                from gradlab.keras import diagnose
        except ImportError as error:
            say(f"{side}: {error}")
            continue
        for name in models:
            say(f"diagnose: {side} {name}")
            job = TorchJob(name) if side == "torch" else KerasJob(name)
            job.step()
            step = statistics.median(seconds(job.step) for _ in range(repeats))
            call = {"optimizer": job.model.optimizer if side == "keras" else job.optimizer}
            loss = TorchJob.loss if side == "torch" else keras_loss
            args = (job.model, loss, (job.x, job.y))
            taken = statistics.median(
                seconds(lambda a=args, c=call, d=diagnose: d(*a, **c)) for _ in range(3)
            )
            found.append({"side": side, "model": name, "seconds": taken, "steps": taken / step})
    return found


def keras_loss(model, batch):
    """Cross-entropy, as `diagnose` wants it."""
    from gradlab.keras import keras

    x, y = batch
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return loss(y, model(x, training=True))


# -- the command ---------------------------------------------------------------------------------


def machine() -> dict:
    """What the figures were measured with."""
    from importlib import metadata

    versions = {}
    for name in ("torch", "tensorflow", "keras", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    return {"processor": platform.machine(), "cores": os.cpu_count(), "threads": threads} | versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sides", nargs="+", choices=("torch", "keras"), default=["torch", "keras"]
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", metavar="TOOL", help="tools named exactly like this")
    parser.add_argument("--repeats", type=int, default=60, help="pairs of measurements")
    parser.add_argument("--inner", type=int, default=1, help="steps in a row per measurement")
    parser.add_argument("--growth", action="store_true", help="cost by number of tensors instead")
    parser.add_argument("--diagnose", action="store_true", help="cost of a diagnosis instead")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()

    keep_memory()
    report: dict = {"machine": machine()}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    if arguments.growth:
        report["growth"] = growth(arguments.repeats)
        keys = list(report["growth"][0])
        print("milliseconds added to a step\n" + "".join(f"{key:>22}" for key in keys))
        for entry in report["growth"]:
            print("".join(f"{entry[key]:>22.4g}" for key in keys))
    elif arguments.diagnose:
        report["diagnose"] = diagnosis(arguments.sides, arguments.models, arguments.repeats)
        for entry in report["diagnose"]:
            print("{side:6} {model:12} {seconds:8.3f} s = {steps:6.1f} steps".format(**entry))
    else:

        def wanted(tool: str) -> bool:
            return not arguments.only or tool in arguments.only

        rows = []
        print(f"{'':44}{'plain ms':>9}{'ratio':>8}{'quartiles':>16}{'extra ms':>10}{'floors':>8}")
        for side in arguments.sides:
            measure = measure_torch if side == "torch" else measure_keras
            for name in arguments.models:
                for r in measure(name, wanted, arguments.repeats, arguments.inner):
                    rows.append(r)
                    print(
                        f"{r.side:6} {r.model:12} {r.tool:24}{r.plain_ms:9.2f}{r.ratio:8.3f}"
                        f"{r.low:8.3f}{r.high:8.3f}{r.extra_ms:10.3f}{r.floors:8.1f}",
                        flush=True,
                    )
        report["rows"] = [asdict(r) for r in rows]
        if arguments.only and not rows:
            parser.error(f"nothing measured: no installed tool is named {arguments.only}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
