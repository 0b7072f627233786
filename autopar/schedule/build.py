"""From what is kept to a schedule: what is missing is recomputed right before it is read."""

from __future__ import annotations

from collections.abc import Iterable

from autopar.schedule.program import INPUT, Program, Schedule


class BackwardBuilder:
    """Writes the backward of a schedule.

    Attributes:
        sequence: its operators so far.
        alive: storages that exist now.

    Args:
        kept: storages of the forward that are saved.
    """

    def __init__(self, program: Program, kept: Iterable[int]) -> None:
        self.program = program
        self.alive = set(kept)
        self.sequence: list[int] = []

    def recompute(self, storages: Iterable[int]) -> None:
        """Recompute storages that do not exist, and what that needs; operators that cannot be
        replayed have had their results saved."""
        program = self.program
        stack = [(s, False) for s in reversed(list(storages))]
        while stack:
            s, ready = stack.pop()
            maker = program.maker[s]
            if s in self.alive or maker == INPUT:
                continue
            op = program.ops[maker]
            if not op.replays:
                self.alive.add(s)
            elif ready:
                self._append(maker)
            else:
                stack.append((s, True))
                stack += [(r, False) for r in reversed(op.reads)]

    def _append(self, i: int) -> None:
        self.sequence.append(i)
        self.alive.update(self.program.ops[i].makes)

    def run(self, ops: Iterable[int]) -> None:
        """Run operators, each after recomputing what it reads."""
        for i in ops:
            self.recompute(self.program.ops[i].reads)
            self._append(i)

    def schedule(self) -> Schedule:
        """The finished schedule, which makes all gradients."""
        self.recompute(s for s in self.program.gradients if self.program.maker[s] != INPUT)
        return Schedule(self.program.forward, tuple(self.sequence))


def schedule_of(program: Program, kept: Iterable[int]) -> Schedule:
    """Keep these storages and recompute the others, each once."""
    backward = BackwardBuilder(program, kept)
    backward.run(program.backward)
    return backward.schedule()
