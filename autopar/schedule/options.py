"""What a stage may keep: a family of choices from everything to nothing, made by small integer
programs at the level of operators, and shared by all stages of the same kind.

    keep_v  storage v of the stage is kept        run_o  operator o runs again in the backward

    min  Σ cost_o run_o + ε Σ bytes_v keep_v
    s.t. keep_v + run_maker(v) >= 1                 backward reads v             _needs
         keep_u + run_maker(u) >= run_o             o reads u                    _needs
         Σ bytes_v keep_v <= budget                                              _within
         live_t(keep, run) <= cap                   at every operator t          _below

Without the last, this is a minimum cut for every price of a byte. In `live_t` what runs again is
alive from its first possible reader to its last; the exact peak comes from simulating the stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pulp

from autopar.schedule.build import Backward
from autopar.schedule.program import GIVEN, Program
from autopar.schedule.stages import Stage, join
from autopar.solver.chain import ChainOption

_BUDGETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0)
THROUGH = (0.0, 0.25, 0.4, 0.55, 0.75)
_CAPS = (0.6, 0.8)  # of the backward's peak when nothing is kept


@dataclass(frozen=True)
class StageOption:
    """An option with the storages that it keeps."""

    kept: frozenset[int]
    numbers: ChainOption


def stage_options(
    program: Program, stage: Stage, cost: Mapping[int, float]
) -> tuple[StageOption, ...]:
    """The options of a stage that no other one of them is better than.

    Args:
        cost: of running each operator again.
    """
    model = Model(program, stage, cost)
    found: dict[frozenset[int], ChainOption] = {}
    everything = sum(program.nbytes[s] for s in model.direct)
    for share in _BUDGETS:
        kept = model.solve(share * everything)
        if kept is not None and kept not in found:
            found[kept] = model.numbers(kept)
    top = max((o.backward for o in found.values()), default=0.0)
    for cap in _CAPS:
        for share in (0.0, 0.35):
            kept = model.solve(share * everything, cap * top)
            if kept is not None and kept not in found:
                found[kept] = model.numbers(kept)
    return tuple(
        StageOption(kept, option)
        for kept, option in found.items()
        if not any(_better(other, option) for other in found.values())
    )


def through(
    program: Program, stage: Stage, cost: Mapping[int, float]
) -> tuple[frozenset[int], ...]:
    """What a stage keeps where its output is not kept either, but computed again from that: one
    choice for every share in `THROUGH`."""
    model = Model(program, stage, cost, output=True)
    everything = sum(program.nbytes[s] for s in model.direct)
    found = [model.solve(share * everything) for share in THROUGH]
    return tuple(kept if kept is not None else frozenset() for kept in found)


def span_option(
    program: Program, stages: Sequence[Stage], kept: frozenset[int], cost: Mapping[int, float]
) -> StageOption:
    """The option that keeps these storages of several stages, and not what they hand on."""
    model = Model(program, join(program, stages), cost)
    return StageOption(kept, replace(model.numbers(kept), span=len(stages)))


def _solver(seconds: float) -> pulp.LpSolver:
    make = pulp.HiGHS if find_spec("highspy") is not None else pulp.PULP_CBC_CMD
    return make(msg=False, timeLimit=seconds, gapRel=1e-3)


def _better(a: ChainOption, b: ChainOption) -> bool:
    return a != b and all(
        x <= y
        for x, y in (
            (a.kept, b.kept), (a.forward, b.forward), (a.backward, b.backward), (a.cost, b.cost)
        )
    )  # fmt: skip


class Model:
    """The integer program of one stage, or of the whole program as one."""

    def __init__(
        self,
        program: Program,
        stage: Stage,
        cost: Mapping[int, float],
        *,
        output: bool = False,
    ) -> None:
        self.program, self.stage, self.cost = program, stage, cost
        self.made = {s for i in stage.forward for s in program.ops[i].makes}
        self.direct = self._read_by(stage.backward)
        if not output:
            self.made.discard(stage.output)
            self.direct = [s for s in self.direct if s != stage.output]
        elif stage.output >= 0 and stage.output not in self.direct:
            self.direct.append(stage.output)
        self.again = [i for i in stage.forward if program.ops[i].replays]
        self.spans = self._spans()

    def _read_by(self, ops: Iterable[int]) -> list[int]:
        found = {s: None for i in ops for s in self.program.ops[i].reads if s in self.made}
        return list(found)

    def _spans(self) -> dict[int, tuple[int, int]]:
        """Of every storage, the first and last operator of the backward that may need it."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for t, i in enumerate(self.stage.backward):
            for s in self.program.ops[i].reads:
                if s in self.made:
                    first.setdefault(s, t)
                    last[s] = t
        for s in self.direct:  # the output, where the stage's own backward does not read it
            first.setdefault(s, 0)
            last.setdefault(s, 0)
        for i in reversed(self.stage.forward):
            op = self.program.ops[i]
            times = [first[s] for s in op.makes if s in first]
            for s in op.reads if times else ():
                if s in self.made:
                    first[s] = min(first.get(s, times[0]), *times)
                    last[s] = max(last.get(s, times[0]), *times)
        return {s: (first[s], last[s]) for s in first}

    def solve(
        self, budget: float, cap: float | None = None, *, seconds: float = 1.0
    ) -> frozenset[int] | None:
        """The cheapest choice that keeps at most `budget` bytes, None if there is none."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 3 announces PuLP 4
            return self._solve(budget, cap, seconds)

    def _solve(self, budget: float, cap: float | None, seconds: float) -> frozenset[int] | None:
        program, nbytes = self.program, self.program.nbytes
        problem = pulp.LpProblem("stage", pulp.LpMinimize)
        reach = self.spans
        keep = {s: pulp.LpVariable(f"k{s}", cat="Binary") for s in reach}
        run = {
            i: pulp.LpVariable(f"r{i}", cat="Binary")
            for i in self.again
            if any(s in reach for s in program.ops[i].makes)
        }
        scale = sum(self.cost[i] for i in run) or 1.0
        total = sum(nbytes[s] for s in keep) or 1
        problem += pulp.lpSum(self.cost[i] / scale * v for i, v in run.items()) + pulp.lpSum(
            1e-6 * nbytes[s] / total * v for s, v in keep.items()
        )
        self._needs(problem, keep, run)
        free = sum(nbytes[s] for s in keep if program.maker[s] not in run)
        problem += (
            pulp.lpSum(nbytes[s] / total * v for s, v in keep.items())
            <= max(budget, free) / total + 1e-9
        )
        if cap is not None:
            self._below(problem, keep, run, cap)
        problem.solve(_solver(seconds))
        if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        return frozenset(s for s, v in keep.items() if (v.value() or 0) > 0.5)

    def _needs(
        self,
        problem: pulp.LpProblem,
        keep: Mapping[int, pulp.LpVariable],
        run: Mapping[int, pulp.LpVariable],
    ) -> None:
        maker, ops = self.program.maker, self.program.ops
        for s in self.direct:
            problem += keep[s] + run.get(maker[s], 0) >= 1
        for i, v in run.items():
            for s in ops[i].reads:
                if s in keep:
                    problem += keep[s] + run.get(maker[s], 0) >= v

    def _below(
        self,
        problem: pulp.LpProblem,
        keep: Mapping[int, pulp.LpVariable],
        run: Mapping[int, pulp.LpVariable],
        cap: float,
    ) -> None:
        nbytes, maker = self.program.nbytes, self.program.maker
        for t, gradients in enumerate(_gradients(self.program, self.stage)):
            terms = []
            for s, (first, last) in self.spans.items():
                if t <= last and nbytes[s]:
                    terms.append(nbytes[s] / cap * keep[s])
                    if first <= t and maker[s] in run:
                        terms.append(nbytes[s] / cap * run[maker[s]])
            problem += pulp.lpSum(terms) <= 1 - gradients / cap

    def numbers(self, kept: frozenset[int]) -> ChainOption:
        """What the option costs, from a simulation of the stage alone."""
        program, stage = self.program, self.stage
        backward = Backward(program, self._outside() | kept)
        for i in stage.backward:
            backward.run(i)
        sequence = backward.sequence
        own = set(stage.backward)
        cost = sum(self.cost[i] for i in sequence if i not in own)
        return ChainOption(
            sum(program.nbytes[s] for s in kept),
            forward_peak(program, stage, kept),
            _backward_peak(program, stage, sequence, kept),
            cost,
        )

    def _outside(self) -> set[int]:
        """All that the stage reads and others make."""
        read = {
            s
            for i in (*self.stage.forward, *self.stage.backward)
            for s in self.program.ops[i].reads
        }
        own = {s for i in self.stage.backward for s in self.program.ops[i].makes}
        return read - self.made - own


def forward_peak(program: Program, stage: Stage, kept: frozenset[int]) -> float:
    """The most alive while the stage's forward runs, of what it makes itself."""
    stay = kept | {stage.output}
    return max(_live(program, stage.forward, {}, stay), default=0)


def _backward_peak(
    program: Program, stage: Stage, sequence: Sequence[int], kept: frozenset[int]
) -> float:
    """The most alive while the stage's backward runs: gradients, what was kept, what runs again."""
    start = {s: program.nbytes[s] for s in (*_incoming(program, stage), *kept)}
    return max(_live(program, sequence, start, _outgoing(program, stage)), default=0)


def _incoming(program: Program, stage: Stage) -> set[int]:
    """Gradients that the stage's backward reads and others made."""
    forward = program.forward_made
    own = {s for i in stage.backward for s in program.ops[i].makes}
    read = {s for i in stage.backward for s in program.ops[i].reads}
    return {s for s in read - own if program.maker[s] != GIVEN and s not in forward}


def _outgoing(program: Program, stage: Stage) -> set[int]:
    """Gradients that later operators read."""
    inside = set(stage.backward)
    read = {s for i in program.backward if i not in inside for s in program.ops[i].reads}
    return {s for i in stage.backward for s in program.ops[i].makes if s in read}


def _gradients(program: Program, stage: Stage) -> list[int]:
    """Bytes of gradients alive at every operator of the stage's backward."""
    forward = program.forward_made
    start = {s: program.nbytes[s] for s in _incoming(program, stage)}
    return _live(program, stage.backward, start, _outgoing(program, stage), skip=forward)


def _live(
    program: Program,
    sequence: Sequence[int],
    start: Mapping[int, int],
    stay: Iterable[int],
    skip: frozenset[int] = frozenset(),
) -> list[int]:
    """Bytes alive at every operator of a piece, results written over operands that die.

    Args:
        start: alive at its beginning, with their bytes.
        stay: alive after its end.
    """
    stay = set(stay)
    last: dict[int, int] = {}
    for t, i in enumerate(sequence):
        last |= dict.fromkeys(program.ops[i].reads, t)
    alive = dict(start)
    own: set[int] = set()
    now, found = sum(alive.values()), []
    for t, i in enumerate(sequence):
        op = program.ops[i]
        over = next(
            (s for s in op.overwrites if s in own and last[s] == t and s not in stay and alive[s]),
            None,
        )
        made = {s: program.nbytes[s] for s in op.makes if s not in skip}
        found.append(now + (sum(made.values()) if over is None else 0))
        now += sum(n - alive.get(s, 0) for s, n in made.items())
        alive |= made
        own.update(made)
        for s in (*op.reads, *made):
            if s in alive and s not in stay and last.get(s, t) <= t:
                now -= alive.pop(s)
    return found
