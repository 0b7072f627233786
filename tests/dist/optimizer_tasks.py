"""What the ranks run to step optimizers on sharded parameters beside a single device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from autopar.cluster.cluster import ClusterInfo
from autopar.comm import dtensor_rules, world
from autopar.comm.stored_layout import StoredLayout
from autopar.runtime import recorded_step
from autopar.runtime.distribute import laid_out_like
from autopar.runtime.optimizer_state import handle_later_optimizers
from autopar.runtime.recorded_step import programs_of
from autopar.runtime.sharded_values import ShardedGradient, ShardedParameter, view, views

Parameters = list[torch.Tensor]
Make = Callable[[Parameters], torch.optim.Optimizer]


class SlowOwn(torch.optim.Optimizer):
    """A user's own: momentum, each update as long as its parameter, weights held at their first
    norm, and a number that each step reads."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.longest = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["count"] = 0
                    state["average"] = p.grad.clone()
                    state["first"] = p.norm()
                    state["rows"] = p.grad.flatten(1).sum(1) if p.ndim > 1 else p.grad.abs()
                state["count"] += 1
                state["average"].mul_(0.9).add_(p.grad, alpha=0.1)
                state["rows"] = 0.5 * state["rows"] + p.mean()
                length = state["average"].norm().item()
                self.longest = max(self.longest, length)
                if length > 1e-3:  # a branch on a value
                    scale = group["lr"] * p.norm() / length / math.sqrt(state["count"])
                    p.sub_(scale * state["average"])
                p.mul_(state["first"] / p.norm().clamp(min=1e-6))
                if p.ndim > 1:
                    p.sub_(1e-3 * state["rows"].view(-1, *[1] * (p.ndim - 1)))


def _timm(name: str) -> Any:
    import timm.optim

    return getattr(timm.optim, name)


def _transformers_adafactor(**options: Any) -> Make:
    from transformers.optimization import Adafactor

    return lambda ps: Adafactor(ps, **options)


def _soap() -> Any:
    from timm.optim.kron import Kron

    return Kron


def makes() -> dict[str, Make]:
    """Optimizers by name."""
    o = torch.optim
    found: dict[str, Make] = {
        "Adafactor": lambda ps: o.Adafactor(ps, lr=0.05, weight_decay=0.01),
        "Adafactor, one by one": lambda ps: o.Adafactor(ps, lr=0.05, foreach=False),
        "Muon": lambda ps: o.Muon([p for p in ps if p.ndim == 2], lr=0.02),
        "Muon, match_rms": lambda ps: o.Muon(
            [p for p in ps if p.ndim == 2], lr=0.02, nesterov=False, adjust_lr_fn="match_rms_adamw"
        ),
        "Adafactor of transformers": _transformers_adafactor(),
        "Adafactor of transformers, lr": _transformers_adafactor(
            lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9
        ),
        "Lamb": lambda ps: _timm("Lamb")(ps, lr=0.02),
        "Lamb, one by one": lambda ps: _timm("Lamb")(
            ps, lr=0.02, foreach=False, always_adapt=True, trust_clip=True
        ),
        "Lamb, no clipping": lambda ps: _timm("Lamb")(
            ps, lr=0.02, max_grad_norm=None, decoupled_decay=True
        ),
        "Lars": lambda ps: _timm("Lars")(ps, lr=0.5, momentum=0.9, weight_decay=1e-2),
        "Lars, LARC": lambda ps: _timm("Lars")(
            ps, lr=0.5, trust_clip=True, always_adapt=True, nesterov=True, momentum=0.8,
            weight_decay=1e-2,
        ),
        "a user's own": lambda ps: SlowOwn(ps),
    }  # fmt: skip
    for name in (
        "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD", "Adagrad",
        "Adadelta",
    ):  # fmt: skip
        more = {"momentum": 0.9} if name == "SGD" else {}
        found[name] = lambda ps, name=name, more=more: getattr(o, name)(ps, lr=0.01, **more)
    for name in (
        "AdaBelief", "Adafactor", "AdafactorBigVision", "AdamP", "AdamWLegacy", "Adan", "Adopt",
        "LaProp", "Lion", "MADGRAD", "Mars", "Muon", "NAdamW", "NvNovoGrad", "RMSpropTF", "SGDP",
        "SGDW",
    ):  # fmt: skip
        lr = {} if name in ("Adafactor",) else {"lr": 0.01}
        found[f"timm {name}"] = lambda ps, name=name, lr=lr: _timm(name)(ps, **lr)
    return found


EVEN = ((8, 16), (16, 4), (8,), (4, 8, 3, 3), (16, 4))
UNEVEN = ((10, 7), (7, 13), (9,), (5, 6, 3, 1), (7, 13))

LAYOUTS: dict[str, tuple[str, ...]] = {
    "2": ("S0R", "RS0", "S0", "RS0RR", "RR"),
    "4": ("S0R", "RS0", "S0", "S0RRR", "RS0"),
    "pipe=2": ("RR@0", "RR@1", "R@1", "RRRR@0", "RR"),
    "pipe=2,data=2": ("S1R@0", "RS1@1", "S1@1", "S1RRR@0", "RR@1"),
    "2x2": ("S01R", "S0S1", "S0", "S1S0RR", "RS1"),
}


def sharded(whole: torch.Tensor, spec: str, mesh: Any) -> ShardedParameter:
    """A parameter of an engine, laid out."""
    placements = StoredLayout.parse(spec).placements(mesh)
    like = DTensor.from_local(
        whole.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return ShardedParameter.of_values(laid_out_like(whole, like), True)


def _mesh(mesh: str) -> Any:
    """A mesh on which operators take DTensors as they do with an engine."""
    handle_later_optimizers()
    dtensor_rules.install("cpu")
    dtensor_rules.install_for(views(), view)
    dtensor_rules.replicate_plain_tensors()
    return world.start(ClusterInfo.of(mesh), torch.device("cpu"))


def _values(seed: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def error_of(
    name: str, mesh: str, even: bool, steps: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[float, list[int], int]:
    """Five steps on shards and on a single device.

    Returns:
        the largest difference of parameters and of state; the number of collectives of each
        program; the number of programs.
    """
    device_mesh = _mesh(mesh)
    shapes = EVEN if even else UNEVEN
    whole = _values(0, shapes, dtype)
    alone = [torch.nn.Parameter(w.clone()) for w in whole]
    mine = [sharded(w, s, device_mesh) for w, s in zip(whole, LAYOUTS[mesh], strict=True)]
    make = makes()[name]
    one, other = make(list(alone)), make(list(mine))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (one, other)
                 if name not in ("Adafactor of transformers", "timm Adafactor")]  # fmt: skip
    for step in range(steps):
        grads = _values(100 + step, shapes, dtype)
        grads[2] = None if step == 3 else grads[2]  # a parameter without a gradient
        for p, q, g in zip(alone, mine, grads, strict=True):
            p.grad = None if g is None else g.clone()
            q.grad = None if g is None else ShardedGradient.of_dtensor(laid_out_like(g, q))
        torch.manual_seed(step)
        one.step()
        torch.manual_seed(step)
        other.step()
        for schedule in schedules:
            schedule.step()
    worst = max(_gap(q, p) for p, q in zip(alone, mine, strict=True))
    for p, q in zip(alone, mine, strict=True):
        for key, expected in one.state.get(p, {}).items():
            if isinstance(expected, torch.Tensor):
                found = other.state[q][key]
                assert found.shape == expected.shape, (key, found.shape, expected.shape)
                assert (
                    not expected.ndim or isinstance(found, DTensor) or (expected.shape != p.shape)
                ), key
                worst = max(worst, _gap(found, expected))
    programs = programs_of(other)
    return worst, [p.collectives for p in programs], len(programs)


def _gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    found = found.full_tensor() if isinstance(found, DTensor) else found
    if not expected.numel():
        return 0.0
    scale = max(1.0, expected.detach().abs().max().item())
    return (found.detach().double() - expected.detach().double()).abs().max().item() / scale


def errors_of(names: Sequence[str], mesh: str, even: bool) -> dict[str, Any]:
    """`error_of` for several optimizers, or what was raised."""
    found: dict[str, Any] = {}
    for name in names:
        found[name] = error_of(name, mesh, even)
    return found


def habit_error(name: str, mesh: str, even: bool, steps: int = 4) -> float:
    """The largest difference of parameters from a single device, stepping by a habit."""
    from tests.dist.optimizer_habits import Own

    device_mesh = _mesh(mesh)
    shapes = EVEN if even else UNEVEN
    whole = _values(0, shapes, torch.float64)
    alone = [torch.nn.Parameter(w.clone()) for w in whole]
    mine = [sharded(w, s, device_mesh) for w, s in zip(whole, LAYOUTS[mesh], strict=True)]
    pair = [Own([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.01}], name) for ps in (alone, mine)]
    for step in range(steps):
        for p, q, g in zip(alone, mine, _values(100 + step, shapes, torch.float64), strict=True):
            p.grad = g.clone()
            q.grad = ShardedGradient.of_dtensor(laid_out_like(g, q))
        for optimizer in pair:
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
    for p, q in zip(alone, mine, strict=True):
        for key, expected in pair[0].state[p].items():
            found = pair[1].state[q][key]
            assert type(found) is type(expected) or isinstance(found, DTensor), (key, found)
    return max(_gap(q, p) for p, q in zip(alone, mine, strict=True))


def habit_errors(mesh: str, even: bool, names: Sequence[str], lazy: bool) -> dict[str, Any]:
    """`habit_error` for several, or what was raised.

    Args:
        lazy: numbers that are asked for are taken to come later, as in torch's own optimizers.
    """
    found: dict[str, Any] = {}
    recorded_step.LAZY_NUMBERS_IN[3:] = ["tests."] if lazy else []
    for name in names:
        try:
            found[name] = habit_error(name, mesh, even)
        except Exception as error:  # the same on all ranks
            found[name] = f"{type(error).__name__}: {error}"
    return found


def engine_run(name: str) -> dict[str, Any]:
    """A model trained with clipping, saved, and resumed by another optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    from autopar import auto_engine
    from autopar.optim import large_batch_schedule
    from tests.clusters import eager_to_shard
    from tests.dist.engine_tasks import batch, difference, mlp

    alone = mlp()
    model = mlp()
    make = makes()[name]
    one, other = (make(list(m.parameters())) for m in (alone, model))
    split = {"up.weight": "S0R", "down.weight": "RS0"}
    engine, other = auto_engine(model, other, eager_to_shard("2"), constraints=split)
    schedules = [large_batch_schedule(o, 2, 10) for o in (one, other)]

    def steps(start: int, pairs: Any) -> None:
        for step in range(start, start + 3):
            for m, o in pairs:
                o.zero_grad()
                m(*batch(step)).backward()
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
                o.step()
            for schedule in schedules:
                schedule.step()

    steps(0, ((alone, one), (engine, other)))
    found: dict[str, Any] = {"difference": difference(engine, alone)}
    found["state"] = {
        k: isinstance(v, DTensor)
        for entry in other.state.values()
        for k, v in entry.items()
        if v.ndim
    }
    found["programs"] = len(programs_of(other))
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(engine, other, options=options)["state"]
    if torch.distributed.get_rank() == 0:
        for (p_name, p), entry in zip(alone.named_parameters(), saved.values(), strict=True):
            assert saved[p_name] is entry
            found["saved"] = max(
                found.get("saved", 0.0),
                *(_gap(v, one.state[p][k]) for k, v in entry.items() if v.ndim),
            )
    later = make(list(engine.parameters()))
    later.load_state_dict(other.state_dict())
    schedules[1].optimizer = later
    steps(3, ((alone, one), (engine, later)))
    found["resumed"] = difference(engine, alone)
    return found


def around_a_step(what: str) -> str:
    """Closures, errors, random numbers, loss scalers, optimizers made late: "right", or what is
    not."""
    from tests.dist.optimizer_habits import HABITS, Own

    mesh = _mesh("2")
    whole = _values(0, UNEVEN[:2], torch.float64)
    alone = [torch.nn.Parameter(w.clone()) for w in whole]
    mine = [sharded(w, s, mesh) for w, s in zip(whole, LAYOUTS["2"], strict=False)]
    for p, q, g in zip(alone, mine, _values(1, UNEVEN[:2], torch.float64), strict=True):
        p.grad = g.clone()
        q.grad = ShardedGradient.of_dtensor(laid_out_like(g, q))

    def gap() -> float:
        return max(_gap(q, p) for p, q in zip(alone, mine, strict=True))

    if what == "clip":
        from autopar.optim import clip_grad_norm_

        expected = torch.nn.utils.clip_grad_norm_(alone, 0.5)
        found = clip_grad_norm_(mine, 0.5)
        grads = [_gap(q.grad, p.grad) for p, q in zip(alone, mine, strict=True)]
        norm = abs(found.item() - expected.item())
        return "right" if type(found) is torch.Tensor and max(norm, *grads) < 1e-12 else f"{grads}"
    if what == "refused":
        from autopar.errors import EngineError

        def draws_into_a_view(self: Any, p: Any, g: Any, state: Any) -> None:
            p.t()[1:3].normal_()

        HABITS["draws_into_a_view"] = draws_into_a_view
        try:
            Own(mine, "draws_into_a_view").step()
        except EngineError as error:
            return "right" if "p.copy_" in str(error) else str(error)
        return "not refused"
    if what == "shapes":  # [5, 7] fits the shards of [10, 7], and not the whole

        def does_not_fit(self: Any, p: Any, g: Any, state: Any) -> None:
            p.sub_(torch.ones(5, 7, dtype=p.dtype))

        HABITS["does_not_fit"] = does_not_fit
        for ps in (alone, mine):
            try:
                Own(ps, "does_not_fit").step()
            except RuntimeError:
                continue
            return "no error"
        return "right" if gap() == 0 else f"{gap()}"
    if what == "closure":
        results = []
        for ps in (alone, mine):
            optimizer = Own(ps, "gradients_of_others")

            def closure(ps: Any = ps) -> Any:
                with torch.no_grad():
                    return sum((p * p.grad).sum() for p in ps)

            value = optimizer.step(closure)
            results.append(_whole(value).item())
        return "right" if gap() < 1e-12 and abs(results[0] - results[1]) < 1e-12 else f"{gap()}"
    if what == "masked":  # as in Rprop, whose step with a closure runs on DTensors
        worst = 0.0
        for dim in (0, 1):
            sign = whole[1].sign()
            other = distribute_tensor(sign.clone(), mesh, [Shard(dim)])
            for x in (sign, other):
                x[x.gt(0)] = 1.2
                x[x.lt(0)] = 0.5
            worst = max(worst, _gap(other, sign))
        return "right" if worst == 0 else f"{worst}"
    if what == "error":

        def fails(self: Any, p: Any, g: Any, state: Any) -> None:
            p.mul_(0.5)
            if p.ndim and p.shape[0] == UNEVEN[1][0]:
                raise KeyError("the second one")

        HABITS["fails"] = fails
        for ps in (alone, mine):
            optimizer = Own(ps, "fails")
            try:
                optimizer.step()
            except KeyError:
                continue
            return "no error"
        mine[0].detach().mul_(1.0)  # nothing is recorded any more
        return "right" if gap() == 0 else f"{gap()}"
    if what == "random":

        def draws(self: Any, p: Any, g: Any, state: Any) -> None:
            p.mul_(0.5)
            p.add_(torch.randn_like(p) * 1e-3)

        HABITS["draws"] = draws
        torch.manual_seed(0)
        Own(mine, "draws").step()
        moved = [(_whole(q) - 0.5 * w).abs().max().item() for q, w in zip(mine, whole, strict=True)]
        return "right" if all(1e-4 < m < 1e-2 for m in moved) else f"{moved}"
    if what == "scaler":
        from autopar.optim import LAMB

        for ps in (alone, mine):
            optimizer = LAMB(ps, lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
            for step in range(2):
                scaler.scale(torch.ones(()))  # makes the scale
                for p in ps:
                    p.grad.mul_(4.0)
                    if step == 0 and p is ps[0]:  # this step is skipped
                        p.grad.mul_(math.inf)
                scaler.step(optimizer)
                scaler.update()
                for p, g in zip(ps, _values(2, UNEVEN[:2], torch.float64), strict=True):
                    p.grad = g if ps is alone else ShardedGradient.of_dtensor(laid_out_like(g, p))
        return "right" if 0 <= gap() < 1e-12 else f"{gap()}"
    if what == "late":  # its first step is recorded too
        later = torch.optim.Muon(mine, lr=0.1)
        torch.optim.Muon(alone, lr=0.1).step()
        later.step()
        return "right" if gap() < 1e-12 and programs_of(later) else f"{gap()}"

    def keeps(self: Any, p: Any, g: Any, state: Any) -> None:
        self.last = p + g
        self.length = g.norm().item()
        p.sub_(g, alpha=0.1)

    HABITS["keeps"] = keeps
    pair = [Own(ps, "keeps") for ps in (alone, mine)]
    for optimizer in pair:
        optimizer.step()
    kept = _gap(pair[1].last, pair[0].last)
    same = type(pair[1].length) is float and abs(pair[1].length - pair[0].length) < 1e-12
    return "right" if gap() < 1e-12 and kept < 1e-12 and same else f"{gap()}, {kept}, {same}"


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
