"""`Peers`: the processes of a group that run on one host, as seen by one of them.

Between every two is a socket, for small messages, and all have a piece of memory in common, for
large ones. Neither has a name in a file system, so that nothing is left behind and the size of
/dev/shm does not matter.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import select
import socket
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autopar.runtime.groups import DEFAULT_TIMEOUT

log = logging.getLogger(__name__)

# Of the longest message. Writing more to memory is faster: a message is written once for each.
MESSAGE_BYTES = 8 * 2**10
# In front of a message: which of those from its sender it is an answer to.
_NUMBER = struct.Struct("<q")
# Of waiting for one process, before looking at what the others do.
_LOOK_US = 100_000
# Until a process that has said it is there takes a step of the meeting.
_MEETING_S = 60.0


class Peers:
    """Messages between the processes of a group, each known by its position, and their memory.

    Args:
        index: of this process.
        links: connected sockets to the others, that keep messages apart.
        memory: bytes that all see.
        ranks: what errors call them, by position.
        timeout_s: how long to wait for a message.
    """

    def __init__(
        self,
        index: int,
        links: dict[int, socket.socket],
        memory: torch.Tensor,
        ranks: Sequence[int],
        timeout_s: float,
    ) -> None:
        self.index, self.memory = index, memory
        self._links, self._ranks, self._timeout_s = links, tuple(ranks), timeout_s
        # what has come before it was asked for
        self._inbox: dict[int, dict[int, bytearray]] = {peer: {} for peer in links}
        # from the next on, so that not all send to the same
        size = len(links) + 1
        self._order = [(index + d) % size for d in range(1, size)]
        for link in links.values():
            link.settimeout(None)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, _LOOK_US))
        _ALL.add(self)
        # at exit sockets close with the process, after what is registered to be done there
        weakref.finalize(self, _close, tuple(links.values())).atexit = False

    def close(self) -> None:
        """Hang up: who waits for this process learns that it will not answer."""
        _close(tuple(self._links.values()))

    def send(self, number: int, messages: Sequence[bytes]) -> None:
        """Message i to process i, under a number that all give it; this returns before they are
        read.

        Raises:
            RuntimeError: a process is gone, or does not read.
        """
        head = _NUMBER.pack(number)
        for peer in self._order:
            link, message = self._links[peer], head + messages[peer]
            while True:
                try:
                    link.send(message, socket.MSG_DONTWAIT)
                    break
                except BlockingIOError:
                    self._make_room(peer)
                except OSError as error:
                    raise self._gone(peer) from error

    def receive(self, number: int) -> dict[int, bytearray]:
        """What the others send under this number, by who did.

        Raises:
            RuntimeError: a process is gone, or nothing came of it in time.
        """
        for peer in self._order:
            inbox, begin = self._inbox[peer], None
            while number not in inbox:
                if not self._take(peer):
                    begin = begin or time.monotonic()
                    self._look_up(number, time.monotonic() - begin)
        return {peer: inbox.pop(number) for peer, inbox in self._inbox.items()}

    def _look_up(self, number: int, waited_s: float) -> None:
        """While waiting for one, read what all have sent: one that cannot send on to this process
        may be what the other waits for."""
        for peer, inbox in self._inbox.items():
            try:
                self._drain(peer)
            except RuntimeError:  # having sent its part it may go
                if number not in inbox:
                    raise
        missing = [self._ranks[p] for p, inbox in self._inbox.items() if number not in inbox]
        if missing and waited_s > self._timeout_s:
            raise RuntimeError(f"ranks {missing} have not come within {self._timeout_s:g} s")

    def _drain(self, peer: int) -> None:
        while self._take(peer, socket.MSG_DONTWAIT):
            pass

    def _take(self, peer: int, flags: int = 0) -> bool:
        """One message from a process into the inbox; whether there was one soon."""
        while True:
            try:
                message = self._links[peer].recv(_NUMBER.size + MESSAGE_BYTES, flags)
            except BlockingIOError:
                return False
            except ConnectionResetError:  # said once; what was sent before comes after it
                continue
            except OSError as error:
                raise self._gone(peer) from error
            if not message:
                raise self._gone(peer)
            (number,) = _NUMBER.unpack_from(message)
            self._inbox[peer][number] = bytearray(memoryview(message)[_NUMBER.size :])
            return True

    def _make_room(self, peer: int) -> None:
        """Wait until a process takes messages again. It may be waiting for this one to do so, whose
        messages are therefore read."""
        poll = select.poll()
        for other, link in self._links.items():
            poll.register(link, select.POLLIN | (select.POLLOUT if other == peer else 0))
        if not poll.poll(min(1e3 * self._timeout_s, 2**31 - 1)):
            raise RuntimeError(
                f"rank {self._ranks[peer]} has read nothing for {self._timeout_s:g} s"
            )
        for other in self._links:
            self._drain(other)

    def _gone(self, peer: int) -> RuntimeError:
        return RuntimeError(f"rank {self._ranks[peer]} has closed its connection")


def _close(links: Sequence[socket.socket]) -> None:
    for link in links:
        link.close()


_ALL: weakref.WeakSet[Peers] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked process holds no connection open after its parent has died."""
    for peers in tuple(_ALL):
        peers.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def meet(group: dist.ProcessGroup, nbytes: int, timeout_s: float | None = None) -> Peers | None:
    """Connect the processes of a group and give them memory in common; called by all of them.

    Args:
        group: can communicate; it is asked at every step whether all could take it.
        nbytes: of the memory. It costs nothing until it is used.
        timeout_s: how long to wait for a message; None for what the group waits.

    Returns:
        None on all of them if they are not on one host, or something else is in the way: the log
        says what.
    """
    meeting = _Meeting(group.rank(), group.size(), nbytes)
    answers: list[Any] = [None] * group.size()
    ranks = dist.get_process_group_ranks(group)
    try:
        for step in (meeting.listen, meeting.call, meeting.share):
            dist.all_gather_object(answers, _attempt(step, answers), group=group)
            failed = {r: a for r, a in zip(ranks, answers, strict=True) if isinstance(a, OSError)}
            if failed:
                rank, reason = next(iter(failed.items()))
                log.info("ranks %s share no memory: %s on rank %d", ranks, reason, rank)
                return None
        log.info("ranks %s share memory", ranks)
        timeout_s = timeout_s or _timeout_s(group)
        return Peers(meeting.index, meeting.take(), meeting.memory, ranks, timeout_s)
    finally:
        meeting.close()


def _attempt(step: Callable[[list[Any]], Any], answers: list[Any]) -> Any:
    try:
        return step(answers)
    except OSError as error:
        return OSError(f"{step.__name__}: {error}")


def _timeout_s(group: dist.ProcessGroup) -> float:
    """Of a collective of this group, where its backend says."""
    try:
        timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):
        timeout = DEFAULT_TIMEOUT
    return timeout.total_seconds()


class _Meeting:
    """The steps by which processes come to be connected. Each gets what all answered to the one
    before; OSError says why there is no going on."""

    def __init__(self, index: int, size: int, nbytes: int) -> None:
        self.index, self.size, self.nbytes = index, size, nbytes
        self._links: dict[int, socket.socket] = {}
        self._listener: socket.socket | None = None
        self._file: int | None = None

    def listen(self, answers: list[Any]) -> str:
        """The name under which the others call: by chance, as another host may have the same ones,
        and abstract, without a file."""
        if os.environ.get("AUTOPAR_SHARED_MEMORY") == "0":
            raise OSError("AUTOPAR_SHARED_MEMORY is 0")
        if not hasattr(os, "memfd_create"):
            raise OSError("no memory without a name on this system")
        if self.index == 0:
            self._file = os.memfd_create("autopar")
            os.ftruncate(self._file, self.nbytes)
        name = f"\0autopar-{secrets.token_hex(16)}"
        self._listener = _socket()
        self._listener.bind(name)
        self._listener.listen(self.size)
        return name

    def call(self, names: list[Any]) -> None:
        """All that come before this one; each finds the call when it looks."""
        for peer in range(self.index):
            self._links[peer] = link = _socket()
            link.connect(names[peer])
            link.send(_NUMBER.pack(self.index))

    def share(self, answers: list[Any]) -> None:
        """Take the calls of those that come after this one; the first hands out the memory."""
        assert self._listener is not None
        for _ in range(self.index + 1, self.size):
            link, _ = self._listener.accept()
            link.settimeout(_MEETING_S)
            self._links[int.from_bytes(link.recv(_NUMBER.size), "little")] = link
        if set(self._links) != set(range(self.size)) - {self.index}:
            raise OSError(f"called by {sorted(self._links)}")
        for link in self._links.values():
            _, user, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, _CREDENTIALS, 12))
            if user != os.getuid():
                raise OSError(f"called by user {user}")
        if self._file is None:
            self._file = _file_from(self._links[0])
        else:
            for link in self._links.values():
                socket.send_fds(link, [b"m"], [self._file])
        self.memory = torch.frombuffer(mmap.mmap(self._file, self.nbytes), dtype=torch.uint8)

    def take(self) -> dict[int, socket.socket]:
        """The connections, which are then not closed with the rest."""
        links, self._links = self._links, {}
        return links

    def close(self) -> None:
        """What the meeting alone needs."""
        _close([*self._links.values(), *([self._listener] if self._listener else [])])
        if self._file is not None:
            os.close(self._file)


_CREDENTIALS = getattr(socket, "SO_PEERCRED", 0)


def _socket() -> socket.socket:
    """One that keeps messages apart, like the ones it accepts."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(_MEETING_S)
    return made


def _file_from(link: socket.socket) -> int:
    _, files, _, _ = socket.recv_fds(link, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not files:
        raise OSError("given no memory")
    return files[0]
