"""Many networks as one stacked computation, against a Python loop over them: time as a ratio.

    python benchmarks/sweep.py                                # 64 networks, depth 30, width 64
    python benchmarks/sweep.py --depth 3 --width 16 --sides torch
    python benchmarks/sweep.py --json sweep.json

The loops train one network after another in the framework's usual way.  "measuring" loops record
what a sweep records, the loss and every layer's gradient norm at every step; "bare" ones record
nothing.  Times are CPU seconds of the whole process per network and step, one framework thread;
each loop is timed next to the stack, and the ratio is the median over the repeats.  "least" is the
time that the matrix products alone take, at the rate this machine reaches on one stacked product:
no stacking can be faster, so loop / least bounds what stacking could ever gain.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable

# Before any framework is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from gradlab import data, mlp
from gradlab.sweep import minibatches


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def torch_loops(weights, x, y, rows) -> dict[str, Callable[[], object]]:
    """Loops over the networks in PyTorch."""
    import torch

    inputs, classes, batches = map(torch.from_numpy, (x, y, rows))

    def loop(measuring: bool) -> None:
        for member in range(len(weights[0])):
            layers = []
            for matrix in weights:
                linear = torch.nn.Linear(*matrix.shape[1:], bias=False)
                linear.weight.data = torch.from_numpy(matrix[member].T.copy())
                layers += [linear, torch.nn.ReLU()]
            net = torch.nn.Sequential(*layers[:-1])
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
            seen = []
            for batch in batches[:, member]:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(net(inputs[batch]), classes[batch])
                loss.backward()
                if measuring:
                    norms = [p.grad.norm().item() for p in net.parameters()]
                    seen.append((loss.item(), norms))
                optimizer.step()

    return {"measuring loop": lambda: loop(True), "bare loop": lambda: loop(False)}


def keras_loops(weights, x, y, rows) -> dict[str, Callable[[], object]]:
    """Loops over the networks in TensorFlow: eager, and with a step compiled once for all."""
    import tensorflow as tf

    inputs, classes, batches = map(tf.constant, (x, y, rows))
    net = [tf.Variable(matrix[0]) for matrix in weights]
    optimizer = tf.keras.optimizers.SGD(0.01)
    optimizer.build(net)

    def step(batch):
        with tf.GradientTape() as tape:
            h = tf.gather(inputs, batch)
            for matrix in net[:-1]:
                h = tf.nn.relu(h @ matrix)
            each = tf.nn.sparse_softmax_cross_entropy_with_logits(
                tf.gather(classes, batch), h @ net[-1]
            )
            loss = tf.reduce_mean(each)
        gradients = tape.gradient(loss, net)
        optimizer.apply_gradients(zip(gradients, net, strict=True))
        return loss, tf.stack([tf.norm(gradient) for gradient in gradients])

    def loop(step, measuring: bool) -> None:
        for member in range(len(weights[0])):
            for variable, matrix in zip(net, weights, strict=True):
                variable.assign(matrix[member])
            seen = []
            for batch in batches[:, member]:
                loss, norms = step(batch)
                if measuring:
                    seen.append((loss.numpy(), norms.numpy()))

    compiled = tf.function(step)
    return {
        "measuring loop, eager": lambda: loop(step, True),
        "measuring loop, tf.function": lambda: loop(compiled, True),
    }


def least(side: str, members: int, batch: int, shapes: list[tuple[int, int]]) -> float:
    """CPU seconds that one step's matrix products take, all networks stacked."""
    rng = np.random.default_rng(0)
    total = 0.0
    for shape in set(shapes):
        a = rng.normal(size=(members, batch, shape[0])).astype("float32")
        b = rng.normal(size=(members, *shape)).astype("float32")
        if side == "torch":
            import torch

            a, b, product = torch.from_numpy(a), torch.from_numpy(b), torch.bmm
        else:
            import tensorflow as tf

            a, b, product = tf.constant(a), tf.constant(b), tf.matmul
        product(a, b)
        once = min(cpu(lambda a=a, b=b, p=product: [p(a, b) for _ in range(20)]) / 20
                   for _ in range(5))  # fmt: skip
        total += 3 * shapes.count(shape) * once  # forward, and two products backward
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sides", nargs="+", choices=["torch", "keras"], default=["torch", "keras"]
    )
    parser.add_argument("--networks", type=int, default=64)
    parser.add_argument("--depth", type=int, default=30, help="matrices in a network")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="also write the rows to this file")
    given = parser.parse_args()

    digits = data.digits(seed=0)
    # Few examples: a sweep also reads its training accuracy, which the loops do not.
    x, y = digits.x_train[:256], digits.y_train[:256].astype(np.int64)
    spec = mlp.MLPSpec(64, 10, width=given.width, depth=given.depth - 1, bias=False)
    weights = mlp.stacked_weights(spec, range(given.networks))
    rows = minibatches(len(x), given.networks, given.steps, given.batch, 0)
    net_steps = given.networks * given.steps
    found = []
    for side in given.sides:
        if side == "torch":
            import gradlab.torch as framework
        else:
            import gradlab.keras as framework
        loops = {"torch": torch_loops, "keras": keras_loops}[side](weights, x, y, rows)
        floor = least(side, given.networks, given.batch, spec.sizes) / given.networks

        def stack(framework=framework):
            small = {"x_test": x[:10], "y_test": y[:10]}
            framework.sweep.train(weights, x, y, lr=0.01, rows=rows, **small)

        stack()
        for name, loop in loops.items():
            print(f"{side}: {name} …", file=sys.stderr, flush=True)
            loop()
            pairs = np.array([(cpu(loop), cpu(stack)) for _ in range(given.repeats)]) / net_steps
            ratio = np.quantile(pairs[:, 0] / pairs[:, 1], [0.25, 0.5, 0.75])
            slow, fast = 1e3 * np.median(pairs, 0)
            found.append(
                {"side": side, "loop": name, "loop_ms": slow, "stacked_ms": fast,
                 "least_ms": 1e3 * floor, "ratio": ratio[1], "low": ratio[0], "high": ratio[2]}
            )  # fmt: skip

    print(f"{given.networks} networks, depth {given.depth}, width {given.width}, batch "
          f"{given.batch}, on {platform.processor() or platform.machine()}")  # fmt: skip
    print(f"{'':36s}{'ms per network and step':>30s}{'loop / stacked':>24s}")
    print(f"{'':36s}{'loop':>10s}{'stacked':>10s}{'least':>10s}{'median (quartiles)':>24s}")
    for r in found:
        spread = f"{r['ratio']:.2f} ({r['low']:.2f}-{r['high']:.2f})"
        print(f"{r['side'] + ', ' + r['loop']:36s}{r['loop_ms']:10.3f}{r['stacked_ms']:10.3f}"
              f"{r['least_ms']:10.3f}{spread:>24s}")  # fmt: skip
    if given.json:
        with open(given.json, "w", encoding="utf-8") as stream:
            json.dump({"settings": vars(given), "rows": found}, stream, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
