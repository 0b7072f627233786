"""What the ranks run to try precision policies; every function returns plain data."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from autopar import auto_engine


def _autocast(how: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def bits_of_split_storage(how: str) -> bool:
    """Whether three steps on split weights have the bits of those on one device."""
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    policy = "bf16" if how == "policy" else None
    layouts = {"0.weight": "S0R reshard", "2.weight": "RS0", "0.bias": "S0"}
    layouts |= dict.fromkeys(("inputs.input", "0", "1", "2"), "RR")
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, optimizer = auto_engine(model, optimizer, "4", precision=policy, constraints=layouts)
    alone = _model()
    beside = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(3):
        with _autocast(how):
            loss = engine(x).float().square().mean()
            if how == "policy":
                cast = {n: p.to(torch.bfloat16) for n, p in alone.named_parameters()}
                out = torch.func.functional_call(alone, cast, (x.to(torch.bfloat16),))
            else:
                out = alone(x)
            expected = out.float().square().mean()
        loss.backward()
        expected.backward()
        for o in (optimizer, beside):
            o.step()
            o.zero_grad()
    pairs = zip(engine.parameters(), alone.parameters(), strict=True)
    split = isinstance(engine.get_parameter("0.weight"), DTensor)
    return split and all(torch.equal(p.full_tensor(), q) for p, q in pairs)


def uneven_gradients(how: str, microbatches: int | None = None) -> float:
    """A gradient that is 256 for one rank's sample and 0.5 for each of the others', in each of the
    microbatches, which gather weights."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    policy = "bf16" if how == "policy" else None
    layouts = {"0.weight": "S0R", "inputs.input": "S0R", "0": "S0R"}
    memory = None if microbatches is None else "1GiB"
    engine, _ = auto_engine(
        model, None, "4", precision=policy, constraints=layouts, microbatches=microbatches,
        memory=memory,
    )  # fmt: skip
    x = torch.tensor([[256.0], [0.5], [0.5], [0.5]] * (microbatches or 1)).expand(-1, 4)
    x = x.contiguous()
    with _autocast(how):
        out = engine(x)
    out.float().sum().backward()
    gradient = engine.get_parameter("0.weight").grad.full_tensor()
    return gradient.min().item()  # rows are summed in other orders of ranks


def overflow_on_one_rank() -> tuple[bool, float]:
    """Whether a step with an infinite gradient changed weights, and the scale after it."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    engine, optimizer = auto_engine(
        model, optimizer, "4", precision="fp16", batch="local", constraints={"weight": "S0R"}
    )
    x = torch.full((2, 4), 1e4 if rank == 2 else 1e-4)
    before = engine.weight.full_tensor().clone()
    scaler.scale(engine(x).float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return not torch.equal(before, engine.weight.full_tensor()), scaler.get_scale()


def read_in_another_dtype(folder: str) -> tuple[str, float]:
    """The dtype of parameters whose checkpoint is bfloat16, and how far they are from it."""
    from safetensors.torch import load_file

    from autopar import deferred_init

    with deferred_init():
        model = _model()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    engine, _ = auto_engine(
        model, None, "4", precision="bf16", weights=f"{folder}/model.safetensors",
        constraints={"0.weight": "S0R"}, example_inputs=x,
    )  # fmt: skip
    stored = load_file(f"{folder}/model.safetensors")["0.weight"]
    weight = engine.get_parameter("0.weight")
    return str(weight.dtype), (weight.full_tensor() - stored.float()).abs().max().item()
