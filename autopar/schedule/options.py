"""What a stage may keep: choices from everything to nothing, found by small integer programs over
operators, and shared by all stages of the same kind.

    keep_v  storage v of the stage is kept        run_o  operator o is recomputed in the backward

    min  Σ cost_o run_o + ε Σ bytes_v keep_v
    s.t. keep_v + run_maker(v) >= 1                 backward reads v
         keep_u + run_maker(u) >= run_o             o reads u
         Σ bytes_v keep_v <= budget
         live_t(keep, run) <= cap                   at every operator t

Without the last two, and with a price of kept bytes in the objective, this is a minimum cut. The
choices for all prices are the convex hull of cost over bytes; equal stages that mix two neighbours
of it reach every budget at the least cost. In `live_t`, what is recomputed is alive from its first
possible reader to its last; simulating the stage gives the exact peak.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

from autopar.schedule.build import BackwardBuilder
from autopar.schedule.program import INPUT, Program
from autopar.schedule.stages import Stage, join
from autopar.solver.chain import ChainOption
from autopar.solver.linear_program import LinearProgram

_BUDGETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0)
KEPT_SHARES = (0.0, 0.25, 0.4, 0.55, 0.75)  # of stages whose output is not kept
_CAPS = (0.6, 0.8)  # of the backward's peak when nothing is kept
_PRICES = 16  # at most, that the convex hull is sought with
_SAME = 1e-3  # of its cost: what a choice must win to be a new point of the hull


@dataclass(frozen=True)
class StageOption:
    """The storages that an option keeps, and its costs for the chain."""

    kept: frozenset[int]
    costs: ChainOption


def stage_options(
    program: Program, stage: Stage, cost: Mapping[int, float]
) -> tuple[StageOption, ...]:
    """The options of a stage that are not dominated by another one.

    Args:
        cost: of recomputing each operator.
    """
    model = StageModel(program, stage, cost)
    options: dict[frozenset[int], ChainOption] = {}

    def add(share: float, cap: float = math.inf, price: float = 0.0) -> ChainOption | None:
        kept = model.solve(share * model.needed_bytes, cap, price)
        if kept is None:
            return None
        return options.setdefault(kept, model.costs(kept))

    for share in _BUDGETS:
        add(share)
    sides = [(all_kept, nothing)] if (all_kept := add(1.0)) and (nothing := add(0.0)) else []
    for _ in range(_PRICES):
        if not sides:
            break
        more, less = sides.pop(0)
        if more.kept <= less.kept:
            continue
        price = (less.cost - more.cost) / (more.kept - less.kept)
        between = add(1.0, price=price)
        line = more.cost + price * more.kept
        if between and between.cost + price * between.kept < line * (1 - _SAME):
            sides += [(more, between), (between, less)]
    top = max((o.backward for o in options.values()), default=0.0)
    for cap in _CAPS:
        for share in (0.0, 0.35):
            add(share, cap * top)
    return tuple(
        StageOption(kept, option)
        for kept, option in options.items()
        if not any(_dominates(other, option) for other in options.values())
    )


def kept_without_output(
    program: Program, stage: Stage, cost: Mapping[int, float]
) -> tuple[frozenset[int], ...]:
    """What a stage keeps if its output is recomputed from that: one choice per share in
    `KEPT_SHARES`."""
    model = StageModel(program, stage, cost, output=True)
    choices = [model.solve(share * model.needed_bytes) for share in KEPT_SHARES]
    return tuple(kept if kept is not None else frozenset() for kept in choices)


def span_option(
    program: Program, stages: Sequence[Stage], kept: frozenset[int], cost: Mapping[int, float]
) -> StageOption:
    """The option that keeps these storages of several stages, and no output of theirs."""
    model = StageModel(program, join(program, stages), cost)
    return StageOption(kept, replace(model.costs(kept), span=len(stages)))


def _dominates(a: ChainOption, b: ChainOption) -> bool:
    return a != b and all(x <= y for x, y in zip(astuple(a), astuple(b), strict=True))


class StageModel:
    """The integer program of one stage, or of the whole program as one stage.

    Args:
        output: the stage's output may be recomputed, like its other storages.
    """

    def __init__(
        self, program: Program, stage: Stage, cost: Mapping[int, float], *, output: bool = False
    ) -> None:
        self.program, self.stage, self.cost = program, stage, cost
        self.written = {s for i in stage.forward for s in program.ops[i].makes}
        read = (s for i in stage.backward for s in program.ops[i].reads)
        self.needed = [s for s in dict.fromkeys(read) if s in self.written]
        if not output:
            self.written.discard(stage.output)
            self.needed = [s for s in self.needed if s != stage.output]
        elif stage.output >= 0 and stage.output not in self.needed:
            self.needed.append(stage.output)
        self.needed_bytes = sum(program.nbytes[s] for s in self.needed)
        self.spans = self._spans()

    def _spans(self) -> dict[int, tuple[int, int]]:
        """Per storage, the first and last operator of the backward that may need it."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for t, i in enumerate(self.stage.backward):
            for s in self.program.ops[i].reads:
                if s in self.written:
                    first.setdefault(s, t)
                    last[s] = t
        for s in self.needed:  # the output, if the stage's own backward does not read it
            first.setdefault(s, 0)
            last.setdefault(s, 0)
        for i in reversed(self.stage.forward):
            op = self.program.ops[i]
            times = [first[s] for s in op.makes if s in first]
            for s in op.reads if times else ():
                if s in self.written:
                    first[s] = min(first.get(s, times[0]), *times)
                    last[s] = max(last.get(s, times[0]), *times)
        return {s: (first[s], last[s]) for s in first}

    def solve(
        self, budget: float, cap: float = math.inf, price: float = 0.0, *, seconds: float = 1.0
    ) -> frozenset[int] | None:
        """The cheapest choice that keeps at most `budget` bytes; None if there is none.

        Args:
            cap: of the bytes alive while the backward runs.
            price: of a kept byte, in the unit of the costs.
            seconds: at most.
        """
        if not self.spans:
            return frozenset()
        ops, nbytes, maker = self.program.ops, self.program.nbytes, self.program.maker
        replayable = [
            i
            for i in self.stage.forward
            if ops[i].replays and any(s in self.spans for s in ops[i].makes)
        ]
        scale = sum(self.cost[i] for i in replayable) or 1.0
        total = sum(nbytes[s] for s in self.spans) or 1
        problem = LinearProgram()
        keep = {
            s: problem.variable((1e-6 / total + price / scale) * nbytes[s], upper=1.0, integer=True)
            for s in sorted(self.spans, key=str)
        }
        run = {
            i: problem.variable(self.cost[i] / scale, upper=1.0, integer=True)
            for i in sorted(replayable, key=str)
        }

        def present(s: int) -> list[tuple[int, float]]:
            return [(keep[s], 1.0)] + ([(run[maker[s]], 1.0)] if maker[s] in run else [])

        for s in self.needed:
            problem.row(present(s), lower=1.0)
        for i in replayable:
            for s in ops[i].reads:
                if s in keep:
                    problem.row([*present(s), (run[i], -1.0)], lower=0.0)
        not_replayable = sum(nbytes[s] for s in self.spans if maker[s] not in run)
        problem.row(
            [(keep[s], nbytes[s] / total) for s in self.spans],
            upper=max(budget, not_replayable) / total + 1e-9,
        )
        for t, gradients in enumerate(self._gradient_bytes() if math.isfinite(cap) else ()):
            terms = []
            for s, (first, last) in self.spans.items():
                if t <= last and nbytes[s]:
                    terms.append((keep[s], nbytes[s] / cap))
                    if first <= t and maker[s] in run:
                        terms.append((run[maker[s]], nbytes[s] / cap))
            problem.row(terms, upper=1 - gradients / cap)
        solution = problem.minimize(time_limit=seconds, gap=1e-3)
        unsolved = solution.status == "stopped" and not solution.values.any()
        if solution.status == "infeasible" or unsolved:
            return None
        return frozenset(s for s, variable in keep.items() if solution.values[variable] > 0.5)

    def costs(self, kept: frozenset[int]) -> ChainOption:
        """The costs of keeping these storages, from a simulation of the stage alone."""
        program, stage = self.program, self.stage
        read = {s for i in (*stage.forward, *stage.backward) for s in program.ops[i].reads}
        own = {s for i in stage.backward for s in program.ops[i].makes}
        backward = BackwardBuilder(program, (read - self.written - own) | kept)
        backward.run(stage.backward)
        sequence = backward.sequence
        required = set(stage.backward)
        start = {s: program.nbytes[s] for s in (*_incoming(program, stage), *kept)}
        return ChainOption(
            sum(program.nbytes[s] for s in kept),
            forward_peak(program, stage, kept),
            max(_live(program, sequence, start, _outgoing(program, stage)), default=0),
            sum(self.cost[i] for i in sequence if i not in required),
        )

    def _gradient_bytes(self) -> list[int]:
        """Bytes of gradients alive at every operator of the stage's backward."""
        program, stage = self.program, self.stage
        start = {s: program.nbytes[s] for s in _incoming(program, stage)}
        outgoing = _outgoing(program, stage)
        return _live(program, stage.backward, start, outgoing, skip=program.forward_storages)


def forward_peak(program: Program, stage: Stage, kept: frozenset[int]) -> float:
    """The most bytes alive while the stage's forward runs, of what it makes itself."""
    return max(_live(program, stage.forward, {}, kept | {stage.output}), default=0)


def _incoming(program: Program, stage: Stage) -> set[int]:
    """Gradients that the stage's backward reads and others made."""
    forward = program.forward_storages
    own = {s for i in stage.backward for s in program.ops[i].makes}
    read = {s for i in stage.backward for s in program.ops[i].reads}
    return {s for s in read - own if program.maker[s] != INPUT and s not in forward}


def _outgoing(program: Program, stage: Stage) -> set[int]:
    """Gradients that later operators read."""
    inside = Counter(s for i in set(stage.backward) for s in set(program.ops[i].reads))
    readers = program.backward_readers
    made = {s for i in stage.backward for s in program.ops[i].makes}
    return {s for s in made if readers.get(s, 0) > inside[s]}


def _live(
    program: Program,
    sequence: Sequence[int],
    start: Mapping[int, int],
    end: Iterable[int],
    skip: frozenset[int] = frozenset(),
) -> list[int]:
    """Bytes alive at every operator of a piece; results are written over operands that die.

    Args:
        start: alive at its beginning, with their bytes.
        end: alive after it.
        skip: do not count.
    """
    end = set(end)
    last: dict[int, int] = {}
    for t, i in enumerate(sequence):
        last |= dict.fromkeys(program.ops[i].reads, t)
    alive = dict(start)
    own: set[int] = set()
    now, live = sum(alive.values()), []
    for t, i in enumerate(sequence):
        op = program.ops[i]
        in_place = any(
            s in own and last[s] == t and s not in end and alive[s] for s in op.overwrites
        )
        written = {s: program.nbytes[s] for s in op.makes if s not in skip}
        live.append(now + (0 if in_place else sum(written.values())) + op.buffers.beside)
        now += sum(n - alive.get(s, 0) for s, n in written.items())
        alive |= written
        own.update(written)
        for s in (*op.reads, *written):
            if s in alive and s not in end and last.get(s, t) <= t:
                now -= alive.pop(s)
    return live
