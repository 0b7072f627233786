"""The largest Llama that trains within a budget of device memory, with its states on the host.

Device memory is emulated by a budget, and the link to the host by its bandwidth: a copy takes its
bytes over the bandwidth, in a queue beside compute. A reference model's parameters, gradients and
AdamW moments, all in float32, are its states; budgets are 1/2 to 1/16 of them. Models grow in width
and depth together.

Contestants, each with AdamW fused on the host, and each by its best setting:

* autopar with a tier "host" (`step_beside` compares when its optimizer steps);
* FSDP2 with `CPUOffloadPolicy`, as it runs on a CPU: layers of blocks, or of every linear layer;
  with and without activation checkpointing. It copies nothing on a CPU, so the link's time is
  computed and taken to be hidden as far as there is compute;
* DeepSpeed, if it is installed, on its accelerator "cpu": ZeRO-Offload (stage 2, with the optimizer
  on the host), and stage 3 with parameters there too; with and without checkpointing. The time of
  the link as with FSDP2. The optimizer is torch's fused one, as `DeepSpeedCPUAdam` is compiled
  first;
* torchao's recipe by hand (its class takes GPUs only): gradients move in hooks, as they are made,
  each parameter is stepped on the host and copied back.

Steps that are compared take turns in one process, as the machine may be busy, and the least time of
each counts. The same is counted for all: every storage that a step makes until it is freed, and
what stays on the device between steps: nothing but inputs for autopar, FSDP2 and stage 3,
parameters for ZeRO-Offload and the recipe. A gradient that is a result of FSDP2's step counts as on
the host as soon as it exists.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console

BANDWIDTH = 2e9  # bytes/s of the emulated link
SHARES = (2, 4, 8, 16)
REFERENCE = 4  # of the sizes
SIZES = (2, 3, 4, 5, 6, 7, 8)  # of 64 in width, and as many layers
QUICK = (3, 4)
PREDICTED, VOCABULARY, TOKENS = 3.0, 2048, 128

_BUCKET = 200_000  # elements, of DeepSpeed's buffers

_BOTH = (False, True)
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


class Link:
    """A link of stated bandwidth: copies run one after another in a thread, and take their time."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self.nbytes = bandwidth, 0
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def copy(self, target: Any, source: Any) -> threading.Event:
        """Start a copy."""
        done = threading.Event()
        self.nbytes += target.nbytes
        self._jobs.put((target.detach(), source.detach(), done))
        return done

    def _run(self) -> None:
        import torch

        while True:
            target, source, done = self._jobs.get()
            start = time.perf_counter()
            with torch.no_grad():
                target.copy_(source)
            # the copy of this machine's memory is a part of it
            time.sleep(max(0.0, start + target.nbytes / self.bandwidth - time.perf_counter()))
            del target, source
            done.set()


@contextmanager
def emulated(link: Link) -> Iterator[None]:
    """autopar's copies to and from the host go over a link."""
    from autopar.comm import host_copies

    running: dict[int, threading.Event] = {}
    before = host_copies.copy, host_copies.wait

    def copy(target: Any, source: Any) -> None:
        running[target.untyped_storage()._cdata] = link.copy(target, source)

    def wait(target: Any) -> None:
        done = running.pop(target.untyped_storage()._cdata, None)
        if done is not None:
            done.wait()

    host_copies.copy, host_copies.wait = copy, wait  # type: ignore[assignment]
    try:
        yield
    finally:
        host_copies.copy, host_copies.wait = before


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


def worker(arguments: dict[str, Any]) -> None:
    """Measurements in a process of their own: peaks of one case after another, or the times of
    steps of several cases that take turns."""
    import torch

    torch.set_num_threads(1)
    rounds = arguments["rounds"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, trainers = [], []
        for who, case in arguments["cases"]:
            gc.collect()
            trainer = TRAINERS[who](**case)
            found.append(trainer.found)
            trainers.append(trainer if rounds else None)
        times: list[list[float]] = [[] for _ in trainers]
        for order in common.turns(len(trainers), rounds):
            for k in order:
                start = time.perf_counter()
                trainers[k].step()
                times[k].append(time.perf_counter() - start)
        for k, trainer in enumerate(trainers):
            if trainer is not None:
                found[k]["seconds"] = max(min(times[k]), trainer.link_s)
    common.answer({"found": found})


# -- the contest --------------------------------------------------------------------------------


Case = tuple[str, dict[str, Any]]


def _measured(cases: Sequence[Case], rounds: int = 0) -> list[dict[str, Any]]:
    answer = common.in_fresh_process(
        "benchmarks.offload", {"cases": list(cases), "rounds": rounds}, timeout_s=7200.0
    )
    for case, found in zip(cases, answer["found"], strict=True):
        console.print(f"{case}: {found}", markup=False)
    return list(answer["found"])


def _peaks(sizes: Sequence[int], budget: float) -> dict[str, dict[int, list[tuple[float, Case]]]]:
    """What the others take with each of their settings, by size, up to the first that is too large
    for a budget."""
    found: dict[str, dict[int, list[tuple[float, Case]]]] = {}
    for who, settings in SETTINGS.items():
        if who == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
            console.print("no rows of DeepSpeed: it is not installed", markup=False)
            continue
        found[who] = {}
        for size in sizes:
            cases: list[Case] = [
                (who, {"size": size, **dict(zip(settings, values, strict=True))})
                for values in itertools.product(*settings.values())
            ]
            results = _measured(cases)
            found[who][size] = [(r["peak"], c) for c, r in zip(cases, results, strict=True)]
            if min(peak for peak, _ in found[who][size]) > budget:
                break
    return found


def _largest(of: dict[int, list[tuple[float, Case]]], budget: float) -> int:
    return max(
        (s for s, tried in of.items() if any(peak <= budget for peak, _ in tried)), default=0
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", metavar="SHARE", help="one of the budgets, such as 1/8")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    sizes, rounds = (QUICK, 5) if options.quick else (SIZES, 6)
    shares = SHARES[2:3] if options.quick else SHARES
    shares = tuple(n for n in shares if options.only in (None, f"1/{n}"))
    count = {size: parameters(size) for size in sizes}
    budgets = {n: 16 * count[REFERENCE] / n for n in shares}
    others = _peaks(sizes, max(budgets.values()))
    rows: list[Row] = []
    worst = 0.0
    for share, budget in budgets.items():
        case = f"1/{share} of the states, {budget / 2**20:.1f} MiB"
        best = {name: _largest(of, budget) for name, of in others.items()}
        trained: dict[int, list[tuple[str, dict[str, Any]]]] = {}
        for size in sorted({*best.values()} - {0}) + [s for s in sizes if s > max(best.values())]:
            contestants: list[Case] = [("autopar", {"size": size, "budget": budget})]
            for of in others.values():
                contestants += [c for peak, c in of.get(size, []) if peak <= budget]
            found = _measured(contestants, rounds)
            if found[0]["peak"] > budget:
                break
            names = [who for who, _ in contestants]
            trained[size] = list(zip(names, found, strict=True))
            if size > max(best.values()):  # one size more is enough to be larger
                break
        largest = max(trained, default=0)
        rows.append(Row(case, "parameters, autopar (or more)", count.get(largest, 0) / 1e6, "M"))
        for name in others:
            size = best[name]
            rows.append(Row(case, f"parameters, {name}", count.get(size, 0) / 1e6, "M"))
            share_of = 100 * count.get(size, 0) / count[largest] if largest else 1000.0
            end = 100.0 if largest == sizes[-1] else 99.9  # larger, unless no size is
            rows.append(Row(case, f"parameters, {name} of autopar", share_of, "%", end))
        for s, results in trained.items():
            size_text = f"{count[s] / 1e6:.1f} M"
            found_here = results[0][1]
            seconds = found_here["seconds"]
            rows.append(Row(case, f"step of {size_text}, autopar", 1e3 * seconds, "ms"))
            for name in others:
                times = [result["seconds"] for who, result in results if who == name]
                if times:
                    ratio = 100 * seconds / min(times)
                    rows.append(Row(case, f"step of {size_text}, {name}", 1e3 * min(times), "ms"))
                    rows.append(Row(case, f"autopar of {name}, {size_text}", ratio, "%", 100.0))
            off = 100 * abs(found_here["predicted"] / found_here["peak"] - 1)
            worst = max(worst, off)
            used = 100 * found_here["peak"] / budget
            rows.append(Row(case, f"peak of {size_text}, of the budget", used, "%", 100.0))
            rows.append(Row(case, f"peak of {size_text}, predicted off by", off, "%", PREDICTED))
    headline = f"predicted peaks are within {worst:.2f}% of the measured ones"
    title = f"States on the host, over a link of {BANDWIDTH / 1e9:g} GB/s"
    return common.finish(title, rows, headline, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
