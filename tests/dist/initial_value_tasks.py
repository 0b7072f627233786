"""What the ranks run to start models whose values no rank, or only one, holds whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from autopar import auto_engine, deferred_init
from tests.dist.script_tasks import data, gap, refused, whole

SHARDED = {"0.weight": "S0R", "3.weight": "RS01", "inputs.input": "S0R"}


def net() -> nn.Sequential:
    layers = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 8)
    return nn.Sequential(*layers).double()


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return net()


def train(model: Any, optimizer: Any) -> list[float]:
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(model(data(step, 8, 16)), data(9 + step, 8, 8))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def deferred() -> nn.Module:
    with deferred_init():
        return net()


def deferred_by_other_seeds() -> nn.Module:
    torch.manual_seed(7 + dist.get_rank() if dist.get_rank() else 3)
    return deferred()


def rank_zero_only() -> nn.Module:
    return on_meta() if dist.get_rank() else net()


def deferred_on_rank_zero_only() -> nn.Module:
    return on_meta() if dist.get_rank() else deferred()


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (deferred, deferred_by_other_seeds, rank_zero_only, deferred_on_rank_zero_only)
}


def _compared(model: nn.Module, reference: nn.Module, **options: Any) -> dict[str, Any]:
    """Train a model on a mesh of 2x2 and a whole one, and compare."""
    optimizer, expected = adamw(model), train(reference, adamw(reference))
    engine, optimizer = auto_engine(model, optimizer, "2x2", constraints=SHARDED, **options)
    losses = train(engine, optimizer)
    buffers = zip(engine.buffers(), reference.buffers(), strict=True)
    return {
        "loss": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "parameters": gap(engine, reference),
        "buffers": max((a.double() - b.double()).abs().max().item() for a, b in buffers),
        "first shard": tuple(engine[0].weight.to_local().shape),
        "last shard": tuple(engine[3].weight.to_local().shape),
    }


def from_builders() -> dict[str, Any]:
    gaps = {}
    for name, build in BUILDERS.items():
        torch.manual_seed(3)
        reference = net()
        torch.manual_seed(3)
        gaps[name] = _compared(build(), reference)
    return gaps


def from_reset_parameters() -> dict[str, Any]:
    """The values are those that a single process gets from `to_empty` and `reset_parameters`."""
    gaps = {}
    for same_seed in (True, False):
        torch.manual_seed(5)
        reference = on_meta().to_empty(device="cpu")
        for module in reference.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        torch.manual_seed(5 if same_seed else 5 + dist.get_rank())
        gaps[f"same seed: {same_seed}"] = _compared(on_meta(), reference)
    return gaps


def write_checkpoints(folder: str) -> None:
    """Checkpoints of a model in all forms that are read."""
    torch.manual_seed(4)
    state = net().state_dict()
    path = Path(folder)
    save_file(state, path / "one.safetensors")
    (path / "several").mkdir()
    halves = {"a.safetensors": list(state)[:3], "b.safetensors": list(state)[3:]}
    for file, names in halves.items():
        save_file({name: state[name] for name in names}, path / "several" / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    index = path / "several" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    dcp.save(state, checkpoint_id=path / "plain_dcp", no_dist=True)
    dcp.save({"model": state, "step": 3}, checkpoint_id=path / "nested_dcp", no_dist=True)


CHECKPOINTS = ("one.safetensors", "several", "plain_dcp", "nested_dcp")

# Every checkpoint for a model on the meta device, and every kind of model from two of them.
STARTS = [(name, on_meta) for name in CHECKPOINTS] + [
    (name, build)
    for name in ("one.safetensors", "nested_dcp")
    for build in (deferred, rank_zero_only, net)
]


def from_checkpoints(folder: str) -> dict[str, Any]:
    gaps = {}
    for name, build in STARTS:
        torch.manual_seed(4)
        reference = net()
        torch.manual_seed(11)
        gaps[f"{name}, {build.__name__}"] = _compared(
            build(), reference, weights=Path(folder) / name
        )
    return gaps


def saved_on_a_mesh(folder: str) -> dict[str, Any]:
    """A distributed checkpoint of an engine starts an engine on another mesh."""
    torch.manual_seed(4)
    model = net()
    engine, optimizer = auto_engine(model, adamw(model), "2x2", constraints=SHARDED)
    train(engine, optimizer)
    dcp.save(engine.state_dict(), checkpoint_id=folder)
    twin, _ = auto_engine(
        on_meta(), None, "4", weights=folder, example_inputs=(data(0, 8, 16),),
        constraints={"0.weight": "S0R"},
    )  # fmt: skip
    return {
        "gap": gap(twin, engine),
        "shard": tuple(twin[0].weight.to_local().shape),
        "average": (whole(twin[1].running_mean) - engine[1].running_mean).abs().max().item(),
    }


def refusals() -> dict[str, str]:
    def other_shape() -> nn.Module:
        with torch.device("meta"):
            return nn.Linear(16, 8 + dist.get_rank() // 3)

    def without_reset() -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(nn.MultiheadAttention(8, 2))

    return refused(
        {
            "shape": lambda: auto_engine(other_shape(), None, "4"),
            "no reset": lambda: auto_engine(without_reset(), None, "4"),
        }
    )


def memory_at_start() -> dict[str, float]:
    """Of the benchmark's largest model, in MiB, after a small one as there."""
    from benchmarks.start_memory import start

    start("linear layers", "deferred_init", True, "unused")
    return start("linear layers", "deferred_init", False, "unused")
