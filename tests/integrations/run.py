"""Run a library's actions on this process, or on the ranks of a launcher, and save the results.

python -m tests.integrations.run trainer FOLDER
torchrun --nproc-per-node 4 -m tests.integrations.run trainer FOLDER --mesh 2x2
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MODULES = {
    "trainer": "trainer",
    "accelerate": "accelerate_loop",
    "lightning": "lightning_module",
    "fabric": "fabric_loop",
    "peft": "lora",
}
RESULTS = "results.pt"


def plugin_for(mesh: str, tool: str) -> Any:
    """Devices so slow that even a small model is split, and a parameter that has to be."""
    from autopar.integrations.plugin import AutoparPlugin
    from tests.clusters import eager_to_shard

    several = tool in ("lightning", "peft")  # other names, or several engines
    options = {} if several else {"constraints": {"transformer.wte.weight": "S0R"}}
    return AutoparPlugin(eager_to_shard(mesh), options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Save what each action gives, and its seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=MODULES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mesh")
    parser.add_argument("--first", type=int, help="so many actions alone")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    actions = importlib.import_module(f"tests.integrations.{MODULES[options.tool]}")
    plugin = None if options.mesh is None else plugin_for(options.mesh, options.tool)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    results, start = {}, time.perf_counter()
    chosen = itertools.islice(actions.run(options.folder, plugin, ranks), options.first)
    for action, value in chosen:
        results[action] = (value.detach().cpu(), time.perf_counter() - start)
        start = time.perf_counter()
    rank = int(os.environ.get("RANK", "0"))
    torch.save(results, options.folder / f"rank{rank}-{RESULTS}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
