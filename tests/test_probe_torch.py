"""The PyTorch probe in the loops people really write: closures, loss scaling, wrappers, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradlab.torch
from gradlab.history import GradientHistory, NonFinite
from gradlab.torch import GradientProbe, NonFiniteGradientError
from gradlab.torch.probe import gradient_norms
from writer import Writer


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def data(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)


def loss_of(net: nn.Module, seed: int = 0) -> torch.Tensor:
    x, y = data(seed)
    return nn.functional.mse_loss(net(x), y)


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_same(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def grad_norms(net: nn.Module) -> list[float]:
    return [float(p.grad.double().norm()) for p in net.parameters()]


# -- step(closure) -------------------------------------------------------------------------------


def lbfgs(net):
    return torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=4)


def adam(net):
    return torch.optim.Adam(net.parameters(), lr=0.1)


def train_with_closure(make, probe=None, bad=(), keyword=False, steps=4):
    """Train, poisoning the evaluations whose running number is in `bad`."""
    net = small()
    optimizer = make(net)
    seen, rows = [], []
    watch = None if probe is None else GradientProbe(net, optimizer, **probe)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        if len(seen) in bad:
            net[2].weight.grad.fill_(torch.nan)
        seen.append(grad_norms(net))
        return loss

    def loop():
        for _ in range(steps):
            optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            rows.append(seen[-1])

    if watch is None:
        loop()
    else:
        with watch:
            loop()
    return net, watch, rows, seen


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("make", [lbfgs, adam])
def test_a_closure_gives_one_row_of_its_last_evaluation(make, keyword):
    probe = {"update_ratio_every": 2, "on_nonfinite": "skip"}
    net, watch, rows, seen = train_with_closure(make, probe, keyword=keyword)
    plain, *_ = train_with_closure(make)
    assert_same(weights(net), weights(plain))
    assert len(seen) > 4 if make is lbfgs else len(seen) == 4
    np.testing.assert_allclose(watch.history.norms, rows, rtol=1e-5)
    assert np.isfinite(watch.history.update_ratios).all(1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("make", [lbfgs, adam])
def test_a_bad_evaluation_undoes_its_whole_step(make):
    bad = 2 if make is adam else 6  # for L-BFGS in the middle of the second step
    net, watch, *_ = train_with_closure(make, {"on_nonfinite": "skip"}, bad=[bad])
    step = watch.history.first_nonfinite.step
    assert np.flatnonzero(watch.history.skipped).tolist() == [step]
    assert watch.history.first_nonfinite == NonFinite(2 if make is adam else 1, "2.weight")
    # The weights are those of a training that never took that step.
    assert_same(weights(net), weights(train_with_closure(make, steps=3)[0]))


def test_a_bad_evaluation_raises_with_the_weights_of_the_step_before():
    net = small()
    optimizer = lbfgs(net)
    count = 0

    def closure():
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        if count == 7:
            net[0].bias.grad[1] = torch.inf
        return loss

    with GradientProbe(net, optimizer, on_nonfinite="raise") as probe:
        optimizer.step(closure)
        before = weights(net)
        with pytest.raises(NonFiniteGradientError, match=r"step 1: .*0\.bias .*0: Linear"):
            optimizer.step(closure)
    assert_same(weights(net), before)
    assert probe.history.skipped.tolist() == [False, True]


def test_a_bad_evaluation_is_recorded_even_if_a_good_one_follows():
    _, watch, *_ = train_with_closure(lbfgs, {}, bad=[0], steps=1)
    assert watch.history.first_nonfinite == NonFinite(0, "2.weight")
    assert not watch.history.skipped.any()


# -- GradScaler ----------------------------------------------------------------------------------


def train_scaled(clip=None, *, watched=True, tell=True, fused=False, **probe):
    """Six steps; the first scale is too large for float32, the second is not."""
    net = small()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    probe = GradientProbe(net, optimizer, scaler=scaler if tell else None, **probe)
    norms = []

    def loop():
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(1e3 * loss_of(net, step)).backward()
            reference = small()
            reference.load_state_dict(net.state_dict())
            (1e3 * loss_of(reference, step)).backward()
            norms.append(grad_norms(reference))
            if clip == "torch":
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            elif clip == "unscale, probe":
                scaler.unscale_(optimizer)
                probe.clip_(1.0)
            elif clip == "probe":
                probe.clip_(1.0)
            scaler.step(optimizer)
            scaler.update()

    if watched:
        with probe:
            loop()
    else:
        loop()
    assert "step" not in vars(scaler)
    return net, probe.history, np.array(norms), scaler


@pytest.mark.parametrize("mode", ["record", "skip", "raise"])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_leaves_out_are_recorded_as_skipped(fused, mode):
    net, history, norms, scaler = train_scaled(fused=fused, on_nonfinite=mode)
    assert history.skipped.tolist() == [True] + [False] * 5
    assert history.first_nonfinite.step == 0
    assert not np.isfinite(history.total[0])
    # Norms are those of the loss, without the scale.
    np.testing.assert_allclose(history.norms[1:], norms[1:], rtol=1e-4)
    plain, *_, plain_scaler = train_scaled(watched=False, fused=fused)
    assert_same(weights(net), weights(plain))
    assert scaler.get_scale() == plain_scaler.get_scale() == 2.0**27
    assert "divided by the loss scale" in history.seen


def test_without_being_told_of_the_scaler_the_probe_sees_the_steps_that_are_taken():
    _, history, norms, _ = train_scaled(tell=False, on_nonfinite="raise")
    np.testing.assert_allclose(history.norms, norms[1:], rtol=1e-4)


def test_a_scaler_that_is_off_changes_nothing():
    net, scaler = small(), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = adam(net)
    with GradientProbe(net, optimizer, scaler=scaler) as probe:
        scaler.scale(loss_of(net)).backward()
        norm = float(np.linalg.norm(grad_norms(net)))
        assert probe.clip_(1e-3) == pytest.approx(norm)
        scaler.step(optimizer)
        scaler.update()
    assert probe.history.total == pytest.approx([norm])
    assert not probe.history.skipped.any()


@pytest.mark.parametrize("clip", ["unscale, probe", "probe"])
@pytest.mark.parametrize("fused", [False, True])
def test_clip_under_a_scaler_is_torchs_own_recipe(clip, fused):
    net, history, norms, _ = train_scaled(clip, fused=fused)
    reference, seen, *_ = train_scaled("torch", fused=fused)
    for a, b in zip(weights(net), weights(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(history.norms[1:], norms[1:], rtol=1e-4)
    np.testing.assert_allclose(history.clipped_total[1:], 1.0)
    assert history.skipped.tolist() == seen.skipped.tolist() == [True] + [False] * 5
    np.testing.assert_allclose(seen.total[1:], 1.0, rtol=1e-4)
    assert history.seen.startswith("gradients before the probe's clip_")
    assert "after any clipping by the loop" in seen.seen


def test_two_probes_share_a_scaler():
    net, scaler = small(), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = adam(net)
    with (
        GradientProbe(net, optimizer, scaler=scaler) as one,
        GradientProbe(net, optimizer, scaler=scaler) as two,
    ):
        scaler.scale(1e3 * loss_of(net)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert one.history.skipped.tolist() == two.history.skipped.tolist() == [True]
    assert "step" not in vars(scaler)


# -- models and gradients of other kinds ---------------------------------------------------------


def test_names_are_those_of_the_users_own_modules():
    plain = list(dict(small().named_parameters()))
    part = small()
    part[2] = torch.compile(part[2], backend="eager")
    for net in (torch.compile(small(), backend="eager"), part):
        optimizer = adam(net)
        with GradientProbe(net, optimizer, activations=True) as probe:
            loss_of(net).backward()
            expected = grad_norms(net)
            optimizer.step()
        assert probe.history.names == plain
        assert probe.history.activation_names == ["0", "1", "2"]
        np.testing.assert_allclose(probe.history.norms[0], expected, rtol=1e-5)
        net.get_parameter(list(dict(net.named_parameters()))[2]).grad.fill_(torch.nan)
        with (
            pytest.raises(NonFiniteGradientError, match=r"of 2\.weight \(module 2: Linear"),
            GradientProbe(net, optimizer, on_nonfinite="raise"),
        ):
            optimizer.step()


def test_a_module_of_the_users_called_module_keeps_its_name():
    net = nn.Sequential()
    net.module = nn.Linear(1, 1)
    assert GradientProbe(net, adam(net)).history.names == ["module.weight", "module.bias"]


def test_data_parallel_models_have_clean_names(tmp_path):
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch without gloo")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(small())
        optimizer = adam(net)
        with GradientProbe(net, optimizer, activations=True) as probe:
            loss_of(net).backward()
            expected = grad_norms(net)
            probe.clip_(1e-3)
            optimizer.step()
    finally:
        dist.destroy_process_group()
    assert probe.history.names == list(dict(small().named_parameters()))
    np.testing.assert_allclose(probe.history.norms[0], expected, rtol=1e-5)
    assert np.isfinite(probe.history.activations).all()


def test_sharded_gradients_are_measured_whole(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        net = nn.Linear(3, 2, bias=False)
        value = distribute_tensor(net.weight.detach(), mesh, [Shard(0)])
        net.weight = nn.Parameter(value)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for first in (3.0, torch.nan):
            gradient = torch.tensor([[first, 4, 0], [0, 0, 12]])
            net.weight.grad = distribute_tensor(gradient, mesh, [Shard(0)])
            with GradientProbe(net, optimizer, on_nonfinite="skip") as probe:
                probe.clip_(1.0)
                optimizer.step()
            assert isinstance(net.weight, DTensor)
            assert probe.history.total[0] == pytest.approx(
                13 if first == 3 else np.nan, nan_ok=True
            )
    finally:
        dist.destroy_process_group()


def test_half_complex_and_double_gradients():
    values = [
        torch.full((4,), 5e4, dtype=torch.float16),
        torch.full((4,), 3e38, dtype=torch.bfloat16),
        torch.tensor([3 + 4j, 0]),
        torch.tensor([3e30 + 4e30j], dtype=torch.complex128),
        torch.tensor([complex(0, np.nan)]),
        torch.zeros(0),
        torch.tensor(1e-300, dtype=torch.float64),
    ]
    expected = [1e5, 2 * float(values[1][0]), 5, 5e30, np.nan, 0, 1e-300]
    expected[0] = 2 * float(values[0][0])
    np.testing.assert_allclose(gradient_norms(values), expected, rtol=1e-6)


def test_a_complex_parameter_is_trained_and_clipped():
    net = nn.Module()
    net.w = nn.Parameter(torch.tensor([3 + 4j]))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with GradientProbe(net, optimizer, update_ratio_every=1) as probe:
        net.w.grad = torch.tensor([6 - 8j])
        assert probe.clip_(1.0) == pytest.approx(10)
        optimizer.step()
    assert net.w.detach().numpy() == pytest.approx(3 + 4j - (0.6 - 0.8j))
    assert probe.history.update_ratios == pytest.approx(0.2)


def test_a_large_gradient_keeps_its_digits():
    gradient = torch.full((3, (1 << 22) + 5), 0.1)
    exact = float(np.float32(0.1)) * np.sqrt(gradient.numel())
    norms = gradient_norms([torch.ones(4), gradient, torch.ones(9)])
    np.testing.assert_allclose(norms, [2, exact, 3], rtol=2e-5)
    gradient[1, -1] = torch.nan
    assert np.isnan(gradient_norms([gradient])).all()
    norms = gradient_norms([gradient.fill_(1e25)])
    np.testing.assert_allclose(norms, 1e25 * np.sqrt(gradient.numel()), rtol=1e-5)


def test_accumulated_gradients_are_seen_as_their_sum():
    net = small()
    optimizer = adam(net)
    with GradientProbe(net, optimizer) as probe:
        for seed in range(3):
            loss_of(net, seed).backward()
        optimizer.step()
    total = small()
    sum(loss_of(total, seed) for seed in range(3)).backward()
    np.testing.assert_allclose(probe.history.norms, [grad_norms(total)], rtol=1e-5)


def test_a_scheduler_and_the_probe_get_along():
    net = small()
    optimizer = adam(net)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings(), GradientProbe(net, optimizer) as probe:
        warnings.simplefilter("error")
        for _ in range(2):
            loss_of(net).backward()
            optimizer.step()
            scheduler.step()
    assert len(probe.history.steps) == 2


# -- activations ---------------------------------------------------------------------------------


def test_activations_are_those_of_training_since_the_step_before():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.scale = nn.LSTM(2, 3), nn.Linear(1, 1, bias=False)
            self.never, self.ints = nn.Linear(1, 1), nn.Module()
            self.ints.forward = lambda: torch.ones(2, dtype=torch.long)
            self.scale.weight.data.fill_(-2.0)

        def forward(self, x):
            self.ints()
            return self.scale(x)

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with GradientProbe(net, optimizer, activations=True) as probe:
        for x in ([1.0, 3.0], [2.0]):  # two batches, then one
            for value in x:
                net(torch.tensor([[value]]))
            out = net.rnn(torch.ones(1, 2))
            with torch.no_grad():
                net(torch.tensor([[100.0]]))  # an evaluation
            optimizer.step()
        optimizer.step()
    history = probe.history
    assert history.activation_names == ["rnn", "scale", "never", "ints"]
    cell = max(t.abs().max().item() for t in (out[0], *out[1]))
    nan = np.nan
    expected = [[cell, 6, nan, nan], [cell, 4, nan, nan], [nan] * 4]
    np.testing.assert_allclose(history.activations, expected, rtol=1e-6)


# -- while it runs -------------------------------------------------------------------------------


def test_a_killed_run_leaves_its_steps(tmp_path):
    code = """
import itertools, sys, torch
from gradlab.torch import GradientProbe
net = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
with GradientProbe(net, optimizer, save_to=sys.argv[1], save_every=5, capacity=50):
    for step in itertools.count():
        net.weight.grad = torch.tensor([[3.0 * (step + 1), 4.0 * (step + 1)]])
        optimizer.step()
        print(step, flush=True)
"""
    path = tmp_path / "run.npz"
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=os.environ | {}
    )
    try:
        for line in run.stdout:
            if int(line) >= 23:
                break
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    history = GradientHistory.load(path)
    assert len(history.steps) >= 20
    assert len(history.steps) % 5 == 0 or len(history.steps) == 50
    np.testing.assert_allclose(history.norms[:, 0], 5.0 * (history.steps + 1), rtol=1e-6)


def test_the_file_is_finished_with_the_block_even_by_an_error(tmp_path):
    net, path = small(), tmp_path / "run.npz"
    optimizer = adam(net)
    probe = GradientProbe(net, optimizer, save_to=path, save_every=2)

    def loop():
        with probe:
            for step in range(5):
                assert path.exists() == (step >= 2)
                loss_of(net).backward()
                optimizer.step()
            assert len(GradientHistory.load(path).steps) == 4
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    np.testing.assert_array_equal(GradientHistory.load(path).norms, probe.history.norms)
    assert len(probe.history.steps) == 5


def test_a_save_that_fails_does_not_end_the_training(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    net = small()
    optimizer = adam(net)
    probe = GradientProbe(net, optimizer, save_to=folder / "run.npz", save_every=1)
    folder.rmdir()
    with pytest.warns(UserWarning, match="history was not saved"), probe:
        optimizer.step()
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*runs"):
        GradientProbe(net, optimizer, save_to=folder / "run.npz")


def test_logging_follows_the_history():
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    writer, seldom = Writer(), Writer()
    with GradientProbe(net, optimizer, update_ratio_every=2, capacity=3) as probe:
        assert probe.log_to(writer).log_to(seldom, every=3) is probe
        for step in range(7):
            optimizer.zero_grad()
            loss_of(net).backward()
            net[2].bias.grad = None
            expected = np.linalg.norm([float(net[i].weight.grad.norm()) for i in (0, 2)])
            expected = np.hypot(expected, float(net[0].bias.grad.norm()))
            optimizer.step()
            assert writer.seen["grad_norm/total", step] == pytest.approx(expected, rel=1e-5)
    norms = {(f"grad_norm/{n}", s) for n in ("0.weight", "0.bias", "2.weight") for s in range(7)}
    names = list(dict(net.named_parameters()))
    ratios = {(f"update_ratio/{name}", step) for name in names for step in (0, 2, 4, 6)}
    totals = {(f"grad_norm/{t}", step) for t in ("total", "clipped_total") for step in range(7)}
    assert set(writer.seen) == norms | ratios | totals
    assert {step for _, step in seldom.seen} == {0, 3, 6}
    assert all(writer.seen[key] == value for key, value in seldom.seen.items())
    with pytest.raises(TypeError, match=r"a method add_scalar.*got dict"):
        probe.log_to({})
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        probe.log_to(writer, every=0)


def test_a_step_that_raises_is_logged_and_saved_too(tmp_path):
    net, writer = small(), Writer()
    net[0].weight.grad = torch.full((4, 3), torch.inf)
    probe = GradientProbe(net, adam(net), on_nonfinite="raise", save_to=tmp_path / "run.npz")
    with pytest.raises(gradlab.torch.NonFiniteGradientError), probe.log_to(writer):
        probe.optimizer.step()
    assert writer.seen["grad_norm/0.weight", 0] == np.inf
    assert GradientHistory.load(tmp_path / "run.npz").first_nonfinite == NonFinite(0, "0.weight")
