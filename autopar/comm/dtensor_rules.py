"""What operators of the caller's code do with DTensors, where torch leaves values wrong.

* A plain tensor beside a DTensor counts as replicated.
* Random operators on CPUs draw other numbers for every shard, and the same for its replicas.
* A number read off a tensor that is not whole on this rank is refused.

Private to torch here: `DTensor._op_dispatcher._custom_op_handlers` and
`torch.distributed.tensor._random._rng_tracker`; tested with 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import _random as dtensor_random
from torch.distributed.tensor.experimental import implicit_replication

from autopar.errors import EngineError

# The context of implicit replication, once it is entered.
_REPLICATION: list[Any] = []


def replicate_plain_tensors() -> None:
    """From now on, a plain tensor beside a DTensor in an operator counts as replicated."""
    if not _REPLICATION:
        _REPLICATION.append(implicit_replication())
        _REPLICATION[0].__enter__()


def install(device_type: str) -> None:
    """Put the rules for random operators and for numbers in force."""
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    handlers[torch.ops.aten._local_scalar_dense.default] = _number
    if device_type == "cpu" and dtensor_random._rng_tracker is None:
        dtensor_random._rng_tracker = _CpuTracker()  # type: ignore[assignment]


def _number(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (x,) = args
    if not all(placement.is_replicate() for placement in x.placements):
        raise EngineError(
            f"the number that is asked for is this rank's part of a sharded tensor "
            f"({', '.join(map(str, x.placements))}); write x.full_tensor().item() in the place of "
            "x.item() or float(x), on all ranks"
        )
    return op(x._local_tensor)


class _CpuTracker:
    """A random state per shard, as DTensor's own trackers keep one on GPUs."""

    distribute_region_enabled = True

    @contextmanager
    def _distribute_region(
        self, spec: Any, generator: torch.Generator | None = None
    ) -> Iterator[None]:
        """While on, the generator draws for this rank's shard.

        Args:
            spec: of the DTensor that is drawn.
        """
        used = torch.default_generator if generator is None else generator
        seed = int(torch.randint(2**62, (), generator=used))  # alike on ranks in the same state
        shard = 0
        for axis, placement in enumerate(spec.placements):
            if placement.is_shard():
                shard = shard * spec.mesh.size(axis) + spec.mesh.get_local_rank(axis)
        after = used.get_state()
        used.manual_seed((seed + shard) % 2**62)
        try:
            yield
        finally:
            used.set_state(after)
