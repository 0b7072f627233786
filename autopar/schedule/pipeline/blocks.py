"""What blocks of a model cost, and what a stage of several neighbouring blocks costs.

A block is what lies between two neighbouring places at which the model may be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from autopar.cluster.link import Link
from autopar.errors import PlanError
from autopar.schedule.pipeline.partition import Spans
from autopar.schedule.pipeline.timeline import StageCost


@dataclass(frozen=True)
class Block:
    """What a block takes on one rank, for one microbatch where not said otherwise.

    Args:
        name: for messages and layouts.
        forward_us, input_us, weight_us: of F, I and W, as of a stage.
        held_bytes: activations from F until B or I, if all are kept.
        weight_bytes: of these, what W needs.
        checkpoint_bytes: what is kept of them if the backward computes the rest again.
        recompute_us: how much longer the backward takes then.
        state_bytes: parameters, gradients and optimizer state; all the time. Those of a shared
            parameter count in the first block that uses it.
        before_us, after_us: of parameter gathers and gradient reductions, once a step.
        forward_bytes, backward_bytes: activations that pass the cut after this block, and their
            gradients.
        shares: names and bytes of parameters that other blocks use too, such as tied embeddings.
    """

    name: str
    forward_us: float
    input_us: float = 0.0
    weight_us: float = 0.0
    held_bytes: float = 0.0
    weight_bytes: float = 0.0
    checkpoint_bytes: float = 0.0
    recompute_us: float = 0.0
    state_bytes: float = 0.0
    before_us: float = 0.0
    after_us: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    shares: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "shares") and not 0 <= value < float("inf"):
                raise PlanError(
                    f"block {self.name} of a pipeline: {field.name} is {value}; 0 is the least"
                )
        if self.weight_bytes > self.held_bytes:
            raise PlanError(
                f"block {self.name} of a pipeline: W needs {self.weight_bytes:.0f} bytes of the"
                f" {self.held_bytes:.0f} that are held from F on; raise held_bytes"
            )


def send_us(link: Link, nbytes: float) -> float:
    """One message from a rank to another."""
    return 1e6 * (link.alpha + nbytes * link.beta)


@dataclass(frozen=True, eq=False)
class StageTable:
    """Neighbouring blocks as a stage.

    Args:
        cost: if nothing is recomputed.
        held_bytes, recomputed_bytes, recompute_us: by how many blocks are recomputed, counted from
            the front. Blocks at the front are recomputed last, when the others' memory is free.
    """

    cost: StageCost
    held_bytes: np.ndarray
    recomputed_bytes: np.ndarray
    recompute_us: np.ndarray


# What a stage has as the sum of its blocks, under the same name.
_SUMMED = (
    "forward_us", "input_us", "weight_us", "state_bytes", "weight_bytes", "before_us", "after_us",
)  # fmt: skip


class Chain:
    """The blocks for one size of microbatch, and what stages of them cost.

    Args:
        splits: whether the backward is split into I and W.
    """

    def __init__(self, blocks: Sequence[Block], link: Link, splits: bool) -> None:
        self.blocks, self.link, self.splits = blocks, link, splits
        self._stages: dict[tuple[int, int], StageTable] = {}
        self._spans: dict[int, Spans] = {}
        self._costs: dict[tuple[int, int, int], StageCost] = {}
        # By shared parameter, its bytes and the blocks that use it, in order.
        self.shared: dict[str, tuple[float, list[int]]] = {}
        for at, block in enumerate(blocks):
            for name, nbytes in block.shares:
                self.shared.setdefault(name, (nbytes, []))[1].append(at)

    @cached_property
    def sums(self) -> dict[str, np.ndarray]:
        """By field, its sums over the first blocks; and those of `saved_bytes` by recomputing."""
        sums = {
            name: np.array([0.0, *accumulate(getattr(block, name) for block in self.blocks)])
            for name in (*_SUMMED, "held_bytes", "recompute_us")
        }
        saved = (max(0.0, b.held_bytes - b.checkpoint_bytes) for b in self.blocks)
        sums["saved_bytes"] = np.array([0.0, *accumulate(saved)])
        return sums

    def spans(self, stages: int) -> Spans:
        if stages not in self._spans:
            self._spans[stages] = Spans(self.sums, stages)
        return self._spans[stages]

    def stage(self, first: int, end: int) -> StageTable:
        """Blocks first to end - 1."""
        if (first, end) not in self._stages:
            self._stages[first, end] = self._stage(first, end)
        return self._stages[first, end]

    def cost(self, first: int, end: int, recomputed: int) -> StageCost:
        """The same stage, if so many of its blocks are recomputed."""
        key = first, end, recomputed
        if key not in self._costs:
            stage = self.stage(first, end)
            held = float(stage.held_bytes[recomputed])
            more = float(stage.recomputed_bytes[recomputed])
            self._costs[key] = replace(
                stage.cost,
                input_us=stage.cost.input_us + float(stage.recompute_us[recomputed]),
                held_bytes=held,
                recomputed_bytes=more,
                # Only rounding makes it less.
                weight_bytes=min(stage.cost.weight_bytes, held + more),
            )
        return self._costs[key]

    def copies(
        self, borders: Sequence[int], rank_of_stage: Sequence[int]
    ) -> Mapping[int, tuple[float, float]]:
        """By stage, bytes and microseconds for shared parameters of other ranks.

        The first stage that uses one owns it. Every other rank that uses it has a copy and its
        gradient, which count in its first such stage. Once a step it receives the one and sends
        the other: the microseconds are of each.

        Args:
            borders: where stages begin, and the number of blocks.
        """
        more: dict[int, tuple[float, float]] = {}
        for nbytes, users in self.shared.values():
            stages = sorted({int(np.searchsorted(borders, at, "right")) - 1 for at in users})
            seen = {rank_of_stage[stages[0]]}
            for stage in stages[1:]:
                if rank_of_stage[stage] not in seen:
                    seen.add(rank_of_stage[stage])
                    held, us = more.get(stage, (0.0, 0.0))
                    more[stage] = held + 2 * nbytes, us + send_us(self.link, nbytes)
        return more

    def _stage(self, first: int, end: int) -> StageTable:
        blocks = self.blocks[first:end]
        before = self.blocks[first - 1] if first else None
        cost = StageCost(
            **{name: sum(getattr(block, name) for block in blocks) for name in _SUMMED},
            held_bytes=sum(block.held_bytes for block in blocks),
            send_forward_us=send_us(self.link, blocks[-1].forward_bytes)
            if end < len(self.blocks)
            else 0.0,
            send_backward_us=send_us(self.link, before.backward_bytes) if before else 0.0,
        )
        # What blocks behind the recomputed ones keep, and the checkpoints of these.
        kept = [*accumulate((b.held_bytes for b in reversed(blocks)), initial=0.0)][::-1]
        checkpoints = accumulate((b.checkpoint_bytes for b in blocks), initial=0.0)
        more, us = [0.0], [0.0]
        for b in blocks:
            # While a block is recomputed, those behind it have left what their W need.
            left = max(0.0, b.weight_bytes - b.checkpoint_bytes) if self.splits else 0.0
            more.append(max(more[-1] + left, b.held_bytes - b.checkpoint_bytes))
            us.append(us[-1] + b.recompute_us)
        held = np.array(kept) + np.array(list(checkpoints))
        return StageTable(cost, held, np.array(more), np.array(us))
