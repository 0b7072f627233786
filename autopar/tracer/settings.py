"""Settings of model libraries that decide whether a model captures, changed on the traced copy.

Each setting changes how the library computes but not the result. In Hugging Face's models, some
mixtures loop over their experts in Python (`grouped_mm` is the same product without the loop),
training builds a key-value cache that nothing reads, and export builds attention masks that a run
skips.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from autopar.ir.guards import Guard
from autopar.tracer.statistics import averages_all_batches, cumulative_batch_norm


def apply_settings(clone: torch.nn.Module) -> tuple[Guard, ...]:
    """Change the settings on a copy of a model; returns a guard for each change."""
    guards: list[Guard] = []
    module: Any
    for module in clone.modules():
        where = type(module).__name__
        offered = getattr(module, "_can_set_experts_implementation", None)
        if offered is not None and offered():
            current = set(module.get_experts_implementation().values())
            if current - {"grouped_mm", "batched_mm"}:
                # the grouped product has no kernel in double precision
                double = any(p.dtype == torch.float64 for p in module.parameters())
                chosen = "batched_mm" if double else "grouped_mm"
                module.set_experts_implementation(chosen)
                guards.append(_guard(where, "experts_implementation", chosen))
        config: Any = getattr(module, "config", None)
        if clone.training and getattr(config, "use_cache", False) is True:
            config.use_cache = False
            guards.append(_guard(where, "use_cache", False))
        if averages_all_batches(module):
            module.forward = functools.partial(cumulative_batch_norm, module)
    return tuple({(g.source, g.text): g for g in guards}.values())


def computed_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Attributes of modules that an earlier forward computed from parameters.

    `torch.nn.utils.weight_norm` and its like keep the weight so, and compute it anew before each
    forward. Such tensors cannot be copied; the capture refuses a forward that reads them.
    """
    values = (v for module in model.modules() for v in vars(module).values())
    return [v for v in values if isinstance(v, torch.Tensor) and not v.is_leaf]


# Modules that build masks for every case if they are being traced.
_MASKS = ("transformers.masking_utils", "transformers.modeling_attn_mask_utils")
_ASKED = ("is_tracing", "is_torchdynamo_exporting", "is_torchdynamo_compiling")


def masks_can_be_skipped() -> bool:
    """Whether a library is loaded that builds other masks while it is traced."""
    return any(name in sys.modules for name in _MASKS)


@contextmanager
def masks_as_run() -> Iterator[None]:
    """While on, masks are built or skipped as in a run; a guard records the condition."""
    with ExitStack() as stack:
        for module in filter(None, map(sys.modules.get, _MASKS)):
            for name in _ASKED:
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, lambda *_: False))
        yield


def _guard(where: str, name: str, value: object) -> Guard:
    note = "set for the capture, on a copy; the same mathematics"
    return Guard("setting", where, f"config.{name}", value, note)
