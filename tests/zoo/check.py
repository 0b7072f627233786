"""Whether a captured program is the model: loss, results, gradients and buffers, side by side."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.zoo.family import seed_everything


@dataclass(frozen=True)
class Step:
    """One forward and backward.

    Args:
        structure: what the model returned, tensors replaced by their shape and type.
        results: the tensors in it, by the way to them.
        loss: by which was differentiated.
        gradients: by parameter; None where the loss does not depend on it.
        buffers: after the step.
    """

    structure: Any
    results: dict[str, torch.Tensor]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def step(
    run: Callable[..., Any], model: nn.Module, batch: Mapping[str, Any], seed: int = 0
) -> Step:
    """Call `run` on the batch and differentiate, every draw starting from the seed."""
    model.zero_grad(set_to_none=True)
    seed_everything(seed)
    returned = run(**batch)
    leaves = dict(tensors(returned))
    loss = loss_of(returned)
    loss.backward()
    return Step(
        structure=structure(returned),
        results={name: t.detach().clone() for name, t in leaves.items()},
        loss=loss.detach(),
        gradients={n: p.grad for n, p in model.named_parameters()},
        buffers={n: b.clone() for n, b in model.named_buffers()},
    )


def loss_of(returned: Any) -> torch.Tensor:
    """The model's loss; without one, what depends on every result."""
    if isinstance(returned, torch.Tensor) and returned.numel() == 1:
        return returned
    loss = returned.get("loss") if isinstance(returned, Mapping) else None
    if isinstance(loss, torch.Tensor):
        return loss.sum()
    floating = [t for _, t in tensors(returned) if t.is_floating_point() and t.requires_grad]
    return torch.stack([t.square().mean() for t in floating]).sum()


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Parts of a result: of mappings and sequences.

    Caches of keys and values are for generating, not for training; a graph may leave them out.
    """
    if isinstance(value, Mapping):
        parts = [(str(name), part) for name, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(str(i), part) for i, part in enumerate(value)]
    else:
        parts = []
    yield from (
        (n, p) for n, p in parts if p is not None and not type(p).__name__.endswith("Cache")
    )


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a result with the way to them."""
    if isinstance(value, torch.Tensor):
        yield path, value
    else:
        for name, part in children(value):
            yield from tensors(part, f"{path}.{name}" if path else name)


def structure(value: Any) -> Any:
    """A result without its numbers."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype, value.requires_grad)
    parts = {name: structure(part) for name, part in children(value)}
    return (type(value).__name__, parts) if parts else type(value).__name__


def differences(actual: Step, expected: Step) -> Iterator[tuple[str, float]]:
    """Error of each number, relative to the larger of 1 and its size; inf where one is missing."""
    if actual.structure != expected.structure:
        yield f"structure: {_first_difference(actual.structure, expected.structure)}", math.inf
    yield "loss", error(actual.loss, expected.loss)
    for what in ("results", "gradients", "buffers"):
        own, reference = getattr(actual, what), getattr(expected, what)
        for name in own.keys() | reference.keys():
            if what != "buffers" or not _is_cache(own.get(name), reference.get(name)):
                yield f"{what}: {name}", error(own.get(name), reference.get(name))


def _is_cache(actual: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    """A buffer that the model's first call gave the shape its batch needs."""
    return actual is not None and expected is not None and actual.shape != expected.shape


def error(actual: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """The largest deviation; a gradient that is absent is equal to one of zeros."""
    present = [t for t in (actual, expected) if t is not None]
    if not present:
        return 0.0
    if len(present) == 1:
        return 0.0 if not present[0].any() else math.inf
    assert actual is not None and expected is not None
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    if not expected.numel():
        return 0.0
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    scale = max(1.0, _finite_max(expected))
    gap = torch.where(same, 0.0, (actual - expected).abs() / scale)
    return math.inf if gap.isnan().any() else float(gap.max())


def _finite_max(value: torch.Tensor) -> float:
    finite = value[value.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _first_difference(actual: Any, expected: Any, path: str = "") -> str:
    both = isinstance(actual, tuple) and isinstance(expected, tuple)
    if both and isinstance(actual[-1], dict) and isinstance(expected[-1], dict):
        for name in [*expected[1], *(n for n in actual[1] if n not in expected[1])]:
            own, reference = actual[1].get(name), expected[1].get(name)
            if own != reference:
                return _first_difference(own, reference, f"{path}.{name}")
    return f"{path} is {actual}, not {expected}"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that tracing must leave as it is, as values that compare."""
    state = {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    hooks = [
        n for n, m in model.named_modules() for _ in (*m._forward_hooks, *m._forward_pre_hooks)
    ]
    attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
    return {
        "tensors": {n: i for n, (i, _) in state.items()},
        "values": {n: t.detach() for n, (_, t) in state.items()},
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "hooks": hooks,
        "attributes": attributes,
        "training": {n: m.training for n, m in model.named_modules()},
        "torch": torch.get_rng_state(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
    }


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Which parts of two snapshots differ."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        return a == b

    return [name for name in before if not same(before[name], after[name])]
