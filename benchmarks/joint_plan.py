"""The joint plan of sharding and schedule, compared with sharding first and recomputing after.

Planned, not run: a GPT-2 and a Llama stack on four L4 over PCIe, at three budgets between the
memory of the fastest plan and that of its parameters and optimizer state. Per budget the predicted
step (the plan's, and what recomputation, re-gathers and reloads add) of

* sharding first: the fastest plan without a limit, scheduled within the budget;
* no schedule: the fastest plan that fits without one;
* the joint plan (`autopar/planner/joint.py`).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console

MODELS = ("GPT-2", "Llama")
SHARES = (0.75, 0.5, 0.35)  # of what the fastest plan needs beside parameters and state
MESH, DEVICE = "4", "L4"


def build(name: str, quick: bool) -> tuple[Any, dict[str, Any]]:
    """A model that returns its loss, on the meta device, and a batch."""
    import torch
    import transformers as hf

    from benchmarks.losses import LossOnly

    layers, width, length = (2, 256, 128) if quick else (4, 1024, 512)
    ids = torch.zeros((16, length), dtype=torch.int64)
    with torch.device("meta"):
        if name == "GPT-2":
            gpt2 = hf.GPT2Config(
                n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=8000,
                n_positions=length, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model: Any = LossOnly(hf.GPT2LMHeadModel(gpt2))
        else:
            llama = hf.LlamaConfig(
                hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
                num_attention_heads=width // 64, vocab_size=8000, use_cache=False,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model = LossOnly(hf.LlamaForCausalLM(llama))
    return model, {"input_ids": ids, "labels": ids}


def compare(name: str, quick: bool) -> list[Row]:
    """The rows of a model."""
    from autopar import ClusterInfo
    from autopar.errors import InfeasibleError
    from autopar.planner.estimate import estimate_memory
    from autopar.planner.joint import plan_jointly
    from autopar.planner.planner import build_problem

    model, batch = build(name, quick)
    problem = build_problem(model, (), batch, cluster=ClusterInfo.of(MESH, DEVICE))
    unlimited = problem.decide(math.inf)
    memory = estimate_memory(problem.space, unlimited.choices)
    state = memory.parameters_bytes + memory.optimizer_bytes + memory.buffers_bytes
    rows = []
    for share in SHARES:
        budget = state + share * (memory.total_bytes - state)
        start = time.process_time()
        case = f"{name}, {budget / 2**20:.0f} MiB of {memory.total_bytes / 2**20:.0f}"
        limited = replace(problem, budget_bytes=budget)
        try:
            joint = plan_jointly(limited)
        except InfeasibleError as error:
            console.print(f"{case}: {error}", markup=False)
            continue
        first = joint.tried[0].step_us
        best = min(t.step_us for t in joint.tried if not math.isnan(t.added_us))
        try:
            fitting = limited.decide().step_us
        except InfeasibleError:
            fitting = math.inf
        for what, us in (("sharding first", first), ("no schedule", fitting)):
            rows.append(Row(case, what, us * 1e-3, "ms"))
        fastest = min(first, fitting) * 1e-3
        rows.append(Row(case, "joint plan", best * 1e-3, "ms", round(fastest + 5e-4, 3)))
        rows.append(Row(case, "planned in", time.process_time() - start, "s"))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan; returns the exit code."""
    options = common.parser(__doc__ or "").parse_args(arguments)
    console.print(common.machine(), markup=False)
    rows = [row for name in MODELS for row in compare(name, options.quick)]
    joint = [r for r in rows if r.metric == "joint plan"]
    firsts = [r for r in rows if r.metric == "sharding first"]
    gains = [100 * (1 - p.value / f.value) for p, f in zip(joint, firsts, strict=True)]
    headline = (
        f"joint plans take up to {max(gains, default=0.0):.1f}% less than sharding first, and "
        f"{sum(bool(r.ok) for r in joint)} of {len(joint)} no more than either alone"
    )
    return common.finish("Sharding and scheduling", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
