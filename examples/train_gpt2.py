"""Train a Hugging Face GPT-2 on real English text, distributed by one added line.

    make demo
    torchrun --nproc-per-node 4 examples/train_gpt2.py --steps 30 --mesh 2x2

The text ships with Python (the documentation topics of `pydoc`), byte by byte. Rank 0 also trains
the same model alone on the same batches, to show that the losses agree.
"""

import argparse
import copy
import logging
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GPT2Config, GPT2LMHeadModel

from autopar import auto_engine
from autopar.files import write_atomically
from autopar.report.html import render_html
from autopar.report.text import render
from autopar.testing.live_memory import LiveMemory, training_state_bytes

logging.getLogger("transformers").setLevel(logging.ERROR)
TOLERANCE = 1e-4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", default="2x2", help="device mesh, such as 4 or 2x2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step, over all ranks")
    parser.add_argument("--length", type=int, default=64, help="bytes per sequence")
    parser.add_argument("--memory", default=None, help="budget per rank, such as 64MiB")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="for plan and report")
    return parser.parse_args()


def batches(steps: int, batch: int, length: int):
    """The same batches on every rank."""
    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - length, (batch,), generator=generator)
        yield torch.stack([text[s : s + length] for s in starts])


def train_step(model, optimizer, ids) -> float:
    """An ordinary training step."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=256, n_head=8, vocab_size=256, n_positions=options.length,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    alone = copy.deepcopy(model)
    alone_optimizer = torch.optim.AdamW(alone.parameters(), lr=5e-4)

    # the one added line
    model, optimizer = auto_engine(model, optimizer, options.mesh, memory=options.memory)

    rank = dist.get_rank()
    console = Console(stderr=False, quiet=rank != 0)
    parameters = sum(p.numel() for p in alone.parameters())
    console.print(f"GPT-2 with {parameters / 1e6:.1f} million parameters on mesh {options.mesh}")
    worst, measured = 0.0, {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=False) as progress:
        task = progress.add_task("planning and compiling", total=options.steps)
        for step, ids in enumerate(batches(options.steps, options.batch, options.length)):
            if step == 1:
                measured = measure_memory(model, optimizer, ids)
            loss = train_step(model, optimizer, ids)
            if step == 0:
                console.out(render(model.plan, width=console.width))
            if rank == 0:
                reference = train_step(alone, alone_optimizer, ids)
                difference = abs(loss - reference) / abs(reference)
                worst = max(worst, difference)
                text = f"step {step + 1:3d}  loss {loss:.6f}  alone {reference:.6f}"
                progress.update(task, advance=1, description=text)
                if (step + 1) % 5 == 0 or step == 0:
                    console.print(f"{text}  relative difference {difference:.1e}")
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, measured)
    if rank == 0:
        finish(console, model.plan, everyone, worst, options)


def measure_memory(model, optimizer, ids) -> dict[str, float]:
    """Live bytes of one forward and backward, with what is held between steps."""
    held = training_state_bytes(model, optimizer)
    with LiveMemory() as live:
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.zero_grad()
    return {**held, "step": live.peak, "total": sum(held.values()) + live.peak}


def finish(console, plan, everyone, worst, options) -> None:
    mib = 2**20
    predicted = plan.memory.total_bytes
    console.print("\nmemory per rank in MiB, measured (predicted for the fullest rank)")
    for rank, measured in enumerate(everyone):
        console.print(
            f"  rank {rank}: parameters {measured['parameters'] / mib:6.2f} "
            f"({plan.memory.parameters_bytes / mib:.2f}), "
            f"optimizer {measured['optimizer'] / mib:6.2f} "
            f"({plan.memory.optimizer_bytes / mib:.2f}), "
            f"peak {measured['total'] / mib:6.2f} ({predicted / mib:.2f})"
        )
    plan.save(options.out / "plan.json")
    write_atomically(options.out / "report.html", render_html(plan))
    console.print(f"\nplan:   {options.out / 'plan.json'}\nreport: {options.out / 'report.html'}")
    agree = worst < TOLERANCE
    console.print(
        f"largest relative difference to the single process over {options.steps} steps: "
        f"{worst:.1e} ({'agrees' if agree else 'DISAGREES'}, tolerance {TOLERANCE:.0e})"
    )
    if not agree:
        sys.exit(1)


if __name__ == "__main__":
    main()
