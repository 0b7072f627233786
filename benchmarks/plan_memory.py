"""Predicted memory against the measured peak of live bytes, on one and on four processes here.

Models of a few million parameters train three steps on one device, and on a 2x2 mesh over Gloo by
the solver's plan for fast links. Measured is the most that is alive during forward and backward of
the last step: parameters, optimizer state, buffers, and every tensor that the step makes; on a mesh
on the fullest rank. It is compared with

* the plan: what the search predicts for its own choices, before the program exists (on the mesh);
* the schedule that keeps everything, and one for three quarters of what that makes (or the smallest
  schedule): the simulation of the program that runs, operator by operator. "step" is what the step
  makes, by itself. On the mesh, the tighter schedule runs once more as on devices that communicate
  beside compute, with prefetched gathers ("ahead").
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console

MODELS = (
    "GPT-2", "GPT-2 in bf16", "Llama", "Llama in bf16", "ResNet-50", "ViT", "Mixtral",
)  # fmt: skip
# of the measured, in percent
PLAN_TARGET, SCHEDULE_TARGET = 5.0, 3.0
_TIGHT = 0.75
_AMPLE = "64GiB"


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A model that returns its loss, and a global batch."""
    import timm
    import torch
    import transformers as hf

    from benchmarks.losses import Classifier, LossOnly

    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 96, 96), torch.randint(0, 100, (16,))
    if name == "ResNet-50":
        return Classifier(timm.create_model("resnet50", num_classes=100)), {
            "images": images, "labels": labels,
        }  # fmt: skip
    if name == "ViT":
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=96, patch_size=8, depth=4, num_classes=100
        )
        return Classifier(vit), {"images": images, "labels": labels}
    ids = torch.randint(0, 2000, (8, 64))
    batch = {"input_ids": ids, "labels": ids}
    shape = {
        "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
        "num_hidden_layers": 4, "vocab_size": 2000, "use_cache": False, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    if name == "GPT-2":
        config = hf.GPT2Config(
            n_layer=4, n_embd=256, n_head=4, vocab_size=5003, use_cache=False, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return LossOnly(hf.GPT2LMHeadModel(config)), batch
    if name == "Llama":
        llama = hf.LlamaConfig(**shape, intermediate_size=768)
        return LossOnly(hf.LlamaForCausalLM(llama)), batch
    mixtral = hf.MixtralConfig(**shape, intermediate_size=384, num_local_experts=4)
    return LossOnly(hf.MixtralForCausalLM(mixtral)), batch


def train(name: str, mesh: str, overlaps: bool = False, **options: Any) -> tuple[Any, int, int]:
    """The engine after three steps; bytes between steps, and the peak of what the last one made."""
    import torch

    from autopar import auto_engine
    from autopar.testing.live_memory import LiveMemory, training_state_bytes
    from tests.clusters import eager_to_shard

    name, _, precision = name.partition(" in ")
    options["precision"] = precision or None
    built, batch = build(name)
    optimizer = torch.optim.AdamW(built.parameters())
    model, optimizer = auto_engine(
        built, optimizer, eager_to_shard(mesh, overlaps=overlaps), **options
    )
    for _ in range(3):
        held = training_state_bytes(model, optimizer)
        with LiveMemory() as live, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, sum(held.values()), live.peak


def rank(name: str, mesh: str) -> None:
    """One process of a mesh; rank 0 answers for the fullest."""
    import torch
    import torch.distributed as dist

    from autopar.errors import InfeasibleError

    peaks: dict[str, tuple[float, float]] = {}  # predicted, measured

    def record(what: str, predicted: float, measured: float) -> None:
        values = torch.tensor([predicted, measured], dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        peaks[what] = tuple(values.tolist())

    def scheduled(what: str, **options: Any) -> tuple[Any, float, float]:
        model, held, peak = train(name, mesh, **options)
        copied = sum(b.nbytes for b in model.buffers())
        expected = model.memory_plan.peak_bytes + copied
        record(f"{what}, step", expected, peak)
        record(what, held + expected, held + peak)
        return model, held, expected

    if mesh != "1":
        model, held, peak = train(name, mesh)
        record("plan", model.plan.memory.total_bytes, held + peak)
    model, held, expected = scheduled("all kept", memory=_AMPLE)
    budget = torch.tensor(held + _TIGHT * expected)
    dist.all_reduce(budget, dist.ReduceOp.MAX)
    memory = budget.item()
    for suffix, overlaps in (("", False), (", ahead", True))[: 1 + (mesh != "1")]:
        options = {"overlaps": overlaps, "plan": model.plan}
        try:
            scheduled(f"3/4 of the step{suffix}", memory=memory, **options)
        except InfeasibleError as error:  # on all ranks
            scheduled(f"the smallest{suffix}", memory=error.smallest_bytes, **options)
    if dist.get_rank() == 0:
        common.answer(peaks)
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="models whose name has this")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    rows: list[Row] = []
    names = MODELS[:1] if options.quick else MODELS
    if options.only:
        names = tuple(n for n in names if any(word in n for word in options.only))
    for name in names:
        for mesh, count in (("1", 1), ("2x2", 4)):
            peaks = common.on_ranks("benchmarks.plan_memory", count, name, mesh)
            case = f"{name}, mesh {mesh}"
            for what, (predicted, measured) in peaks.items():
                console.print(
                    f"{case}, {what}: {measured / 2**20:.1f} MiB measured, "
                    f"{predicted / 2**20:.1f} predicted", markup=False,
                )  # fmt: skip
                target = PLAN_TARGET if what == "plan" else SCHEDULE_TARGET
                off = 100 * abs(predicted / measured - 1)
                rows.append(Row(case, f"{what}, measured", measured / 2**20, "MiB"))
                rows.append(Row(case, f"{what}, predicted off by", off, "%", target))
    worst = {
        kind: max((r.value for r in rows if r.target == target), default=0.0)
        for kind, target in (("plan", PLAN_TARGET), ("schedule", SCHEDULE_TARGET))
    }
    headline = (
        f"memory as scheduled is within {worst['schedule']:.1f}% of the measured peak, as planned "
        f"before the program exists within {worst['plan']:.1f}%"
    )
    return common.finish("Memory of a rank", rows, headline, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
    else:
        sys.exit(main())
