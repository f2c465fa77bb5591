"""`gradlab train`: what it refuses, that a kill costs nothing, that both frameworks agree."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from gradlab import checkpoint, claims, cli, convnet, data, training
from gradlab.history import GradientHistory

SIDES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in training.FRAMEWORKS]
MOMENTUM = ("momentum", "nesterov")
QUICK = ("--model-name", "mlp", "--train-load-size", "200", "--num-epochs", "2")


def train(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, what was printed, what was complained of."""
    capsys.readouterr()
    try:
        code = cli.main(["train", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out, said.err


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    return checkpoint.load(list(checkpoint.numbered(folder).values())[-1]).arrays


def assert_same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert set(one) == set(two)
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), name


# ---------------------------------------------------------------------------------------------
# What it refuses


@pytest.fixture
def npz(tmp_path):
    """Writes a data file that the command may be given."""

    def write(**arrays):
        path = tmp_path / "data.npz"
        rng = np.random.default_rng(0)
        given = {"x": rng.normal(size=(40, 3)), "y": np.arange(40) % 4} | arrays
        np.savez(path, **{name: array for name, array in given.items() if array is not None})
        return path

    return write


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--framework", "jax"], "--framework must be one of torch, tensorflow"),
        (["--framework", "pytorch"], "PyTorch's name in Python is torch"),
        (["--framework", "tf"], "got 'tf'. It is written in full: tensorflow"),
        (["--framework", "keras"], "Keras runs on TensorFlow here: tensorflow"),
        (["--model-name", "resnet"], "--model-name must be one of nn, mlp, deep"),
        (["--optimizer", "lion"], "--optimizer must be one of sgd"),
        (["--loss", "hinge"], "--loss must be one of cross-entropy, mse"),
        (["--loss", "gradient-descent"], "--optimizer sgd"),
        (["--lr-schedule", "cos"], "--lr-schedule must be one of constant"),
        (["--weight-initialization", "ones"], "must be one of he, glorot, orthogonal, zeros"),
        (["--precision", "int8"], "--precision must be one of float32"),
        (["--on-nonfinite", "ignore"], "--on-nonfinite must be one of record, skip, raise"),
        (["--num-epochs", "0"], "--num-epochs must be a whole number from 1 up, got 0"),
        (["--num-epochs", "-3"], "--num-epochs must be"),
        (["--num-epochs", "2.5"], "argument --num-epochs: invalid int value: '2.5'"),
        (["--num-epochs", "1" + "0" * 12], "--num-epochs must be"),
        (["--num-epochs", "1" + "0" * 9], "steps, and 50000000 are the most: give 16000 or fewer"),
        (["--batch-size", "0"], "--batch-size must be"),
        (["--batch-size", "-32"], "--batch-size must be"),
        (["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["--save-interval", "0"], "--save-interval must be"),
        (["--save-path", ""], "--save-path names nothing"),
        (["--logdir", ""], "--logdir names nothing"),
        (["--data", ""], "--data names nothing"),
        (["--train-load-size", "0"], "--train-load-size must be a share above 0"),
        (["--train-load-size", "-1"], "--train-load-size must be"),
        (["--train-load-size", "1.5"], "--train-load-size must be"),
        (["--train-load-size", "nan"], "--train-load-size must be"),
        (["--train-load-size", "1e300"], "--train-load-size must be"),
        (["--train-load-size", "100001"], "asks for 100001 samples, and there are 100000"),
        (["--validation-load-size", "1e9"], "--validation-load-size asks for 1000000000 samples"),
        (["--test-load-size", "inf"], "--test-load-size must be"),
        (["--lr", "0"], "--lr must be a finite number above 0"),
        (["--lr", "-0.1"], "--lr must be"),
        (["--lr", "nan"], "--lr must be"),
        (["--lr", "inf"], "--lr must be"),
        (["--lr", "1e-400"], "--lr must be a finite number above 0, got 0.0"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--clip-norm", "0"], "--clip-norm must be above 0"),
        (["--clip-norm", "-1"], "--clip-norm must be above 0"),
        (["--clip-norm", "nan"], "--clip-norm must be above 0"),
        (["--clip-norm", "inf"], "leave it out to clip nothing"),
        (["--seed", "-1"], "--seed must be"),
        (["--seed", "5000000000"], "--seed must be"),
        (["--resume", "--reset"], "give one of them"),
        (["--resume"], "there is no folder"),
        (["--data", "nowhere.npz"], "there is no such file"),
        (["--momentum", "0.9"], "unrecognized arguments: --momentum 0.9. See gradlab train --help"),
        (["--num-epoch", "3"], "unrecognized arguments: --num-epoch 3"),
    ],
)
def test_bad_input_gets_a_sentence_and_changes_nothing(capsys, tmp_path, arguments, says):
    code, out, err = train(capsys, "--save-path", tmp_path / "run", *arguments)
    assert code == cli.BAD_INPUT
    assert says in err
    assert err.startswith("gradlab: ")
    assert err.count("\n") == 1
    assert not out
    assert not (tmp_path / "run").exists()


def x_with(value):
    x = np.ones((40, 3))
    x[7, 2] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": x_with(np.nan)}, "x[7, 2] is nan, the first of 1 numbers that are not finite"),
        ({"x": x_with(-np.inf)}, "x[7, 2] is -inf"),
        ({"x": x_with(1e39)}, "x[7, 2] is inf"),  # float32 cannot hold it
        ({"x": None}, "it needs arrays named x and y, and holds y"),
        ({"x": None, "y": None}, "it needs arrays named x and y, and holds none"),
        ({"x": None, "images": np.ones((40, 3))}, "and holds y, images"),
        ({"x": np.ones((40, 3, 1))}, "x.reshape(len(x), -1) makes one row of each sample"),
        ({"y": np.arange(39)}, "x must be (samples, features) and y (samples,)"),
        ({"x": np.ones(40)}, "x must be (samples, features) and y (samples,)"),
        ({"x": np.ones((40, 0))}, "x must be (samples, features)"),
        ({"y": np.linspace(0, 1, 40)}, "y must hold class numbers 0, 1, 2, …, got float64"),
        ({"y": np.arange(40) - 1}, "of two classes or more, got 40 from -1 to 38"),
        ({"y": np.zeros(40, int)}, "of two classes or more, got 1 from 0 to 0"),
        ({"y": np.arange(40) % 2 * 1000}, "got 2 from 0 to 1000 for 40 samples"),
        (
            {"y": np.array(["cat", "dog"] * 20)},
            "got <U3. np.unique(y, return_inverse=True)",
        ),
        ({"x": np.full((40, 3), "a")}, "x must hold real numbers"),
        ({"x": np.ones((5, 3)), "y": np.arange(5)}, "ten samples are the least, got 5"),
        (
            {"x": np.full((40, 3), 1.5, dtype=object)},
            "x holds Python objects, not numbers. Save x.ast",
        ),
        ({"y": np.array([0, 1] * 20, dtype=object)}, "numbers. Save y.astype(int)"),
        ({"x": None, "X": np.ones((40, 3))}, "and holds y, X. Write them in small letters"),
        ({"y": np.arange(40) % 2 * 1.0}, "got float64. y.astype(int) makes them of whole numbers"),
        ({"y": np.linspace(0, 1, 40)}, "what is trained here tells classes apart"),
        ({"y": np.zeros((40, 1), int)}, "got (40, 3) and (40, 1). y.ravel() makes one row of y"),
        ({"y": np.eye(40, 2)}, "(40, 2). y.argmax(1) makes class numbers of rows with a single 1"),
    ],
)
def test_bad_data_are_refused(capsys, tmp_path, npz, arrays, says):
    code, _, err = train(capsys, "--save-path", tmp_path / "run", "--data", npz(**arrays))
    assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
    assert says in err
    assert not (tmp_path / "run").exists()


def test_a_file_of_another_kind_is_refused(capsys, tmp_path):
    for content, says in (
        (b"1,2\n3,4\n", "this is no .npz file. np.savez('data.npz', x=x, y=y) writes one"),
        (b"", "this is no .npz file"),
        (b"PK: no zip", "this is no .npz file"),
        (b"PK\x03\x04, and no more", "cannot be read as an .npz file"),
    ):
        (tmp_path / "data.npz").write_bytes(content)
        code, _, err = train(capsys, "--data", tmp_path / "data.npz", "--save-path", tmp_path / "r")
        assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
        assert says in err
        assert "pickle" not in err
    np.save(tmp_path / "data.npy", np.ones((40, 3)))
    code, _, err = train(capsys, "--data", tmp_path / "data.npy", "--save-path", tmp_path / "run")
    assert code == cli.BAD_INPUT
    assert "this is an .npy file, which holds one array. np.savez(" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (np.arange(40) % 2 + 1, "Class 0 has no sample. Do yours count from 1? Then save y - 1."),
        (np.arange(40) % 2 * 20, "19 of 21 classes have no sample, 1 first. np.unique(y, return_i"),
        (np.arange(40), "40 classes for 40 samples: each has one or two. Is y a number to be"),
        (np.arange(40) % 4, ""),
    ],
)
def test_class_numbers_that_are_seldom_meant_are_remarked_on(capsys, tmp_path, npz, y, says):
    run = ("--model-name", "mlp", "--num-epochs", 1, "--save-path", tmp_path / "run")
    code, out, _ = train(capsys, *run, "--data", npz(y=y))
    assert code == 0
    if says:
        assert out.splitlines()[1].startswith(says)
    else:
        assert out.splitlines()[1].startswith("epoch 1: ")


@pytest.mark.parametrize("flag", ["--save-path", "--logdir"])
@pytest.mark.parametrize("below", ["", "run", "run/deep"])
def test_a_path_that_is_a_file_is_refused(capsys, tmp_path, flag, below):
    (tmp_path / "file").write_text("kept")
    path = tmp_path / "file" / below
    code, out, err = train(capsys, *QUICK, "--save-path", tmp_path / "new", flag, path)
    assert (code, out, err.count("\n")) == (cli.BAD_INPUT, "", 1)
    assert f"{flag} {path}: {tmp_path / 'file'} is a file, not a folder" in err
    assert (tmp_path / "file").read_text() == "kept"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("flag", ["--save-path", "--logdir"])
def test_a_path_that_cannot_be_made_is_refused(capsys, tmp_path, monkeypatch, flag):
    make = Path.mkdir

    def mkdir(path, *arguments, **keywords):
        if path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return make(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    makedirs = os.makedirs
    monkeypatch.setattr(
        os, "makedirs", lambda p, *a, **k: mkdir(Path(p)) if "closed" in p else makedirs(p, *a, **k)
    )
    closed = tmp_path / "new" / "closed"
    code, out, err = train(capsys, *QUICK, "--save-path", tmp_path / "a" / "b", flag, closed)
    assert (code, out, err.count("\n")) == (cli.BAD_INPUT, "", 1)
    assert f"{flag} {closed} cannot be written: Permission denied. Name another" in err
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_too_long_is_refused(capsys, tmp_path):
    code, _, err = train(capsys, *QUICK, "--save-path", tmp_path / ("n" * 300))
    assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
    assert "File name too long" in err


@pytest.mark.parametrize("lacking", ["framework", "data"])
def test_what_is_lacking_is_noticed_before_anything_is_made(capsys, tmp_path, monkeypatch, lacking):
    def unavailable():
        raise data.DataUnavailable("MNIST could not be downloaded (no network).")

    monkeypatch.setattr(data, "mnist", unavailable)
    if lacking == "framework":
        monkeypatch.setitem(sys.modules, "gradlab.torch.train", None)
    source = ("--data", "mnist") if lacking == "data" else ()
    code, out, err = train(
        capsys, "--model-name", "mlp", *source, "--save-path", tmp_path / "a" / "b"
    )
    assert (code, out, err.count("\n")) == (cli.BAD_INPUT, "", 1)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder with a finished run in PyTorch; copied, never changed."""
    folder = tmp_path_factory.mktemp("done")
    assert cli.main(["train", *QUICK, "--save-path", str(folder)]) == 0
    return folder


@pytest.fixture
def run(done, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(done, tmp_path / "run"))


def test_a_schedule_is_never_stretched(capsys, tmp_path):
    here = (*QUICK, "--lr-schedule", "cosine", "--save-path", tmp_path)
    assert train(capsys, *here, "--num-epochs", 1)[0] == 0
    for more in ((), ("--lr", 0.002), ("--clip-norm", 1)):  # whatever else is changed
        code, _, err = train(capsys, *here, "--num-epochs", 2, "--resume", *more)
        assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
        assert "--num-epochs was 1 and is 2, and --lr-schedule cosine is laid over all" in err
        assert "Repeat --num-epochs 1, or go on with --lr-schedule constant and an --lr" in err
    # What the sentence offers is taken.
    code, out, _ = train(
        capsys, *here, "--num-epochs", 2, "--resume", "--lr-schedule", "constant", "--lr", 0.002
    )
    assert code == 0
    assert "after 1 epoch, --num-epochs from 1 to 2" in out
    assert train(capsys, *here, "--num-epochs", 1, "--reset")[0] == 0
    assert train(capsys, *here, "--num-epochs", 1, "--resume")[0] == 0
    # And a constant rate knows no end.
    flat = (*here, "--lr-schedule", "constant")
    assert train(capsys, *flat, "--num-epochs", 1, "--reset")[0] == 0
    code, out, _ = train(capsys, *flat, "--num-epochs", 2, "--resume")
    assert (code, "Changed on the way" in out) == (0, False)


def test_all_that_resumptions_changed_is_kept_and_said(capsys, tmp_path):
    def resumed(epochs, *options):
        given = ("--save-path", tmp_path, "--num-epochs", epochs, "--resume", *options)
        code, out, _ = train(capsys, *QUICK, *given)
        assert code == 0
        (said,) = [line for line in out.splitlines() if line.startswith("Changed on the way: ")]
        record = checkpoint.load(tmp_path / f"checkpoint-{epochs:06d}.json").record
        return said.removeprefix("Changed on the way: "), record["changes"]

    assert train(capsys, *QUICK, "--save-path", tmp_path, "--num-epochs", 1)[0] == 0
    assert checkpoint.load(tmp_path / "checkpoint-000001.json").record["changes"] == []
    first, kept = resumed(2, "--lr", 0.01)
    assert first == "after 1 epoch, --lr from 0.001 to 0.01."
    assert kept == [{"epochs_done": 1, "option": "lr", "before": 0.001, "now": 0.01}]
    second, kept = resumed(3, "--lr", 0.02, "--clip-norm", 1)
    assert second == (
        "after 1 epoch, --lr from 0.001 to 0.01; after 2 epochs, --clip-norm from None to 1.0; "
        "after 2 epochs, --lr from 0.01 to 0.02."
    )
    assert len(kept) == 3
    # Also by a resumption that changes nothing.
    assert resumed(4, "--lr", 0.02, "--clip-norm", 1) == (second, kept)


@pytest.mark.parametrize("changes", [5, [5], [{"option": "lr"}], None])
def test_a_list_of_changes_that_is_none_is_refused(capsys, run, changes):
    there = checkpoint.load(run / "checkpoint-000002.json")
    checkpoint.save(run, 2, there.arrays, there.record | {"changes": changes})
    code, _, err = train(capsys, *QUICK, "--save-path", run, "--resume")
    assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
    assert "checkpoint-000002.json holds no list of changes: " in err


def damaged(path, change):
    content = path.read_bytes()
    path.write_bytes(change(content))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "already holds a run"),
        (["--resume", "--seed", "1"], "--seed was 0 and is 1"),
        (["--resume", "--framework", "tensorflow"], "--framework was 'torch' and is 'tensorflow'"),
        (["--resume", "--optimizer", "sgd"], "--optimizer was 'adam' and is 'sgd'"),
        (["--resume", "--model-name", "deep"], "--model-name was 'mlp' and is 'deep'"),
        (["--resume", "--num-epochs", "1"], "has 2 epochs behind it, --num-epochs asks for 1"),
        (["--resume", "--batch-size", "16"], "--batch-size was 32 and is 16"),
    ],
)
def test_a_run_is_neither_overwritten_nor_mixed_with_another(capsys, run, arguments, says):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    code, _, err = train(capsys, *QUICK, "--save-path", run, *arguments)
    assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
    assert says in err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize(
    ("suffix", "change", "says"),
    [
        (".safetensors", lambda content: content[:-9], "is not what was saved"),
        (".safetensors", lambda content: content[:-1] + b"\x7f", "is not what was saved"),
        (".json", lambda content: content[:50], "cannot be read as JSON"),
        (".json", lambda content: b'{"epoch": 2}', "is no checkpoint of gradlab"),
        (".json", lambda content: content.replace(b'"lr": 0.001', b'"lr": 0.002'), "was edited"),
        (".json", lambda content: content.replace(b'"seed": 0', b'"seed": 1'), "was edited"),
    ],
)
def test_a_bad_checkpoint_is_refused(capsys, run, suffix, change, says):
    damaged(run / f"checkpoint-000002{suffix}", change)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    code, _, err = train(capsys, *QUICK, "--save-path", run, "--resume")
    assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
    assert says in err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize(
    ("change_array", "change_record"),
    [
        (lambda name, array: {name: array[..., :-1] if array.ndim else array}, {}),
        (lambda name, array: {} if name.startswith("model.") else {name: array}, {}),
        (lambda name, array: {name: array, "optimizer.99.step": array}, {}),
        (lambda name, array: {name: array, "optimizer.what.ever.this.is": array}, {}),
        (lambda name, array: {name: array}, {"epochs": []}),
        (lambda name, array: {name: array}, {"epochs": [{"epoch": 1}, {"epoch": 2}]}),
        (lambda name, array: {name: array}, {"start_loss": None}),
        (lambda name, array: {name: array}, {"options": None}),
        (lambda name, array: {name: array}, {"epochs_done": "two"}),
    ],
)
def test_what_belongs_to_another_network_is_refused(capsys, run, change_array, change_record):
    there = checkpoint.load(run / "checkpoint-000002.json")
    arrays = {}
    for name, array in there.arrays.items():
        arrays |= change_array(name, array)
    checkpoint.save(run, 2, arrays, there.record | change_record)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    code, _, err = train(capsys, *QUICK, "--save-path", run, "--resume", "--num-epochs", "3")
    assert (code, err.count("\n")) == (cli.BAD_INPUT, 1)
    assert re.search("does not (fit this network|say what run it belongs to)", err)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("way", ["--resume", "--reset"])
def test_what_a_kill_left_half_written_is_removed(capsys, run, way):
    for name in (".checkpoint-000003.json.1.partial", ".history-000003.npz.1.partial"):
        (run / name).write_bytes(b"half")
    (run / ".mine").write_text("kept")
    assert len(checkpoint.partials(run)) == 2
    assert train(capsys, *QUICK, "--save-path", run, way)[0] == 0
    assert not checkpoint.partials(run)
    assert (run / ".mine").exists()


@pytest.mark.parametrize("way", [(), ("--resume",), ("--reset",)])
def test_two_runs_do_not_share_a_folder(capsys, tmp_path, run, way):
    pytest.importorskip("fcntl")
    folder = run if way else tmp_path / "new"
    other = training.Place(training.Options(save_path=str(folder), reset=True))
    with other.held():
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        code, out, err = train(capsys, *QUICK, "--save-path", folder, *way)
        assert (code, out, err.count("\n")) == (cli.BAD_INPUT, "", 1)
        assert "another run is writing there" in err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert train(capsys, *QUICK, "--save-path", folder, *way)[0] == 0


def test_a_run_that_began_and_ended_in_between_is_noticed(tmp_path):
    pytest.importorskip("fcntl")
    place = training.Place(training.Options(save_path=str(tmp_path)))
    checkpoint.save(tmp_path, 1, {}, {})
    with pytest.raises(training.BadOption, match="another run"), place.held():
        pass


@pytest.mark.parametrize("full", ["checkpoint-000002.safetensors", "history-000002.npz"])
def test_a_full_disk_stops_the_run_and_spares_what_was_saved(capsys, tmp_path, monkeypatch, full):
    folder, replace_file = tmp_path / "run", os.replace

    def replacing(source, target):
        if Path(target).name == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    with monkeypatch.context() as now:
        now.setattr(os, "replace", replacing)
        code, _, err = train(capsys, *QUICK, "--save-path", folder, "--num-epochs", 3)
    assert (code, err.count("\n")) == (cli.NOT_SAVED, 1)
    assert f"epoch 2 could not be saved in {folder}: No space left on device" in err
    assert "checkpoint-000001.json" in err
    assert list(checkpoint.numbered(folder)) == [1]
    assert not checkpoint.partials(folder)
    whole = tmp_path / "whole"
    assert train(capsys, *QUICK, "--save-path", whole, "--num-epochs", 3)[0] == 0
    assert train(capsys, *QUICK, "--save-path", folder, "--num-epochs", 3, "--resume")[0] == 0
    assert_same(arrays_of(folder), arrays_of(whole))


def test_folders_may_have_any_name(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "läufe mit Leerzeichen/näher 中"
    code, _, _ = train(
        capsys, *QUICK, "--save-path", f"~/{name}", "--logdir", f"~/{name}/log", "--num-epochs", 1
    )
    assert code == 0
    assert list(checkpoint.numbered(tmp_path / name)) == [1]
    assert list((tmp_path / name / "log").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / name, target_is_directory=True)
    assert train(capsys, *QUICK, "--save-path", tmp_path / "link", "--resume")[0] == 0
    assert list(checkpoint.numbered(tmp_path / name)) == [1, 2]
    assert (tmp_path / "link").is_symlink()


def test_reset_deletes_the_run_and_nothing_else(capsys, run):
    others = (
        *("checkpoint-best.safetensors", "checkpoint-last.json", "checkpoint-00001.json"),
        *("checkpoint-000001.json.bak", "history-2024.npz", "history.npz", "notes.txt"),
        *(".notes.txt.12.partial", ".checkpoint-best.json.12.partial", ".mine.partial"),
    )
    for name in others:
        (run / name).write_text("mine")
    (run / training.AT_THE_END).write_text("of a run that blew up")
    (run / ".history-000002.npz.12.partial").write_text("half")
    code, out, _ = train(capsys, *QUICK, "--save-path", run, "--reset", "--num-epochs", "1")
    assert code == 0
    # Three of each of the two epochs, and two more.
    assert out.startswith(f"--reset: 8 files of {run} deleted\n")
    own = {"checkpoint-000001.json", "checkpoint-000001.safetensors", "history-000001.npz"}
    assert {path.name for path in run.iterdir()} == own | set(others)
    assert all((run / name).read_text() == "mine" for name in others)
    assert train(capsys, *QUICK, "--save-path", run, "--resume")[0] == 0
    assert all((run / name).read_text() == "mine" for name in others)


def test_a_reset_with_nothing_to_delete_says_nothing(capsys, tmp_path):
    _, out, _ = train(capsys, *QUICK, "--save-path", tmp_path, "--reset", "--num-epochs", "1")
    assert "--reset" not in out


# ---------------------------------------------------------------------------------------------
# Rates, sizes, weights


def test_the_schedules():
    options = training.Options(lr=2.0)

    def rates(name):
        return training.learning_rates(replace(options, lr_schedule=name), 100)

    np.testing.assert_array_equal(rates("constant"), 2.0)
    step = rates("step")
    np.testing.assert_allclose(step[[0, 49, 50, 74, 75, 99]], [2, 2, 0.2, 0.2, 0.02, 0.02])
    cosine = rates("cosine")
    np.testing.assert_allclose(cosine[[0, 50]], [2, 1], atol=1e-12)
    assert (np.diff(cosine) < 0).all()
    warm = rates("warmup-cosine")
    np.testing.assert_allclose(warm[:6], [0.4, 0.8, 1.2, 1.6, 2.0, 2.0], rtol=1e-3)
    assert (np.diff(warm[5:]) < 0).all()
    for steps in (1, 2, 3):  # the shortest runs
        for name in training.SCHEDULES:
            short = training.learning_rates(replace(options, lr_schedule=name), steps)
            assert short.shape == (steps,)
            assert (short > 0).all()


def test_the_articles_network_has_its_numbers():
    task = training.problem(training.Options())
    assert task.train.x.shape == (100_000, 10)
    assert set(np.unique(task.train.y)) == set(range(100))
    assert task.steps_per_epoch == 3125
    assert [name for name in task.weights if name.endswith("weight")] == [
        f"{name}.weight" for name in ("conv0", "conv1", "hidden", "output")
    ]
    seen = np.concatenate([task.order(0), task.order(1)])
    np.testing.assert_array_equal(np.bincount(seen), 2)
    assert (task.order(0) != task.order(1)).any()


def test_the_data_are_standardised_as_the_notebooks_do_it(npz):
    x = np.random.default_rng(1).normal(3, 5, (40, 3))
    x[:, 1] = 0.1  # never varies
    options = training.Options(model_name="mlp", data=str(npz(x=x)))
    task = training.problem(options)
    # The split that the book states.
    order = np.random.default_rng(0).permutation(40)
    parts = (x[order[:32]], x[order[32:36]], x[order[36:]])
    wanted = data.standardize(*(part.astype(np.float32) for part in parts))
    for part, array in zip((task.train, task.validation, task.test), wanted, strict=True):
        np.testing.assert_array_equal(part.x, array)
        assert part.x.dtype == np.float32
    given = data.Standardization.of(parts[0].astype(np.float32))
    assert [a.tobytes() for a in task.standard] == [a.tobytes() for a in given]


@pytest.mark.parametrize("side", SIDES)
def test_a_checkpoint_is_read_back_as_the_book_says(capsys, tmp_path, monkeypatch, npz, side):
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(100 + 20 * c, 3, (100, 3)) for c in range(4)])
    path = npz(x=x, y=np.repeat(np.arange(4), 100))
    assert (
        train(
            capsys,
            *("--framework", side, "--model-name", "mlp", "--data", path, "--num-epochs", 10),
            *("--lr", 0.01, "--save-path", tmp_path / "runs" / "mine"),
        )[0]
        == 0
    )
    page = Path(__file__).resolve().parent.parent / "book" / "api.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "input.mean" in block]
    if side == "tensorflow":
        code = code.replace("gradlab.torch", "gradlab.keras")
        code = code.replace("torch.from_numpy(scaled)", "scaled")
        code = code.replace("predicted = logits.argmax(1)", "predicted = logits.numpy().argmax(1)")
    monkeypatch.chdir(tmp_path)
    known = {"x": x}
    exec(code, known)
    assert (np.asarray(known["predicted"]) == np.repeat(np.arange(4), 100)).mean() > 0.95
    saved = checkpoint.load(tmp_path / "runs" / "mine" / "checkpoint-000010.json").arrays
    assert {saved[name].dtype for name in ("input.mean", "input.scale")} == {np.dtype(float)}
    assert saved["model.output.weight"].shape == (64, 4)  # (inputs, outputs) on both sides


@pytest.mark.parametrize("side", SIDES)
def test_a_checkpoint_without_the_standardisation_is_resumed(capsys, tmp_path, side):
    here = (*QUICK, "--framework", side, "--save-path", tmp_path)
    assert train(capsys, *here, "--num-epochs", 1)[0] == 0
    there = checkpoint.load(tmp_path / "checkpoint-000001.json")
    older = {name: array for name, array in there.arrays.items() if "input." not in name}
    assert len(older) == len(there.arrays) - 2
    checkpoint.save(tmp_path, 1, older, there.record)
    assert train(capsys, *here, "--resume")[0] == 0
    assert "input.mean" in arrays_of(tmp_path)


def test_a_share_and_a_number_of_samples():
    task = training.problem(
        training.Options(train_load_size=0.01, validation_load_size=7, test_load_size=1)
    )
    assert (len(task.train.x), len(task.validation.x), len(task.test.x)) == (1000, 7, 12_500)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (3, 20, 50)])
def test_drawn_weights_have_their_scheme_s_spread(shape):
    fan_in = int(np.prod(shape[:-1]))
    fan_out = shape[-1] * int(np.prod(shape[:-2]))
    rng = np.random.default_rng(0)
    for scheme, variance in (("he", 2 / fan_in), ("glorot", 2 / (fan_in + fan_out))):
        drawn = convnet.draw(shape, scheme, rng)
        assert drawn.shape == shape
        assert drawn.var() == pytest.approx(variance, rel=0.1)
    matrix = convnet.draw(shape, "orthogonal", rng).reshape(fan_in, -1)
    np.testing.assert_allclose(np.linalg.svd(matrix)[1], np.sqrt(2))
    assert not convnet.draw(shape, "zeros", rng).any()
    with pytest.raises(ValueError, match="scheme must be one of"):
        convnet.draw(shape, "ones", rng)


def test_a_name_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match=r"end in \.weight, \.scale or \.bias, got weight"):
        convnet.initial_weights({"weight": (3, 2), "output.bias": (2,)}, "he", 0)


# ---------------------------------------------------------------------------------------------
# Training


def test_both_frameworks_take_the_same_steps(capsys, tmp_path):
    for model in ("nn", "mlp"):
        for optimizer in training.OPTIMIZERS:
            found = []
            for side in training.FRAMEWORKS:
                options = training.Options(
                    framework=side,
                    model_name=model,
                    train_load_size=96,
                    num_epochs=1,
                    optimizer=optimizer,
                    precision="float64",
                    lr=1e-3 if optimizer in ("adam", "rmsprop") else 0.05,
                    # Keras keeps the rate inside the momentum, PyTorch outside: another rule as
                    # soon as the rate changes.
                    lr_schedule="constant" if optimizer in MOMENTUM else "warmup-cosine",
                    clip_norm=0.5,
                    loss="cross-entropy" if optimizer != "sgd" else "mse",
                    save_path=str(tmp_path / f"{side}-{model}-{optimizer}"),
                )
                training.run(options, lambda line: None)
                found.append(arrays_of(Path(options.save_path)))
            start = training.problem(options).weights
            one, two = (
                np.concatenate([(a[f"model.{name}"] - w).ravel() for name, w in start.items()])
                for a in found
            )
            # Adam and RMSprop: the two put ε in different places.
            allowed = 0.1 if optimizer in ("adam", "rmsprop") else 1e-5
            distance = np.linalg.norm(one - two) / np.linalg.norm(one)
            assert distance < allowed, (model, optimizer)


def test_where_the_frameworks_differ_is_adam_and_not_the_rest(tmp_path):
    def apart(optimizer: str, samples: int) -> float:
        """By which share the mean losses of the second epoch differ, thirty layers deep."""
        one, two = (
            training.run(
                training.Options(
                    framework=side,
                    model_name="deep",
                    train_load_size=samples,
                    num_epochs=2,
                    optimizer=optimizer,
                    lr=0.01 if optimizer == "sgd" else 0.001,
                    save_path=str(tmp_path / f"{side}-{optimizer}"),
                ),
                lambda line: None,
            )[-1].loss
            for side in training.FRAMEWORKS
        )
        return abs(one - two) / one

    assert apart("sgd", 96) < 1e-5
    assert apart("adam", 300) > 1e-4


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_weights(capsys, tmp_path, side, precision):
    shared = [*QUICK, "--framework", side, "--precision", precision, "--lr-schedule", "constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(capsys, *shared, "--num-epochs", 3, "--save-path", whole)[0] == 0
    assert train(capsys, *shared, "--num-epochs", 1, "--save-path", parts)[0] == 0
    code, out, _ = train(capsys, *shared, "--num-epochs", 3, "--save-path", parts, "--resume")
    assert code == 0
    assert "2 of 3 epochs to go" in out
    assert_same(arrays_of(whole), arrays_of(parts))
    record = json.loads((parts / "checkpoint-000003.json").read_text())
    assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2, 3]
    # And a run that is done is only tested once more.
    code, out, _ = train(capsys, *shared, "--num-epochs", 3, "--save-path", parts, "--resume")
    assert code == 0
    assert "0 of 3 epochs to go" in out
    assert "accuracy" in out


@pytest.mark.parametrize("side", SIDES)
def test_a_batch_may_be_larger_than_the_data(capsys, tmp_path, side, monkeypatch):
    monkeypatch.setattr(training, "SPEAK_EVERY", 0.0)
    code, out, _ = train(
        capsys, *QUICK, "--framework", side, "--batch-size", 10**9, "--save-path", tmp_path
    )
    assert code == 0
    assert "200 training samples of 64 features and 10 classes, 1 step an epoch, 2 of 2" in out
    assert "epoch 1, step 1 of 1\n" in out


@pytest.mark.parametrize("side", SIDES)
def test_a_log_file_hears_of_a_long_epoch(capsys, tmp_path, side, monkeypatch):
    shared = (*QUICK, "--framework", side, "--save-path", tmp_path)
    _, out, _ = train(capsys, *shared, "--num-epochs", 1)
    assert ", step " not in out  # not yet
    assert re.search(r"epoch 1: loss \S+, validation loss \S+, validation accuracy ", out)
    assert re.search(r"test loss \S+, test accuracy ", out)
    monkeypatch.setattr(training, "SPEAK_EVERY", 0.0)
    _, out, _ = train(capsys, *shared, "--resume")
    assert [line for line in out.splitlines() if ", step " in line] == [
        f"epoch 2, step {step} of 7" for step in range(1, 8)
    ]


@pytest.mark.parametrize("side", SIDES)
def test_a_run_that_blows_up_is_explained(capsys, tmp_path, side):
    code, out, err = train(
        capsys,
        *("--framework", side, "--model-name", "deep", "--optimizer", "sgd", "--lr", 30),
        *("--num-epochs", 2, "--save-path", tmp_path),
    )
    assert code == cli.BLEW_UP
    assert "is not finite. The step was not taken" in out
    cause = out.split("The untrained network, on its first batch:")[1]
    cause, consequence = cause.split("What had become of it, at the step that was left out:")
    assert "Divergence at " in cause
    assert " at hidden" in consequence
    assert "No checkpoint was saved." in err
    assert err.endswith("; begin again with what the diagnosis says\n")
    assert f"in {tmp_path / 'history-at-the-end.npz'}; " in err
    history = GradientHistory.load(tmp_path / "history-at-the-end.npz")
    assert history.first_nonfinite is not None
    assert not checkpoint.numbered(tmp_path)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "way", [("--on-nonfinite", "skip"), ("--on-nonfinite", "record"), ("--precision", "float16")]
)
def test_a_lost_network_is_explained_and_not_saved(capsys, tmp_path, side, way):
    code, out, _ = train(
        capsys,
        *("--framework", side, "--model-name", "deep", "--optimizer", "sgd", "--lr", 30),
        *("--num-epochs", 4, "--save-path", tmp_path, *way),
    )
    assert code == cli.BLEW_UP
    assert "Divergence at " in re.split("on its (?:next|first) batch:", out)[1]
    for path in checkpoint.numbered(tmp_path).values():
        assert all(np.isfinite(array).all() for array in checkpoint.load(path).arrays.values())


def with_a_bad_sample(monkeypatch, row: int) -> None:
    """Put a NaN into the training data behind the command's back."""
    prepare = training.problem

    def problem(options):
        task = prepare(options)
        task.train.x[row] = np.nan
        return task

    monkeypatch.setattr(training, "problem", problem)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("model", ["mlp", "nn"])
@pytest.mark.parametrize("side", SIDES)
def test_one_bad_step_is_left_out_and_the_run_goes_on(
    capsys, tmp_path, monkeypatch, side, model, precision
):
    hot = (*QUICK, "--framework", side, "--model-name", model, "--precision", precision)
    with_a_bad_sample(monkeypatch, 77)
    code, out, err = train(capsys, *hot, "--on-nonfinite", "skip", "--save-path", tmp_path)
    assert code == 0, out + err
    assert "Of the last 14 steps, 2 were left out." in out
    record = checkpoint.load(tmp_path / "checkpoint-000002.json").record
    assert all(np.isfinite(epoch["loss"]) for epoch in record["epochs"])


@pytest.mark.parametrize("side", SIDES)
def test_the_mean_loss_is_that_of_the_steps_that_were_taken(tmp_path, monkeypatch, side):
    options = training.Options(
        framework=side,
        model_name="mlp",
        train_load_size=200,
        num_epochs=2,
        optimizer="sgd",
        lr=1e-30,  # nothing moves
        on_nonfinite="skip",
        save_path=str(tmp_path),
    )
    task = training.problem(options)
    order = [task.order(epoch) for epoch in range(2)]
    bad = int(order[0][199])  # the last step of epoch 0, of eight samples
    with_a_bad_sample(monkeypatch, bad)
    epochs = training.run(options, lambda line: None)
    trainer = import_module(f"gradlab.{training.FRAMEWORKS[side]}.train").Trainer(options, task)
    for epoch, rows in zip(epochs, order, strict=True):
        batch = int(np.flatnonzero(rows == bad)[0]) // 32
        taken = np.delete(rows, np.s_[32 * batch : 32 * batch + 32])
        assert len(taken) == (192 if epoch.epoch == 1 else 200 - len(rows[32 * batch :][:32]))
        wanted, _ = trainer.evaluate(training.Part(task.train.x[taken], task.train.y[taken]))
        assert epoch.loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_a_mean_loss_that_is_no_number_is_explained_by_the_step_left_out(
    capsys, tmp_path, monkeypatch, side
):
    prepared = training.problem(training.Options(model_name="mlp", train_load_size=200))
    with_a_bad_sample(monkeypatch, int(prepared.order(1)[70]))  # the third step of the second epoch
    trainer = import_module(f"gradlab.{training.FRAMEWORKS[side]}.train").Trainer
    fit = trainer.fit

    def lost(self, first, last, after_step, after_epoch):
        def after(epoch, loss):
            after_epoch(epoch, loss if epoch == 0 else np.nan)

        fit(self, first, last, after_step, after)

    monkeypatch.setattr(trainer, "fit", lost)
    code, out, _ = train(
        capsys, *QUICK, "--framework", side, "--on-nonfinite", "skip", "--save-path", tmp_path
    )
    assert code == cli.BLEW_UP
    assert "The mean loss of this epoch is nan" in out
    assert "Bad input at " in out.split("at the step that was left out:")[1]


@pytest.mark.parametrize("side", SIDES)
def test_a_loss_that_grows_is_a_blow_up_also_in_the_last_epoch(capsys, tmp_path, side):
    hot = (*QUICK, "--framework", side, "--optimizer", "sgd", "--save-path", tmp_path)
    assert train(capsys, *hot, "--lr", 0.01, "--num-epochs", 1)[0] == 0
    code, out, err = train(capsys, *hot, "--lr", 5, "--num-epochs", 2, "--resume")
    assert code == cli.BLEW_UP
    assert "after 1 epoch, --lr from 0.01 to 5.0" in out
    assert "The mean loss of this epoch is " in out
    assert "Divergence at " in out.split("The network after 1 epoch, ")[1]
    assert "--save-interval" not in err
    # The cure that it names is one that --resume takes.
    assert "another --lr" in err
    code, out, _ = train(capsys, *hot, "--lr", 0.01, "--num-epochs", 2, "--resume")
    assert code == 0
    assert "checkpoint-000002.json" in out
    assert not list(tmp_path.glob("*at-the-end*"))


@pytest.mark.parametrize("side", SIDES)
def test_a_resumed_run_is_judged_by_the_untrained_network(capsys, tmp_path, side):
    shared = (*QUICK, "--framework", side, "--save-path", tmp_path)
    assert train(capsys, *shared, "--num-epochs", 1)[0] == 0
    assert train(capsys, *shared, "--num-epochs", 2, "--resume")[0] == 0
    first, second = (checkpoint.load(p).record for p in checkpoint.numbered(tmp_path).values())
    assert first["start_loss"] == second["start_loss"]
    assert first["start_loss"] > first["epochs"][0]["validation_loss"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_has_the_same_number_before_and_after_a_resumption(
    capsys, tmp_path, monkeypatch, side, precision
):
    hot = (*QUICK, "--framework", side, "--save-path", tmp_path, "--precision", precision)
    assert train(capsys, *hot, "--num-epochs", 1)[0] == 0
    prepared = training.problem(training.Options(model_name="mlp", train_load_size=200))
    bad = int(prepared.order(1)[70])  # the third step of the second epoch
    with_a_bad_sample(monkeypatch, bad)
    code, out, _ = train(capsys, *hot, "--resume", "--on-nonfinite", "skip")
    assert code == 0
    assert re.search(r"The gradient of \S+ was not finite at epoch 2, step 3 of 7\. Of the", out)
    if precision == "float32":  # (The scaler takes the step in float16, and goes on.)
        for path in tmp_path.glob("*000002*"):
            path.unlink()
        code, out, _ = train(capsys, *hot, "--resume", "--on-nonfinite", "raise")
        assert code == cli.BLEW_UP
        assert re.search(r"^epoch 2, step 3 of 7: the gradient of \S+ \(", out, re.MULTILINE)
        code, out, _ = train(capsys, *hot, "--resume", "--on-nonfinite", "record")
        assert code == cli.BLEW_UP
        assert ", since epoch 2, step 3 of 7 (" in out


def events(log: Path) -> list:
    """What TensorBoard would read, file by file."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(log.iterdir()):
        content = path.read_bytes()
        while content:  # length (8), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


@pytest.mark.parametrize("side", SIDES)
def test_the_log_holds_losses_and_norms(capsys, tmp_path, monkeypatch, side):
    monkeypatch.setattr(training, "LOG_EVERY", 2)
    log = tmp_path / "log"
    hot = (*QUICK, "--framework", side, "--save-path", tmp_path / "run", "--logdir", log)
    assert train(capsys, *hot)[0] == 0
    code, out, _ = train(capsys, *hot, "--resume", "--num-epochs", 3)
    assert (code, "--logdir" in out) == (0, False)
    tags, hidden = {}, []
    for event in events(log):
        if event.HasField("session_log"):
            hidden.append(event.step)
        for value in event.summary.value:
            tags.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert {"loss", "validation/loss", "validation/accuracy", "grad_norm/total"} <= set(tags)
    # Counted from 1: the last step of an epoch and the epoch stand above each other.
    assert [step for step, _ in tags["loss"]] == [7, 14, 21]
    steps, norms = zip(*tags["grad_norm/total"], strict=True)
    assert steps == (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21)
    assert all(norm > 0 for norm in norms)
    # What a killed run wrote after its last checkpoint is not drawn beside what came instead.
    assert hidden == [15]


def test_a_log_that_holds_another_run_is_remarked_on(capsys, tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    (log / "notes.txt").write_text("mine")
    said = [
        train(capsys, *QUICK, "--num-epochs", 1, "--logdir", log, "--save-path", tmp_path / name)
        for name in ("first", "second")
    ]
    assert [code for code, *_ in said] == [0, 0]
    assert "--logdir" not in said[0][1]
    assert f"\n--logdir {log} already holds the events of a run, and " in said[1][1]
    assert f"such as {log / 'second'}, keeps them apart.\n" in said[1][1]
    assert len(list(log.iterdir())) == 3


@pytest.mark.parametrize("side", SIDES)
def test_rarer_checkpoints_are_named_where_one_would_have_helped(
    capsys, tmp_path, monkeypatch, side
):
    trainer = import_module(f"gradlab.{training.FRAMEWORKS[side]}.train").Trainer
    fit = trainer.fit

    def lost(self, first, last, after_step, after_epoch):
        fit(self, first, last, after_step, lambda e, loss: after_epoch(e, loss if e < 1 else 1e9))

    monkeypatch.setattr(trainer, "fit", lost)
    for interval in (2, 1):
        where = (*QUICK, "--framework", side, "--save-path", tmp_path / str(interval))
        _, out, err = train(capsys, *where, "--save-interval", interval)
        assert "\nThe network after 1 epoch, on its next batch:\n" in out
        assert ("or save more often with --save-interval" in err) == (interval == 2)


def started(side: str, folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "gradlab", "train", "--framework", side, *QUICK]
    command += ["--num-epochs", "40", "--save-path", str(folder), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )


@pytest.mark.parametrize("side", SIDES)
def test_a_killed_run_resumes_to_the_same_weights(capsys, tmp_path, side):
    folder, rng = tmp_path / "killed", random.Random()
    for _ in range(2):
        run = started(side, folder, *(["--resume"] if checkpoint.numbered(folder) else []))
        # Once it has begun, at a random moment of its work.
        before, give_up = len(checkpoint.numbered(folder)), time.monotonic() + 120
        while len(checkpoint.numbered(folder)) == before and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        run.wait()
    last = started(side, folder, "--resume")
    out, _ = last.communicate(timeout=240)
    assert last.returncode == 0, out
    whole = tmp_path / "whole"
    arguments = [*QUICK, "--framework", side, "--num-epochs", 40]
    assert train(capsys, *arguments, "--save-path", whole)[0] == 0
    assert_same(arrays_of(folder), arrays_of(whole))


def test_two_processes_under_torchrun_take_the_steps_of_one(capsys, tmp_path):
    shared = [*QUICK, "--precision", "float64", "--clip-norm", "1", "--batch-size", "33"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "gradlab", "train", *shared, "--save-path", str(tmp_path / "two")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("epoch 1:") == 1
    assert train(capsys, *shared, "--save-path", tmp_path / "one")[0] == 0
    one, two = arrays_of(tmp_path / "one"), arrays_of(tmp_path / "two")
    assert set(one) == set(two)
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-9, atol=1e-12, err_msg=name)


def test_tensorflow_under_torchrun_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = train(
        capsys, *QUICK, "--framework", "tensorflow", "--save-path", tmp_path / "deep" / "run"
    )
    assert code == cli.BAD_INPUT
    assert "use --framework torch" in err
    assert not (tmp_path / "deep").exists()


def test_a_terminated_run_says_so_in_what_it_wrote(tmp_path):
    run = started("torch", tmp_path)
    give_up = time.monotonic() + 120
    while not checkpoint.numbered(tmp_path) and time.monotonic() < give_up:
        time.sleep(0.01)
    run.terminate()
    out, _ = run.communicate(timeout=60)
    assert run.returncode == cli.INTERRUPTED
    assert "epoch 1: loss" in out
    assert "--resume goes on from" in out


def test_an_interrupted_run_says_where_it_goes_on(capsys, run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", interrupt)
    code, _, err = train(capsys, "--save-path", run)
    assert code == cli.INTERRUPTED
    assert "checkpoint-000002.json" in err


INTERRUPTED_IMPORT = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.write(2, b"what a library says\\n")
            os.kill(os.getpid(), signal.{signal})
sys.meta_path.insert(0, Interrupt())
{before}
from gradlab import cli
sys.exit(cli.main(["train", "--framework", {side!r}, "--save-path", {folder!r}]))
"""


@pytest.mark.parametrize(
    ("name", "side", "how"),
    [
        ("numpy", "torch", "SIGINT"),
        ("gradlab.training", "torch", "SIGTERM"),
        ("gradlab.torch.probe", "torch", "SIGINT"),
        ("tensorflow", "tensorflow", "SIGINT"),
    ],
)
def test_an_interrupt_during_imports_leaves_no_trace(tmp_path, name, side, how):
    # (Python sets its own handler only where the shell does not ignore interrupts.)
    before = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = INTERRUPTED_IMPORT.format(
        name=name, side=side, signal=how, before=before, folder=str(tmp_path / "run")
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == cli.INTERRUPTED, run.stderr
    assert "gradlab: interrupted; nothing had been " in run.stderr
    assert "Traceback" not in run.stderr
    assert ("what a library says" in run.stderr) == (side == "torch")  # TensorFlow is kept quiet
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------
# The other command, and the entry


@pytest.fixture
def claimed(tmp_path, monkeypatch):
    """A folder like the book's, with its claims and nothing built; the current one."""
    root = Path(__file__).resolve().parent.parent
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "claims.yml").write_bytes((root / "book" / "claims.yml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_claims_can_be_asked(capsys, claimed):
    assert cli.main(["claims"]) == 0
    out = capsys.readouterr().out
    assert "A1.16  " in out
    assert "No verdicts here yet: `make book`" in out
    for way in (["A1.16"], ["a1.16"], ["a1.16", "--registry", str(claimed / "book/claims.yml")]):
        assert cli.main(["claims", *way]) == 0
        out = capsys.readouterr().out
        assert out.startswith("A1.16  ")
        assert "12_xla" in out
        assert "A1.15" not in out
    for wrong in ("A9.9", ""):
        assert cli.main(["claims", wrong]) == cli.BAD_INPUT
        assert f"there is no claim {wrong!r}" in capsys.readouterr().err


def test_a_built_book_s_verdicts_stand_beside_its_claims(capsys, claimed):
    (claimed / "_build").mkdir()
    ledger = claimed / "_build" / "ledger.json"
    ledger.write_text(json.dumps({"A1.16": {"verdict": "conditional"}}))
    assert cli.main(["claims"]) == 0
    out = capsys.readouterr().out
    assert "\nA1.16  conditional  " in out
    assert "\nA1.15  undecided  " in out
    assert "No verdicts" not in out
    for broken in ("{", "[]", '{"A1.16": {}}', '{"A1.16": 1}'):
        ledger.write_text(broken)
        assert cli.main(["claims", "A1.16"]) == 0
        assert "No verdicts here yet" in capsys.readouterr().out


def test_the_claims_without_the_book_get_one_sentence(capsys, tmp_path, monkeypatch):
    def missing():
        raise claims.RegistryError("no book/claims.yml")

    monkeypatch.setattr(claims, "find_registry", missing)
    assert cli.main(["claims"]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith("gradlab: the claims are in the book's folder")
    assert err.endswith("name the file with --registry\n")
    assert cli.main(["claims", "--registry", str(tmp_path / "no.yml")]) == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert (
        err
        == f"gradlab: --registry {tmp_path / 'no.yml'} cannot be read: No such file or directory\n"
    )
    (tmp_path / "no.yml").write_text("a: [")
    assert cli.main(["claims", "--registry", str(tmp_path / "no.yml")]) == cli.BAD_INPUT
    assert "cannot be read: " in capsys.readouterr().err


def test_the_module_is_the_command():
    for call in (["--help"], ["train", "--help"], ["--version"]):
        run = subprocess.run(
            [sys.executable, "-m", "gradlab", *call], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert "gradlab" in run.stdout


def test_the_help_shows_no_default_that_means_nothing(capsys):
    _, out, _ = train(capsys, "--help")
    assert "None" not in out
    assert "default: False" not in out
    assert "NUM_EPOCHS" not in out
    assert "DATA" not in out
    assert "(default: 0)" in out  # the seed
    for said in ("--num-epochs N", "no clipping", "blobs for nn", "record: ", "skip: ", "raise: "):
        assert said in " ".join(out.split())
    assert "\n  gradlab train --model-name mlp" in out  # an example, on a line of its own
    for example in re.findall(r"\n  (gradlab train (?:.|\\\n)*)", out):
        assert "--logdir runs/log" in example  # without it a resumption is not in the log


def test_without_a_command_there_is_a_choice(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "{train,claims}" in capsys.readouterr().err
