"""Parameters on the ranks of a pipeline: each has one owner, and other stages borrow it for a step.

A tied embedding is used by the first stage and by the last. Its owner is the first stage that uses
it: others get the values before a step, and give their gradients back after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from autopar.passes.cut import Crossing
from autopar.runtime.pipeline_runtime import Pipeline


@dataclass(frozen=True)
class StageParameters:
    """
    Args:
        owners: by position of a parameter, the rank of the pipeline that has it; None if all have.
        users: by position of a parameter, the ranks of the pipeline whose stages use it.
        like: by position, shards on ranks that use them.
    """

    owners: Mapping[int, int | None] = field(default_factory=dict)
    users: Mapping[int, frozenset[int]] = field(default_factory=dict)
    like: Mapping[int, Crossing] = field(default_factory=dict)

    @property
    def _lent(self) -> list[tuple[int, int, int]]:
        """Position, owner and user of what is lent."""
        return [
            (k, owner, user)
            for k, owner in self.owners.items()
            for user in sorted(self.users.get(k, ()))
            if owner is not None and user != owner
        ]

    def borrow(self, flat: list[torch.Tensor], pipeline: Pipeline) -> None:
        """Put the values of parameters of other ranks into the flat tensors of a step."""
        gives, takes = [], []
        for k, owner, user in self._lent:
            if pipeline.rank == owner:
                gives.append((flat[k].detach().contiguous(), user))
            elif pipeline.rank == user:
                flat[k] = self.like[k].empty()
                takes.append((flat[k], owner))
        pipeline.exchange(gives, takes)

    def hand_back(
        self, grads: list[torch.Tensor | None], stored: list[torch.Tensor], pipeline: Pipeline
    ) -> list[torch.Tensor | None]:
        """Gradients of this rank's shards, with those of the ranks that borrowed them.

        Args:
            grads: by position of a parameter, of this rank's stages.
            stored: this rank's shards, which are empty of what others own.
        """
        gives, takes, added = [], [], []
        for k, owner, user in self._lent:
            if not self.like[k].differentiable:
                continue
            if pipeline.rank == user:
                grad = grads[k]
                gives.append((self._own(grad, k), owner))
            elif pipeline.rank == owner:
                part = self.like[k].empty()
                takes.append((part, user))
                added.append((k, part))
        pipeline.exchange(gives, takes)
        for k, part in added:
            known = grads[k]
            grads[k] = part if known is None else known + part
        for k, rank in self.owners.items():
            if rank is None and self.users.get(k):  # all have it
                if self.like[k].differentiable:
                    total = self._own(grads[k], k).clone()
                    pipeline.all_reduce(total)
                    grads[k] = total
            elif rank is not None and rank != pipeline.rank:
                grads[k] = torch.zeros_like(stored[k])
        return grads

    def _own(self, grad: torch.Tensor | None, k: int) -> torch.Tensor:
        return self.like[k].empty().zero_() if grad is None else grad.contiguous()
