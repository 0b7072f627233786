"""`SharedGroup`: collectives between processes of one host through memory that all of them see."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from autopar.runtime.groups import ProcessGroup, Wait, truth_as_bytes
from autopar.runtime.peers import MESSAGE_BYTES, Peers

# What a rank writes in one round: as much as weights that share a message (`passes/bucket.py`).
_ROW_BYTES = 4 * 2**20
# What one more round takes the time of.
_ROUND_BYTES = 512 * 2**10

Steps = Generator[None, None, None]


class SharedGroup(ProcessGroup):
    """Processes of one host, whose tensors are in its memory.

    Small tensors are sent, whole, to every rank that needs them. Larger ones go through memory in
    rounds: every rank writes its part of it, tells the others so, and when all have told it reads
    what they wrote. An all-reduce is one round, in which all ranks add up everything, or where that
    takes longer two: each adds up its share, and all read the shares. Sums are taken in the order
    of ranks, so that all get the same to the last bit.

    Rounds alternate between two halves of the memory. Then no rank writes what another has yet to
    read: it begins round n + 2, in the half of round n, when it has been told of round n + 1 by
    all others, and they told after they had read what there was of round n.

    What was started is sent, or written in its first round, by then; the rest follows when it is
    waited for, or when another of the large ones begins, as rounds do not overlap. All ranks start
    the same collectives in the same order, and wait for large ones at the same places.

    Args:
        peers: with `memory_bytes` in common.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, peers: Peers) -> None:
        super().__init__(name, group)
        self._peers = peers
        self._halves = peers.memory.view(2, -1)
        self._sent = self._rounds = 0
        self._under_way: Steps | None = None
        self._failed: str | None = None
        self._lock = threading.RLock()  # losses are waited for from other threads (late.py)
        me = self.index
        self._others = [s for s in (slice(0, me), slice(me + 1, self.size)) if s.start < s.stop]

    @staticmethod
    def memory_bytes(size: int) -> int:
        """That a group of this size has in common; none of it is taken until it is used."""
        return 2 * size * _ROW_BYTES

    def close(self) -> None:
        self._peers.close()

    # -- collectives --------------------------------------------------------------------------

    @truth_as_bytes
    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        flat = _flat(x)
        out = torch.empty_like(flat)
        self._start("all-reduce", x, flat.nbytes, self._reduce(flat, op, out))()
        return out.view(x.shape)

    def reduce_row(self, xs: Sequence[torch.Tensor], op: str) -> torch.Tensor:
        nbytes = sum(x.nbytes for x in xs)
        if nbytes <= MESSAGE_BYTES or nbytes > _ROW_BYTES or xs[0].dtype is torch.bool:
            return super().reduce_row(xs, op)
        out = xs[0].new_empty(sum(x.numel() for x in xs))
        flat = [x.detach().reshape(-1) for x in xs]
        steps = self._reduce_row(flat, op, out)
        self._start("all-reduce", out, nbytes, steps)()
        return out

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((self.size, *x.shape))
        self._start("all-gather", x, x.nbytes, self._gather(_flat(x), out.view(self.size, -1)))()
        return out

    @truth_as_bytes
    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[1:])
        steps = self._scatter(_flat(x).view(self.size, -1), out.view(-1))
        self._start("reduce-scatter", x, out.nbytes, steps)()
        return out

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        steps = self._transpose(_flat(x).view(self.size, -1), out.view(self.size, -1))
        self._start("all-to-all", x, x.nbytes // self.size, steps)()
        return out

    def start_all_reduce(self, x: torch.Tensor, op: str) -> Wait:
        flat = _flat(x)
        return self._start("all-reduce", x, x.nbytes, self._reduce(flat, op, flat))

    def start_all_gather(self, x: torch.Tensor) -> Wait:
        rows = x.detach().view(self.size, -1)
        own = rows[self.index]
        return self._start("all-gather", x, own.nbytes, self._gather(own, rows))

    def start_reduce_scatter(self, x: torch.Tensor) -> Wait:
        rows = x.detach().view(self.size, -1)
        own = rows[self.index]
        return self._start("reduce-scatter", x, own.nbytes, self._scatter(rows, own))

    # -- how they run -------------------------------------------------------------------------

    @contextmanager
    def _reporting(self, what: str, x: torch.Tensor) -> Iterator[None]:
        """What has failed once fails from then on, and ends this rank's connections, so that no
        other waits for it."""
        with self._lock, super()._reporting(what, x):
            if self._failed is not None:
                raise RuntimeError(self._failed)
            try:
                yield
            except RuntimeError as error:
                self._failed = str(error)
                self._peers.close()
                raise

    def _start(self, what: str, x: torch.Tensor, nbytes: int, steps: Steps) -> Wait:
        """Begin a collective; what is returned does the rest.

        Args:
            nbytes: that a rank sends to another.
            steps: it yields when others are to be waited for.
        """
        if not nbytes:
            return lambda: None
        with self._reporting(what, x):
            if nbytes > MESSAGE_BYTES:
                self._finish(self._under_way)
                self._under_way = steps
            next(steps)

        def wait() -> None:
            with self._reporting(what, x):
                self._finish(steps)

        return wait

    def _finish(self, steps: Steps | None) -> None:
        for _ in steps or ():
            pass
        if steps is self._under_way:
            self._under_way = None

    def _exchange(self, messages: Sequence[bytes]) -> Generator[None, None, dict[int, bytearray]]:
        """Message i to rank i; what came from the others."""
        self._sent += 1
        number = self._sent
        self._peers.send(number, messages)
        yield
        return self._peers.receive(number)

    def _swap(self, send: Sequence[torch.Tensor]) -> Generator[None, None, list[torch.Tensor]]:
        """Part i to rank i as a message; what came from each, of the size of this rank's own."""
        own = send[self.index]
        once = {id(x): _bytes(x) for x in send}  # all are the same one but in a scatter
        got = [own] * self.size
        for rank, message in (yield from self._exchange([once[id(x)] for x in send])).items():
            self._same_size(rank, len(message), own.nbytes)
            got[rank] = torch.frombuffer(message, dtype=own.dtype)
        return got

    def _half(self, x: torch.Tensor) -> torch.Tensor:
        """The memory of the round that begins, as elements like those of x."""
        half: torch.Tensor = self._halves[self._rounds % 2].view(x.dtype)
        return half

    def _told(self, part: torch.Tensor) -> Steps:
        """This rank has written its part of the round; then, all have."""
        self._rounds += 1
        says = [part.nbytes.to_bytes(8, "little")] * self.size
        for rank, message in (yield from self._exchange(says)).items():
            self._same_size(rank, int.from_bytes(message, "little"), part.nbytes)

    @staticmethod
    def _same_size(rank: int, found: int, own: int) -> None:
        if found != own:
            raise RuntimeError(f"rank {rank} of the group sent {found} bytes, not {own}")

    # Each in rounds of as much as there is memory for. Names of sizes: k ranks, n elements.

    def _gather(self, own: torch.Tensor, out: torch.Tensor) -> Steps:
        """[n] to [k, n]; what is in this rank's row may be that already."""
        if own.nbytes <= MESSAGE_BYTES:
            got = yield from self._swap([own] * self.size)
            for row, part in zip(out, got, strict=True):
                row.copy_(part)
            return
        if out[self.index].data_ptr() != own.data_ptr():
            out[self.index].copy_(own)
        for a, b in _rounds(own.numel(), _ROW_BYTES // own.element_size()):
            rows = self._half(own)[: self.size * (b - a)].view(self.size, -1)
            rows[self.index].copy_(own[a:b])
            yield from self._told(rows[self.index])
            for others in self._others:
                out[others, a:b].copy_(rows[others])

    def _scatter(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """[k, n] to the sum over ranks of this one's row, which may be its place."""
        k, me = self.size, self.index
        if out.nbytes <= MESSAGE_BYTES:
            parts = yield from self._swap(x.unbind())
            self._total(parts, "sum", out, parts[0] if me > 1 else out)
            return
        for a, b in _rounds(out.numel(), _ROW_BYTES // (k * x.element_size())):
            rows = self._half(x)[: k * k * (b - a)].view(k, k, -1)
            for others in self._others:
                rows[me, others].copy_(x[others, a:b])
            yield from self._told(rows[me])
            parts = list(rows[:, me].unbind())  # which no other reads
            parts[me] = x[me, a:b]
            self._total(parts, "sum", out[a:b], parts[0] if me > 1 else out[a:b])

    def _transpose(self, x: torch.Tensor, out: torch.Tensor) -> Steps:
        """[k, n], row i for rank i, to [k, n], row i of rank i."""
        k, me = self.size, self.index
        if out[0].nbytes <= MESSAGE_BYTES:
            torch.stack((yield from self._swap(x.unbind())), out=out)
            return
        out[me].copy_(x[me])
        for a, b in _rounds(out.shape[1], _ROW_BYTES // (k * x.element_size())):
            rows = self._half(x)[: k * k * (b - a)].view(k, k, -1)
            for others in self._others:
                rows[me, others].copy_(x[others, a:b])
            yield from self._told(rows[me])
            for others in self._others:
                out[others, a:b].copy_(rows[others, me])

    def _reduce(self, x: torch.Tensor, op: str, out: torch.Tensor) -> Steps:
        """[n] to [n], which may be the same."""
        if x.nbytes <= MESSAGE_BYTES:
            parts = yield from self._swap([x] * self.size)
            self._total(parts, op, out, parts[0] if self.index > 1 else out)
            return
        for a, b in _rounds(x.numel(), _ROW_BYTES // x.element_size()):
            yield from self._reduce_row([x[a:b]], op, out[a:b])

    def _reduce_row(self, xs: list[torch.Tensor], op: str, out: torch.Tensor) -> Steps:
        """[n1], [n2], ... one behind the other to [n], as much as there is memory for."""
        k, n = self.size, out.numel()
        rows = self._half(out)[: k * n].view(k, n)
        torch.cat(xs, out=rows[self.index])
        yield from self._told(out)
        if out.nbytes * (k - 1) * (k - 2) // k <= _ROUND_BYTES:
            self._total(rows.unbind(), op, out, out)
            return
        row = self._half(out)[:n]
        share = slice(n * self.index // k, n * (self.index + 1) // k)
        self._total(rows[:, share].unbind(), op, row[share], row[share])
        yield from self._told(out)
        out.copy_(row)

    @staticmethod
    def _total(
        parts: Sequence[torch.Tensor], op: str, out: torch.Tensor, so_far: torch.Tensor
    ) -> None:
        """Of the parts in their order.

        Args:
            so_far: for sums on the way; it may be the place of one of the first two, which are read
                before it is written.
        """
        combine = torch.add if op == "sum" else torch.maximum
        total = parts[0]
        for part in parts[1:-1]:
            total = combine(total, part, out=so_far)
        combine(total, parts[-1], out=out)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(-1)


def _bytes(x: torch.Tensor) -> bytes:
    row = x.contiguous().as_strided((x.numel(),), (1,))  # one element may have any stride
    found: bytes = row.view(torch.uint8).numpy().tobytes()
    return found


def _rounds(n: int, most: int) -> list[tuple[int, int]]:
    """Begin and end of parts of n elements."""
    return [(a, min(a + most, n)) for a in range(0, n, most)]
