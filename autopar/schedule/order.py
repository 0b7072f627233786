"""An order of the backward in which less is alive.

Autograd's order is that of the forward, reversed. Within it, an operator may move to where it frees
earlier (a gradient of a weight, which ends the life of an activation) or makes later. A move is
taken if it lowers the bytes alive summed over time; so many small steps find what matters: weight
gradients first, then the gradient that is passed on.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.schedule.program import Program

_ROUNDS = 4
_FAR = 200  # no operator gains by moving down so many places


def ordered_backward(program: Program) -> tuple[int, ...]:
    """The operators of the backward in the new order."""
    mover = _Mover(program)
    for _ in range(_ROUNDS):
        before = list(mover.order)
        for i in (*before, *reversed(before)):
            mover.move(i)
        if mover.order == before:
            break
    return tuple(mover.order)


class _Mover:
    """The order, and where every operator stands in it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order = list(program.backward)
        self.at = {i: k for k, i in enumerate(self.order)}
        self.readers: dict[int, list[int]] = {}
        for i in self.order:
            for s in program.ops[i].reads:
                self.readers.setdefault(s, []).append(i)

    def move(self, i: int) -> None:
        """Move one operator to the best place among those that its operands and readers leave."""
        op, at = self.program.ops[i], self.at[i]
        maker, nbytes = self.program.maker, self.program.nbytes
        made_at = [self.at[m] for s in op.reads if (m := maker[s]) in self.at]
        read_at = [self.at[r] for s in op.makes for r in self.readers.get(s, ())]
        low = max(made_at, default=-1) + 1
        high = min(read_at, default=len(self.order)) - 1
        if i not in self.program.flows:  # as late as possible, like all that is computed again
            self._to(i, high)
            return
        returned = self.program.gradients
        made = sum(nbytes[s] for s in op.makes if s not in returned)
        # where each operand is read last by others; from the forward, it is alive before
        last = [
            (max((self.at[r] for r in self.readers[s] if r != i), default=-1), nbytes[s])
            for s in op.reads
            if s not in returned and nbytes[s]
        ]
        best, where, gain = 0, at, 0
        for p in range(at - 1, low - 1, -1):
            gain += sum(n for read, n in last if read < p) - made
            if gain > best:
                best, where = gain, p
        gain = 0
        for p in range(at + 1, high + 1):
            gain += made - sum(n for read, n in last if read < p)
            if gain > best:
                best, where = gain, p
            if p - at > _FAR:
                break
        self._to(i, where)

    def _to(self, i: int, where: int) -> None:
        at = self.at[i]
        if where == at:
            return
        self.order.insert(where, self.order.pop(at))
        for k in range(min(at, where), max(at, where) + 1):
            self.at[self.order[k]] = k


def in_order(program: Program) -> Program:
    """The program with its backward in the better order."""
    return replace(program, order=ordered_backward(program))
