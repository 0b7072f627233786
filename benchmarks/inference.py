"""Generation: tokens per second and memory, against transformers' own tensor parallelism.

A Llama with grouped heads and random weights generates greedily from a prompt, with one sequence
and with a batch. Contestants run in the same processes, read the same file and take turns:
`tp_plan="auto"` of transformers (on one process its plain model), with its dynamic cache and with
its static one, and autopar. transformers has no int8 of its own on CPUs, so autopar's int8 is
measured beside its bfloat16. Seconds are those of the slowest rank; bytes are those of the fullest:
parameters and buffers, and what else is alive while it generates. Ratios are medians over rounds,
to the faster of transformers' caches and to the smaller.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import Row, answer, finish, machine, on_ranks, parser, turns

MIB = 2**20
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
THEIRS = ("transformers", "transformers, static cache")
_PROMPT = 16


@dataclass(frozen=True)
class Case:
    """
    Args:
        dtype: of `DTYPES`.
        batches: numbers of sequences, one after the other.
        tokens: that each generates.
        rounds: of turns.
    """

    dtype: str
    batches: tuple[int, ...]
    tokens: int
    rounds: int


def save(folder: str, *, quick: bool) -> None:
    """A model in safetensors, in a folder per dtype."""
    import transformers as hf

    torch.manual_seed(0)
    layers, width = (2, 128) if quick else (8, 512)
    config = hf.LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=8192, max_position_embeddings=512,
        initializer_range=0.1, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    for dtype in ("float32", "bf16"):
        model.to(DTYPES[dtype]).save_pretrained(f"{folder}/{dtype}")


@dataclass
class Contestant:
    name: str
    model: Any
    options: Mapping[str, Any]

    def generate(self, batch: int, tokens: int) -> torch.Tensor:
        """The tokens, [batch, prompt + tokens]."""
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(2, 8000, (batch, _PROMPT), generator=generator)
        result: torch.Tensor = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            min_new_tokens=tokens, max_new_tokens=tokens, **self.options,
        )  # fmt: skip
        return result

    def held_bytes(self) -> int:
        """Of parameters and buffers on this rank, each once. transformers' shards on CPUs are views
        of whole tensors; only what they show is counted, as on a device that they are copied to."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
        return sum({x.data_ptr(): x.nbytes for x in local}.values())

    def peak_bytes(self, batch: int, tokens: int) -> int:
        from autopar.testing.live_memory import LiveMemory

        gc.collect()
        with LiveMemory() as live:
            self.generate(batch, tokens)
        return self.held_bytes() + live.peak


def theirs(folder: str, dtype: torch.dtype, name: str) -> Contestant:
    import transformers as hf

    split = {"tp_plan": "auto"} if dist.get_world_size() > 1 else {}
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **split).eval()
    static = {"cache_implementation": "static"} if "static" in name else {}
    return Contestant(name, model, static)


def ours(folder: str, dtype: str) -> Contestant:
    import transformers as hf

    import autopar

    with autopar.deferred_init():
        config = hf.AutoConfig.from_pretrained(folder)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    weights: str | None = folder
    if dtype == "int8":  # rounded before it is planned
        model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
        model, weights = autopar.quantize(model, "int8"), None
    engine, _ = autopar.auto_engine(
        model.eval(), None, str(dist.get_world_size()), weights=weights, progress=False
    )
    return Contestant("autopar", engine, {})


def measure(racing: list[Contestant], batch: int, case: Case) -> dict[str, Any]:
    """Seconds of the slowest rank per round and contestant, and bytes of the fullest."""
    tokens = [c.generate(batch, case.tokens) for c in racing]  # plans and compiles
    for c in racing:
        c.generate(batch, case.tokens)
    times = torch.zeros(case.rounds, len(racing))
    for k, order in enumerate(turns(len(racing), case.rounds)):
        gc.collect()
        for who in order:
            dist.barrier()
            begin = time.perf_counter()
            racing[who].generate(batch, case.tokens)
            times[k, who] = time.perf_counter() - begin
    dist.all_reduce(times, dist.ReduceOp.MAX)
    peaks = [c.peak_bytes(batch, case.tokens) for c in racing]
    most = torch.tensor(peaks, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return {
        "seconds": times.tolist(),
        "peaks": most.tolist(),
        "same": float((tokens[-1] == tokens[0]).float().mean()),
    }


def run_rank(folder: str, case: Case) -> None:
    """One rank; rank 0 answers."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    racing = [theirs(folder, DTYPES[case.dtype], name) for name in THEIRS]
    racing.append(ours(folder, case.dtype))
    measured = {str(batch): measure(racing, batch, case) for batch in case.batches}
    if dist.get_rank() == 0:
        answer(measured)
    dist.destroy_process_group()


def rows_of(name: str, batch: int, tokens: int, measured: Mapping[str, Any]) -> list[Row]:
    seconds, peaks = measured["seconds"], measured["peaks"]
    ratios = [own / min(other) for *other, own in seconds]
    best = [min(column) for column in zip(*seconds, strict=True)]
    count = batch * tokens
    return [
        Row(name, "tokens per second, transformers", count / min(best[:-1]), "1/s"),
        Row(name, "tokens per second, autopar", count / best[-1], "1/s"),
        Row(name, "time / transformers'", statistics.median(ratios), "", 1.0),
        Row(name, "memory, transformers", min(peaks[:-1]) / MIB, "MiB"),
        Row(name, "memory, autopar", peaks[-1] / MIB, "MiB"),
        Row(name, "memory / transformers'", peaks[-1] / min(peaks[:-1]), "", 1.0),
        Row(name, "tokens that are the same", 100 * measured["same"], "%"),
    ]


def main(options: argparse.Namespace) -> int:
    quick = options.quick
    ranks, dtypes = ((2,), ("float32",)) if quick else ((2, 1, 4), tuple(DTYPES))
    batches, tokens, rounds = ((2,), 8, 2) if quick else ((1, 8), 24, 5)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        save(folder, quick=quick)
        for count in ranks:
            for dtype in dtypes:
                case = Case(dtype, batches, tokens, rounds)
                job = json.dumps(asdict(case))
                file = f"{folder}/{'float32' if dtype == 'float32' else 'bf16'}"
                measured = on_ranks("benchmarks.inference", count, file, job)
                for batch in batches:
                    name = f"{count} ranks, {dtype}, {batch} sequences"
                    rows += rows_of(name, batch, tokens, measured[str(batch)])
                    print(*(f"{r.metric}: {r.value:.2f}" for r in rows[-7:]), sep="; ", flush=True)
    ahead = sum(row.ok is True for row in rows)
    targets = sum(row.target is not None for row in rows)
    headline = f"ahead of transformers' tensor parallelism in {ahead} of {targets} ratios"
    return finish(f"Generation ({machine()})", rows, headline, options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        fields = json.loads(sys.argv[3])
        run_rank(sys.argv[2], Case(**{**fields, "batches": tuple(fields["batches"])}))
    else:
        sys.exit(main(parser(__doc__).parse_args()))
