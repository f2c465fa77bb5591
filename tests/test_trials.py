"""A case trained side by side is the case trained alone, with its settings written out by hand."""

import importlib

import numpy as np
import pytest

from gradlab import trials
from gradlab.sweep import Update, minibatches

SIDES = {"torch": "gradlab.torch.sweep", "keras": "gradlab.keras.sweep"}
STEPS, NETWORKS, LAYERS, RATE = 6, 2, 3, 0.2
HELD_OUT = slice(80, 120)

#: What each remedy is, for one network: arguments of `sweep.train`, and a factor of the gain.
BY_HAND = {
    "nothing": {},
    "rate ÷ 10": {"lr": RATE / 10},
    "rate ÷ 100": {"lr": RATE / 100},
    "warm-up": {"update": Update(schedule=[1 / 3, 2 / 3, 1, 1, 1, 1])},
    "momentum 0.9": {"update": Update("momentum", momentum=0.9)},
    "Adam at 0.001": {"lr": 0.001, "update": Update("adam", momentum=0.9, beta2=0.999)},
    "L2 penalty 0.1": {"update": Update(l2=0.1)},
    "clip norm to 1": {"update": Update(clip="norm", threshold=1.0)},
    "dropout 0.5": {"dropout": 0.5},
    "leak 0.3": {"slope": 0.3},
    "critical start": {},
    "layer norm": {"normalization": "layer"},
    "batch norm": {"normalization": "batch"},
    "scaled skips": {"skip": LAYERS**-0.5},
    "wider format": {},
}
TREATED = {name: trials.REMEDIES[name] for name in BY_HAND}


@pytest.fixture(params=SIDES)
def train(request):
    pytest.importorskip({"torch": "torch", "keras": "tensorflow"}[request.param])
    return importlib.import_module(SIDES[request.param]).train


def task(seed=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((120, 6)), rng.integers(4, size=120)


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(6, 8), (8, 8), (8, 4)]
    return [(rng.standard_normal((NETWORKS, *s)) * np.sqrt(2 / s[0])) for s in shapes]


def treat(train, patients, remedies=TREATED, rows=None):
    x, y = task()
    return trials.treat(
        train, patients, remedies, x[:80], y[:80],
        rows=minibatches(80, NETWORKS, STEPS, 5, 7) if rows is None else rows,
        x_test=x[HELD_OUT], y_test=y[HELD_OUT], seed=1,
    )  # fmt: skip


def test_side_by_side_equals_alone(train):
    x, y = task()
    sick = trials.Patient(weights(), gain=1.5, rate=RATE)
    well = trials.Patient(weights(1), gain=1.0, rate=RATE / 2)
    found = treat(train, {"sick": sick, "well": well})
    assert {patient: list(cases) for patient, cases in found.items()} == {
        "sick": list(TREATED), "well": list(TREATED),
    }  # fmt: skip
    rows = minibatches(80, NETWORKS, STEPS, 5, 7)
    for remedy, by_hand in BY_HAND.items():
        gain = 1.0 if remedy == "critical start" else 1.5
        dtype = "float64" if remedy == "wider format" else "float32"
        for network in range(NETWORKS):
            alone = train(
                [(gain * w[network : network + 1]).astype(dtype) for w in weights()], x[:80],
                y[:80], **{"lr": RATE, "slope": 0.0, "activation": "leaky_relu"} | by_hand,
                rows=rows[:, network : network + 1], seed=1, x_test=x[HELD_OUT],
                y_test=y[HELD_OUT],
            )  # fmt: skip
            trial = found["sick"][remedy]
            np.testing.assert_allclose(
                trial.grad_norm[:, network], alone.grad_norm[:, 0], rtol=1e-3, err_msg=remedy
            )
            assert trial.accuracy[network] == pytest.approx(alone.accuracy[0], abs=0.03)


def test_every_remedy_does_something(train):
    found = treat(train, {"sick": trials.Patient(weights(), gain=1.5, rate=RATE)})["sick"]
    last = {remedy: trial.grad_norm[-1] for remedy, trial in found.items()}
    for remedy in last.keys() - {"nothing", "wider format"}:
        assert not np.allclose(last[remedy], last["nothing"], rtol=1e-3), remedy


def test_the_second_patient_has_its_own_gain_and_rate(train):
    one = trials.Patient(weights(), gain=1.5, rate=RATE)
    two = trials.Patient(weights(), gain=1.0, rate=RATE)
    remedies = {name: TREATED[name] for name in ("nothing", "critical start")}
    found = treat(train, {"one": one, "two": two}, remedies)
    for patient in ("one", "two"):  # one's critical start is two as it is
        np.testing.assert_allclose(
            found[patient]["critical start"].grad_norm, found["two"]["nothing"].grad_norm, rtol=1e-4
        )
    assert not np.allclose(found["one"]["nothing"].grad_norm, found["two"]["nothing"].grad_norm)


def test_a_patient_may_have_its_own_minibatches(train):
    same = trials.Patient(weights(), gain=1.5, rate=RATE)
    few, all_ = (minibatches(n, NETWORKS, STEPS, 5, 7) for n in (10, 80))
    remedies = {name: TREATED[name] for name in ("nothing", "layer norm", "clip norm to 1")}
    both = treat(train, {"few": same, "all": same}, remedies, rows={"few": few, "all": all_})
    for patient, rows in (("few", few), ("all", all_)):
        alone = treat(train, {patient: same}, remedies, rows=rows)[patient]
        for remedy, trial in alone.items():
            np.testing.assert_allclose(
                both[patient][remedy].grad_norm, trial.grad_norm, rtol=1e-4, err_msg=remedy
            )
    assert not np.allclose(both["few"]["nothing"].grad_norm, both["all"]["nothing"].grad_norm)


def test_the_groups_are_apart():
    sizes = [len(g) for g in (trials.TRAINING, trials.MODEL, trials.ARITHMETIC)]
    assert len(trials.REMEDIES) == 1 + sum(sizes)


def test_what_cannot_be_trained_together_says_so():
    with pytest.raises(ValueError, match="Adam and gradient descent"):
        trials.how([{"adam": 0.001}, {}], 0.1, np.zeros((1, 1, 1), int))
    deep, shallow = trials.Patient(weights()), trials.Patient(weights()[:1])
    with pytest.raises(ValueError, match="same shapes and activation, got 2 kinds"):
        treat(None, {"deep": deep, "shallow": shallow})
    with pytest.raises(ValueError, match=r"has no \['safe'\]; a remedy may set \['adam'"):
        treat(None, {"deep": deep}, {"safe root": trials.REMEDIES["safe root"]})
