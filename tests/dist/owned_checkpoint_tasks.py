"""What the ranks run to save, load and start models whose parameters one pipeline stage owns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

from autopar import deferred_init
from autopar.comm.owned_shards import Owned
from autopar.comm.ranks import WorldRanks
from autopar.comm.stored_layout import StoredLayout
from autopar.ir.spec import ShardingSpec
from autopar.runtime.adoption import adopt
from autopar.runtime.distribute import distribute, stored_layouts, stored_specs
from autopar.runtime.full_state import distribute_state, gather_state
from autopar.runtime.initial_values import initial_values
from autopar.runtime.sharded_values import SavedShard
from tests.dist.owned_tasks import (
    LAYOUTS,
    OPTIMIZERS,
    SHAPES,
    Net,
    difference,
    lay_out,
    prepare,
    set_gradients,
)
from tests.dist.script_tasks import whole


def trained(steps: int, mesh: str | None = None) -> tuple[Net, torch.optim.Optimizer]:
    """A model and its optimizer after some steps, of one process or laid out on a mesh."""
    model = Net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    if mesh is not None:
        lay_out(model, optimizer, mesh)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def saved(model: nn.Module) -> dict[str, Any]:
    """As the engine hands its state dict out."""
    return {name: SavedShard.of_handle(x) for name, x in model.state_dict(keep_vars=True).items()}


def furthest(model: nn.Module, known: nn.Module) -> float:
    pairs = zip(model.parameters(), known.parameters(), strict=True)
    return max(difference(a, b) for a, b in pairs)


def save(folder: Path, mesh: str) -> dict[str, Any]:
    """Save after two steps, whole at once and in the background, and say what the files hold."""
    model, optimizer = trained(2, mesh)
    state = {"model": saved(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "saved")
    beside = dist.new_group(backend="gloo")
    saving = dcp.async_save(state, checkpoint_id=folder / "beside", process_group=beside)
    saving.result()
    found = {}
    for name in ("saved", "beside"):
        metadata = dcp.FileSystemReader(folder / name).read_metadata()
        missing = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "chunks")
            and sum(math.prod(c.sizes) for c in entry.chunks) != math.prod(entry.size)
        }
        keys = set(metadata.state_dict_metadata)
        expected = {f"model.{n}" for n in SHAPES}
        expected |= {f"optimizer.state.{n}.exp_avg" for n in SHAPES}
        found[name] = (sorted(missing), sorted(expected - keys))
    dist.barrier()
    return found


def resume(folder: Path, mesh: str) -> dict[str, float]:
    """Load on a mesh and go on, by both ways of torch."""
    known, expected = trained(2)
    train(known, expected, range(2, 4))
    found = {}
    for name in ("saved", "beside"):
        model, optimizer = trained(1, mesh)
        state = {"model": saved(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / name)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        train(model, optimizer, range(2, 4))
        found[name] = furthest(model, known)
    model = Net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())  # without state
    lay_out(model, optimizer, mesh)
    parts: Any = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(parts, checkpoint_id=folder / "saved")
    set_model_state_dict(model, parts["model"])
    set_optimizer_state_dict(model, optimizer, parts["optimizer"])
    train(model, optimizer, range(2, 4))
    found["without state"] = furthest(model, known)
    return found


def whole_states(mesh: str) -> dict[str, Any]:
    """State dicts of whole tensors, gathered and given back."""
    known, expected = trained(2)
    model, optimizer = trained(2, mesh)
    found: dict[str, Any] = {}
    gathered = gather_state(saved(model), rank0_only=False, offload_to_cpu=True)
    found["gathered"] = max(difference(gathered[n], p) for n, p in known.named_parameters())
    only = gather_state(saved(model), rank0_only=True, offload_to_cpu=True)
    found["on rank 0"] = float(bool(only) != (dist.get_rank() == 0))
    state = gather_state(optimizer.state_dict(), rank0_only=False, offload_to_cpu=True)
    entries = zip(state["state"].values(), expected.state_dict()["state"].values(), strict=True)
    found["optimizer"] = max(difference(a["exp_avg"], b["exp_avg"]) for a, b in entries)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        found["torch's"] = max(difference(full[n], p) for n, p in known.named_parameters())
    plain = {name: x.detach().clone() for name, x in known.state_dict().items()}
    from_zero = None if dist.get_rank() else plain
    for name, given in {"from all": plain, "from rank 0": from_zero}.items():
        other, fresh = trained(0, mesh)
        distributed = distribute_state(given, other.state_dict(keep_vars=True), torch.device("cpu"))
        other.load_state_dict(distributed)
        fresh.load_state_dict(trained(2)[1].state_dict())
        train(other, fresh, range(2, 3))
        found[name] = furthest(other, trained(3)[0])
    other, _ = trained(0, mesh)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, plain if dist.get_rank() == 0 else {}, options=options)
    found["torch's, from rank 0"] = furthest(other, known)
    return found


def starts(folder: Path, mesh_text: str) -> dict[str, Any]:
    """Models without values."""
    mesh, known, found = prepare(mesh_text), Net(), {}
    if dist.get_rank() == 0:
        save_file({n: p.detach() for n, p in known.named_parameters()}, folder / "w.safetensors")
        state = {n: p.detach() for n, p in known.named_parameters()}
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    dist.barrier()

    def deferred() -> nn.Module:
        with deferred_init():
            return Net()

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return Net()

    def on_rank_zero() -> nn.Module:
        return on_meta() if dist.get_rank() else Net()

    cases: dict[str, tuple[Callable[[], nn.Module], Path | None]] = {
        "deferred": (deferred, None), "rank 0": (on_rank_zero, None),
        "safetensors": (on_meta, folder / "w.safetensors"), "dcp": (on_meta, folder / "dcp"),
    }  # fmt: skip
    layouts = {n: StoredLayout.parse(text) for n, text in LAYOUTS[mesh_text].items()}
    for name, (make, weights) in cases.items():
        model, device = make(), torch.device("cpu")
        initial = initial_values(model, WorldRanks(), device, weights)
        adopt(model, None, mesh)
        coords = tuple(mesh.get_coordinate())
        distribute(model, None, layouts, mesh, coords, device, initial.names, initial.fill)
        found[name] = furthest(model, known)
        found[f"{name} layouts"] = float(stored_layouts(model) != layouts)
    found["specs"] = float(stored_specs(model) != {n: x.spec for n, x in layouts.items()})
    return found


def drawn(mesh_text: str) -> dict[str, Any]:
    """Random values: alike on replicas, and those of the same model without stages."""
    model, _ = trained(0, mesh_text)
    results = {}
    for name, p in model.named_parameters():
        torch.manual_seed(0)
        nn.init.normal_(p)
        results[name] = whole(p).clone()
        with torch.no_grad():
            p.exponential_()
        results[f"{name} exponential"] = whole(p).clone()
    nn.init.orthogonal_(model.last)
    results["orthogonal"] = last = whole(model.last)
    results["orthonormal"] = torch.tensor((last @ last.T).allclose(torch.eye(4).double()))
    return results


def refusals(mesh_text: str) -> dict[str, str]:
    model, _ = trained(0, mesh_text)
    mesh, p = model.first.device_mesh, model.first
    return {
        name: _message(function)
        for name, function in {
            "from_local": lambda: DTensor.from_local(p.to_local(), mesh, p.placements),
            "no such stage": lambda: StoredLayout.parse("RR@9").placements(mesh),
            "split by stages": lambda: StoredLayout.parse("S1R@1").placements(mesh),
            "scalar": lambda: StoredLayout(ShardingSpec(()), 0),
            "a number of a part": lambda: p.sum().item(),
        }.items()
    }


def _message(function: Callable[[], Any]) -> str:
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def conversions(mesh_text: str) -> dict[str, float]:
    """`redistribute` between owners, and to and from torch's own shards."""
    model, _ = trained(0, mesh_text)
    known, found = Net(), {}
    mesh = model.first.device_mesh
    axis = mesh.mesh_dim_names.index("pipe")
    for name, p in model.named_parameters():
        reference = dict(known.named_parameters())[name]
        for target in (Replicate(), Shard(0), Shard(1), Owned(0, 0), Owned(0, 1), Owned(1, 1)):
            if isinstance(target, Shard) and target.dim >= p.ndim:
                continue
            placements = list(p.placements)
            placements[axis] = target
            there = p.detach().redistribute(placements=placements)
            back = there.redistribute(placements=p.placements)
            gaps = [difference(there, reference), difference(back, reference)]
            gaps.append(float(back.to_local().shape != p.to_local().shape))
            found[f"{name} {target}"] = max(gaps)
    return found
