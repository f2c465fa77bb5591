"""Checkpoints: what is saved comes back, what was damaged is refused, a kill leaves none halved."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gradlab import checkpoint

ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "count": np.array(7, np.int64),
    "empty": np.zeros((0, 4)),
}


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path, 3, ARRAYS, {"epochs_done": 3, "losses": [0.5, 0.25]})


def test_what_is_saved_comes_back(saved):
    there = checkpoint.load(str(saved))
    assert there.record["epochs_done"] == 3
    assert set(there.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert (there.arrays[name].dtype, there.arrays[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(there.arrays[name], array)
    assert sorted(path.name for path in saved.parent.iterdir()) == [
        "checkpoint-000003.json",
        "checkpoint-000003.safetensors",
    ]


def test_the_newest_is_last_whatever_the_digits(tmp_path):
    for number in (2, 10, 1_000_000, 9):
        checkpoint.save(tmp_path, number, {}, {})
    (tmp_path / "checkpoint-000099.json.bak").write_text("{}")
    assert list(checkpoint.numbered(tmp_path)) == [2, 9, 10, 1_000_000]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def other(key, value, *, forged=False):
    """Another value in the JSON; forged: with a digest of its own that fits."""

    def change(path):
        record = json.loads(path.read_text()) | {key: value}
        if forged:
            rest = {k: v for k, v in record.items() if k != "record_sha256"}
            digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
            record["record_sha256"] = digest
        path.write_text(json.dumps(record))

    return change


def without(key):
    def change(path):
        record = json.loads(path.read_text())
        del record[key]
        path.write_text(json.dumps(record))

    return change


@pytest.mark.parametrize(
    ("suffix", "damage", "says"),
    [
        (".safetensors", flip, "is not what was saved"),
        (".safetensors", cut, "is not what was saved"),
        (".safetensors", lambda path: path.unlink(), "cannot be read"),
        (".json", cut, "cannot be read as JSON"),
        (".json", lambda path: path.unlink(), "there is no checkpoint"),
        (".json", lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
        (".json", lambda path: path.write_text("[]"), "is no checkpoint of gradlab"),
        (".json", other("format", "gradlab checkpoint 2"), "is no checkpoint of gradlab"),
        (".json", other("sha256", None, forged=True), r"\.safetensors is not what was saved"),
        (
            ".json",
            other("arrays", "../other.safetensors", forged=True),
            "names no arrays beside it",
        ),
        (".json", other("arrays", 5, forged=True), "names no arrays beside it"),
        (".json", other("epochs_done", 4), r"\.json is not what was saved: its content does not"),
        (".json", other("losses", [0.5, 0.26]), "is not what was saved"),
        (".json", other("more", 1), "It was edited or damaged, and is not loaded"),
        (".json", without("epochs_done"), "is not what was saved"),
        # As one that was written before there was a digest.
        (".json", without("record_sha256"), "its content does not fit its record_sha256"),
        (".json", other("record_sha256", "0" * 64), "is not what was saved"),
        (".json", other("record_sha256", None), "is not what was saved"),
    ],
)
def test_a_damaged_one_is_refused(saved, suffix, damage, says):
    damage(saved.with_suffix(suffix))
    with pytest.raises(checkpoint.BadCheckpoint, match=says):
        checkpoint.load(saved)


def test_every_bit_of_the_record_counts(saved):
    content = saved.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            saved.write_bytes(changed)
            with pytest.raises(checkpoint.BadCheckpoint):
                checkpoint.load(saved)


def test_a_record_may_hold_what_json_changes(tmp_path):
    record = {"é": float("nan"), "pair": (1, 2), "by number": {1: "one"}, "tiny": 5e-324}
    there = checkpoint.load(checkpoint.save(tmp_path, 1, {}, record)).record
    assert np.isnan(there["é"])
    assert (there["pair"], there["by number"], there["tiny"]) == ([1, 2], {"1": "one"}, 5e-324)
    # Saved again, it gets digests of its own.
    again = checkpoint.save(tmp_path, 2, ARRAYS, there | {"more": 1})
    assert checkpoint.load(again).record["more"] == 1
    # And other spaces are no other content.
    again.write_text(json.dumps(json.loads(again.read_text())))
    assert checkpoint.load(again).record["more"] == 1


def test_arrays_of_another_format_are_refused(saved):
    import pickle

    data = saved.with_suffix(".safetensors")
    data.write_bytes(pickle.dumps({"weight": 1}))
    other("sha256", hashlib.sha256(data.read_bytes()).hexdigest(), forged=True)(saved)
    with pytest.raises(checkpoint.BadCheckpoint, match="is no safetensors file"):
        checkpoint.load(saved)


def test_a_refusal_names_the_newest_of_the_others(tmp_path):
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, number, ARRAYS, {})
    flip(tmp_path / "checkpoint-000003.safetensors")
    with pytest.raises(checkpoint.BadCheckpoint, match=r"newest .*checkpoint-000002\.json"):
        checkpoint.load(tmp_path / "checkpoint-000003.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "kept"
    path.write_text("old")

    def half():
        with checkpoint.replacing(path) as partial:
            partial.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_who_may_read_one_file_may_read_the_other(tmp_path, mask):
    before = os.umask(mask)
    try:
        checkpoint.save(tmp_path, 1, ARRAYS, {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("full", [".safetensors", ".json"])
def test_a_full_disk_leaves_the_older_one_and_no_other(tmp_path, monkeypatch, full):
    older = checkpoint.save(tmp_path, 1, ARRAYS, {"epochs_done": 1})
    there = sorted(path.name for path in tmp_path.iterdir())
    write = Path.write_bytes

    def half(path, content, *_, **__):
        write(path, content[:7] if isinstance(content, bytes) else content[:7].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes" if full == ".safetensors" else "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, ARRAYS, {"epochs_done": 2})
    assert list(checkpoint.numbered(tmp_path).values()) == [older]
    assert checkpoint.load(older).record["epochs_done"] == 1
    assert not checkpoint.partials(tmp_path)
    if full == ".safetensors":
        assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_a_kill_at_any_moment_leaves_the_newest_whole(tmp_path):
    # The same numbers again and again: a file that is being replaced is the one that is read.
    program = (
        "import sys, itertools, numpy as np\n"
        "from pathlib import Path\n"
        "from gradlab import checkpoint\n"
        "for i in itertools.count(int(sys.argv[2])):\n"
        "    arrays = {'a': np.full(200_000, i, np.float32)}\n"
        "    checkpoint.save(Path(sys.argv[1]), i % 3, arrays, {'i': i})\n"
        "    if i % 1000 == 3:\n"
        "        print(i, flush=True)\n"
    )
    rng, lives = random.Random(0), set()
    for life in range(10):
        command = [sys.executable, "-c", program, str(tmp_path), str(1000 * life)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        whole = 0
        for path in checkpoint.numbered(tmp_path).values():
            try:
                there = checkpoint.load(path)
            except checkpoint.BadCheckpoint:
                continue  # between the two replacements of one number: refused, never half loaded
            whole += 1
            assert set(there.arrays["a"]) == {there.record["i"]}
            lives.add(there.record["i"] // 1000)
        assert whole >= 2
    assert lives == set(range(10))
