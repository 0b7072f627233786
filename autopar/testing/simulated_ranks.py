"""All ranks of a mesh as threads of one process, on a `torch.distributed` backend of their own.

Programs run as on real processes: functional collectives find the process groups by name. The
threads of one group meet at every collective, share their tensors and compute the result
themselves, in the order of the ranks.

Python subclasses of `ProcessGroup` and their registration by name are private to torch; tested with
2.11 and 2.13.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work, _register_process_group, _unregister_process_group

from autopar.comm.groups import register_mesh

Coords = tuple[int, ...]

_NUMBERS = itertools.count()  # torch keeps one group per name


class _Meeting:
    """Where the threads of one group meet: every call takes the tensors of all ranks."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.tensors: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)

    def gather(self, rank: int, x: Any) -> list[Any]:
        self.tensors[rank] = x
        self.barrier.wait()
        tensors = list(self.tensors)
        self.barrier.wait()
        return tensors


class _Done(Work):
    """Work that is done when its collective returns."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class _ThreadGroup(dist.ProcessGroup):
    """One rank of a group of threads.

    Attributes:
        sent_bytes: that this rank has sent to others, by the ring algorithms.
    """

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        super().__init__(rank, len(meeting.tensors))  # type: ignore[call-arg]
        self._rank, self._meeting = rank, meeting
        self.sent_bytes = 0.0

    def getBackendName(self) -> str:
        return "threads"

    def _all(self, x: torch.Tensor, share: float) -> list[torch.Tensor]:
        """The tensors of all ranks, of which a share goes over every link of the ring."""
        self.sent_bytes += share * (self.size() - 1) * x.nbytes
        return self._meeting.gather(self._rank, x.detach().clone())

    def _own_parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """This rank's part of the tensors of all ranks."""
        tensors = self._all(x.reshape(-1), 1 / self.size())
        return [t.chunk(self.size())[self._rank] for t in tensors]

    def allreduce(  # type: ignore[override]
        self, tensors: list[torch.Tensor], opts: Any = None
    ) -> Work:
        (x,) = tensors
        stacked = torch.stack(self._all(x, 2 / self.size()))
        largest = opts is not None and opts.reduceOp == dist.ReduceOp.MAX
        x.copy_(stacked.amax(0) if largest else stacked.sum(0).to(x.dtype))
        return _Done()

    def allgather_into_tensor_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work:
        for output, x in zip(outputs, inputs, strict=True):
            output.copy_(torch.cat(self._all(x.reshape(-1), 1.0)).view_as(output))
        return _Done()

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work:
        for output, x in zip(outputs, inputs, strict=True):
            parts = self._own_parts(x)
            output.copy_(torch.stack(parts).sum(0).to(output.dtype).view_as(output))
        return _Done()

    def alltoall_base(  # type: ignore[override]
        self, output: torch.Tensor, x: torch.Tensor, output_sizes: Any, input_sizes: Any, opts: Any
    ) -> Work:
        if not input_sizes:
            output.copy_(torch.cat(self._own_parts(x)).view_as(output))
            return _Done()
        self.sent_bytes += (sum(input_sizes) - input_sizes[self._rank]) * x.element_size()
        rows = self._meeting.gather(self._rank, (x.detach().clone(), list(input_sizes)))
        parts = [row.split(sizes)[self._rank] for row, sizes in rows]
        output.copy_(torch.cat(parts).view_as(output))
        return _Done()


class SimulatedMesh:
    """Process groups for all ranks of a mesh, one thread each. Close it after use.

    Attributes:
        groups: by coordinates, the names of a rank's groups along the axes.
    """

    def __init__(self, mesh: Sequence[int], timeout_s: float = 120.0) -> None:
        self._meetings: dict[Any, _Meeting] = {}
        self._timeout_s = timeout_s
        self._registered: dict[str, _ThreadGroup] = {}  # torch keeps no reference to a Python group
        self.groups: dict[Coords, tuple[str, ...]] = {}
        world, number = math.prod(mesh), next(_NUMBERS)
        for rank, coords in enumerate(product(*(range(size) for size in mesh))):
            where = f"threads{number}/{','.join(map(str, coords))}"
            names = []
            for axis, size in enumerate(mesh):
                others = axis, coords[:axis] + coords[axis + 1 :]
                names.append(self._join(f"{where}/axis{axis}", others, coords[axis], size))
            all_ranks = self._join(f"{where}/all", "all", rank, world)
            self.groups[coords] = register_mesh(
                mesh, coords, names, all_ranks, gathers_in_place=False
            )

    def _join(self, name: str, meeting: Any, rank: int, size: int) -> str:
        if meeting not in self._meetings:
            self._meetings[meeting] = _Meeting(size, self._timeout_s)
        group = _ThreadGroup(rank, self._meetings[meeting])
        _register_process_group(name, group)  # type: ignore[arg-type]
        self._registered[name] = group
        return name

    @property
    def sent_bytes(self) -> float:
        """That all ranks have sent to others, by the ring algorithms."""
        return sum(group.sent_bytes for group in self._registered.values())

    def sent_along(self, coords: Coords) -> tuple[float, ...]:
        """Bytes that one rank has sent, per mesh axis."""
        return tuple(self._registered[name].sent_bytes for name in self.groups[coords])

    def run(self, work: Callable[[Coords], Any]) -> dict[Coords, Any]:
        """The result of one call per rank, all at once.

        Raises:
            the first error of a rank; the others stop waiting for it.
        """
        results: dict[Coords, Any] = {}
        errors: list[BaseException] = []

        def call(coords: Coords) -> None:
            try:
                results[coords] = work(coords)
            except BaseException as error:
                errors.append(error)
                for meeting in self._meetings.values():
                    meeting.barrier.abort()

        threads = [threading.Thread(target=call, args=(c,), daemon=True) for c in self.groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for meeting in self._meetings.values():
            meeting.barrier.reset()
        if errors:
            raise errors[0]
        return {coords: results[coords] for coords in self.groups}

    def close(self) -> None:
        """Take the groups out of torch's registry."""
        for name in self._registered:
            _unregister_process_group(name)  # type: ignore[arg-type]
        self._registered.clear()

    def __enter__(self) -> SimulatedMesh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
