"""The command line: `gradlab train` and `gradlab claims`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from gradlab import checkpoint, claims, convnet, data, training

BAD_INPUT, BLEW_UP, INTERRUPTED = 2, 1, 130
"""Exit codes beside 0, for what cannot be done, for a run that blew up or that somebody stopped."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """The default, where there is one."""
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One sentence, without the usage, which hides it."""
        sys.exit(_refuse(f"{message}. See {self.prog} --help"))


def _refuse(sentence: str) -> int:
    print(f"gradlab: {sentence}", file=sys.stderr)
    return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gradlab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train a network, save it, and say why if it blows up",
        description="Train a network in either framework, from the same weights and on the same "
        "batches; save checkpoints that a kill cannot halve; record the gradients.",
        epilog="In --save-path: checkpoint-N.safetensors, weights and optimiser after N epochs; "
        "checkpoint-N.json, its digest, the options and all losses; history-N.npz, gradient norms "
        "of the last steps. Exit code: 0 done, 1 the run blew up (a gradient was not finite, or an "
        "epoch's mean loss is ten times that of the untrained network; the diagnosis is printed), "
        "2 bad input (and nothing was changed), 130 interrupted. Under torchrun, PyTorch trains "
        "data-parallel.",
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
        "blobs, digits, mnist, or an .npz file with x (samples, features) and y, class numbers "
        "from 0 (default: the model's own)",
    )
    option("--num-epochs", "passes over the training samples", type=int)
    option("--batch-size", "samples a step", type=int)
    for part in ("train", "validation", "test"):
        size = "how many to load: a share up to 1, which is all, or a number of samples"
        option(f"--{part}-load-size", f"{part} samples: {size}", type=float)
    option("--save-interval", "epochs between two checkpoints; the last is always saved", type=int)
    option("--save-path", "folder of the checkpoints")
    option("--optimizer", "update rule", **choice(training.OPTIMIZERS))
    option("--loss", "what is minimised", **choice(training.LOSSES))
    option("--lr", "learning rate, the highest of the schedule", type=float)
    option(
        "--lr-schedule",
        "how the rate changes: cosine falls to 0; step divides by ten after half and after three "
        "quarters of the steps; warmup-cosine rises over the first 5%% of them, then falls",
        **choice(training.SCHEDULES),
    )
    option("--weight-initialization", "how weights begin", **choice(convnet.SCHEMES))
    option("--clip-norm", "clip the gradient to this total norm", type=float)
    option("--precision", "float16 and bfloat16 are mixed", **choice(training.PRECISIONS))
    option("--seed", "of the weights and of the order of the samples", type=int)
    option("--resume", "go on from the newest checkpoint in --save-path", action="store_true")
    option("--reset", "delete the checkpoints in --save-path first", action="store_true")
    option("--logdir", "write TensorBoard's events into this folder")
    option(
        "--on-nonfinite",
        "at a gradient that is not finite: record it and go on, skip the step, or raise: stop "
        "before the step and diagnose it. (float16 skips such steps by itself, to find its scale)",
        **choice(training.ON_NONFINITE),
    )
    ledger = commands.add_parser("claims", help="the statements under test, and their verdicts")
    ledger.add_argument("id", nargs="?", help="one claim, such as A1.16")
    ledger.add_argument("--registry", type=Path, default=Path("book/claims.yml"))
    return parser


def _train(arguments: argparse.Namespace) -> int:
    given = {k: v for k, v in vars(arguments).items() if k != "command"}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    on_main = threading.current_thread() is threading.main_thread()
    try:
        if on_main:
            before = signal.signal(signal.SIGTERM, stop)
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
    except KeyboardInterrupt:  # Ctrl-C, or a termination
        there = list(checkpoint.numbered(Path(given["save_path"])).values())
        last = f"--resume goes on from {there[-1]}" if there else "nothing had been saved yet"
        print(f"\ngradlab: interrupted; {last}", file=sys.stderr)
        return INTERRUPTED
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, before)
    return 0


def _claims(arguments: argparse.Namespace) -> int:
    try:
        registry = claims.load(arguments.registry)
    except (OSError, ValueError) as error:
        return _refuse(f"--registry {arguments.registry} cannot be read: {error}")
    if arguments.id is not None and arguments.id not in registry:
        return _refuse(f"there is no claim {arguments.id!r}; there are {', '.join(registry)}")
    for claim in registry.values():
        if arguments.id in (None, claim.id):
            print(f"{claim.id}  {claim.statement}")
            if arguments.id is not None:
                print(f"\n{claim.correction}\nDecided in notebooks/{claim.chapter}.ipynb")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: as on the command line, without the program's name; None takes that.

    Returns:
        The exit code.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        return _refuse(
            f"unrecognized arguments: {' '.join(unknown)}. See gradlab {parsed.command} --help"
        )
    return {"train": _train, "claims": _claims}[parsed.command](parsed)
