"""Settings of model libraries that decide whether a model captures, changed on the traced copy.

Each changes how the library computes, not what: Hugging Face's mixtures loop over their experts in
Python by default in some families (`grouped_mm` is the same product without the loop), and models
in training mode carry a key-value cache that nothing reads.
"""

from __future__ import annotations

from typing import Any

import torch

from autopar.tracer.guards import Guard


def apply_settings(clone: torch.nn.Module) -> tuple[Guard, ...]:
    """Set what the libraries offer on a copy of a model; says what was changed."""
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
    unique = {(g.source, g.text): g for g in guards}
    return tuple(unique.values())


def _guard(where: str, name: str, value: object) -> Guard:
    note = "set for the capture, on a copy; the same mathematics"
    return Guard("setting", where, f"config.{name}", value, note)
