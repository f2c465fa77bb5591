"""Worker processes: right results, errors that name the worker, and nothing left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from gradlab.processes import WorkerFailed, Workers

LIMIT = 240  # seconds; generous, for machines that are busy


def rank() -> int:
    return int(os.environ["RANK"])


def told(value=None):
    return rank(), int(os.environ["WORLD_SIZE"]), os.getpid(), value


def fails(how: str, worker: int):
    if rank() != worker:
        return
    if how == "raise":
        raise ValueError("no such luck")
    if how == "exit":
        print("a last word", file=sys.stderr)
        sys.exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(0.1)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(workers: Workers) -> None:
    assert len(workers.pids) == workers.size
    assert not any(map(running, workers.pids))
    assert not workers.folder.exists()


def test_every_worker_gives_its_result_in_the_order_of_ranks():
    with Workers(2, limit=LIMIT, environment={"A_WORD": "said"}) as workers:
        assert workers.run(told, 7) == [(r, 2, workers.pids[r], 7) for r in range(2)]
        assert workers.run("os:getenv", "A_WORD") == ["said"] * 2  # the same workers again
        offset = 10
        assert workers.run(lambda: offset + 1) == [11, 11]  # travels with what it uses
        large = np.arange(300_000.0)  # more than a pipe holds
        assert all((back == large).all() for back in workers.run(lambda: large))
        assert not workers.run(print, "nowhere near this page", limit=LIMIT)[0]
        assert "nowhere near" in (workers.folder / "output1").read_text()
    assert_gone(workers)
    with pytest.raises(RuntimeError, match=r"gone \(closed\): start new ones"):
        workers.run(told)


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        (
            "raise",
            "raised",
            r"worker 1 of 2 raised in fails: ValueError: no such luck\n\nTraceback",
        ),
        ("exit", "died", r"worker 1 of 2 ended with exit code 3 during fails.*\na last word"),
        ("kill", "died", r"worker 1 of 2 was killed by SIGKILL during fails"),
        ("hang", "late", r"worker 1 of 2 had not finished fails after 5 s\n  worker 1: fails \("),
    ],
)
def test_a_failure_names_the_worker_and_leaves_nothing(how, kind, says):
    with Workers(2, limit=LIMIT) as workers:
        workers.run(told)
        started = time.monotonic()
        with pytest.raises(WorkerFailed, match=says) as failure:
            workers.run(fails, how, 1, limit=5)
        assert time.monotonic() - started < 30
        assert (failure.value.ranks, failure.value.kind) == ([1], kind)
        assert_gone(workers)
        with pytest.raises(RuntimeError, match=r"gone \(worker 1 of 2 .*start new ones"):
            workers.run(told)


def test_what_cannot_travel_fails_here_and_harms_nobody():
    with Workers(1, limit=LIMIT) as workers:
        with pytest.raises(TypeError, match="pickle"):
            workers.run(told, (c for c in "no generators"))
        with pytest.raises(ValueError, match="limit must be a time > 0 in seconds, got 0"):
            workers.run(told, limit=0)
        assert workers.run(told)[0][0] == 0
        with pytest.raises(WorkerFailed, match="worker 0 of 1 raised in told: ValueError: a funct"):
            workers.run("told")


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Workers(0)
    with pytest.raises(ValueError, match="limit must be a time > 0 in seconds, got -1"):
        Workers(1, limit=-1)


def test_workers_that_nobody_holds_any_more_are_gone():
    workers = Workers(1, limit=LIMIT)
    workers.run(told)
    pids, folder = workers.pids, workers.folder
    del workers
    assert not any(map(running, pids))
    assert not folder.exists()


HOLDER = """
    import os, signal, time
    from gradlab.processes import Workers
    if __name__ == "__main__":
        # What a shell starts in the background ignores Ctrl-C, and hands that on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        workers = Workers(2, limit=90)
        workers.run(os.getpid)
        print(workers.folder, *workers.pids, flush=True)
        try:
            workers.run(time.sleep, 1000, limit=1000)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            time.sleep(1000)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_nothing_outlives_an_interrupt_or_the_death_of_the_parent(tmp_path, signum):
    script = tmp_path / "holder.py"
    script.write_text(textwrap.dedent(HOLDER))
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        folder, *pids = parent.stdout.readline().split()
        time.sleep(0.5)
        if signum == signal.SIGINT:  # as a terminal does, to the whole group
            os.killpg(parent.pid, signum)
            assert parent.stdout.readline() == "interrupted\n"
        else:
            parent.kill()
        end = time.monotonic() + 20
        while any(running(int(pid)) for pid in pids) or Path(folder).exists():
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()


# With PyTorch.  Each process takes seconds to import it: few of them, and each is used to the end.

SETTINGS = {"steps": 5, "max_norm": 0.5, "seed": 3}
COMMAND = ["-m", "gradlab.torch.parallel", "--steps=5", "--max-norm=0.5", "--seed=3"]


def output(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


def numbers(line: str) -> list[float]:
    """Of "1 process: loss 1, norm 2, weights 3": the three."""
    return [float(word.split()[1]) for word in line.partition(": ")[2].split(", ")]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """The last loss and norm, and the weights' norm, of the command in one process."""
    pytest.importorskip("torch")
    line = output(*COMMAND)
    assert line.startswith("1 process: loss ")
    return numbers(line)


def test_the_same_command_runs_under_torchrun(alone):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    line = output(*launcher, "--nproc-per-node=2", *COMMAND)
    assert line.startswith("2 processes: loss ")
    assert numbers(line) == pytest.approx(alone, rel=1e-5)


def assert_the_steps_of_one(workers: Workers, alone: list[float]) -> None:
    size = workers.size
    assert workers.run("gradlab.torch.parallel:join") == [(r, size) for r in range(size)]
    for log in workers.run("gradlab.torch.parallel:train", **SETTINGS):
        assert max(log["norm"]) > SETTINGS["max_norm"]  # the clip has work to do
        assert [values[-1] for values in log.values()] == pytest.approx(alone, rel=1e-5)
    for clipped, true, early in workers.run(clipped_gradient):
        np.testing.assert_allclose(clipped, true, rtol=0, atol=1e-6 * np.abs(true).max())
        assert np.linalg.norm(early - true) > 0.01 * np.linalg.norm(true)


def clipped_gradient():
    """Averaged and then clipped; of all rows, in this process; clipped and then averaged."""
    import torch
    from torch.nn.utils import clip_grad_norm_

    from gradlab import data
    from gradlab.mlp import MLPSpec
    from gradlab.torch import MLP, parallel

    digits, size = data.digits(), int(os.environ["WORLD_SIZE"])
    x, y = torch.tensor(digits.x_train[:64]), torch.tensor(digits.y_train[:64])
    x[-1] *= 100
    found = []
    for rows, order in (
        (slice(rank(), None, size), (parallel.mean_gradients, clip_grad_norm_)),
        (slice(None), (clip_grad_norm_,)),
        (slice(rank(), None, size), (clip_grad_norm_, parallel.mean_gradients)),
    ):
        model = MLP(MLPSpec(64, 10))
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        for act in order:
            parameters = list(model.parameters())
            act(parameters, 1.0) if act is clip_grad_norm_ else act(parameters)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]).numpy())
    return found


def test_two_processes(alone):
    """They take the steps of one; a missing gradient is 0; one that waits says where."""
    with Workers(2, limit=LIMIT) as workers:
        assert_the_steps_of_one(workers, alone)
        assert workers.run(mean_of_gradients) == [[[1.5, 1.5], [0.5]]] * 2
        with pytest.raises(WorkerFailed, match="worker 0 of 2 had not finished") as failure:
            workers.run(skip_alone, limit=5)
        assert failure.value.ranks == [0]
        assert "all_reduce (" in str(failure.value)
        assert "skip_alone (test_processes.py" in str(failure.value)
        assert_gone(workers)


def test_four_processes(alone):
    """They take the steps of one; the one that dies is named, and not those who wait for it."""
    with Workers(4, limit=LIMIT) as workers:
        assert_the_steps_of_one(workers, alone)
        with pytest.raises(WorkerFailed, match="worker 2 of 4 was killed by SIGKILL") as failure:
            workers.run(reduce_until_killed, 2)
        assert failure.value.ranks == [2]
        assert 2 not in failure.value.others
        assert all("Error" in text for text in failure.value.others.values())
        assert_gone(workers)


def mean_of_gradients():
    import torch

    from gradlab.torch import parallel

    one, other = (torch.nn.Parameter(torch.zeros(n)) for n in (2, 1))
    one.grad = torch.full((2,), 1.0 + rank())
    if rank() == 1:
        other.grad = torch.ones(1)
    parallel.mean_gradients([one, other])
    return [p.grad.tolist() for p in (one, other)]


def skip_alone():
    import torch
    import torch.distributed as dist

    if rank() == 0:
        dist.all_reduce(torch.ones(10))


def reduce_until_killed(worker: int):
    import torch
    import torch.distributed as dist

    for step in range(1_000_000):
        if step == 5 and rank() == worker:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(10))
