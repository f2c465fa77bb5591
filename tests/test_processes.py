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

LIMIT = 90  # seconds; generous, for machines that are busy


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
        ("raise", "raised", r"worker 1 of 2 raised in fails: ValueError: no such luck\n\nTraceback"),
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
