"""How long a capture takes, by depth: Llama-3-8B dimensions on the meta device.

Hugging Face Llama (hidden 4096, 32 heads, 8 of keys, vocabulary 128256), 4 to 64 layers, training
with its loss, batch 4, sequence 512. Every repetition is a process of its own; imports and the
building of the model are not counted. The target is for wall time; processor time distinguishes a
busy machine from slow code. Twice the depth should take twice the time; the table shows the excess.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Row, console

DEPTHS = (4, 8, 16, 32, 64)
FULL_DEPTH, TARGET_S = 32, 10.0
BEYOND_TARGET_S = 2.0
REPETITIONS = 3


def work(layers: int) -> dict[str, Any]:
    """Capture once, in this process."""
    import logging

    import torch

    from autopar import ColoTracer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).train()
    ids = torch.zeros(4, 512, dtype=torch.long, device="meta")
    start, cpu = time.perf_counter(), time.process_time()
    graph = ColoTracer().trace(model, (), {"input_ids": ids, "labels": ids})
    return {
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "nodes": len(graph.nodes),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--repetitions", type=int, default=None, help="of each depth")
    options = parser.parse_args(arguments)
    depths = DEPTHS[:2] if options.quick else DEPTHS
    repetitions = options.repetitions or (1 if options.quick else REPETITIONS)
    console.print(common.machine(), markup=False)
    runs: dict[int, list[dict[str, Any]]] = {layers: [] for layers in depths}
    for i, layers in itertools.product(range(repetitions), depths):
        measured = common.in_fresh_process("benchmarks.capture_time", {"layers": layers})
        runs[layers].append(measured)
        console.print(f"{layers} layers, run {i + 1}: {measured['wall_s']:.2f} s", markup=False)
    wall = {n: statistics.median(r["wall_s"] for r in runs[n]) for n in depths}
    rows = []
    for layers in depths:
        case = f"Llama-3-8B dimensions, {layers} layers"
        target = TARGET_S if layers == FULL_DEPTH else None
        cpu = statistics.median(r["cpu_s"] for r in runs[layers])
        rows.append(Row(case, "capture", wall[layers], "s", target))
        rows.append(Row(case, "processor time", cpu, "s"))
        rows.append(Row(case, "nodes", runs[layers][0]["nodes"], ""))
        if layers // 2 in wall:
            beyond = wall[layers] - 2 * wall[layers // 2]
            rows.append(Row(case, "beyond twice half", beyond, "s", BEYOND_TARGET_S))
    curve = ", ".join(f"{n}: {wall[n]:.1f} s" for n in depths)
    return common.finish(
        f"Capture time, median of {repetitions}", rows, f"layers: {curve}", options.json
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        common.answer(work(**json.loads(sys.argv[2])))
    else:
        sys.exit(main())
