"""An emulated network: messages between processes of one host take the time that a link would.

Links between processes of one machine are memory, and moving it takes the same cores as compute.
Here, every rank has one link of so many bytes/s, which carries one message after another, and a
message is there at the earliest when the link has carried it. Until then, processes sleep.

What a rank sends to one other, or to all, goes with the time at which it is due, so that those who
receive it wait for that. In other collectives, each rank waits for its own link.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work, _register_process_group, _resolve_process_group

ALPHA_S = 100e-6
# Times of messages are sent with tags of their own.
_TAG = 1 << 20


class SlowLink:
    """A link of a rank: one message after another takes its time."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.free = bytes_per_s, 0.0

    def send(self, nbytes: float) -> float:
        """When a message of so many bytes that is sent now has arrived."""
        start = max(self.free, time.perf_counter())
        self.free = start + ALPHA_S + nbytes / self.bytes_per_s
        return self.free


class _Delayed(Work):
    """Work that is done when others are, and not before a time."""

    def __init__(self, works: Sequence[Any], due: torch.Tensor | float) -> None:
        super().__init__()
        self.works, self.due = works, due

    def wait(self, timeout: Any = None) -> bool:
        for work in self.works:
            work.wait()
        sleep_until(float(self.due))
        return True


def sleep_until(due: float) -> None:
    time.sleep(max(0.0, due - time.perf_counter()))


@contextmanager
def network(bytes_per_s: float | None) -> Iterator[SlowLink | None]:
    """Messages take their time on a link, of which every rank has one: those of `dist.isend`,
    `dist.broadcast`, and of engines made meanwhile. None is the network of the host.

    Others can send on the link that is given.
    """
    from autopar.comm import groups, world

    if bytes_per_s is None:
        yield None
        return
    link = SlowLink(bytes_per_s)
    process_groups, registered = world.process_groups, []

    def delayed(mesh: Any) -> tuple[str, ...]:
        slow = []
        for name in (*process_groups(mesh), dist.group.WORLD.group_name):
            slow.append(f"delayed/{bytes_per_s:g}/{len(registered)}/{name}")
            registered.append(delayed_group(_resolve_process_group(name), link))
            _register_process_group(slow[-1], registered[-1])
        *along, of_all = slow
        return groups.register_mesh(
            tuple(mesh.shape), tuple(mesh.get_coordinate()), along, of_all, gathers_in_place=False
        )

    with mock.patch.object(world, "process_groups", delayed), _slow_messages(link):
        yield link


@contextmanager
def _slow_messages(link: SlowLink) -> Iterator[None]:
    """Delays what has one sender."""
    group_type = dist.ProcessGroup
    real_send, real_recv, real_broadcast = group_type.send, group_type.recv, group_type.broadcast

    def send(group: Any, tensors: Any, to: int, tag: int) -> Any:
        due = link.send(sum(x.nbytes for x in tensors))
        stamp = torch.tensor([due], dtype=torch.float64)
        works = real_send(group, [stamp], to, _TAG + tag), real_send(group, tensors, to, tag)
        return _Delayed(works, stamp)

    def recv(group: Any, tensors: Any, source: int, tag: int) -> Any:
        stamp = torch.zeros(1, dtype=torch.float64)
        works = (
            real_recv(group, [stamp], source, _TAG + tag),
            real_recv(group, tensors, source, tag),
        )
        return _Delayed(works, stamp)

    def broadcast(group: Any, tensors: Any, options: Any) -> Any:
        stamp = torch.zeros(1, dtype=torch.float64)
        if group.rank() == options.rootRank:
            stamp.fill_(link.send(sum(x.nbytes for x in tensors)))
        works = real_broadcast(group, [stamp], options), real_broadcast(group, tensors, options)
        return _Delayed(works, stamp)

    with (
        mock.patch.object(group_type, "send", send),
        mock.patch.object(group_type, "recv", recv),
        mock.patch.object(group_type, "broadcast", broadcast),
    ):
        yield


def delayed_group(group: Any, link: SlowLink) -> Any:
    """A process group whose collectives are done at the earliest when a link has carried them."""
    share = (group.size() - 1) / group.size()

    class Delayed(dist.ProcessGroup):
        def __init__(self) -> None:
            super().__init__(group.rank(), group.size())

        def getBackendName(self) -> str:
            return "delayed"

        def allreduce(self, tensors: Any, opts: Any = None) -> Any:
            due = link.send(2 * share * sum(x.nbytes for x in tensors))
            return _Delayed([group.allreduce(tensors, opts)], due)

        def allgather_into_tensor_coalesced(
            self, outputs: Any, inputs: Any, opts: Any = None
        ) -> Any:
            due = link.send(share * sum(x.nbytes for x in outputs))
            return _Delayed([group.allgather_into_tensor_coalesced(outputs, inputs)], due)

        def reduce_scatter_tensor_coalesced(
            self, outputs: Any, inputs: Any, opts: Any = None
        ) -> Any:
            due = link.send(share * sum(x.nbytes for x in inputs))
            return _Delayed([group.reduce_scatter_tensor_coalesced(outputs, inputs)], due)

        def alltoall_base(
            self, output: Any, x: Any, sizes: Any, split: Any, opts: Any = None
        ) -> Any:
            due = link.send(share * x.nbytes)
            return _Delayed([group.alltoall_base(output, x, sizes, split)], due)

    return Delayed()
