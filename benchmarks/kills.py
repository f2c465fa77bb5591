"""Does a run survive being killed?  SIGKILL at random moments of `gradlab train`, then --resume.

    python benchmarks/kills.py                              # 20 kills in each framework
    python benchmarks/kills.py --framework torch --kills 50 --seed 1

A run that nobody kills comes first, with a checkpoint after every epoch.  Then the same run is
killed again and again: a quarter of the times at a random moment before its first new checkpoint,
the others after a random number of epochs and a random part of one more, of which saving is a large
share.  Each time it is resumed.  After every kill each checkpoint in the folder has to load, and to
hold the unbroken run's numbers of that epoch, bit for bit; in the end, so has the last one.  The
exit status is 1 when one does not, or when a resumption fails.

A run is a process that is forked from one with the framework imported: importing it again for every
kill would take most of the time, and nothing is written during it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

from gradlab import checkpoint, cli, training

START = "before the first checkpoint of all"
AGAIN = "while it was starting again"
BETWEEN = "between two saves"
DURING = "during a save"
EPOCHS_A_LIFE = 10
LIMIT = 300.0  # seconds after which a run hangs


class Run:
    """The command in a process of its own, resuming what is there.

    Args:
        framework: of the run.
        folder: its checkpoints'; what it says goes into a file beside.
        epochs: in all.
    """

    def __init__(self, framework: str, folder: Path, epochs: int) -> None:
        self.said = folder.with_suffix(".txt")
        command = ["train", "--framework", framework, "--model-name", "mlp"]
        command += ["--train-load-size", "200", "--lr-schedule", "cosine"]
        command += ["--num-epochs", str(epochs), "--save-interval", "1"]
        command += ["--save-path", str(folder)]
        if checkpoint.numbered(folder):
            command.append("--resume")
        self.process: BaseProcess = multiprocessing.get_context("fork").Process(
            target=_command, args=(command, self.said)
        )
        self.process.start()

    def wait_for(self, path: Path) -> float:
        """Seconds until a file is there.

        Raises:
            RuntimeError: the run ended without it, or takes too long.
        """
        begun = time.monotonic()
        while not path.exists():
            if self.process.exitcode is not None:
                raise self._failed("")
            if time.monotonic() - begun > LIMIT:
                self.process.kill()
                raise self._failed(f", for there was no {path.name} after {LIMIT:g} s")
            time.sleep(0.001)
        return time.monotonic() - begun

    def finish(self) -> None:
        """Wait for a run that nobody kills.

        Raises:
            RuntimeError: it failed.
        """
        self.process.join()
        if self.process.exitcode != 0:
            raise self._failed("")

    def kill(self) -> None:
        """SIGKILL.

        Raises:
            RuntimeError: it had ended before.
        """
        self.process.kill()
        self.process.join()
        if self.process.exitcode >= 0:
            raise self._failed(" before it was killed")

    def _failed(self, more: str) -> RuntimeError:
        return RuntimeError(
            f"ended with {self.process.exitcode}{more}:\n{self.said.read_text(encoding='utf-8')}"
        )


def _command(arguments: Sequence[str], said: Path) -> None:
    with said.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(cli.main(arguments))


def digests(folder: Path) -> dict[int, str]:
    """Number to SHA-256 of the arrays, of all checkpoints in a folder, each loaded."""
    return {
        number: checkpoint.load(path).record["sha256"]
        for number, path in checkpoint.numbered(folder).items()
    }


def moment(left: set[str], before: int, there: dict[int, str]) -> str:
    """What a kill hit, from the files that it left."""
    last = max(there, default=0)
    begun = {f"history-{last + 1:06d}.npz", f"checkpoint-{last + 1:06d}.safetensors"}
    if any(name.endswith(".partial") for name in left) or begun & left:
        return DURING
    if last == before:
        return AGAIN if before else START
    return BETWEEN


def survive(framework: str, kills: int, rng: random.Random, root: Path) -> Counter[str]:
    """Kill runs in one framework.

    Returns:
        How often each kind of moment was hit, and under "partial files" how many kills left one.

    Raises:
        RuntimeError: a run that could not go on, or went on to other numbers.
        BadCheckpoint: one in the folder that does not load.
    """
    epochs = kills * EPOCHS_A_LIFE
    import_module(f"gradlab.{training.FRAMEWORKS[framework]}.train")
    begun = time.monotonic()
    run = Run(framework, root / "whole", epochs)
    startup = run.wait_for(root / "whole" / "checkpoint-000001.json")
    run.finish()
    an_epoch = (time.monotonic() - begun - startup) / (epochs - 1)
    print(
        f"{framework}: {startup:.1f} s to the first checkpoint, {an_epoch:.3f} s an epoch",
        flush=True,
    )
    whole, folder, hits = digests(root / "whole"), root / "killed", Counter()
    for number in range(1, kills + 1):
        known = set(folder.iterdir()) if folder.exists() else set()
        before = max(checkpoint.numbered(folder), default=0)
        run = Run(framework, folder, epochs)
        if number == 1 or rng.random() < 0.25:
            time.sleep(rng.uniform(0, startup / 2))  # later starts are quicker
        else:
            more = rng.randrange(1, EPOCHS_A_LIFE)
            run.wait_for(folder / f"checkpoint-{before + more:06d}.json")
            time.sleep(rng.uniform(0, an_epoch))
        run.kill()
        files = set(folder.iterdir()) if folder.exists() else set()
        left, there = {path.name for path in files - known}, digests(folder)
        what = moment(left, before, there)
        hits[what] += 1
        hits["partial files"] += any(name.endswith(".partial") for name in left)
        other = [n for n, sha256 in there.items() if whole[n] != sha256]
        if other:
            raise RuntimeError(f"after kill {number} the weights of epochs {other} are others")
        print(f"  kill {number:2}: {what}, at epoch {max(there, default=0)}", flush=True)
    Run(framework, folder, epochs).finish()
    if digests(folder) != whole:
        raise RuntimeError("the run that was killed did not end as the unbroken one")
    partial = list(folder.glob("*.partial"))
    if partial:
        raise RuntimeError(f"what kills left half-written is still there: {partial}")
    return hits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--framework", nargs="+", choices=tuple(training.FRAMEWORKS), default=training.FRAMEWORKS
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    rng, counts = random.Random(arguments.seed), {}
    for framework in arguments.framework:
        with tempfile.TemporaryDirectory() as root:
            try:
                hits = survive(framework, arguments.kills, rng, Path(root))
            except (RuntimeError, checkpoint.BadCheckpoint) as error:
                print(f"{framework}: {error}", file=sys.stderr)
                return 1
        counts[framework] = dict(hits)
    for framework, hits in counts.items():
        print(f"\n{framework}: {arguments.kills} kills, every resumption went on, same weights")
        for what in (START, AGAIN, BETWEEN, DURING):
            print(f"  {hits.get(what, 0):2} {what}")
        print(f"  {hits['partial files']:2} left a half-written file")
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
