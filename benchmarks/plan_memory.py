"""Predicted memory against the measured peak of live bytes, on four processes on this machine.

GPT-2, a Llama and a ResNet of a few million parameters train three steps on a 2x2 mesh over Gloo,
by the solver's plan for fast links. Measured is the most that is alive during forward and backward
of the last step: parameters, optimizer state, buffers, and every tensor that the step makes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console

MODELS = ("GPT-2", "Llama", "ResNet")
# of the measured, in percent
TARGET = 5.0


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A model that returns its loss, and a global batch."""
    import timm
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from benchmarks.losses import Classifier, LossOnly

    torch.manual_seed(0)
    if name == "ResNet":
        images, labels = torch.randn(8, 3, 64, 64), torch.randint(0, 100, (8,))
        model = Classifier(timm.create_model("resnet18", num_classes=100))
        return model, {"images": images, "labels": labels}
    ids = torch.randint(0, 2000, (8, 64))
    if name == "GPT-2":
        config = GPT2Config(
            n_layer=4, n_embd=256, n_head=4, vocab_size=5003, use_cache=False, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return LossOnly(GPT2LMHeadModel(config)), {"input_ids": ids, "labels": ids}
    llama = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_attention_heads=8, num_key_value_heads=4,
        num_hidden_layers=4, vocab_size=2000, use_cache=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return LossOnly(LlamaForCausalLM(llama)), {"input_ids": ids, "labels": ids}


def rank(name: str) -> None:
    """One process: three steps, and what this rank held; rank 0 answers for the fullest."""
    import torch
    import torch.distributed as dist

    from autopar import auto_engine
    from autopar.runtime.memory import LiveBytes, training_state_bytes
    from tests.clusters import eager_to_shard

    built, batch = build(name)
    model, optimizer = auto_engine(
        built, torch.optim.AdamW(built.parameters()), eager_to_shard("2x2")
    )
    for _ in range(3):
        held = training_state_bytes(model, optimizer)
        with LiveBytes() as live, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.tensor(float(sum(held.values()) + live.peak))
    dist.all_reduce(measured, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        predicted = model.plan.memory.total_bytes
        common.answer({"predicted": predicted, "measured": measured.item()})
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    rows, errors = [], []
    for name in MODELS[:1] if options.quick else MODELS:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
            "-m", "benchmarks.plan_memory", "--rank", name,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        off = 100 * (found["predicted"] / found["measured"] - 1)
        errors.append(abs(off))
        case = f"{name}, mesh 2x2"
        rows += [
            Row(case, "predicted", found["predicted"] / 2**20, "MiB"),
            Row(case, "measured", found["measured"] / 2**20, "MiB"),
            Row(case, "off by", abs(off), "%", TARGET),
        ]
    headline = f"predicted memory is within {max(errors):.1f}% of the measured peak"
    return common.finish("Memory of a rank", rows, headline, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2])
    else:
        sys.exit(main())
