"""What a compiler makes of a training step: ratios to the eager step, and what compiling costs.

    python benchmarks/xla.py                    # every model, both frameworks: a table
    python benchmarks/xla.py --models deep loop --repeats 5
    python benchmarks/xla.py --save             # benchmarks/data/xla_cpu.json or xla_gpu.json

A step is the forward pass, the backward pass and the update.  The ways of running it take turns,
and a ratio is the median over the turns, so that a machine that slows down slows all of them.  On a
CPU the clock is the processor time of this process and of the compilers that it starts; on a GPU,
which is used where both frameworks see one, it is the time on the wall until the result is there.
`first` is what the first call costs beyond an ordinary one: tracing and compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

#: The book's own, and one thread for PyTorch's compiler: read when the frameworks are imported.
SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1",
            "TF_NUM_INTEROP_THREADS": "1", "TF_ENABLE_ONEDNN_OPTS": "0",
            "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # fmt: skip
os.environ.update(SETTINGS)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

DATA = Path(__file__).resolve().parent / "data"
RATE = 1e-4

#: What each model is, as the book prints it.
MODELS = {
    "wide": "6 dense layers, 1024 wide, batch 128",
    "deep": "50 tanh layers, 32 wide, batch 32",
    "cnn": "4 convolutions, 32 channels, 28 × 28 pixels, batch 16",
    "attention": "2 transformer blocks, 64 tokens, 128 wide, batch 8",
    "loop": "a recurrent layer, 32 steps, 64 wide, batch 32",
    "pointwise": "30 operations, number by number, on a million numbers",
}


def arrays(model: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The weights and the batch of a model, float32, the same for both frameworks."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, fan_in: int | None = None) -> np.ndarray:
        return (rng.normal(size=shape) / (fan_in or shape[0]) ** 0.5).astype("float32")

    if model == "wide":
        return [normal(1024, 1024) for _ in range(6)], normal(128, 1024, fan_in=1)
    if model == "deep":
        return [normal(32, 32) for _ in range(50)], normal(32, 32, fan_in=1)
    if model == "cnn":
        kernels = [normal(3, 3, a, b, fan_in=9 * a) for a, b in pairwise((1, 32, 32, 32, 32))]
        return kernels, normal(16, 28, 28, 1, fan_in=1)
    if model == "attention":
        block = ((128, 128), (128, 128), (128, 128), (128, 128), (128, 512), (512, 128))
        return [normal(*shape) for _ in range(2) for shape in block], normal(8, 64, 128, fan_in=1)
    if model == "loop":
        return [normal(64, 64), normal(64, 64)], normal(32, 32, 64, fan_in=1)
    return [normal(1_000_000, fan_in=1)], normal(1_000_000, fan_in=1)


def forward(model: str, w: list, x, o):
    """The outputs of a model; `o` has the framework's operations."""
    if model in ("wide", "deep"):
        for a in w:
            x = (o.relu if model == "wide" else o.tanh)(x @ a)
    elif model == "cnn":
        for a in w:
            x = o.relu(o.conv(x, a))
    elif model == "attention":
        for q, k, v, out, up, down in zip(*(iter(w),) * 6, strict=True):
            h = o.normalized(x)
            x = x + o.softmax((h @ q) @ o.transposed(h @ k) / 128**0.5) @ (h @ v) @ out
            x = x + o.relu(o.normalized(x) @ up) @ down
    elif model == "loop":
        h = x[:, 0]
        for step in range(1, x.shape[1]):
            h = o.tanh(h @ w[0] + x[:, step] @ w[1])
        x = h
    else:
        for _ in range(10):
            x = o.tanh(x * w[0] + 0.5)
    return x


class TensorFlow:
    """Its operations, its ways of running a step, and how to wait for the result."""

    name = "tensorflow"

    def __init__(self) -> None:
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")
        self.tf, self.version = tf, tf.__version__
        self.gpus = [
            tf.config.experimental.get_device_details(gpu).get("device_name", "a GPU")
            for gpu in tf.config.list_physical_devices("GPU")
        ]
        self.relu, self.tanh, self.softmax = tf.nn.relu, tf.tanh, tf.nn.softmax

    def conv(self, x, kernel):
        return self.tf.nn.conv2d(x, kernel, 1, "SAME")

    def transposed(self, x):
        return self.tf.linalg.matrix_transpose(x)

    def normalized(self, x):
        mean, variance = self.tf.nn.moments(x, -1, keepdims=True)
        return (x - mean) * self.tf.math.rsqrt(variance + 1e-5)

    def ways(self, model: str) -> dict[str, Callable]:
        tf = self.tf
        start, x = arrays(model)
        w, x = [tf.constant(a) for a in start], tf.constant(x)

        def step(w, x):
            with tf.GradientTape() as tape:
                tape.watch(w)
                loss = tf.reduce_mean(tf.square(forward(model, w, x, self)))
            grads = tape.gradient(loss, w)
            return [a - RATE * g for a, g in zip(w, grads, strict=True)]

        found = {"eager": step, "graph": tf.function(step),
                 "XLA": tf.function(step, jit_compile=True)}  # fmt: skip
        return {name: lambda run=run: run(w, x) for name, run in found.items()}

    def wait(self, result) -> None:
        result[-1].numpy()
        if self.gpus:
            self.tf.test.experimental.sync_devices()


class PyTorch:
    """The same for PyTorch."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch, self.version = torch, torch.__version__
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.gpus = [torch.cuda.get_device_name(0)] if self.device == "cuda" else []
        self.relu, self.tanh = torch.relu, torch.tanh

    def softmax(self, x):
        return self.torch.softmax(x, -1)

    def conv(self, x, kernel):
        return self.torch.nn.functional.conv2d(x, kernel, padding=1)

    def transposed(self, x):
        return x.mT

    def normalized(self, x):
        variance, mean = self.torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * self.torch.rsqrt(variance + 1e-5)

    def ways(self, model: str) -> dict[str, Callable]:
        torch = self.torch
        start, x = arrays(model)
        if model == "cnn":  # channels first
            start, x = [a.transpose(3, 2, 0, 1) for a in start], x.transpose(0, 3, 1, 2)
        w = [torch.tensor(np.ascontiguousarray(a), device=self.device) for a in start]
        x = torch.tensor(np.ascontiguousarray(x), device=self.device)

        def loss_of(w, x):
            return forward(model, w, x, self).square().mean()

        def step(run):
            leaves = [a.detach().requires_grad_() for a in w]
            grads = torch.autograd.grad(run(leaves, x), leaves)
            with torch.no_grad():
                return [a - RATE * g for a, g in zip(leaves, grads, strict=True)]

        found = {"eager": loss_of, "compile": torch.compile(loss_of)}
        return {name: lambda run=run: step(run) for name, run in found.items()}

    def wait(self, result) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()


def processor_time() -> float:
    """Seconds of this process and of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(framework, model: str, repeats: int, clock: Callable[[], float]) -> dict:
    """One model in one framework: the ratios to the eager step and the cost of the first call."""
    ways = framework.ways(model)

    def seconds(run: Callable, times: int = 1) -> float:
        start = clock()
        for _ in range(times):
            result = run()
        framework.wait(result)
        return (clock() - start) / times

    first = {name: seconds(run) for name, run in ways.items()}
    seconds(ways["eager"])
    times = max(1, int(0.1 / seconds(ways["eager"])))  # about a tenth of a second at a time
    for run in ways.values():
        seconds(run, 2)
    turns = [{name: seconds(run, times) for name, run in ways.items()} for _ in range(repeats)]
    eager = statistics.median(turn["eager"] for turn in turns)
    found = {"framework": framework.name, "model": model, "ways": {}}
    for name in ways:
        low, ratio, high = np.quantile([t[name] / t["eager"] for t in turns], [0.25, 0.5, 0.75])
        took = statistics.median(turn[name] for turn in turns)
        found["ways"][name] = {
            "ratio": round(float(ratio), 4),
            "quartiles": [round(float(low), 4), round(float(high), 4)],
            "first": round((first[name] - took) / eager, 1),
        }
    found["eager_ms"] = round(1e3 * eager, 3)
    return found


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and save where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--save", action="store_true", help=f"write a file in {DATA}")
    options = parser.parse_args(argv)

    frameworks = [TensorFlow(), PyTorch()]
    gpus = [framework.gpus for framework in frameworks]
    on_gpu = all(gpus)
    if any(gpus) and not on_gpu:
        parser.error("only one framework sees a GPU; CUDA_VISIBLE_DEVICES= hides it")
    clock = time.perf_counter if on_gpu else processor_time
    report = {
        "device": "gpu" if on_gpu else "cpu",
        "machine": gpus[0][0] if on_gpu else f"{processor()}, one thread",
        "versions": {f.name: f.version for f in frameworks} | {"python": platform.python_version()},
        "settings": SETTINGS,
        "clock": "wall" if on_gpu else "processor",
        "repeats": options.repeats,
        "models": {name: MODELS[name] for name in options.models},
        "rows": [],
    }
    print(f"{report['device']}: {report['machine']}; {report['versions']}", file=sys.stderr)
    for model in options.models:
        for framework in frameworks:
            row = measure(framework, model, options.repeats, clock)
            report["rows"].append(row)
            cells = (
                f"{name} {way['ratio']:.2f} (first call {way['first']:.0f} eager steps)"
                for name, way in row["ways"].items()
            )
            print(f"{model:10s} {framework.name:11s} {row['eager_ms']:8.2f} ms  ", "  ".join(cells))
            sys.stdout.flush()
    if options.save:
        DATA.mkdir(exist_ok=True)
        path = DATA / f"xla_{report['device']}.json"
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:  # nothing that an earlier run compiled
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        sys.exit(main())
