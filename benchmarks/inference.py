"""Generation: tokens per second and memory, against transformers' own tensor parallelism.

A Llama with grouped heads and random weights generates greedily from a prompt, with one sequence
and with a batch. Contestants run in the same processes, which hold one model after the other from
one file, and take turns: `tp_plan="auto"` of transformers (on one process its plain model), with
its dynamic cache and with its static one, and autopar. transformers has no int8 of its own on CPUs,
so autopar's int8 is measured beside its bfloat16. Seconds are those of the slowest rank, bytes those
of the fullest: parameters and buffers, and what is alive while it generates.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import answer, turns

MIB = 2**20
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
THEIRS = ("transformers", "transformers, static cache")
_PROMPT = 16


@dataclass(frozen=True)
class Case:
    """
    Args:
        dtype: of `DTYPES`.
        batch: sequences.
        tokens: that each generates.
        rounds: of turns.
    """

    dtype: str
    batch: int
    tokens: int
    rounds: int


def save(folder: str, *, quick: bool) -> None:
    """A model in safetensors, in float32."""
    import transformers as hf

    torch.manual_seed(0)
    layers, width = (2, 128) if quick else (8, 512)
    config = hf.LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=8192, max_position_embeddings=512,
        initializer_range=0.1, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)


@dataclass
class Contestant:
    name: str
    model: Any
    options: Mapping[str, Any]

    def generate(self, case: Case) -> torch.Tensor:
        """The tokens, [batch, prompt + tokens]."""
        ids = torch.randint(
            2, 8000, (case.batch, _PROMPT), generator=torch.Generator().manual_seed(3)
        )
        result: torch.Tensor = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            min_new_tokens=case.tokens, max_new_tokens=case.tokens, **self.options,
        )  # fmt: skip
        return result

    def held_bytes(self) -> int:
        """Of parameters and buffers on this rank, each once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
        return sum(
            {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in local}.values()
        )

    def peak_bytes(self, case: Case) -> int:
        from autopar.testing.live_memory import LiveMemory

        gc.collect()
        held = self.held_bytes()
        with LiveMemory() as live:
            self.generate(case)
        return held + live.peak


def theirs(folder: str, dtype: torch.dtype, name: str) -> Contestant:
    import transformers as hf

    split = {"tp_plan": "auto"} if dist.get_world_size() > 1 else {}
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **split).eval()
    static = {"cache_implementation": "static"} if "static" in name else {}
    return Contestant(name, model, static)


def ours(folder: str, case: Case) -> Contestant:
    import transformers as hf

    import autopar

    config = hf.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config).to(DTYPES[case.dtype]).eval()
    if case.dtype == "int8":
        model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        model = autopar.quantize(model, "int8")
        folder = None
    engine, _ = autopar.auto_engine(
        model, None, str(dist.get_world_size()), weights=folder, progress=False
    )
    return Contestant("autopar", engine, {})


def measure(folder: str, case: Case) -> dict[str, Any]:
    racing = [theirs(folder, DTYPES[case.dtype], name) for name in THEIRS]
    racing.append(ours(folder, case))
    tokens = [c.generate(case) for c in racing]  # plans and compiles
    agree = [float((t == tokens[0]).float().mean()) for t in tokens]
    for c in racing:
        c.generate(case)
    times = torch.zeros(case.rounds, len(racing))
    for k, order in enumerate(turns(len(racing), case.rounds)):
        gc.collect()
        for who in order:
            dist.barrier()
            begin = time.perf_counter()
            racing[who].generate(case)
            times[k, who] = time.perf_counter() - begin
    dist.all_reduce(times, dist.ReduceOp.MAX)
    peaks = torch.tensor([c.peak_bytes(case) for c in racing], dtype=torch.float64)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    return {
        "names": [c.name for c in racing],
        "seconds": times.tolist(),
        "peaks": peaks.tolist(),
        "agree": agree,
        "programs": len(racing[-1].model.steps),
    }


def run_rank(folder: str, case: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = measure(folder, Case(**json.loads(case)))
    if dist.get_rank() == 0:
        answer(measured)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(sys.argv[2], sys.argv[3])
