"""Run a function in several processes at once, each with a rank, and leave none behind.

It does what a launcher such as `torchrun` does, for a notebook: the workers stay, so that imports
are paid once; every call has a time limit; a worker that dies ends the call with an error that
names it.  (`torchrun` starts scripts, on many machines if you like, and has no limit of time.)  The
workers see the same variables as under `torchrun`: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE.
In place of MASTER_ADDR and MASTER_PORT, `GRADLAB_RENDEZVOUS` names a file, not there yet, to
meet at: no address has to be resolved, and no port has to be free.

Example::

    with Workers(4) as workers:
        results = workers.run(function, x, y, limit=30)  # a list, one result per rank

In a script, stand below ``if __name__ == "__main__":``, as for everything that spawns processes.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path

import cloudpickle

__all__ = ["WorkerFailed", "Workers"]

_SPAWN = multiprocessing.get_context("spawn")  # neither framework survives a fork
_GRACE = 1.0  # seconds in which a death may still explain the errors of those who waited for it
_ECHO = 3.0  # seconds to wait for the errors that a death causes in others
_TAIL = 1500  # characters of a dead worker's standard error that the message shows
_STACKS = getattr(signal, "SIGUSR1", None)  # asks a worker where it is; Windows has none


class WorkerFailed(RuntimeError):
    """A worker raised, died, or had not answered when the time was up.

    Attributes:
        ranks: the workers that failed first; of a call out of time, all that had not answered.
        kind: "raised", "died" or "late".
        others: what other workers raised soon after a death, by rank; often its consequence.
    """

    def __init__(
        self, message: str, ranks: list[int], kind: str, others: dict[int, str] | None = None
    ) -> None:
        super().__init__(message)
        self.ranks, self.kind, self.others = ranks, kind, others or {}


class Workers:
    """Processes that wait for functions to run, all of them at once.

    Leaving the `with` block, or `close`, kills them and removes their folder.  So does the first
    failure, an interrupted call, the end of this process, and even its violent end.  A worker
    cannot start processes of its own through `multiprocessing`.

    Args:
        size: number of processes, ≥ 1; their ranks are 0 to size − 1.
        limit: seconds that a call may take, unless it says otherwise; > 0.  The first call includes
            the start of the processes.
        environment: variables for the workers, set before they import anything of yours; by default
            one thread each (OMP_NUM_THREADS, MKL_NUM_THREADS).

    Attributes:
        size: as given.
        pids: the processes' numbers, by rank.
        folder: where they meet; `output2` and `errors2` in it are what worker 2 has written to its
            standard output and error.  Gone after `close`.

    Raises:
        ValueError: a size below 1, or a limit that is not > 0.
    """

    def __init__(
        self, size: int, *, limit: float = 60.0, environment: dict[str, str] | None = None
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size, self.limit = size, _checked(limit)
        self.folder = Path(tempfile.mkdtemp(prefix="gradlab-"))
        self.pids: list[int] = []
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[connection.Connection] = []
        self._calls, self._over = 0, "closed"
        # Also when the last reference goes, as when a notebook's cell runs again, and at the end.
        self._end = weakref.finalize(self, _end, self._processes, self._pipes, self.folder)
        given = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | (environment or {})
        try:
            for rank in range(size):
                ours, theirs = _SPAWN.Pipe()
                self._pipes.append(ours)
                process = _SPAWN.Process(
                    target=_work,
                    args=(rank, size, str(self.folder), theirs, given),
                    name=f"worker {rank}",
                    daemon=True,
                )
                self._processes.append(process)
                process.start()
                theirs.close()
                self.pids.append(process.pid)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(
        self, function: Callable | str, *args: object, limit: float | None = None, **kwargs: object
    ) -> list:
        """Call the function in every worker, with the same arguments, and wait for all.

        Args:
            function: a function, which may be one that a notebook defines (it travels with the
                globals that it uses), or "module:name" of one that the workers can import.
            args, kwargs: its arguments, anything that pickles.
            limit: seconds that the call may take, > 0; None takes the workers' own.

        Returns:
            What it returned, by rank.

        Raises:
            WorkerFailed: a worker raised, died or was not done in time.  The message names it, and
                says with which error, signal or exit code, or where it stood.  All workers are
                gone then: start new ones.
            RuntimeError: the workers are gone already.
        """
        limit = self.limit if limit is None else _checked(limit)
        if not self._end.alive:
            raise RuntimeError(f"these workers are gone ({self._over}): start new ones")
        name = function if isinstance(function, str) else getattr(function, "__name__", "a call")
        call = cloudpickle.dumps((function, args, kwargs))
        deadline = time.monotonic() + limit
        try:
            # Through a file: a pipe would make us wait for a worker that does not read.
            task = self.folder / f"call{self._calls}"
            task.write_bytes(call)
            self._calls += 1
            for pipe in self._pipes:
                with suppress(OSError):  # a dead worker: waiting for its answer will show it
                    pipe.send(str(task))
            return self._collect(name, task, deadline, limit)
        except BaseException as error:
            self._over = str(error).partition("\n")[0] or type(error).__name__
            self.close()
            raise

    def _collect(self, name: str, task: Path, deadline: float, limit: float) -> list:
        waiting = set(range(self.size))
        while waiting:
            watched = {self._pipes[rank]: rank for rank in waiting}
            # A worker that has answered may die too, and others may wait for it.
            sentinels = [process.sentinel for process in self._processes]
            ready = connection.wait([*watched, *sentinels], max(0, deadline - time.monotonic()))
            if not ready:
                raise self._late(name, sorted(waiting), limit)
            errors = {}
            for rank in sorted(watched[pipe] for pipe in ready if pipe in watched):
                try:
                    errors[rank] = self._pipes[rank].recv()
                except (EOFError, OSError):  # dead, or about to be
                    errors[rank] = "its connection broke"
                if errors[rank] is None:
                    waiting.remove(rank)
                    del errors[rank]
            first = [rank for rank, sentinel in enumerate(sentinels) if sentinel in ready]
            if errors or first:
                raise self._failure(name, errors, first)
        results = [Path(f"{task}.{rank}") for rank in range(self.size)]
        found = [pickle.loads(path.read_bytes()) for path in results]
        for path in (task, *results):
            path.unlink()
        return found

    def _failure(self, name: str, errors: dict[int, str], first: list[int]) -> WorkerFailed:
        """The death that others' errors follow from, if there is one; else the first error."""
        sentinels = [process.sentinel for process in self._processes]
        dead = first or [sentinels.index(s) for s in connection.wait(sentinels, _GRACE)]
        if not dead:
            rank, error = next(iter(errors.items()))
            text = f"worker {rank} of {self.size} raised in {name}: {error}"
            return WorkerFailed(text, [rank], "raised")
        rank = min(dead)
        self._processes[rank].join(_GRACE)
        how = _ending(self._processes[rank].exitcode)
        text = f"worker {rank} of {self.size} {how} during {name}{self._said(rank)}"
        end = time.monotonic() + _ECHO
        for other, pipe in enumerate(self._pipes):
            if other not in {*dead, *errors} and pipe.poll(max(0, end - time.monotonic())):
                with suppress(EOFError, OSError):
                    errors[other] = pipe.recv()
        others = {r: error for r, error in sorted(errors.items()) if r not in dead and error}
        return WorkerFailed(text, [rank], "died", others)

    def _late(self, name: str, ranks: list[int], limit: float) -> WorkerFailed:
        """All that have not answered, and where each of them is: some may wait for another."""
        if _STACKS is not None:
            for rank in ranks:
                os.kill(self.pids[rank], _STACKS)
            end = time.monotonic() + _GRACE
            # A stack is complete once it has come down to this file.
            while time.monotonic() < end and not all(
                __file__ in self._read(f"stack{rank}") for rank in ranks
            ):
                time.sleep(0.02)
        places = {rank: self._place(rank) for rank in ranks}
        named = f"worker{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {self.size}"
        lines = [f"{named} had not finished {name} after {limit:g} s"]
        lines += [f"  worker {rank}: {place or 'place unknown'}" for rank, place in places.items()]
        return WorkerFailed("\n".join(lines), ranks, "late")

    def _place(self, rank: int) -> str:
        """Where a worker's main thread was when it was asked: its calls, the innermost first."""
        frames = re.findall(r'File "(.*)", line (\d+) in (.*)', self._read(f"stack{rank}"))
        calls = []
        for path, line, function in frames:
            if Path(path) == Path(__file__):
                break
            calls.append(f"{function} ({Path(path).name}:{line})")
        return " < ".join(calls)

    def _said(self, rank: int) -> str:
        text = self._read(f"errors{rank}").strip()
        return f"; it had written:\n{text[-_TAIL:]}" if text else ""

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(errors="replace")
        except OSError:
            return ""

    def close(self) -> None:
        """Kill the workers and remove their folder; harmless when they are gone."""
        self._end()


def _end(
    processes: list[multiprocessing.Process], pipes: list[connection.Connection], folder: Path
) -> None:
    started = [process for process in processes if process.pid is not None]
    try:
        for process in started:
            process.kill()
        for pipe in pipes:
            pipe.close()
        for process in started:
            process.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _checked(limit: float) -> float:
    if not limit > 0:
        raise ValueError(f"limit must be a time > 0 in seconds, got {limit}")
    return limit


def _ending(code: int | None) -> str:
    if code is None:
        return "lost its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _function(given: Callable | str) -> Callable:
    if not isinstance(given, str):
        return given
    module, colon, name = given.partition(":")
    if not (module and colon and name):
        raise ValueError(f"a function's name must read 'module:name', got {given!r}")
    return getattr(importlib.import_module(module), name)


def _work(
    rank: int, size: int, folder: str, pipe: connection.Connection, environment: dict[str, str]
) -> None:
    """A worker's life: wait for a call, answer None or an error's text, wait again."""
    # Ctrl-C reaches every process of a terminal; the one that waits for us decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, descriptor in (("output", 1), ("errors", 2)):  # not into the notebook's page
        with open(f"{folder}/{name}{rank}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    if _STACKS is not None:
        stacks = open(f"{folder}/stack{rank}", "wb", buffering=0)  # noqa: SIM115 (as long as it lives)
        faulthandler.register(_STACKS, file=stacks, all_threads=False)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        GRADLAB_RENDEZVOUS=f"{folder}/rendezvous",
    )
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            function, args, kwargs = pickle.loads(Path(task).read_bytes())
            result = _function(function)(*args, **kwargs)
            Path(f"{task}.{rank}").write_bytes(cloudpickle.dumps(result))
            answer = None
        except Exception as error:
            error.__traceback__ = error.__traceback__.tb_next  # without this function
            said = traceback.format_exception_only(error)[-1].strip()
            answer = f"{said}\n\n{''.join(traceback.format_exception(error))}"
        pipe.send(answer)


def _end_with_parent(folder: str) -> None:
    """End this worker as soon as its parent does, whatever it is busy with."""
    connection.wait([multiprocessing.parent_process().sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
