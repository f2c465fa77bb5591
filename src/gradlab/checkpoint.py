"""Checkpoints that a kill cannot halve and that say so when they were changed.

A checkpoint is two files: arrays in the safetensors format, which holds numbers and no code, and a
small JSON that names the arrays' file with its SHA-256, and ends with one over its own content.
The arrays are written first, the JSON last, each under another name that is replaced in one step
when it is complete.  So a JSON under its own name always stands for a whole checkpoint.

The digests find accidents and edits.  Whoever can write both files can write digests that fit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORMAT = "gradlab checkpoint 1"
SEAL = "record_sha256"
"""What the JSON's own digest is called in it."""
_NAME = re.compile(r"checkpoint-(\d{6,})\.json")


class BadCheckpoint(ValueError):
    """A checkpoint that must not be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes:
        arrays: name to array.
        record: whatever else the run needs, as JSON holds it, the format and the digests included.
        path: the JSON file that it came from.
    """

    arrays: dict[str, np.ndarray]
    record: dict
    path: Path


_PARTIAL = re.compile(r"\.(.+)\.\d+\.partial")


def partials(folder: Path) -> list[Path]:
    """What writers that were killed left half-written, see `replacing`."""
    return sorted(path for path in folder.glob(".*.partial") if _PARTIAL.fullmatch(path.name))


def name_of_partial(path: Path) -> str:
    """The name that one of `partials` would have got."""
    return _PARTIAL.fullmatch(path.name)[1]


@contextmanager
def replacing(path: Path, *, survives_power_loss: bool = True) -> Iterator[Path]:
    """A name to write a file under; when the block ends well, the file gets its own, at once.

    Args:
        path: the file's own name.  What is there stays whole until the new one is complete.
        survives_power_loss: wait for the disk.  A killed process needs no waiting.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if survives_power_loss:
            with partial.open("rb") as written:
                os.fsync(written.fileno())  # the numbers before the name
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if survives_power_loss and os.name == "posix":  # and the name itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(folder: Path, number: int, arrays: Mapping[str, np.ndarray], record: Mapping) -> Path:
    """Write a checkpoint; a kill at any moment leaves it whole or absent.

    Args:
        folder: an existing folder.
        number: names the checkpoint, for instance the epochs done.
        arrays: name to array; any shape, and a type that NumPy and safetensors share.
        record: whatever else belongs to it; JSON must be able to hold it.  The names "format",
            "arrays", "sha256" and `SEAL` are the file's own, and replaced.

    Returns:
        The path of its JSON file.

    Raises:
        OSError: it cannot be written; an older one stays as it is.
    """
    from safetensors.numpy import save as as_bytes

    # (`save_file` would make a file that only its owner can read.)
    content = as_bytes({name: np.array(array, order="C") for name, array in arrays.items()})
    data = folder / f"checkpoint-{number:06d}.safetensors"
    with replacing(data) as partial:
        partial.write_bytes(content)
    path = folder / f"checkpoint-{number:06d}.json"
    head = {"format": FORMAT, "arrays": data.name, "sha256": _sha256(content)}
    whole = json.loads(json.dumps(head | dict(record) | head))  # as `load` will see it
    whole |= {SEAL: seal(whole)}
    with replacing(path) as partial:
        partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return path


def seal(record: Mapping) -> str:
    """The digest of a record: SHA-256 of its JSON with sorted names, without the digest itself.

    Args:
        record: as JSON gives it.
    """
    rest = {name: value for name, value in record.items() if name != SEAL}
    return _sha256(json.dumps(rest, sort_keys=True).encode("utf-8"))


def numbered(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder: number to JSON file, ascending."""
    found = {int(m[1]): path for path in folder.glob("*.json") if (m := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, after holding its record and its arrays against their digests.

    Args:
        path: its JSON file.

    Raises:
        BadCheckpoint: a file that is missing, cut short, changed, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as arrays_in

    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"there is no checkpoint {path}") from None
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON: {error}. {_earlier(path)}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BadCheckpoint(
            f"{path} is no checkpoint of gradlab: its 'format' should be {FORMAT!r}. "
            "Name a folder that `gradlab train` has written."
        )
    if record.get(SEAL) != seal(record):
        raise BadCheckpoint(
            f"{path} is not what was saved: its content does not fit its {SEAL}. It was edited or "
            f"damaged, and is not loaded. {_earlier(path)}"
        )
    name = record.get("arrays")
    if not isinstance(name, str) or Path(name).name != name:
        raise BadCheckpoint(f"{path} names no arrays beside it, but {name!r}. {_earlier(path)}")
    data = path.with_name(name)
    try:
        content = data.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{data} cannot be read: {error}. {_earlier(path)}") from None
    if _sha256(content) != record.get("sha256"):
        raise BadCheckpoint(
            f"{data} is not what was saved: its SHA-256 is not the one in {path.name}. It was "
            f"changed, cut short or damaged, and is not loaded. {_earlier(path)}"
        )
    try:
        arrays = arrays_in(content)
    except SafetensorError as error:
        raise BadCheckpoint(f"{data} is no safetensors file: {error}. {_earlier(path)}") from None
    return Checkpoint(arrays, record, path)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _earlier(path: Path) -> str:
    """What a reader can do who meets a bad checkpoint."""
    others = [other for other in numbered(path.parent).values() if other != path]
    if others:
        return f"Move both files away, and the newest of those left is used: {others[-1].name}."
    return "There is no other checkpoint beside it: --reset begins anew."
