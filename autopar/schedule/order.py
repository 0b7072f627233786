"""An order of the backward in which fewer bytes are alive.

Autograd's order is that of the forward, reversed. An operator may move to where it frees operands
earlier (the gradient of a weight, which is the last reader of an activation) or makes results
later. A move is taken if it lowers the sum of live bytes over time. In effect, gradients of weights
come before the gradient that is passed on.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.schedule.program import Program

_ROUNDS = 4
_FURTHEST = 200  # no operator gains by moving down further


def in_order(program: Program) -> Program:
    """The program with its backward in that order."""
    mover = _Mover(program)
    for _ in range(_ROUNDS):
        before = list(mover.order)
        for i in (*before, *reversed(before)):
            mover.move(i)
        if mover.order == before:
            break
    return replace(program, order=tuple(mover.order))


class _Mover:
    """The order, and every operator's position in it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order = list(program.backward)
        self.at = {i: k for k, i in enumerate(self.order)}
        self.readers: dict[int, list[int]] = {}
        for i in self.order:
            for s in program.ops[i].reads:
                self.readers.setdefault(s, []).append(i)

    def move(self, i: int) -> None:
        """Move one operator to the best position that its operands and readers allow."""
        op, at = self.program.ops[i], self.at[i]
        maker, nbytes = self.program.maker, self.program.nbytes
        made_at = [self.at[m] for s in op.reads if (m := maker[s]) in self.at]
        read_at = [self.at[r] for s in op.makes for r in self.readers.get(s, ())]
        low = max(made_at, default=-1) + 1
        high = min(read_at, default=len(self.order)) - 1
        if i not in self.program.flows:  # as late as possible, like recomputation
            self._to(i, high)
            return
        returned = self.program.gradients
        written = sum(nbytes[s] for s in op.makes if s not in returned)
        # the last other reader of each operand; -1 if the forward alone reads it
        last = [
            (max((self.at[r] for r in self.readers[s] if r != i), default=-1), nbytes[s])
            for s in op.reads
            if s not in returned and nbytes[s]
        ]
        best, best_at, gain = 0, at, 0
        for p in range(at - 1, low - 1, -1):
            gain += sum(n for read, n in last if read < p) - written
            if gain > best:
                best, best_at = gain, p
        gain = 0
        for p in range(at + 1, high + 1):
            gain += written - sum(n for read, n in last if read < p)
            if gain > best:
                best, best_at = gain, p
            if p - at > _FURTHEST:
                break
        self._to(i, best_at)

    def _to(self, i: int, new: int) -> None:
        at = self.at[i]
        if new == at:
            return
        self.order.insert(new, self.order.pop(at))
        for k in range(min(at, new), max(at, new) + 1):
            self.at[self.order[k]] = k
