"""Precision policies: bytes that weights and gradients move by dtype, and the loss they end with.

A small GPT-2 trains on a mesh of 4 with every weight split over all ranks (ZeRO-3): under no
policy, under policies and under autocast; and under FSDP2 with the same dtypes. Bytes are counted
as one rank passes them to collectives: what it gathers, and what it reduces. The loss is compared
with that of float32 after the same steps on the same batches.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import Row, answer, finish, machine, on_ranks, parser

RANKS, MIB = 4, 2**20
POLICIES = ("float32", "bf16", "bf16, sums in bf16", "autocast")
_GATHERS, _SUMS = ("all_gather", "allgather"), ("reduce_scatter", "all_reduce", "allreduce")
_WORDS, _LENGTH = 503, 32


def build(steps: int) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """The model, and batches that are the same on every rank."""
    import transformers as hf

    from benchmarks.losses import LossOnly

    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_layer=4, n_embd=128, n_head=4, vocab_size=_WORDS, n_positions=_LENGTH, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    # sequences that can be learned: each token is the one before plus a number of the sequence's
    batches = []
    for _ in range(steps):
        start, stride = torch.randint(0, _WORDS, (2, 16, 1), generator=generator)
        ids = (start + (stride % 7 + 1) * torch.arange(_LENGTH)) % _WORDS
        batches.append({"input_ids": ids, "labels": ids})
    return LossOnly(hf.GPT2LMHeadModel(config)), batches


class Moved(TorchDispatchMode):
    """Counts bytes that collectives of at least a KiB gather and reduce, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if "c10d" in name:
            kind = "gathered" if any(k in name for k in _GATHERS) else ""
            kind = "summed" if any(k in name for k in _SUMS) else kind
            # the larger side: the result of a gather, the operand of a sum
            tensors = [
                t
                for t in torch.utils._pytree.tree_leaves((args, kwargs, result))
                if isinstance(t, torch.Tensor)
            ]
            if kind and tensors:
                largest = max(tensors, key=lambda t: t.nbytes)
                if largest.nbytes >= 1024:
                    dtype = str(largest.dtype).removeprefix("torch.")
                    self.bytes[f"{kind}, {dtype}"] += largest.nbytes
        return result


def start(how: str, model: torch.nn.Module, fsdp: bool) -> tuple[torch.nn.Module, Any]:
    """The model and its optimizer, distributed."""
    from autopar import Precision, auto_engine

    if not fsdp:
        policy = {
            "bf16": Precision("bf16"),
            "bf16, sums in bf16": Precision("bf16", reductions="bf16"),
        }.get(how)  # fmt: skip
        wanted = {
            name: "S0R reshard" for name, p in model.named_parameters() if p.ndim == 2
        } | {"inputs.*": "S0R"}  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return auto_engine(
            model, optimizer, str(RANKS), precision=policy, constraints=wanted, progress=None
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    short = None if how in ("float32", "autocast") else torch.bfloat16
    sums = {"bf16": torch.float32, "bf16, sums in bf16": torch.bfloat16}.get(how)
    mesh = init_device_mesh("cpu", (RANKS,))
    kind = MixedPrecisionPolicy(param_dtype=short, reduce_dtype=sums)
    for block in model.model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=kind)
    fully_shard(model, mesh=mesh, mp_policy=kind)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(how: str, steps: int, fsdp: bool) -> tuple[dict[str, int], float]:
    """Bytes of the last step but one, and the mean loss over the last tenth of the steps."""
    model, batches = build(steps)
    model, optimizer = start(how, model, fsdp)
    rank, losses, moved = dist.get_rank(), [], Moved()
    for step, batch in enumerate(batches):
        if fsdp:  # takes its own samples
            batch = {name: x.chunk(RANKS)[rank] for name, x in batch.items()}
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
        with moved if step == steps - 2 else nullcontext():
            with autocast:
                loss = model(**batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach().float()
        if fsdp:
            dist.all_reduce(value)
            value /= RANKS
        losses.append(value.item())
    last = losses[-max(1, steps // 10) :]
    return dict(moved.bytes), sum(last) / len(last)


def run_rank(how: str, steps: int, fsdp: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    moved, loss = train(how, steps, fsdp)
    if dist.get_rank() == 0:
        answer({"moved": moved, "loss": loss})
    dist.destroy_process_group()


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    options.add_argument("--steps", type=int, default=200)
    chosen = options.parse_args()
    if chosen.rank:
        how, steps, who = chosen.rank
        run_rank(how, int(steps), who == "FSDP2")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(machine())
    steps = 4 if chosen.quick else chosen.steps
    rows, exact = [], {}
    for how in POLICIES:
        for who in ("autopar", "FSDP2"):
            got = on_ranks("benchmarks.precision", RANKS, how, str(steps), who)
            exact.setdefault(who, got["loss"])
            case = f"{how}, {who}"
            rows += [
                Row(case, f"{kind} per rank and step", n / MIB, "MiB")
                for kind, n in sorted(got["moved"].items())
            ]
            rows.append(Row(case, f"loss after {steps} steps", got["loss"], "nats"))
            rows.append(Row(case, "the same, from float32", got["loss"] - exact[who], "nats"))
    gathered = {
        how: sum(r.value for r in rows if r.case == f"{how}, autopar" and "gathered" in r.metric)
        for how in POLICIES
    }
    share = gathered["bf16"] / gathered["float32"]
    rows.append(Row("bf16, autopar", "gathered, of float32's", share, "x", 0.55))
    headline = f"bf16 gathers {share:.2f} of float32's bytes"
    return finish("Precision policies", rows, headline, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
