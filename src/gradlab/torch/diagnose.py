"""Look at one training step and say what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from gradlab import diagnosis
from gradlab.diagnosis import Diagnosis
from gradlab.lanczos import largest_eigenvalue, start_near
from gradlab.measurements import (
    Curvature,
    Float64,
    LayerUse,
    Measurements,
    OptimizerFacts,
    Place,
    Raised,
    TensorFacts,
    Trial,
    which_matter,
)
from gradlab.torch._curvature import flat, hessian_product
from gradlab.torch._float64 import float64
from gradlab.torch._state import spare_optimizer, untouched
from gradlab.torch._tracing import Call, Trace, Weights, raised_at
from gradlab.torch.probe import gradient_norms, total_norm

LossFunction = Callable[[nn.Module, Any], torch.Tensor]

# Optimisers that divide by a running size of the gradient, and what they call that size.
_ADAPTIVE = {
    "Adam": "exp_avg_sq",
    "AdamW": "exp_avg_sq",
    "NAdam": "exp_avg_sq",
    "RMSprop": "square_avg",
    "Adagrad": "sum",
}


def diagnose(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Diagnosis:
    """Examine one training step, and say what is wrong with it, where, and what to do.

    ::

        def loss_fn(model, batch):
            x, y = batch
            return F.cross_entropy(model(x), y)

        print(diagnose(model, loss_fn, batch, optimizer=optimizer))

    The step is run a few times on copies of the model's numbers: as it is, with every operation
    watched; in float64; and, with an optimiser, for the curvature and for a few trial steps on
    this batch.  Model, optimiser, gradients and random generators are then as before, to the bit.
    All of it costs some dozens of training steps.

    Whatever the model does, raising included, ends up in the diagnosis.  The loop around the step
    is not seen: clipping in it, gradient scaling and warm-up are yours to think of.  Recurrent
    layers run step by step here, so an LSTM costs more: its own training step is one fused call.

    Args:
        model: in the mode and on the device in which it fails.  A compiled model is run without
            its compiler, one in DistributedDataParallel without its communication.
        loss_fn: maps (model, batch) to a scalar loss that has a gradient.
        batch: whatever loss_fn takes; tensors in tuples, lists and dicts are looked at.
        optimizer: if given, its step size is held against the curvature.

    Returns:
        The diagnosis; print it.

    Raises:
        TypeError: a model that is no module, a loss_fn that cannot be called, an optimiser that is
            none.
        ValueError: a loss that is not one number, or a model whose lazy layers have no weights yet.
    """
    model, optimizer = _checked(model, loss_fn, optimizer)
    notes: list[str] = []
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        start_over = stack.enter_context(untouched(model, loss_fn))
        stack.enter_context(_plain_kernels(model))
        step = _Step(model, loss_fn, batch)

        def measure(what: str, measurement: Callable[[], Any]) -> Any:
            """A measurement that fails is a note, never an error."""
            start_over()
            try:
                return measurement()
            except _NotScalar:
                raise
            except Exception as error:
                notes.append(f"{what}: {type(error).__name__}: {error}")
                return None

        found["tensors"] = (
            measure("the batch and the parameters", lambda: _facts(model, batch)) or ()
        )
        found |= measure("the step", lambda: step.traced()) or {}
        gradients = found.pop("_gradients", None)
        finite = gradients is not None and math.isfinite(found["loss"])
        finite = finite and all(math.isfinite(norm) for _, norm in found["gradients"])
        if not finite and "raised" not in found:
            suspects = [facts.name for facts in found["tensors"] if facts.not_finite]
            seen = measure("the first bad operation", lambda: step.traced(suspects)) or {}
            if "raised" in seen:
                notes.append(f"the first bad operation: {seen['raised'].error}")
            else:
                found |= seen
                found.pop("_gradients", None)
        if "raised" not in found:
            found["tensors"] = (
                measure(
                    "large inputs", lambda: step.which_matter(found["tensors"], found, start_over)
                )
                or found["tensors"]
            )
        if finite and any(use.signal == 0 for use in found["layers"]):
            found["revives"] = measure("after a small step", lambda: step.revives())
        if "raised" not in found:
            found["float64"] = measure(
                "the step in float64", lambda: step.in_float64(gradients, start_over)
            )
        if finite and optimizer is not None:
            found |= _step_size(step, optimizer, measure, notes, start_over)
        found = {"loss": math.nan, "dtype": _dtype(model)} | found
    return diagnosis.judge(Measurements(framework="PyTorch", notes=tuple(notes), **found))


class _NotScalar(ValueError):
    """What the loss function returned is not one number."""


def _checked(
    model: Any, loss_fn: Any, optimizer: Any
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(f"run the model once, so that it has weights: {lazy[0]} has no shape yet")
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function of (model, batch), got {type(loss_fn).__name__}"
        )
    while optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        optimizer = inner
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model), optimizer


@contextmanager
def _plain_kernels(model: nn.Module):
    """Run what is fused or compiled step by step: seen by autograd, and differentiable twice."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if recurrent:
            # Asked for TF32, it warns that there is no Intel GPU.
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.enable_grad())
        yield


def _dtype(model: nn.Module) -> str:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------
# What goes in


def _describe(name: str, role: str, tensor: torch.Tensor) -> TensorFacts:
    integer = not (tensor.is_floating_point() or tensor.is_complex())
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values() if tensor.is_sparse else tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    good = torch.isfinite(tensor)
    numbers = tensor[good].double()
    low, high = (numbers.min().item(), numbers.max().item()) if numbers.numel() else (0.0, 0.0)
    bad = tensor.numel() - int(good.sum())
    mask = role != "parameter" and not integer and high <= 0 and not bool(torch.isnan(tensor).any())
    # An additive mask: 0 where one may look, −inf or a large negative number where not.
    mask = mask and not bool(((tensor < 0) & (tensor > -1e4)).any()) and bool((tensor == 0).any())
    mask = mask and not bool(torch.isposinf(tensor).any())
    if mask:
        return TensorFacts(name, role, tensor.numel(), 0, 0.0)
    return TensorFacts(
        name, role, tensor.numel(), bad, max(abs(low), abs(high)), low, high, integer
    )


def _facts(model: nn.Module, batch: Any) -> tuple[TensorFacts, ...]:
    """The batch's, parameters' and buffers' numbers; only those of the batch that are in order."""
    found = []
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiub":
            leaf = torch.as_tensor(leaf)
        if isinstance(leaf, torch.Tensor):
            with suppress(NotImplementedError, RuntimeError):  # nested, quantised, float8, …
                found.append(_describe(f"batch{pytree.keystr(path)}", "batch", leaf))
    for role, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
                continue
            with suppress(NotImplementedError, RuntimeError):
                plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                low, high = torch.aminmax(plain.detach())
                if not max(abs(low.item()), abs(high.item())) < diagnosis.OUT_OF_RANGE:
                    found.append(_describe(name, role, tensor))
    return tuple(found)


# ---------------------------------------------------------------------------------------------
# The step


class _Step:
    """The user's step, and the ways to run it.

    Args:
        model: as `diagnose` gets it.
        loss_fn: as `diagnose` gets it.
        batch: as `diagnose` gets it; each run is given a copy, which it may change.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, batch: Any) -> None:
        self.model, self.loss_fn, self._batch = model, loss_fn, batch
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    @property
    def batch(self) -> Any:
        """A copy of the batch."""

        def copied(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return leaf.detach().clone().requires_grad_(leaf.requires_grad)
            return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

        return pytree.tree_map(copied, self._batch)

    def loss(self, batch: Any = None) -> torch.Tensor:
        """The loss, one number."""
        loss = self.loss_fn(self.model, self.batch if batch is None else batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise _NotScalar(f"loss_fn must return one number as a tensor, got {got}")
        return loss.reshape(())

    def gradient(self, loss: torch.Tensor, *, graph: bool = False) -> list[torch.Tensor | None]:
        """The loss's gradient by each parameter; `.grad` is left alone."""
        wanted = list(self.parameters.values())
        if not loss.requires_grad or not wanted:
            return [None] * len(wanted)
        found = list(torch.autograd.grad(loss, wanted, create_graph=graph, allow_unused=True))
        if not graph and all(g is None for g in found):
            # A reentrant checkpoint lets nothing through but a backward pass of the whole graph.
            for p in wanted:
                p.grad = None
            self.loss().backward()
            found = [p.grad for p in wanted]
        return found

    def traced(self, suspects: list[str] | None = None) -> dict[str, Any]:
        """Run it with every operation watched.

        Args:
            suspects: names of the tensors that are not finite before the step; if given, the first
                bad operation is looked for.
        """
        batch, check = self.batch, suspects is not None
        named = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        named |= {
            f"batch{pytree.keystr(path)}": leaf
            for path, leaf in pytree.tree_flatten_with_path(batch)[0]
        }
        names = {id(named[name]): name for name in suspects or () if name in named}
        trace = Trace(self.model, check=check, suspects=names)
        try:
            with trace.watching():
                loss = self.loss_fn(self.model, batch)
        except Exception as error:
            return {"raised": _raised(error, trace, batch)}
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise _NotScalar(f"loss_fn must return one number as a tensor, got {got}")
        weights = Weights(loss, self.parameters)
        grads = self.gradient(loss.reshape(()))
        named = [(n, g) for n, g in zip(self.parameters, grads, strict=True) if g is not None]
        norms = gradient_norms(g for _, g in named)
        found: dict[str, Any] = {
            "loss": loss.item(),
            "dtype": trace.narrowest() or _dtype(self.model),
            "gradients": tuple(zip((n for n, _ in named), norms.tolist(), strict=True)),
            "layers": weights.uses(),
            "_gradients": grads,
        }
        total = total_norm(norms) if len(norms) else 0.0
        if math.isfinite(total) and named:
            dense = [g.coalesce().values() if g.is_sparse else g for _, g in named]
            own = torch.nn.utils.get_total_norm(dense).item()
            found["norm_overflows"] = not math.isfinite(own)
        if check:
            found["forward"] = trace.forward_event(loss)
            found["origin"] = trace.origin
            if math.isfinite(found["loss"]):
                found["backward"] = trace.backward_event()
            if found["forward"] is not None:
                found["layers"] = self._outputs(trace)
        elif math.isfinite(total) and math.isfinite(found["loss"]):
            found["jump"] = trace.jump({id(p) for p in self.parameters.values()})
            found["chain"] = trace.chain(norms.max(initial=0.0))
        return found

    def _outputs(self, trace: Trace) -> tuple[LayerUse, ...]:
        """Where the forward pass overflowed there is no signal: the sizes of the outputs."""
        names = {id(p): n for n, p in self.parameters.items()}
        uses = []
        for call in trace.calls:
            weight = next((names[id(t)] for t in call.inputs if id(t) in names), None)
            if weight is not None and call.outputs and self.parameters[weight].dim() >= 2:
                uses.append((weight, call.outputs[0].detach()))
        norms = gradient_norms(output for _, output in uses)
        return tuple(
            LayerUse(name.rpartition(".")[0], name, len(uses) - i, math.nan, float(norm))
            for i, ((name, _), norm) in enumerate(zip(uses, norms, strict=True))
        )

    def which_matter(
        self,
        tensors: tuple[TensorFacts, ...],
        found: dict[str, Any],
        start_over: Callable[[], None],
    ) -> tuple[TensorFacts, ...]:
        """Of the tensors with large numbers, whether scaling them down to 1 changes the step."""
        total = float(np.hypot.reduce([0.0, *(norm for _, norm in found["gradients"])]))
        bad = not (math.isfinite(total) and math.isfinite(found["loss"]))
        own = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        large = [
            facts
            for facts in tensors
            if facts.largest >= diagnosis.OUT_OF_RANGE and not facts.integer
        ]

        def helps(names: set[str]) -> bool:
            if not bad and total <= diagnosis.LARGE_GRADIENT:
                return False
            start_over()
            sizes = {facts.name: facts.largest for facts in large if facts.name in names}
            batch = pytree.tree_map_with_path(
                lambda path, leaf: (
                    leaf / sizes[name] if (name := f"batch{pytree.keystr(path)}") in sizes else leaf
                ),
                self.batch,
            )
            for name in sizes.keys() & own.keys():
                own[name].data /= sizes[name]
            loss = self.loss(batch)
            norms = gradient_norms(g for g in self.gradient(loss) if g is not None)
            now = float(total_norm(norms)) if math.isfinite(loss.item()) else math.nan
            return math.isfinite(now) and (bad or now < total / 1000)

        return which_matter(tensors, large, helps)

    def in_float64(
        self, own: list[torch.Tensor | None] | None, start_over: Callable[[], None]
    ) -> Float64:
        """Run it in float64, and compare with the gradient in the model's own format."""
        before = torch.get_rng_state()
        with float64(self.model) as widen:
            loss = self.loss(widen(self.batch))
            weights = Weights(loss, self.parameters)
            grads = self.gradient(loss)
        random = not torch.equal(before, torch.get_rng_state())
        norms = gradient_norms(g for g in grads if g is not None)
        total = total_norm(norms) if len(norms) else 0.0
        finite = math.isfinite(loss.item()) and math.isfinite(total)
        difference, lost = None, 0.0
        pairs = [
            (_real(a).double(), _real(b))
            for a, b in zip(own or [], grads, strict=False)
            if a is not None and b is not None
        ]
        if finite and pairs and all(bool(torch.isfinite(a).all()) for a, _ in pairs):
            if not random and total > 0:
                apart = gradient_norms(a - b for a, b in pairs)
                difference = float(total_norm(apart) / total)
                if difference > 0.05:
                    # Is it the format?  Random numbers of the program's own generators, drawn in
                    # another format, would do it too: draw on, and see.
                    start_over()
                    self.loss()
                    again = [g for g in self.gradient(self.loss()) if g is not None]
                    moved = gradient_norms(
                        _real(a).double() - b for a, (b, _) in zip(again, pairs, strict=True)
                    )
                    if total_norm(moved) > difference * total / 10:
                        difference = None
            vanished = sum(int(((a == 0) & (b != 0)).sum()) for a, b in pairs)
            lost = vanished / max(sum(int((b != 0).sum()) for _, b in pairs), 1)
        return Float64(loss.item(), float(total), finite, difference, lost, weights.uses())

    def revives(self) -> bool:
        """Whether the signal reaches every weight after a few small steps down the gradient."""
        silent = math.inf
        while True:
            loss = self.loss()
            weights = Weights(loss, self.parameters)
            gradients = self.gradient(loss)
            strongest: dict[str, float] = {}
            for use in weights.uses():
                strongest[use.parameter] = max(use.signal, strongest.get(use.parameter, 0.0))
            before, silent = silent, sum(signal == 0 for signal in strongest.values())
            if silent == 0 or silent >= before:
                return silent == 0
            pairs = [
                (p, g)
                for p, g in zip(self.parameters.values(), gradients, strict=True)
                if g is not None and not g.is_sparse
            ]
            slope = float(total_norm(gradient_norms(g for _, g in pairs)))
            size = float(total_norm(gradient_norms(p for p, _ in pairs)))
            if slope == 0:
                return False
            for p, g in pairs:
                p.data -= (0.01 * (size + 1) / slope * g).to(p.dtype)

    def halves(self) -> bool | None:
        """Whether the losses of the batch's halves add up to that of the batch."""
        leaves = [t for t in pytree.tree_leaves(self._batch) if isinstance(t, torch.Tensor)]
        sizes = {t.shape[0] for t in leaves if t.dim()}
        if len(sizes) != 1 or (size := sizes.pop()) < 2 or size % 2:
            return None

        def half(rows: slice) -> float:
            return self.loss(
                pytree.tree_map(
                    lambda t: t[rows] if isinstance(t, torch.Tensor) and t.dim() else t, self.batch
                )
            ).item()

        with torch.no_grad():
            whole = self.loss().item()
            added = half(slice(0, size // 2)) + half(slice(size // 2, size))
        return whole != 0 and abs(added / whole - 1) < 0.2


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """Dense and real, for a comparison."""
    tensor = tensor.to_dense()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _raised(error: Exception, trace: Trace, batch: Any) -> Raised:
    call = trace.raised_in
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if call is None:
        module = "loss" if trace.failed_in is None else trace.failed_in
        return Raised(Place(module, "", raised_at(error)), said)
    leaves = [
        t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, torch.Tensor)
    ]
    indices = [t for t in leaves if not t.is_floating_point() and t.dtype != torch.bool]
    about_index = isinstance(error, IndexError) or any(
        word in str(error).lower() for word in ("out of bounds", "out of range", "class values")
    )
    integers = []
    if about_index:
        known = {
            t.data_ptr(): f"batch{pytree.keystr(path)}"
            for path, t in pytree.tree_flatten_with_path(batch)[0]
            if isinstance(t, torch.Tensor)
        }
        for tensor in indices:
            name = known.get(tensor.data_ptr(), "an integer tensor")
            integers.append(_describe(name, "batch", tensor))
    return Raised(call.place, said, tuple(integers), _one_sample(call), _by_value(call))


def _by_value(call: Call) -> bool:
    """Whether the operation runs on tame numbers of the same shapes."""
    generator = torch.Generator().manual_seed(0)

    def tame(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        numbers = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
        if leaf.dim() >= 2 and leaf.shape[-1] == leaf.shape[-2]:
            # A matrix that can be inverted, and has a Cholesky factor.
            numbers = (numbers + numbers.mT) / 2 + len(numbers) * torch.eye(leaf.shape[-1])
        return numbers.to(leaf).requires_grad_(leaf.requires_grad)

    try:
        with torch.enable_grad():
            args, kwargs = pytree.tree_map(tame, (call.args, call.kwargs))
            call.function(*args, **kwargs)
    except Exception:
        return False
    return True


def _one_sample(call: Call) -> bool:
    """Whether an operation with statistics got a single value for each of them."""
    if not call.inputs or "norm" not in call.place.operation:
        return False
    x = call.inputs[0]
    if x.dim() < 2:
        return False
    each_sample = x.dim() > 2 and "instance" in call.place.operation
    return x.numel() == (x.shape[0] * x.shape[1] if each_sample else x.shape[1])


# ---------------------------------------------------------------------------------------------
# The step's size


def _optimizer_facts(optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    name = type(optimizer).__name__
    group = max(optimizer.param_groups, key=lambda g: float(g.get("lr", 0)))
    rate, momentum, method = float(group.get("lr", math.nan)), 0.0, ""
    steps = [
        float(s["step"]) for s in optimizer.state.values() if isinstance(s, dict) and "step" in s
    ]
    if isinstance(optimizer, torch.optim.SGD) and not group.get("maximize"):
        momentum = float(group["momentum"])
        method = "gradient descent" if momentum == 0 else "momentum"
        method = "nesterov" if group["nesterov"] else method
    elif name in _ADAPTIVE:
        method = "adam"
        momentum = float(group["betas"][0]) if "betas" in group else 0.0
    return OptimizerFacts(name, method, rate, momentum, int(max(steps, default=0)))


def _scales(
    optimizer: torch.optim.Optimizer, facts: OptimizerFacts, parameters: list[nn.Parameter]
) -> list[torch.Tensor] | None:
    """By what the optimiser multiplies each gradient, over its largest learning rate.

    None for an adaptive method that has not seen a gradient yet: its scale is not known.
    """
    by_id: dict[int, dict] = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    scales = []
    for p in parameters:
        group = by_id.get(id(p))
        if group is None:
            scales.append(torch.zeros_like(p))
            continue
        share = float(group["lr"]) / facts.learning_rate if facts.learning_rate else 0.0
        share *= 1 - float(group.get("dampening", 0) or 0)
        if facts.method != "adam":
            scales.append(torch.full_like(p, share))
            continue
        state = optimizer.state.get(p, {})
        size = state.get(_ADAPTIVE[facts.name])
        if size is None or not facts.steps:
            return None
        if "betas" in group:
            size = size / (1 - group["betas"][1] ** float(state["step"]))
        scales.append(share / (size.sqrt() + group["eps"]))
    return scales


def _step_size(
    step: _Step,
    optimizer: torch.optim.Optimizer,
    measure: Callable[[str, Callable[[], Any]], Any],
    notes: list[str],
    start_over: Callable[[], None],
) -> dict[str, Any]:
    trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
    mine = {n: p for n, p in step.parameters.items() if id(p) in trained}
    if not mine:
        notes.append("step size: the optimiser holds none of the model's parameters.")
        return {}
    found: dict[str, Any] = {"optimizer": measure("optimiser", lambda: _optimizer_facts(optimizer))}
    facts = found["optimizer"]
    if facts is None:
        return {}
    if facts.method:
        scales = measure("scales", lambda: _scales(optimizer, facts, list(mine.values())))
        if scales is not None:
            found["curvature"] = measure(
                "curvature", lambda: _curvature(step, mine, scales, facts, optimizer)
            )
    known = facts, found.get("curvature")
    found["trial"] = measure(
        "trial steps",
        lambda: _trial(
            step, optimizer, mine, lambda losses: diagnosis.tried_enough(losses, *known)
        ),
    )
    course = found["trial"]
    if course is not None and not course.losses[-1] <= course.losses[0]:
        with suppress(Exception):
            start_over()
            found["summed"] = step.halves()
    return found


def _curvature(
    step: _Step,
    parameters: dict[str, nn.Parameter],
    scales: list[torch.Tensor],
    facts: OptimizerFacts,
    optimizer: torch.optim.Optimizer,
) -> Curvature | None:
    wanted = list(parameters.values())
    decay = {
        id(p): float(g.get("weight_decay", 0) or 0)
        for g in optimizer.param_groups
        for p in g["params"]
    }
    coupled = not isinstance(optimizer, torch.optim.AdamW)
    root = np.sqrt(flat(scales))
    added = flat([torch.full_like(p, decay[id(p)] if coupled else 0.0) for p in wanted])
    state = torch.get_rng_state()

    def gradient(graph: bool) -> list[torch.Tensor]:
        torch.set_rng_state(state)  # the same draws each time
        grads = torch.autograd.grad(
            step.loss(), wanted, create_graph=graph, allow_unused=True, materialize_grads=True
        )
        return [g.to_dense() if g.is_sparse else g for g in grads]

    product = hessian_product(gradient, wanted)
    value, vector, settled = largest_eigenvalue(
        lambda v: root * (product(root * v) + added * root * v),
        start_near(flat(gradient(False)) * root),
    )
    ends = np.cumsum([p.numel() for p in wanted])[:-1]
    shares = [float(part @ part) for part in np.split(vector, ends)]
    heaviest = list(parameters)[int(np.argmax(shares))]
    return Curvature(value, facts.method == "adam", heaviest, settled)


def _trial(
    step: _Step,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    enough: Callable[[list[float]], bool],
) -> Trial:
    """Steps of the optimiser on this batch, until their losses will do, on copies of its state."""
    before = {n: p.detach().clone() for n, p in parameters.items()}
    everyone = list(step.parameters.values())
    state = torch.get_rng_state()
    losses: list[float] = []

    def closure() -> torch.Tensor:
        torch.set_rng_state(state)  # the same dropout at every step: only the weights change
        loss = step.loss()
        for p, g in zip(everyone, step.gradient(loss), strict=True):
            p.grad = g
        return loss.detach()

    searches = isinstance(optimizer, torch.optim.LBFGS)
    with spare_optimizer(optimizer):
        while True:
            losses.append(closure().item())
            if enough(losses) or (searches and len(losses) > 1):
                break
            # The class's own method: a scheduler may have wrapped the instance's.
            if searches:
                type(optimizer).step(optimizer, torch.enable_grad()(closure))
            else:
                type(optimizer).step(optimizer)
        sizes = {n: gradient_norms([w])[0] for n, w in before.items()}
        moves = {n: gradient_norms([p.detach() - before[n]])[0] for n, p in parameters.items()}
    relative = {n: moves[n] / sizes[n] if sizes[n] > 0 else 0.0 for n in moves}
    total = np.hypot.reduce(list(sizes.values()))
    moved = float(np.hypot.reduce(list(moves.values())) / total) if total > 0 else math.inf
    return Trial(tuple(losses), moved, max(relative, key=relative.get))
