"""The contestants of `benchmarks.offload`: a Llama, and the ways to train it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.offload_link import Link, emulated

BANDWIDTH = 2e9  # bytes/s of the emulated link
VOCABULARY, TOKENS = 2048, 128

_BUCKET = 200_000  # elements, of DeepSpeed's buffers

_BOTH = (False, True)
# of the others, of which the best counts
SETTINGS: dict[str, dict[str, Sequence[Any]]] = {
    "FSDP2": {"fine": _BOTH, "checkpoint": _BOTH},
    "DeepSpeed": {"stage": (2, 3), "checkpoint": _BOTH},
    "torchao's recipe": {"checkpoint": _BOTH},
}


def build(size: int) -> tuple[Any, dict[str, Any]]:
    """A Llama that returns its loss, and a batch."""
    import torch
    import transformers as hf

    from benchmarks.losses import LossOnly

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64 * size, num_hidden_layers=size, intermediate_size=172 * size,
        num_attention_heads=size, num_key_value_heads=size, vocab_size=VOCABULARY, use_cache=False,
        bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    ids = torch.randint(0, VOCABULARY, (2, TOKENS))
    return LossOnly(hf.LlamaForCausalLM(config)), {"input_ids": ids, "labels": ids}


def parameters(size: int) -> int:
    """Of a model."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in build(size)[0].parameters())


@dataclass
class Trainer:
    """A contestant that trains.

    Args:
        step: of training.
        found: its peak, and what else it says.
        link_s: of what it moves, if that is computed: the rest of the step hides it.
    """

    step: Callable[[], None]
    found: dict[str, Any]
    link_s: float = 0.0


# -- contestants --------------------------------------------------------------------------------


def autopar(size: int, budget: float) -> Trainer:
    """Train within a budget; if that is too small, say so."""
    import torch

    from autopar import auto_engine
    from autopar.cluster.local import as_cluster
    from autopar.cluster.tiers import Tier
    from autopar.comm import world
    from autopar.errors import InfeasibleError
    from autopar.testing.live_memory import LiveMemory, training_state_bytes

    world.stop()
    cluster = as_cluster("1")
    device = replace(cluster.device, overlaps=True)
    cluster = replace(cluster, device=device, tiers=(Tier("host", BANDWIDTH, 2e-5),))
    model, batch = build(size)
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        model, optimizer = auto_engine(
            model, optimizer, cluster, memory=budget, example_inputs=batch, progress=False
        )
    except InfeasibleError as error:
        return Trainer(lambda: None, {"peak": float("inf"), "least": error.smallest_bytes})
    link = Link(BANDWIDTH)
    held = sum(x.nbytes for x in (*batch.values(), *model.buffers()))
    if not model.plan.states_on:
        held += sum(training_state_bytes(model, optimizer).values())

    def step() -> None:
        with emulated(link):
            model(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    step()
    moved = link.nbytes
    with emulated(link), LiveMemory() as live:
        model(**batch).backward()
    moved = link.nbytes - moved
    optimizer.step()
    optimizer.zero_grad()
    return Trainer(
        step,
        {
            "peak": live.peak + held, "predicted": model.memory_plan.peak_bytes + held,
            "states_on": model.plan.states_on, "moved": moved,
        },
    )  # fmt: skip


def _peak_on_device(live: Any, on_host: Sequence[Any]) -> int:
    """The peak without storages that stay, which are on the host."""
    gone = {live.numbers.get(t.untyped_storage()._cdata) for t in on_host}
    kept = (n for k, n in live.changes if k not in gone)
    return max(itertools.accumulate(kept, initial=0))


def fsdp(size: int, fine: bool, checkpoint: bool) -> Trainer:
    """FSDP2 with `CPUOffloadPolicy` on one process.

    Args:
        fine: every linear layer and embedding is gathered by itself; else every block.
        checkpoint: activations of blocks are recomputed.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        checkpoint_wrapper,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    from autopar.testing.live_memory import LiveMemory

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    model, batch = build(size)
    blocks = model.model.model.layers
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": CPUOffloadPolicy(pin_memory=False)}
    for k, block in enumerate(blocks):
        if fine:
            for module in block.modules():
                if isinstance(module, torch.nn.Linear):
                    fully_shard(module, **options)
        if checkpoint:
            block = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
            blocks[k] = block
        fully_shard(block, **options)
    for module in (model.model.model.embed_tokens, model.model.lm_head) if fine else ():
        fully_shard(module, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with LiveMemory() as live:
        model(**batch).backward()
    grads = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    peak = _peak_on_device(live, grads) + sum(x.nbytes for x in batch.values())
    peak += sum(b.nbytes for b in model.buffers())
    optimizer.step()
    optimizer.zero_grad()
    total = sum(p.nbytes for p in model.parameters())
    # parameters twice, since they are gathered again, and gradients once
    return Trainer(step, {"peak": peak}, 3 * total / BANDWIDTH)


def zero(size: int, stage: int, checkpoint: bool) -> Trainer:
    """DeepSpeed on one process.

    Args:
        stage: 2 has parameters on the device, 3 has them on the host.
        checkpoint: activations of blocks are recomputed.
    """
    import torch
    import torch.distributed as dist

    from autopar.testing.live_memory import LiveMemory

    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    import deepspeed

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, batch = build(size)
    if checkpoint:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    total = sum(p.nbytes for p in model.parameters())
    offload = {"device": "cpu"}
    options: dict[str, Any] = {
        "stage": stage, "offload_optimizer": offload, "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
    }  # fmt: skip
    if stage == 3:  # nothing is kept or gathered ahead
        options |= {"offload_param": offload, "stage3_prefetch_bucket_size": 0}
        options |= dict.fromkeys(
            ("stage3_param_persistence_threshold", "stage3_max_live_parameters",
             "stage3_max_reuse_distance"), 0,
        )  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        config={
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": options,
            "zero_force_ds_cpu_optimizer": False,
        },
        dist_init_required=False,
    )  # fmt: skip

    def backward() -> None:
        engine.backward(engine(**batch))

    def step() -> None:
        backward()
        engine.step()

    step()
    with LiveMemory() as live:
        backward()
    engine.step()
    peak = live.peak + (total if stage == 2 else 0) + sum(x.nbytes for x in batch.values())
    # gradients, and parameters: to the device after the step, or twice when they are gathered
    return Trainer(step, {"peak": peak}, stage * total / BANDWIDTH)


def by_hand(size: int, checkpoint: bool) -> Trainer:
    """torchao's recipe: parameters on the device, gradients and the step on the host."""
    import torch

    from autopar.testing.live_memory import LiveMemory

    model, batch = build(size)
    if checkpoint:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    link, moving = Link(BANDWIDTH), dict[Any, Any]()
    hosts = {p: p.detach().clone() for p in model.parameters()}
    grads = {p: torch.empty_like(p) for p in hosts}
    optimizers = {}
    for p, host in hosts.items():
        host.grad = grads[p]
        optimizers[p] = torch.optim.AdamW([host], fused=True)

        def moved(p: Any) -> None:
            moving[p] = link.copy(grads[p], p.grad), p.grad
            p.grad = None

        p.register_post_accumulate_grad_hook(moved)

    def backward() -> None:
        model(**batch).backward()

    def step() -> None:
        copies = []
        for p, (done, _) in moving.items():
            done.wait()
            optimizers[p].step()
            copies.append(link.copy(p, hosts[p]))
        for done in copies:
            done.wait()
        moving.clear()

    def whole() -> None:
        backward()
        step()

    whole()
    with LiveMemory() as live:
        backward()
        held = list(model.parameters())
    moving_now = [g for _, g in moving.values()]
    # as a stream would, the device frees a gradient when it has moved
    peak = _peak_on_device(live, moving_now) + sum(p.nbytes for p in held)
    peak += sum(x.nbytes for x in (*batch.values(), *model.buffers()))
    step()
    return Trainer(whole, {"peak": peak})


TRAINERS: dict[str, Callable[..., Trainer]] = {
    "autopar": autopar, "FSDP2": fsdp, "DeepSpeed": zero, "torchao's recipe": by_hand,
}  # fmt: skip
