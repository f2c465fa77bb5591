"""Data-parallel training with PyTorch: what each process runs, and one command that runs it.

On one process, on four of this machine, on eight of two machines::

    python -m gradlab.torch.parallel                                   # one process
    torchrun --nproc-per-node 4 -m gradlab.torch.parallel              # four, on this machine
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d \\
        --rdzv-endpoint first-machine:29500 -m gradlab.torch.parallel  # eight, on two

`gradlab.keras` has no twin of this module: TensorFlow's strategies start no function per process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["join", "main", "mean_gradients", "train"]


def join(limit: float = 1800.0) -> tuple[int, int]:
    """Meet the other processes, with the gloo backend.

    Under `torchrun` at its address, under `gradlab.processes` at its file; started by neither, the
    process is alone.  On one machine it asks gloo for the loopback interface, so that no host name
    has to be resolved.

    Args:
        limit: seconds after which an operation that waits for the others raises.

    Returns:
        This process's rank, and the number of processes.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    file = os.environ.get("GRADLAB_RENDEZVOUS")
    settings = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=limit)}
    if size == int(os.environ.get("LOCAL_WORLD_SIZE", size)):
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if file is not None:
        settings["init_method"] = f"file://{file}"
    elif "MASTER_ADDR" not in os.environ:
        settings["store"] = dist.HashStore()
    dist.init_process_group("gloo", **settings)
    return rank, size


def mean_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every `.grad` by its mean over the processes, in one all-reduce.

    Args:
        parameters: dense, of one dtype, the same in every process.  Where a process has no
            gradient, it takes part with zeros.
    """
    parameters = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in parameters])  # fmt: skip
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = mean.view_as(p).clone()


def train(
    *, steps: int = 20, batch_size: int = 64, lr: float = 0.5, max_norm: float = 1.0, seed: int = 0
) -> dict[str, list[float]]:
    """Train a small network on the digits; each process has its share of every batch.

    Call it in every process, after `join`.  However many there are, it takes the same steps, up to
    rounding: the gradients are averaged first, and clipped then.

    Args:
        steps: steps of stochastic gradient descent.
        batch_size: samples per step, of all processes together; a multiple of their number.
        lr: learning rate.
        max_norm: the global norm is clipped to it; > 0.
        seed: of data, weights and batches.

    Returns:
        "loss" and "norm" (before the clip) of the whole batch, one per step, and "weights", the
        global norm of the weights at the end, alone in its list; alike in every process.

    Raises:
        ValueError: a batch that the processes cannot share evenly.
    """
    from gradlab import data
    from gradlab.mlp import MLPSpec
    from gradlab.sweep import minibatches
    from gradlab.torch.models import MLP

    rank, size = dist.get_rank(), dist.get_world_size()
    if batch_size % size:
        raise ValueError(f"{size} processes cannot share a batch of {batch_size} evenly")
    digits = data.digits(seed=seed)
    x, y = torch.tensor(digits.x_train), torch.tensor(digits.y_train)
    model = MLP(MLPSpec(64, 10, 32, 2), seed)
    parameters = list(model.parameters())
    sgd, log = torch.optim.SGD(parameters, lr=lr), {"loss": [], "norm": []}
    for rows in minibatches(len(x), 1, steps, batch_size, seed)[:, 0]:
        mine = rows[rank::size]
        sgd.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[mine]), y[mine])
        loss.backward()
        mean_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        sgd.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        log["loss"].append(loss.item() / size)
        log["norm"].append(norm.item())
    weights = torch.nn.utils.get_total_norm([p.detach() for p in parameters])
    return log | {"weights": [weights.item()]}


def main(arguments: list[str] | None = None) -> None:
    """The command: train, and let rank 0 print the last loss and norm, and the weights' norm."""
    parser = argparse.ArgumentParser(prog="gradlab.torch.parallel", description=main.__doc__)
    for name, default in (("steps", 20), ("batch-size", 64), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("lr", 0.5), ("max-norm", 1.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    rank, size = join()
    log = train(**vars(parser.parse_args(arguments)))
    if rank == 0:
        ends = ", ".join(f"{name} {values[-1]:.7g}" for name, values in log.items())
        print(f"{size} process{'es' * (size > 1)}: {ends}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
