"""What the command adds to a training step: `gradlab train` against the barest loop, in one run.

    python benchmarks/train.py [--framework torch] [--epochs 3]

An epoch of the article's network on 100,000 samples, batch 32, Adam: the command's own trainer with
its probe, its order of samples and its schedule, and a loop that does nothing but step.  They take
turns; printed are the medians and their ratios, of the clock's seconds and of the processor's,
which other programs disturb less.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from gradlab import training


def bare_torch(task: training.Problem) -> Callable[[], None]:
    import torch
    from torch.nn import functional as F

    from gradlab.torch.convnet import ConvNet

    model = ConvNet(task.spec, task.weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = torch.as_tensor(task.train.x), torch.as_tensor(task.train.y)

    def epoch() -> None:
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()

    return epoch


def bare_tensorflow(task: training.Problem) -> Callable[[], None]:
    import tensorflow as tf

    from gradlab.keras import keras
    from gradlab.keras.convnet import ConvNet

    model = ConvNet(task.spec, task.weights)
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    batches = tf.data.Dataset.from_tensor_slices((task.train.x, task.train.y))
    batches = batches.shuffle(len(task.train.x)).batch(32).prefetch(4)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x))
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    def epoch() -> None:
        for x, y in batches:
            step(x, y)

    return epoch


class Seconds(NamedTuple):
    """On the clock, and of the processor."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> Seconds:
        """Both, since some moment."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, earlier: Seconds) -> Seconds:
        """What has passed."""
        return Seconds(self.clock - earlier.clock, self.processor - earlier.processor)


def command(framework: str, task: training.Problem, folder: str, epochs: int) -> list[Seconds]:
    """Seconds of each epoch, as the command itself trains: evaluation and saving left out."""
    from importlib import import_module

    side = training.FRAMEWORKS[framework]
    options = training.Options(framework=framework, save_path=folder, num_epochs=epochs)
    trainer = import_module(f"gradlab.{side}.train").Trainer(options, task)
    marks = [Seconds.now()]
    trainer.fit(0, epochs, lambda: None, lambda epoch, loss: marks.append(Seconds.now()))
    return [late.since(early) for early, late in itertools.pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=tuple(training.FRAMEWORKS), default="torch")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    task = training.problem(training.Options(num_epochs=arguments.epochs))
    bare = {"torch": bare_torch, "tensorflow": bare_tensorflow}[arguments.framework](task)
    bare()  # warm
    seconds: dict[str, list[Seconds]] = {"bare": [], "command": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            for _ in range(arguments.epochs - 1):
                begin = Seconds.now()
                bare()
                seconds["bare"].append(Seconds.now().since(begin))
            # Its first epoch includes tracing.
            seconds["command"] += command(arguments.framework, task, folder, arguments.epochs)[1:]
    for kind in Seconds._fields:
        values = {name: [getattr(s, kind) for s in many] for name, many in seconds.items()}
        medians = {name: statistics.median(many) for name, many in values.items()}
        for name, many in values.items():
            print(
                f"{kind:9} {name:8} {medians[name]:6.2f} s an epoch "
                f"({min(many):.2f} to {max(many):.2f})"
            )
        print(f"{kind:9} ratio    {medians['command'] / medians['bare']:6.2f}")


if __name__ == "__main__":
    main()
