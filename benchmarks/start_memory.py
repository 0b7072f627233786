"""Host memory of a rank from `auto_engine` to the first plan, against its shards and one parameter.

A Llama and a stack of linear layers, of some 300 million float32 parameters each, start on a mesh
of 2x2, with every weight split over all ranks. Their values come from `deferred_init`, from modules
on the meta device, from checkpoints, or from rank 0 alone. Measured is the growth of the peak
resident set (VmHWM, from /proc) over the resident set after imports and after a small model has
started the same way. The figure is the worst of the ranks that do not hold the model before.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common import Row, answer, finish, machine, on_ranks, parser

MIB = 2**20
TARGET = 1.3
SOURCES = ("deferred_init", "meta device", "safetensors", "DCP", "rank 0 only")


class Layers(nn.Sequential):
    """Square linear layers."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__(*(nn.Linear(width, width) for _ in range(depth)))


def layers(small: bool) -> tuple[nn.Module, dict[str, Any]]:
    return (Layers(2, 64) if small else Layers(12, 5000)), {"*.weight": "S01R"}


def llama(small: bool) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, depth, words = (64, 2, 256) if small else (1024, 16, 32000)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
        num_attention_heads=8, vocab_size=words,
    )  # fmt: skip
    projections = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
    projections += ("mlp.gate", "mlp.up", "mlp.down")
    weights = [f"model.layers.*.{name}_proj.weight" for name in projections]
    weights += ["model.embed_tokens.weight", "lm_head.weight"]
    return LlamaForCausalLM(config), dict.fromkeys(weights, "S01R")


MODELS: dict[str, Callable[[bool], tuple[nn.Module, dict[str, Any]]]] = {
    "linear layers": layers,
    "Llama": llama,
}


def batch(name: str, small: bool) -> dict[str, Any]:
    """A batch to plan with."""
    if name == "Llama":
        return {"input_ids": torch.zeros(4, 8, dtype=torch.long), "use_cache": False}
    return {"input": torch.zeros(4, 64 if small else 5000)}


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def checkpoint_path(folder: str, name: str, source: str, small: bool) -> Path:
    kind = "model.safetensors" if source == "safetensors" else "dcp"
    return Path(folder) / f"{name.replace(' ', '_')}{'_small' if small else ''}" / kind


def save_checkpoints(folder: str, name: str, small: bool) -> None:
    """Write both kinds of checkpoint of a model."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    state = MODELS[name](small)[0].state_dict()
    path = checkpoint_path(folder, name, "safetensors", small)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=checkpoint_path(folder, name, "DCP", small), no_dist=True)


def built(name: str, source: str, small: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A model as this rank has it before `auto_engine`, and its constraints."""
    from autopar import deferred_init

    torch.manual_seed(0)
    if source == "deferred_init":
        with deferred_init():
            return MODELS[name](small)
    if source == "rank 0 only" and dist.get_rank() == 0:
        return MODELS[name](small)
    if name == "Llama":  # its rotary buffers are computed in the constructor
        with deferred_init():
            model, constraints = MODELS[name](small)
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    module._parameters[key] = nn.Parameter(torch.empty_like(p, device="meta"))
        return model, constraints
    with torch.device("meta"):
        return MODELS[name](small)


def start(name: str, source: str, small: bool, folder: str) -> dict[str, float]:
    """Start a model; MiB by what they are of."""
    from autopar import auto_engine

    files = source in ("safetensors", "DCP")
    weights = checkpoint_path(folder, name, source, small) if files else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    model, constraints = built(name, source, small)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = auto_engine(
        model, optimizer, "2x2", weights=weights, constraints=constraints,
        example_inputs=batch(name, small),
    )  # fmt: skip
    growth = resident("VmHWM") - before
    parameters: list[Any] = list(model.parameters())
    return {
        "growth": growth,
        "shards": sum(p.to_local().nbytes for p in parameters) / MIB,
        "largest": max(p.nbytes for p in parameters) / MIB,
        "parameters": sum(p.numel() for p in parameters) / 1e6,
    }


def run_rank(name: str, source: str, small: bool, folder: str) -> None:
    """Start a small model and then the one that is measured, and answer with the worst rank."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    start(name, source, True, folder)
    own = start(name, source, small, folder)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    if dist.get_rank() == 0:
        counted = every[1:] if source == "rank 0 only" else every
        answer(max(counted, key=lambda r: r["growth"]))
    dist.destroy_process_group()


def rows_of(name: str, source: str, small: bool, folder: str) -> list[Row]:
    options = [name, source, "small" if small else "large", folder]
    got = on_ranks("benchmarks.start_memory", 4, *options)
    bound = got["shards"] + got["largest"]
    case = f"{name}, {got['parameters']:.0f} M parameters, {source}"
    # of a small model, imports that are left are more than the shards
    target = None if small else TARGET
    return [
        Row(case, "growth of the peak per rank", got["growth"], "MiB"),
        Row(case, "shards and largest parameter", bound, "MiB"),
        Row(case, "growth over shards and largest parameter", got["growth"] / bound, "x", target),
    ]


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    options.add_argument("--only", choices=SOURCES, action="append", help="sources of values")
    chosen = options.parse_args()
    if chosen.rank:
        name, source, size, folder = chosen.rank
        run_rank(name, source, size == "small", folder)
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(machine())
    sources = chosen.only or (SOURCES[:1] if chosen.quick else SOURCES)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            if {"safetensors", "DCP"} & set(sources):
                for small in (True, chosen.quick):
                    save_checkpoints(folder, name, small)
            for source in sources:
                if (name, source) == ("Llama", "meta device"):
                    continue  # refused: its rotary buffers are computed in the constructor
                rows += rows_of(name, source, chosen.quick, folder)
    worst = max(row.value for row in rows if row.unit == "x")
    headline = f"growth of the peak: at most {worst:.2f} x (shards + largest parameter)"
    return finish("Host memory at start", rows, headline, chosen.json)


if __name__ == "__main__":
    raise SystemExit(main())
