"""From what is kept to a schedule: what is missing is computed again right before it is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autopar.schedule.program import GIVEN, Program, Schedule
from autopar.schedule.stages import Stage
from autopar.solver.chain import Keep, Plan


class Backward:
    """The backward while it is put together.

    Args:
        kept: storages of the forward that are there.
    """

    def __init__(self, program: Program, kept: Iterable[int]) -> None:
        self.program = program
        self.there = set(kept)
        self.sequence: list[int] = []

    def demand(self, storages: Iterable[int]) -> None:
        """Compute what is not there, and what that takes. What cannot run again was kept."""
        program = self.program
        stack = [(s, False) for s in reversed(list(storages))]
        while stack:
            s, ready = stack.pop()
            maker = program.maker[s]
            if s in self.there or maker == GIVEN:
                continue
            op = program.ops[maker]
            if not op.replays:
                self.there.add(s)
            elif ready:
                self.call(maker)
            else:
                stack.append((s, True))
                stack += [(r, False) for r in reversed(op.reads)]

    def call(self, i: int) -> None:
        """Run an operator whose operands are there."""
        self.sequence.append(i)
        self.there.update(self.program.ops[i].makes)

    def run(self, i: int) -> None:
        """Run an operator, and before it what it lacks."""
        self.demand(self.program.ops[i].reads)
        self.call(i)


def schedule_of(program: Program, kept: Iterable[int]) -> Schedule:
    """Keep some storages and compute the others again, each once."""
    backward = Backward(program, kept)
    for i in program.backward:
        backward.run(i)
    backward.demand(s for s in program.gradients if program.maker[s] != GIVEN)
    return Schedule(program.forward, tuple(backward.sequence))


def schedule_of_plan(
    program: Program,
    stages: Sequence[Stage],
    options: Sequence[Sequence[tuple[frozenset[int], int]]],
    common: frozenset[int],
    plan: Plan,
) -> Schedule:
    """Write a plan of the chain out.

    Args:
        options: of every stage, the storages that each option keeps and the stages that it spans.
        common: storages that stay whatever the plan.
    """
    backward = Backward(program, common)
    mine = [frozenset(s for i in stage.forward for s in program.ops[i].makes) for stage in stages]

    def forget(first: int, end: int, but: Iterable[int]) -> None:
        gone = frozenset[int]().union(*mine[first:end])
        backward.there -= gone - common - frozenset(but)

    def play(plan: Plan, last: int, first_time: bool) -> None:
        """What is kept in the first pass is there; afterwards it is computed again here."""
        steps: list[tuple[int, int]] = []
        for step in plan:
            if isinstance(step, Keep):
                i = step.stage
                kept, span = options[i][step.option]
                end = i + span
                wanted = set(kept) | ({stages[end - 1].output} if end <= last else set())
                if first_time:
                    backward.there |= wanted
                elif end <= last:
                    backward.demand(_in_order(program, wanted))
                    forget(i, end, wanted)
                steps.append((i, end))
                continue
            border = stages[step.then].input
            if first_time:
                backward.there.add(border)
            else:
                backward.demand([border])
                forget(step.first, step.then, [border])
            play(step.later, last, first_time)
            backward.there.discard(border)
            play(step.again, step.then - 1, False)
        for i, end in reversed(steps):
            for stage in reversed(stages[i:end]):
                for each in stage.backward:
                    backward.run(each)
            forget(i, end, ())

    play(plan, len(stages) - 1, True)
    backward.demand(s for s in program.gradients if program.maker[s] != GIVEN)
    return Schedule(program.forward, tuple(backward.sequence))


def _in_order(program: Program, storages: Iterable[int]) -> list[int]:
    return sorted(storages, key=lambda s: (program.maker[s], s))
