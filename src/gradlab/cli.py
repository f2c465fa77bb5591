"""The command line: `gradlab train` and `gradlab claims`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

# The library comes with what needs it: an interrupt during its imports is answered as any other.
from gradlab import __version__

BLEW_UP, BAD_INPUT, NOT_SAVED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes beside 0, for runs that blew up, cannot be done or saved, or that somebody stopped."""

_EPILOG = """\
In --save-path:
  checkpoint-N.safetensors  weights and optimiser after N epochs
  checkpoint-N.json         digests, the options, what --resume changed of them, and all losses
  history-N.npz             gradient norms of the last steps

exit code:
  0    done
  1    the run blew up: a gradient was not finite, or an epoch's mean loss is ten times that of the
       untrained network, or weights are not finite after it, or all its steps were left out, or
       some were and the validation loss is not finite; the diagnosis is printed
  2    bad input, and nothing was changed
  3    a checkpoint could not be written; the older ones are as they were
  130  interrupted

examples:
  gradlab train --model-name mlp --lr 0.01 --save-path runs/first --logdir runs/log
  gradlab train --model-name mlp --lr 0.01 --save-path runs/first --logdir runs/log \\
                --num-epochs 20 --resume
  tensorboard --logdir runs/log        (from: pip install tensorboard)
  torchrun --nproc-per-node 2 -m gradlab train --save-path runs/two     (PyTorch, data-parallel)
"""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """The default, where there is one."""
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One sentence, without the usage, which hides it."""
        sys.exit(_refuse(f"{message}. See {self.prog} --help"))


def _refuse(sentence: str) -> int:
    print(f"gradlab: {sentence}", file=sys.stderr)
    return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    from gradlab import convnet, training

    parser = _Parser(prog="gradlab", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gradlab {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="{train,claims}", required=True, parser_class=_Parser
    )
    train = commands.add_parser(
        "train",
        help="train a network, save it, and say why if it blows up",
        description="Train a network in either framework, from the same weights and on the same\n"
        "batches; save checkpoints that a kill cannot halve; record the gradients.",
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    default = training.Options()

    def option(flag: str, meaning: str, **keywords: object) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        keywords.setdefault("default", getattr(default, name))
        train.add_argument(flag, help=meaning, **keywords)

    def choice(names: Sequence[str]) -> dict[str, object]:
        return {"metavar": "{" + ",".join(names) + "}"}  # Options itself says what is wrong

    option("--framework", "what computes", **choice(tuple(training.FRAMEWORKS)))
    models = "; ".join(f"{name}: {what}" for name, what in training.MODELS.items())
    option("--model-name", f"what is trained. {models}", **choice(tuple(training.MODELS)))
    option(
        "--data",
        "blobs, digits, mnist (11 MB, downloaded once), or an .npz file with x (samples, features) "
        "and y, class numbers from 0: 80%% of it to train on, 10%% each to validate and to test. "
        "Each feature is shifted and scaled to mean 0 and standard deviation 1 "
        "(default: blobs for nn, digits for the others)",
        metavar="{blobs,digits,mnist,FILE}",
    )

    def number(flag: str, meaning: str, **keywords: object) -> None:
        option(flag, meaning, **{"type": int, "metavar": "N"} | keywords)

    number("--num-epochs", "passes over the training samples")
    number("--batch-size", "samples a step")
    for part in ("train", "validation", "test"):
        size = "how many to load: up to 1 a share (1 is all), from 2 up a number of samples"
        number(f"--{part}-load-size", f"{part} samples, {size}", type=float)
    number("--save-interval", "epochs between two checkpoints; the last is always saved")
    option("--save-path", "folder of the checkpoints", metavar="FOLDER")
    option("--optimizer", "update rule", **choice(training.OPTIMIZERS))
    option("--loss", "what is minimised", **choice(training.LOSSES))
    number("--lr", "learning rate, the highest of the schedule", type=float, metavar="RATE")
    option(
        "--lr-schedule",
        "how the rate changes: cosine falls to 0; step divides by ten after half and after three "
        "quarters of the steps; warmup-cosine rises over the first 5%% of them, then falls",
        **choice(training.SCHEDULES),
    )
    option("--weight-initialization", "how weights begin", **choice(convnet.SCHEMES))
    number(
        "--clip-norm",
        "scale a gradient down to this total norm where it is longer (default: no clipping)",
        type=float,
        metavar="NORM",
    )
    option(
        "--precision",
        "what is computed in. With float16 and bfloat16 the weights stay float32 and the layers "
        "compute in 16 bits; float16 also scales the loss",
        **choice(training.PRECISIONS),
    )
    number("--seed", "of the weights and of the order of the samples")
    option(
        "--resume",
        "go on from the newest checkpoint in --save-path, to the weights of an unbroken run. Give "
        "the options again; --lr, --lr-schedule and --clip-norm may be others, and are noted; "
        "--num-epochs may, unless a schedule goes on that is laid over all epochs",
        action="store_true",
    )
    option(
        "--reset",
        "delete the checkpoints and histories in --save-path first, and no other file",
        action="store_true",
    )
    option(
        "--logdir",
        "write TensorBoard's events into this folder. It draws those of one folder as one run, so "
        "give each its own; a folder that holds another's is remarked on (default: none)",
        metavar="FOLDER",
    )
    option(
        "--on-nonfinite",
        "at a gradient that is not finite. record: note it and take the step all the same, which "
        "mostly ends in a diagnosis after the epoch; skip: "
        "leave the step out and go on; raise: stop before the step, and diagnose it. (float16 "
        "leaves such steps out by itself, to find its scale)",
        **choice(training.ON_NONFINITE),
    )
    ledger = commands.add_parser(
        "claims",
        help="the statements under test, and their verdicts",
        description="List the book's claims, with the verdicts of a book that has been built.",
        allow_abbrev=False,
    )
    ledger.add_argument("id", nargs="?", help="one claim, such as A1.16 (default: all)")
    ledger.add_argument(
        "--registry",
        type=Path,
        metavar="FILE",
        help="the claims (default: book/claims.yml, here or in a folder above)",
    )
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from gradlab import checkpoint, data, training

    given = {k: v for k, v in vars(arguments).items() if k != "command"}
    try:
        options = training.Options(**given)
        training.run(options)
    except (
        training.BadOption,
        checkpoint.BadCheckpoint,
        data.DataUnavailable,
        ImportError,
    ) as error:
        return _refuse(str(error))
    except training.BlownUp as error:
        print(f"gradlab: {error}", file=sys.stderr)
        return BLEW_UP
    except training.NotSaved as error:
        print(f"gradlab: {error}", file=sys.stderr)
        return NOT_SAVED
    except KeyboardInterrupt:
        there = list(checkpoint.numbered(Path(os.path.expanduser(given["save_path"]))).values())
        return _interrupted(
            f"--resume goes on from {there[-1]}" if there else "nothing had been saved yet"
        )
    return 0


def _interrupted(last: str) -> int:
    print(f"\ngradlab: interrupted; {last}", file=sys.stderr)
    return INTERRUPTED


def _claims(arguments: argparse.Namespace) -> int:
    from gradlab import claims

    try:
        path = arguments.registry or claims.find_registry()
    except claims.RegistryError:
        return _refuse(
            "the claims are in the book's folder, and there is no book/claims.yml here or above: "
            "run this in that folder, or name the file with --registry"
        )
    try:
        registry = claims.load(path)
    except ValueError as error:
        why = error.__cause__  # without it, what is wrong with a file that can be read
        reason = getattr(why, "strerror", None) or why or error
        return _refuse(f"--registry {path} cannot be read: {reason}")
    wanted = {id_.lower(): id_ for id_ in registry}.get((arguments.id or "").lower())
    if arguments.id is not None and wanted is None:
        return _refuse(f"there is no claim {arguments.id!r}; there are {', '.join(registry)}")
    words = _verdicts(path.resolve().parent.parent / "_build" / "ledger.json")
    for claim in registry.values():
        if arguments.id is None or claim.id == wanted:
            word = words.get(claim.id, "" if not words else "undecided")
            print("  ".join(filter(None, (claim.id, word, claim.statement))))
            if arguments.id is not None:
                print(f"\n{claim.correction}\nDecided in notebooks/{claim.chapter}.ipynb")
    if not words:
        print("\nNo verdicts here yet: `make book` measures them, in the book's folder.")
    return 0


def _verdicts(ledger: Path) -> dict[str, str]:
    """The word of each claim that the built book decided; none without one."""
    try:
        return {id_: row["verdict"] for id_, row in json.loads(ledger.read_text("utf-8")).items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: as on the command line, without the program's name; None takes that.

    Returns:
        The exit code.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

    def stop(*_: object) -> None:
        raise KeyboardInterrupt  # a termination is answered like Ctrl-C

    on_main = threading.current_thread() is threading.main_thread()
    try:
        if on_main:
            before = signal.signal(signal.SIGTERM, stop)
        parsed, unknown = _parser().parse_known_args(arguments)
        if unknown:
            return _refuse(
                f"unrecognized arguments: {' '.join(unknown)}. See gradlab {parsed.command} --help"
            )
        return {"train": _train, "claims": _claims}[parsed.command](parsed)
    except KeyboardInterrupt:
        return _interrupted("nothing had been begun")
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, before)
