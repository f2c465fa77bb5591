"""Every snippet of the triage page runs as it is printed, on a step that fails."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

PAGE = Path(__file__).resolve().parent.parent / "book" / "triage.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def torch_patient() -> dict:
    """A network whose loss has a root of 0, and the names that the page takes for granted."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

    def criterion(outputs, targets):
        return torch.sqrt((outputs - outputs.detach()) ** 2 + 0 * targets).sum()

    batch = (torch.ones(6, 4), torch.zeros(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "criterion": criterion, "batch": batch, "optimizer": optimizer,
            "loader": [batch, batch]}  # fmt: skip


def keras_patient() -> dict:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)]
    )

    def criterion(targets, outputs):
        return tf.reduce_sum(tf.sqrt((outputs - tf.stop_gradient(outputs)) ** 2 + 0 * targets))

    model.compile("sgd", criterion)
    x = np.arange(48, dtype="float32").reshape(12, 4)
    data = tf.data.Dataset.from_tensor_slices((x, np.zeros((12, 1), "float32"))).batch(6)
    return {"model": model, "criterion": criterion, "data": data, "batch": next(iter(data))}


@pytest.mark.parametrize(("side", "patient"), [(0, torch_patient), (1, keras_patient)])
def test_the_snippets_of_a_framework(side, patient, capsys):
    ask, watch, by_hand = SNIPPETS[side::2]
    names = patient()
    exec(ask, names)
    assert "Singularity at loss" in capsys.readouterr().out
    if side == 0:
        loop = "optimizer.zero_grad(); loss_fn(model, batch).backward(); optimizer.step()"
        with pytest.raises(FloatingPointError, match="step 0"):
            exec(watch.replace("...  # your loop", loop), names)
    else:
        del names["batch"]
        exec(watch, names)
        assert names["batch"][0].shape == (6, 4)
    if side == 0:
        exec(by_hand, names)
        assert capsys.readouterr().out.splitlines()[-1] == "False"  # not in float64 either
    else:
        with pytest.raises(tf.errors.InvalidArgumentError, match="SqrtGrad"):
            exec(by_hand, names)
        tf.debugging.disable_check_numerics()


def test_the_page_has_each_snippet_twice():
    assert len(SNIPPETS) == 6
    assert all("gradlab.keras" not in text for text in SNIPPETS[::2])
    assert all("gradlab.torch" not in text for text in SNIPPETS[1::2])


def test_the_chart_is_the_one_that_its_script_draws():
    import triage_chart

    assert (PAGE.parent / "assets" / "triage.svg").read_text(encoding="utf-8") == (
        triage_chart.chart()
    )
