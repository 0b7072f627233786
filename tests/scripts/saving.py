"""Checkpoints: whole tensors are loaded after training has started, and saved for anybody."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

import safetensors.torch
import torch

from tests.scripts.case import Found, Wrap, case, rank
from tests.scripts.helpers import (
    Model,
    Run,
    apart,
    common_folder,
    fit,
    from_rank_zero,
    gap,
    gradient_gap,
    mlp,
    pair,
    sgd,
    squares,
    tokens,
    wait_for_all,
    whole,
)  # fmt: skip

EMBEDDING = "transformer.wte.weight"


@case("pytorch#136336")
def restore_the_best(wrap: Wrap) -> Found:
    """`load_state_dict` of whole tensors after training has started."""
    split = {"0.weight": "S0R", "2.weight": "RS0"}
    alone, other = pair(wrap, mlp(32, 64, 8), constraints=split)
    best = {name: value.clone() for name, value in alone.model.state_dict().items()}
    other.step(lambda q: squares(16, 32, 8)(q, 0))
    moved = gap(other.model, alone.model)
    other.model.load_state_dict(best)
    return {"training moved it": moved > 0, "loaded": gap(other.model, alone.model)}


def _trained(wrap: Wrap) -> Run:
    """A GPT-2 with its embedding split, after a step."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=96, n_positions=32)
    )
    run = Run(*wrap(model, sgd(model), constraints={EMBEDDING: "S0R"}))
    ids = tokens(0, 95, 4, 16)
    run.step(lambda q: q(input_ids=ids, labels=ids).loss)
    return run


@case("accelerate#3487, verl#1703", may_refuse=True, dtype=torch.float32)
def torch_save(wrap: Wrap) -> Found:
    """`torch.save` of the state dict on rank 0 writes whole plain tensors."""
    model = _trained(wrap).model
    expected = whole(model.transformer.wte.weight)

    def save() -> bool:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), f"{folder}/model.pt")
            seen = torch.load(f"{folder}/model.pt", weights_only=False)[EMBEDDING]
        return type(seen) is torch.Tensor and torch.equal(seen, expected)

    return {"whole tensors": from_rank_zero(save)}


@case("accelerate#3487, verl#1703", may_refuse=True, dtype=torch.float32)
def save_as_safetensors(wrap: Wrap) -> Found:
    """safetensors of the state dict hold whole tensors."""
    model = _trained(wrap).model
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
        safetensors.torch.save_file(state, file)
        seen = safetensors.torch.load_file(file)[EMBEDDING]
    return {"whole tensors": apart(seen, model.transformer.wte.weight)}


@case("accelerate#3487, verl#1703", may_refuse=True, dtype=torch.float32)
def save_pretrained(wrap: Wrap) -> Found:
    """`save_pretrained` on every rank writes a model that `from_pretrained` reads. (With a process
    group, transformers writes on rank 0 alone.)"""
    from transformers import GPT2LMHeadModel

    model: Model = _trained(wrap).model
    with common_folder() as folder:
        model.save_pretrained(folder)
        wait_for_all()
        seen = GPT2LMHeadModel.from_pretrained(folder)
    return {"whole tensors": apart(seen.transformer.wte.weight, model.transformer.wte.weight)}


@case("FSDP: FullStateDictConfig(rank0_only=True)", rank0_only=(True, False))
def full_state_dict(wrap: Wrap, rank0_only: bool) -> Found:
    """The whole state of a trained engine, on rank 0 or on all ranks, saved by `torch.save`; it is
    loaded from there into another engine in training."""
    split = {"0.weight": "S0R", "2.weight": "RS0"}
    alone, other = pair(wrap, mlp(32, 64, 8), constraints=split)
    fit((alone, other), squares(16, 32, 8))
    if not hasattr(other.model, "full_state_dict"):  # without autopar
        return {"parameters": gap(alone.model, other.model)}
    state = other.model.full_state_dict(rank0_only=rank0_only)
    expected = alone.model.state_dict()
    found: Found = {"whose": bool(state) == (rank() == 0 or not rank0_only)}
    for name, x in state.items():
        found[f"saved {name}"] = type(x) is torch.Tensor and apart(x, expected[name])
    fit((other,), squares(16, 32, 8))
    found["training moved it"] = gap(other.model, alone.model) > 0
    outcome = other.model.load_full_state_dict(state if rank() == 0 or not rank0_only else None)
    found["keys"] = not outcome.missing_keys and not outcome.unexpected_keys
    fit((alone, other), squares(16, 32, 8))
    return found | {"trained on": gap(other.model, alone.model)}


@case("accelerate: gradient accumulation")
def accumulate_without_sync(wrap: Wrap) -> Found:
    """A loop for DDP, that accumulates within `no_sync`; gradients are right within it, too."""
    alone, other = pair(wrap, mlp(32, 64, 8))
    loss = squares(16, 32, 8)
    found: Found = {}
    for step in range(6):
        loss(alone.model, step).backward()
        with getattr(other.model, "no_sync", nullcontext)():
            loss(other.model, step).backward()
        found[f"gradients {step}"] = gradient_gap(alone.model, other.model)
        if step % 3 == 2:
            for run in (alone, other):
                run.optimizer.step()
                run.optimizer.zero_grad()
    return found | {"parameters": gap(alone.model, other.model)}
