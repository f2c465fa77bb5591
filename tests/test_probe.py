"""The probe: what it records is true, and training does not notice it.

The first part runs the same training on both sides; the other two are about what only one has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from torch import nn

import gradlab.keras
import gradlab.torch
from gradlab import backprop
from gradlab.history import GradientHistory, NonFinite
from gradlab.keras.probe import gradient_norms as keras_norms
from gradlab.mlp import MLPSpec, initial_weights
from gradlab.torch.probe import gradient_norms as torch_norms

SPEC = MLPSpec(4, 3, width=6, depth=2, activation="tanh")
NAMES = list(initial_weights(SPEC))
BATCH = 8
MARK = 99.0  # a batch whose first number this is gets NaN into the gradients named in POISONED
POISONED = ("hidden1.weight", "output.bias")


@dataclass
class Run:
    """A finished training."""

    weights: dict[str, np.ndarray]
    state: list[np.ndarray]
    history: GradientHistory | None = None
    error: Exception | None = None
    extra: dict = field(default_factory=dict)


def batches(steps: int, bad: tuple[int, ...] = ()):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps, BATCH, 4)).astype("float32")
    y = rng.integers(3, size=(steps, BATCH))
    x[list(bad), 0, 0] = MARK
    return x, y


def without(data, bad: tuple[int, ...]):
    return tuple(np.delete(array, bad, axis=0) for array in data)


def shared_names(side, names: list[str]) -> list[str]:
    return [n.replace("/", ".").replace("kernel", "weight") for n in names]


def train(side, data, *, probe=None, optimizer="sgd", lr=0.1, scale=1.0, **keywords) -> Run:
    """Train on these batches in order; `probe` holds its arguments, None trains without one."""
    go = train_torch if side is gradlab.torch else train_keras
    return go(data, probe=probe, optimizer=optimizer, lr=lr, scale=scale, **keywords)


def train_torch(data, *, probe, optimizer, lr, scale) -> Run:
    net = gradlab.torch.MLP(SPEC)
    kind, arguments = {
        "sgd": (torch.optim.SGD, {}),
        "momentum": (torch.optim.SGD, {"momentum": 0.9}),
        "adam": (torch.optim.Adam, {}),
    }[optimizer]
    opt = kind(net.parameters(), lr=lr, **arguments)
    run = Run({}, [])
    watch = None if probe is None else gradlab.torch.GradientProbe(net, opt, **probe)

    def loop():
        for x, y in zip(*data, strict=True):
            opt.zero_grad()
            x = torch.from_numpy(x)
            (scale * nn.functional.cross_entropy(net(x), torch.from_numpy(y))).backward()
            if x[0, 0] == MARK:
                for name in POISONED:
                    net.get_parameter(name).grad.fill_(torch.nan)
            opt.step()

    try:
        if watch is None:
            loop()
        else:
            with watch:
                loop()
    except FloatingPointError as error:
        run.error = error
    run.history = watch and watch.history
    run.weights = gradlab.torch.models.get_weights(net)
    run.state = [
        torch.as_tensor(value).numpy()
        for p in net.parameters()
        for value in opt.state.get(p, {}).values()
        if value is not None
    ]
    return run


class PoisonedMLP(gradlab.keras.MLP):
    """With a train_step of its own, as users write them."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        grads = tape.gradient(loss, [v.value for v in self.trainable_variables])
        factor = tf.where(x[0, 0] == MARK, np.float32(np.nan), np.float32(1))
        grads = [
            g * factor if name in POISONED else g for g, name in zip(grads, NAMES, strict=True)
        ]
        self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
        return {"loss": loss}


def scaled_loss(scale: float):
    def loss(y, logits):
        return scale * keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)

    return loss


def compiled(net, optimizer="sgd", lr=0.1, scale=1.0, jit=False, **keywords):
    optimizer = {
        "sgd": lambda: keras.optimizers.SGD(lr),
        "momentum": lambda: keras.optimizers.SGD(lr, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(lr),
    }.get(optimizer, lambda: optimizer)()
    net.compile(optimizer, scaled_loss(scale), jit_compile=jit, **keywords)
    return net


def fit(net, data, *callbacks, **keywords):
    x, y = (array.reshape(-1, *array.shape[2:]) for array in data)
    keywords = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | keywords
    return net.fit(x, y, callbacks=list(callbacks), **keywords)


def train_keras(data, *, probe, optimizer, lr, scale, **keywords) -> Run:
    poisoned = bool((data[0][:, 0, 0] == MARK).any())
    net = compiled((PoisonedMLP if poisoned else gradlab.keras.MLP)(SPEC), optimizer, lr, scale)
    if keywords:
        net = compiled(net, optimizer, lr, scale, **keywords)
    run = Run({}, [])
    watch = [] if probe is None else [gradlab.keras.GradientProbe(**probe)]
    try:
        fit(net, data, *watch)
    except FloatingPointError as error:
        run.error = error
    run.history = watch[0].history if watch else None
    run.weights = gradlab.keras.models.get_weights(net)
    run.state = [v.numpy() for v in net.optimizer.variables]
    return run


def descent(data, lr: float):
    """The same training by gradient descent in NumPy: gradient norms, weights before each step."""
    weights = {n: w.astype("float32").astype(float) for n, w in initial_weights(SPEC).items()}
    norms, before = [], []
    for x, y in zip(*data, strict=True):
        before.append(weights)
        _, grads = backprop.gradients(SPEC, weights, x.astype(float), y)
        norms.append([np.linalg.norm(grads[name]) for name in NAMES])
        weights = {name: w - lr * grads[name] for name, w in weights.items()}
    return np.array(norms), [*before, weights]


def same(one: Run, other: Run) -> None:
    """Bit for bit: weights, and what the optimiser remembers."""
    for name in NAMES:
        np.testing.assert_array_equal(one.weights[name], other.weights[name])
    assert len(one.state) == len(other.state)
    for a, b in zip(one.state, other.state, strict=True):
        np.testing.assert_array_equal(a, b)


# -- on both sides -------------------------------------------------------------------------------


def test_norms_and_update_ratios_are_those_of_an_independent_training(side):
    data, lr = batches(5), 0.1
    history = train(side, data, lr=lr, probe={"update_ratio_every": 2}).history
    norms, weights = descent(data, lr)
    assert shared_names(side, history.names) == NAMES
    np.testing.assert_array_equal(history.steps, range(5))
    np.testing.assert_allclose(history.norms, norms, rtol=2e-5)
    np.testing.assert_allclose(history.total, np.sqrt((norms**2).sum(1)), rtol=2e-5)
    assert history.norms.dtype == np.float64
    assert history.present.all()
    assert not history.skipped.any()
    assert history.first_nonfinite is None
    size = np.array([[np.linalg.norm(w[n]) for n in NAMES] for w in weights[:-1]])
    moved = [[np.linalg.norm(b[n] - a[n]) for n in NAMES] for a, b in pairwise(weights)]
    assert np.isnan(history.update_ratios[[1, 3]]).all()
    assert np.isnan(history.update_ratios[0][size[0] == 0]).all()  # biases that start at 0
    measured = np.isfinite(history.update_ratios)
    np.testing.assert_array_equal(measured[[2, 4]], True)
    np.testing.assert_allclose(
        history.update_ratios[measured], (moved / np.where(size > 0, size, 1))[measured], rtol=1e-3
    )


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_whose_squares_float32_cannot_hold(side, scale):
    data = batches(2)
    history = train(side, data, lr=0.0, scale=scale, probe={"on_nonfinite": "raise"}).history
    np.testing.assert_allclose(history.norms, scale * descent(data, 0.0)[0], rtol=1e-4)
    assert history.first_nonfinite is None


@pytest.mark.parametrize("probe", [{}, {"on_nonfinite": "skip", "update_ratio_every": 2}])
def test_training_does_not_notice_the_probe(side, probe):
    data = batches(4)
    same(
        train(side, data, optimizer="momentum", probe=probe),
        train(side, data, optimizer="momentum"),
    )


def test_a_bad_step_is_recorded_and_left_to_happen(side):
    run = train(side, batches(4, bad=(2,)), probe={})
    assert (run.history.first_nonfinite.step, len(run.history.steps)) == (2, 4)
    assert shared_names(side, [run.history.first_nonfinite.name]) == ["hidden1.weight"]
    bad = np.isnan(run.history.norms)
    assert [NAMES[i] for i in np.flatnonzero(bad[2])] == list(POISONED)
    assert not bad[:2].any()
    assert not run.history.skipped.any()
    assert np.isnan(run.weights["hidden1.weight"]).all()
    assert np.isnan(run.history.total[2])


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_skipped_step_changes_neither_weights_nor_optimiser(side, optimizer):
    bad = (0, 2, 3)  # the very first too: the optimiser has no state yet
    data = batches(6, bad)
    skipping = train(side, data, optimizer=optimizer, probe={"on_nonfinite": "skip"})
    same(skipping, train(side, without(data, bad), optimizer=optimizer))
    assert np.flatnonzero(skipping.history.skipped).tolist() == list(bad)
    assert skipping.history.first_nonfinite.step == 0
    assert len(skipping.state) > 0


def test_raising_names_the_place_and_leaves_the_weights_of_the_step_before(side):
    data = batches(6, bad=(3,))
    run = train(side, data, optimizer="momentum", probe={"on_nonfinite": "raise"})
    assert isinstance(run.error, side.NonFiniteGradientError)
    assert run.error.step == 3
    assert shared_names(side, [run.error.parameter]) == ["hidden1.weight"]
    assert run.error.module.startswith("hidden1")
    for part in ("step 3", run.error.parameter, run.error.module, "step was not taken"):
        assert part in str(run.error)
    same(run, train(side, tuple(a[:3] for a in data), optimizer="momentum"))
    assert run.history.first_nonfinite == NonFinite(3, run.error.parameter)
    assert run.history.skipped.tolist() == [False, False, False, True]


def test_the_ring_keeps_the_last_steps_and_the_first_bad_one(side):
    data = batches(7, bad=(1,))
    history = train(side, data, probe={"on_nonfinite": "skip", "capacity": 3}).history
    np.testing.assert_array_equal(history.steps, [4, 5, 6])
    expected, _ = descent(without(data, (1,)), lr=0.1)
    np.testing.assert_allclose(history.norms, expected[-3:], rtol=1e-4)
    assert not history.skipped.any()
    assert history.first_nonfinite.step == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_nonfinite": "ignore"}, "'record', 'skip', 'raise'.*got 'ignore'"),
        ({"update_ratio_every": -1}, "update_ratio_every must be ≥ 0, got -1"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(side, arguments, message):
    net = nn.Linear(2, 2)
    given = (net, torch.optim.SGD(net.parameters())) if side is gradlab.torch else ()
    with pytest.raises(ValueError, match=message):
        side.GradientProbe(*given, **arguments)


@pytest.mark.parametrize("norms", [torch_norms, keras_norms], ids=["torch", "keras"])
def test_norms_of_odd_gradients(norms):
    tensor = torch.tensor if norms is torch_norms else tf.constant
    values = [
        [3.0, 4.0],
        [0.0, 0.0],
        [[1.0, np.nan]],
        [np.inf, 1.0],
        [-np.inf],
        [np.nan, np.inf],
        2.0,
        [1e-20, 1e-22],
        [3e-23, 3e-23],
        [3e38, 3e38],
    ]
    got = np.asarray(norms([tensor(np.array(v, "float32")) for v in values]))
    expected = [np.linalg.norm(np.array(v, "float32").astype(float)) for v in values]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    double = np.asarray(norms([tensor(np.array(v)) for v in ([3e200, 4e200], [3e-200, 4e-200])]))
    np.testing.assert_allclose(double, [5e200, 5e-200], rtol=1e-12)
    half = np.asarray(norms([tensor(np.array([6e4, 6e4], "float16")), tensor(np.float16(0.3))]))
    np.testing.assert_allclose(half, [6e4 * np.sqrt(2), np.float16(0.3)], rtol=1e-3)
    assert np.asarray(norms([])).shape == (0,)


# -- PyTorch -------------------------------------------------------------------------------------


def watched(net, *, lr=0.1, optimizer=None, **arguments):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=lr)
    return gradlab.torch.GradientProbe(net, optimizer, **arguments)


def test_torch_parameters_without_gradient_frozen_shared_and_unused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.unused = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
            self.one = nn.Linear(3, 3, bias=False)
            self.tied = nn.Linear(3, 3, bias=False)
            self.tied.weight = self.one.weight
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.tied(self.one(self.frozen(x)))

    net = Net()
    with watched(net, on_nonfinite="raise") as probe:
        net(torch.ones(2, 3)).sum().backward()
        expected = net.one.weight.grad.norm().item()
        probe.optimizer.step()
    history = probe.history
    assert history.names == ["frozen.weight", "frozen.bias", "unused.weight", "one.weight"]
    assert history.present.tolist() == [[False, False, False, True]]
    assert np.isnan(history.norms[0, :3]).all()
    assert history.norms[0, 3] == pytest.approx(expected, rel=1e-6)
    assert history.total[0] == history.norms[0, 3]
    assert history.first_nonfinite is None


def test_torch_step_without_any_gradient():
    net = nn.Linear(2, 2)
    with watched(net, on_nonfinite="raise") as probe:
        probe.optimizer.step()
        assert probe.clip_(1.0) == 0
    assert probe.history.total.tolist() == [0]


def test_torch_several_groups_and_a_loss_with_parameters_of_its_own():
    net, margin = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.0))
    groups = [{"params": [net.weight], "lr": 0.1}, {"params": [net.bias, margin], "lr": 1.0}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    before = [p.detach().clone() for p in (net.weight, net.bias, margin)]
    with watched(net, optimizer=optimizer, on_nonfinite="skip") as probe:
        (net(torch.ones(4, 3)).sum() * margin).backward()
        net.bias.grad[0] = torch.inf
        grads = [p.grad for p in (net.weight, net.bias, margin)]
        optimizer.step()
        assert net.weight.grad is grads[0]  # given back at once, not only when the block ends
    assert probe.history.norms[0, 0] == pytest.approx(grads[0].norm().item(), rel=1e-6)
    assert probe.history.norms[0, 1] == np.inf
    for parameter, value, grad in zip((net.weight, net.bias, margin), before, grads, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is grad
    assert not optimizer.state


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_torch_clip_equals_torchs_own(max_norm):
    def one_step(clip):
        net = gradlab.torch.MLP(SPEC)
        x, y = batches(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        with watched(net, optimizer=optimizer) as probe:
            nn.functional.cross_entropy(net(torch.tensor(x[0])), torch.tensor(y[0])).backward()
            total = clip(probe, net)
            optimizer.step()
        return float(total), gradlab.torch.models.get_weights(net), probe.history

    total, weights, history = one_step(lambda probe, net: probe.clip_(max_norm))
    expected, reference, seen = one_step(
        lambda probe, net: nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    )
    assert total == pytest.approx(expected, rel=1e-5)
    for name in NAMES:
        np.testing.assert_allclose(weights[name], reference[name], rtol=1e-5, atol=1e-9)
    # Ours records the norm from before; a probe behind torch's own sees only what is left.
    assert history.total[0] == pytest.approx(total, rel=1e-6)
    assert history.clipped_total[0] == pytest.approx(min(total, max_norm), rel=1e-6)
    assert seen.total[0] == pytest.approx(min(total, max_norm), rel=1e-3)


def test_torch_clip_of_gradients_whose_norm_overflows():
    net = nn.Linear(2, 1, bias=False)
    with watched(net, lr=1.0, on_nonfinite="raise") as probe:
        net.weight.grad = torch.tensor([[3e30, 4e30]])
        assert probe.clip_(1.0) == pytest.approx(5e30)
        np.testing.assert_allclose(net.weight.grad, [[0.6, 0.8]], rtol=1e-6)
        probe.optimizer.step()
    assert probe.history.total[0] == pytest.approx(5e30)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_torch_clip_leaves_bad_gradients_alone_and_the_step_to_the_probe(bad):
    net = nn.Linear(2, 2)
    before = net.weight.detach().clone()
    with watched(net, on_nonfinite="skip") as probe:
        net.weight.grad = torch.full((2, 2), 3.0)
        net.bias.grad = torch.tensor([bad, 1.0])
        assert not np.isfinite(probe.clip_(1.0))
        assert torch.equal(net.weight.grad, torch.full((2, 2), 3.0))
        probe.optimizer.step()
    assert torch.equal(net.weight, before)
    assert probe.history.skipped.tolist() == [True]
    assert probe.history.norms[0, 0] == pytest.approx(6.0)


def test_torch_clip_belongs_to_its_own_step_only():
    net = nn.Linear(2, 1, bias=False)
    with watched(net, lr=0.0) as probe:
        for clip in (True, False):
            net.weight.grad = torch.tensor([[3.0, 4.0]])
            if clip:
                probe.clip_(1.0)
            probe.optimizer.step()
    np.testing.assert_allclose(probe.history.total, [5, 5], rtol=1e-6)
    np.testing.assert_allclose(probe.history.clipped_total, [1, 5], rtol=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, np.nan])
def test_torch_clip_names_a_bad_threshold(max_norm):
    with pytest.raises(ValueError, match=f"max_norm must be > 0, got {max_norm}"):
        watched(nn.Linear(2, 2)).clip_(max_norm)


def test_torch_sparse_gradients_are_measured_and_clipped():
    nets = [nn.Embedding(6, 3, sparse=sparse) for sparse in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    histories = []
    for net in nets:
        with watched(net, lr=1.0) as probe:
            for max_norm in (None, 0.5):
                probe.optimizer.zero_grad()
                net(torch.tensor([1, 1, 4])).square().sum().backward()  # row 1 occurs twice
                if max_norm:
                    probe.clip_(max_norm)
                probe.optimizer.step()
        histories.append(probe.history)
    np.testing.assert_allclose(histories[0].norms, histories[1].norms, rtol=1e-6)
    assert histories[0].total[1] > 0.5
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


def test_torch_probe_leaves_no_hook_behind():
    net = gradlab.torch.MLP(SPEC)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def hooks():
        modules = sum(len(m._forward_hooks) for m in net.modules())
        return modules, len(optimizer._optimizer_step_pre_hooks) + len(
            optimizer._optimizer_step_post_hooks
        )

    probe = watched(net, optimizer=optimizer, activations=True)
    with probe:
        assert hooks() == (3, 2)
    assert hooks() == (0, 0)
    with pytest.raises(KeyError), probe:
        raise KeyError
    assert hooks() == (0, 0)
    optimizer.step()
    assert len(probe.history.steps) == 0


def test_torch_probe_attaches_once_at_a_time_but_as_often_as_one_likes():
    net = nn.Linear(2, 2)
    probe = watched(net)
    with probe:
        probe.optimizer.step()
        with pytest.raises(RuntimeError, match="already attached"), probe:
            pass
        probe.optimizer.step()  # still attached
    with probe:
        probe.optimizer.step()
    assert probe.history.steps.tolist() == [0, 1, 2]


def test_torch_a_step_that_raises_loses_no_gradient():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise OSError("the machine is on fire")

    net = nn.Linear(2, 2)
    net.weight.grad = torch.full((2, 2), torch.nan)
    grad = net.weight.grad
    broken = Broken(net.parameters(), lr=0.1)
    with (
        pytest.raises(OSError, match="on fire"),
        watched(net, optimizer=broken, on_nonfinite="skip"),
    ):
        broken.step()
    assert net.weight.grad is grad


def test_torch_activations_are_the_largest_outputs():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Sequential(nn.Linear(2, 1)))
    net[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, -5.0]])
    net[2][0].weight.data, net[2][0].bias.data = torch.tensor([[2.0, 0.0]]), torch.tensor([0.5])
    with watched(net, lr=0.0, activations=True) as probe:
        for x in ([[1.0, 1.0]], [[3.0, 0.0], [0.0, np.nan]]):
            net(torch.tensor(x))
            probe.optimizer.step()
    assert probe.history.activation_names == ["0", "1", "2.0"]
    np.testing.assert_array_equal(probe.history.activations, [[5, 1, 2.5], [np.nan] * 3])


def test_torch_history_is_saved(tmp_path):
    net = nn.Linear(2, 2)
    with watched(net) as probe:
        net(torch.ones(1, 2)).sum().backward()
        probe.optimizer.step()
    loaded = GradientHistory.load(probe.save(tmp_path / "run.npz"))
    np.testing.assert_array_equal(loaded.norms, probe.history.norms)


def test_torch_bad_gradient_of_a_module_that_is_the_model_itself():
    net = nn.Linear(2, 2)
    net.weight.grad = torch.full((2, 2), torch.inf)
    with (
        pytest.raises(FloatingPointError, match=r"gradient of weight .*model: Linear"),
        watched(net, on_nonfinite="raise") as probe,
    ):
        probe.optimizer.step()


# -- Keras ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{"jit": True}, {"run_eagerly": True}])
def test_keras_records_the_same_in_every_mode(mode):
    data, bad = batches(4, bad=(1,)), (1,)
    probe = {"on_nonfinite": "skip", "update_ratio_every": 2}
    scale = 1e-25  # so that norms take their second, exact way too
    run = train(
        gradlab.keras, data, probe=probe, optimizer="momentum", lr=0.1 / scale, scale=scale, **mode
    )
    reference = train(gradlab.keras, without(data, bad), optimizer="momentum")
    for name in NAMES:
        np.testing.assert_allclose(run.weights[name], reference.weights[name], rtol=1e-3, atol=1e-5)
    assert run.history.skipped.tolist() == [False, True, False, False]
    assert run.history.first_nonfinite == NonFinite(1, run.history.names[2])
    first = descent(data, 0.0)[0][0] * scale
    np.testing.assert_allclose(run.history.norms[0], first, rtol=1e-4)
    assert np.isfinite(run.history.update_ratios).all(1).tolist() == [False, False, True, False]


def test_keras_fit_leaves_the_optimiser_as_it_was_and_a_second_fit_goes_on():
    net, probe = compiled(gradlab.keras.MLP(SPEC)), gradlab.keras.GradientProbe()
    fit(net, batches(3), probe)
    assert "apply" not in vars(net.optimizer)
    fit(net, batches(2))  # without it
    assert len(probe.history.steps) == 3
    fit(net, batches(2), probe, epochs=2)
    assert probe.history.steps.tolist() == list(range(7))
    assert "apply" not in vars(net.optimizer)


class Interrupted(keras.callbacks.Callback):
    """Ends a fit as a user's Ctrl-C does."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise KeyboardInterrupt


def test_keras_probe_works_again_after_a_fit_that_was_interrupted():
    net, probe = compiled(gradlab.keras.MLP(SPEC)), gradlab.keras.GradientProbe()
    with pytest.raises(KeyboardInterrupt):
        fit(net, batches(4), probe, Interrupted())
    assert probe.history.steps.tolist() == [0, 1]
    fit(net, batches(3), probe)
    assert probe.history.steps.tolist() == list(range(5))  # each step once
    assert "apply" not in vars(net.optimizer)


def test_keras_optimiser_is_free_again_after_the_probe_raised():
    net = compiled(PoisonedMLP(SPEC))
    probe = gradlab.keras.GradientProbe(on_nonfinite="raise")
    with pytest.raises(gradlab.keras.NonFiniteGradientError, match="step 1"):
        fit(net, batches(3, bad=(1,)), probe)
    assert "apply" not in vars(net.optimizer)
    fit(net, batches(2), probe)  # the old failure does not end a healthy fit
    assert probe.history.steps.tolist() == [0, 1, 2, 3]
    with pytest.raises(gradlab.keras.NonFiniteGradientError, match="step 5"):
        fit(net, batches(3, bad=(1,)), probe)
    assert probe.history.first_nonfinite.step == 1


def test_keras_raises_with_the_weights_of_the_step_before_under_steps_per_execution():
    data = batches(4, bad=(1,))
    net = compiled(PoisonedMLP(SPEC), steps_per_execution=4)
    with pytest.raises(gradlab.keras.NonFiniteGradientError, match="step 1"):
        fit(net, data, gradlab.keras.GradientProbe(on_nonfinite="raise"))
    expected = train(gradlab.keras, tuple(a[:1] for a in data)).weights
    for name, value in gradlab.keras.models.get_weights(net).items():
        np.testing.assert_array_equal(value, expected[name])


def test_keras_sees_gradients_before_the_optimisers_own_clipping():
    data, lr, limit = batches(3), 0.5, 1e-3
    net, probe = compiled(gradlab.keras.MLP(SPEC)), gradlab.keras.GradientProbe()
    net = compiled(net, keras.optimizers.SGD(lr, global_clipnorm=limit))
    before = gradlab.keras.models.get_weights(net)
    fit(net, tuple(a[:1] for a in data), probe)
    moved = [
        np.linalg.norm(w - before[n]) for n, w in gradlab.keras.models.get_weights(net).items()
    ]
    assert np.linalg.norm(moved) == pytest.approx(lr * limit, rel=1e-3)
    np.testing.assert_allclose(probe.history.norms, descent(data, 0.0)[0][:1], rtol=1e-4)


def test_keras_sparse_gradients_are_summed_over_repeated_rows():
    tokens = np.array([[1, 1, 4], [4, 2, 1]])
    embed = keras.layers.Embedding(6, 3)
    net = keras.Sequential([embed, keras.layers.Flatten(), keras.layers.Dense(1)])
    probe = gradlab.keras.GradientProbe()
    net.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=True)  # the harder way
    net.fit(tokens, np.ones((2, 1)), batch_size=2, verbose=0, callbacks=[probe])
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((net(tokens) - 1) ** 2)
    grads = tape.gradient(loss, [v.value for v in net.trainable_variables])
    assert isinstance(grads[0], tf.IndexedSlices)
    expected = [tf.norm(tf.convert_to_tensor(g)) for g in grads]
    np.testing.assert_allclose(probe.history.norms[0], expected, rtol=1e-5)


def test_keras_frozen_shared_and_unused_variables():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.frozen, self.twice = keras.layers.Dense(3), keras.layers.Dense(3, use_bias=False)
            self.unused = keras.layers.Dense(3, use_bias=False)
            self.frozen.trainable = False

        def build(self, shape):
            for layer in (self.frozen, self.twice, self.unused):
                layer.build((None, 3))

        def call(self, x):
            return self.twice(self.twice(self.frozen(x)))

    net, probe = Net(), gradlab.keras.GradientProbe(on_nonfinite="raise")
    net.compile(keras.optimizers.SGD(0.0), "mse")
    with pytest.warns(UserWarning, match="Gradients do not exist"):  # Keras's own
        net.fit(np.ones((4, 3)), np.ones((4, 3)), verbose=0, callbacks=[probe])
    assert len(probe.history.names) == 2
    assert probe.history.present.tolist() == [[True, False]]
    assert probe.history.norms[0, 0] == probe.history.total[0] > 0
    assert np.isnan(probe.history.norms[0, 1])


def test_keras_layers_of_one_name_are_kept_apart():
    class Pair(keras.Model):
        def __init__(self):
            super().__init__()
            self.one = gradlab.keras.MLP(replace(SPEC, depth=0))
            self.two = gradlab.keras.MLP(replace(SPEC, depth=0))
            self.built = True

        def call(self, x):
            return self.one(x) + 1e3 * self.two(x)

    probe = gradlab.keras.GradientProbe()
    fit(compiled(Pair(), lr=0.0), batches(1), probe)
    assert probe.history.present.all()
    norms = probe.history.norms[0]
    np.testing.assert_allclose(norms[2:] / norms[:2], 1e3, rtol=1e-3)


def test_keras_two_probes_on_one_fit(tmp_path):
    net, probes = compiled(gradlab.keras.MLP(SPEC)), [gradlab.keras.GradientProbe() for _ in "ab"]
    fit(net, batches(2), *probes)
    assert "apply" not in vars(net.optimizer)
    np.testing.assert_array_equal(probes[0].history.norms, probes[1].history.norms)
    loaded = GradientHistory.load(probes[0].save(tmp_path / "run.npz"))
    np.testing.assert_array_equal(loaded.norms, probes[1].history.norms)
    assert loaded.norms.shape == (2, len(NAMES))


def test_keras_a_model_that_is_built_by_fit():
    net, probe = keras.Sequential([keras.layers.Dense(3)]), gradlab.keras.GradientProbe()
    fit(compiled(net), batches(2), probe)
    assert probe.history.norms.shape == (2, 2)
    assert probe.history.present.all()


def test_keras_evaluation_is_not_watched():
    net, probe = compiled(gradlab.keras.MLP(SPEC)), gradlab.keras.GradientProbe()
    x, y = (a[0] for a in batches(1))
    net.evaluate(x, y, verbose=0, callbacks=[probe])
    assert "apply" not in vars(net.optimizer)
    with pytest.raises(RuntimeError, match="nothing recorded yet"):
        _ = probe.history
