"""`DirectGroup`: collectives between processes on CPUs as messages through Gloo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from autopar.runtime.groups import ProcessGroup, Wait, truth_as_bytes

# What one more round of messages takes the time of.
_ROUND_BYTES = 256 * 2**10
# Of collectives under way at a time, by which their messages are told apart.
_TAGS = 2**16


class DirectGroup(ProcessGroup):
    """Processes whose tensors are in host memory: every rank sends to every other at once.

    Gloo's reduce-scatter is an all-reduce of which most is thrown away, and its rings pass a small
    message on k - 1 times. Here parts go from where they are to where they belong, and are added
    up in the order of ranks, so that all ranks get the same to the last bit. An all-reduce is a
    reduce-scatter and an all-gather; it is one round, of whole tensors, where that is faster.

    Messages of what was started are passed on by Gloo's threads; sums are taken, and the second
    round of an all-reduce is made, when it is waited for.
    """

    def __init__(self, name: str, group: dist.ProcessGroup) -> None:
        super().__init__(name, group)
        self._begun = 0

    @truth_as_bytes
    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        k, flat = self.size, x.contiguous().view(-1)
        with self._reporting("all-reduce", x):
            if self._in_one_round(flat):
                parts = self._exchange([flat] * k, [flat.shape] * k)
                return self._total(parts, op).view(x.shape)
            mine = flat.tensor_split(k)
            part = self._total(self._exchange(mine, [mine[self.index].shape] * k), op)
            out = torch.empty_like(flat)
            self._exchange([part] * k, out.tensor_split(k))
        return out.view(x.shape)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((self.size, *x.shape))
        with self._reporting("all-gather", x):
            self._exchange([x.contiguous()] * self.size, out.unbind())
        return out

    @truth_as_bytes
    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        with self._reporting("reduce-scatter", x):
            parts = self._exchange(x.contiguous().unbind(), [x.shape[1:]] * self.size)
            return self._total(parts, "sum")

    def _exchange(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor | torch.Size]
    ) -> list[torch.Tensor]:
        """Part i to rank i; from each rank what it sent, in tensors given or made. This rank's own
        is not copied where none is given."""
        got, wait = self._send(send, receive, 0)
        wait()
        return got

    def _send(
        self, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor | torch.Size], tag: int
    ) -> tuple[list[torch.Tensor], Wait]:
        """`_exchange`, and what waits for it to be done."""
        me = self.index
        got: list[torch.Tensor] = []
        for rank, place in enumerate(receive):
            if isinstance(place, torch.Tensor):
                got.append(_copied(place, send[me]) if rank == me else place)
            else:
                got.append(send[me] if rank == me else send[me].new_empty(place))
        # from the next rank on, so that not all send to the same
        others = [(me + d) % self.size for d in range(1, self.size)]
        work = [self.group.recv([got[rank]], rank, tag) for rank in reversed(others)]
        work += [self.group.send([send[rank]], rank, tag) for rank in others]

        def wait() -> None:
            for pending in work:
                pending.wait()

        return got, wait

    def _in_one_round(self, x: torch.Tensor) -> bool:
        """Whether an all-reduce of whole tensors is faster than one of parts in two rounds."""
        k = self.size
        return x.numel() * x.element_size() * (k - 1) * (k - 2) // k <= _ROUND_BYTES

    def _begin(
        self,
        what: str,
        x: torch.Tensor,
        send: Sequence[torch.Tensor],
        receive: Sequence[torch.Tensor | torch.Size],
        finish: Callable[[list[torch.Tensor]], Any],
    ) -> Wait:
        """Start an exchange; what was got is finished when it is waited for."""
        self._begun += 1  # all ranks start the same collectives in the same order
        with self._reporting(what, x):
            got, done = self._send(send, receive, 1 + self._begun % _TAGS)

        def wait() -> None:
            with self._reporting(what, x):
                done()
                finish(got)

        return wait

    def start_all_reduce(self, x: torch.Tensor, op: str) -> Wait:
        k, flat = self.size, x.view(-1)
        if self._in_one_round(flat):
            return self._begin(
                "all-reduce", x, [flat] * k, [flat.shape] * k,
                lambda got: self._total_into(flat, got, op),
            )  # fmt: skip
        mine = flat.tensor_split(k)

        def finish(got: list[torch.Tensor]) -> None:
            part = self._total_into(mine[self.index], got, op)
            self._exchange([part] * k, mine)

        return self._begin("all-reduce", x, mine, [mine[self.index].shape] * k, finish)

    def start_all_gather(self, x: torch.Tensor) -> Wait:
        own = x[self.index]
        return self._begin("all-gather", x, [own] * self.size, x.unbind(), lambda got: None)

    def start_reduce_scatter(self, x: torch.Tensor) -> Wait:
        own = x[self.index]
        return self._begin(
            "reduce-scatter", x, x.unbind(), [own.shape] * self.size,
            lambda got: self._total_into(own, got, "sum"),
        )  # fmt: skip

    def _total_into(
        self, own: torch.Tensor, parts: Sequence[torch.Tensor], op: str
    ) -> torch.Tensor:
        """The total, in the place of this rank's own part."""
        if self.index < 2:  # which is read first
            return self._total(parts, op, own)
        return own.copy_(self._total(parts, op))

    @staticmethod
    def _total(
        parts: Sequence[torch.Tensor], op: str, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        combine = torch.add if op == "sum" else torch.maximum
        total = combine(parts[0], parts[1], out=out)
        for part in parts[2:]:
            combine(total, part, out=total)
        return total


def _copied(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The target, with the values of the source, which may be the target itself."""
    return target if target.data_ptr() == source.data_ptr() else target.copy_(source)
