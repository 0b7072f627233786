"""Linear and integer programs, solved by HiGHS, or by CBC through PuLP where HiGHS is missing."""

from __future__ import annotations

import math
import subprocess
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

_PROCESSES: list[subprocess.Popen[bytes]] = []  # that solve
_CANCEL_S = 2.0  # that a cancelled solve may take to stop


@dataclass(frozen=True)
class ProgramSolution:
    """The answer of a backend.

    Args:
        status: "stopped" where a limit of time or of the objective ended the search.
        values: per variable; zeros where no solution is known.
    """

    status: Literal["optimal", "infeasible", "stopped"]
    values: np.ndarray


def stop_processes() -> None:
    """End the processes that solve; for a process that ends at once."""
    for process in _PROCESSES:
        process.kill()


def available_backend() -> str:
    """`"HiGHS"` where highspy is installed, else `"CBC"`."""
    return "HiGHS" if find_spec("highspy") is not None else "CBC"


class LinearProgram:
    """minimize cost x subject to lower <= A x <= upper; variables and rows are added one by one."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self._bounds: list[tuple[float, float]] = []
        self._integer: list[bool] = []
        self._rows: list[list[tuple[int, float]]] = []
        self._row_bounds: list[tuple[float, float]] = []

    def variable(
        self, cost: float = 0.0, lower: float = 0.0, upper: float = math.inf, integer: bool = False
    ) -> int:
        """Add a variable; returns its index."""
        self.costs.append(cost)
        self._bounds.append((lower, upper))
        self._integer.append(integer)
        return len(self.costs) - 1

    def row(
        self, terms: Iterable[tuple[int, float]], lower: float = -math.inf, upper: float = math.inf
    ) -> None:
        """Add a row of (variable, coefficient) terms; those of the same variable add up."""
        coefficients: dict[int, float] = defaultdict(float)
        for variable, coefficient in terms:
            coefficients[variable] += coefficient
        self._rows.append([term for term in coefficients.items() if term[1]])
        self._row_bounds.append((lower, upper))

    def minimize(
        self,
        *,
        time_limit: float = 10.0,
        gap: float = 0.0,
        cutoff: float = math.inf,
        backend: str | None = None,
    ) -> ProgramSolution:
        """Solve.

        Args:
            time_limit: seconds.
            gap: relative, at which an integer program may stop.
            cutoff: solutions above this need not be found (HiGHS only).
            backend: of `available_backend`.
        """
        if (backend or available_backend()) == "HiGHS":
            return self._by_highs(time_limit, gap, cutoff)
        return self._by_cbc(time_limit, gap)

    def _by_highs(self, time_limit: float, gap: float, cutoff: float) -> ProgramSolution:
        import highspy

        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.costs), len(self._rows)
        lp.col_cost_ = self.costs
        lp.col_lower_, lp.col_upper_ = np.array(self._bounds).reshape(-1, 2).T
        lp.row_lower_, lp.row_upper_ = np.array(self._row_bounds).reshape(-1, 2).T
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0, *map(len, self._rows)])
        lp.a_matrix_.index_ = [variable for row in self._rows for variable, _ in row]
        lp.a_matrix_.value_ = [coefficient for row in self._rows for _, coefficient in row]
        if any(self._integer):
            kinds = highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger
            lp.integrality_ = [kinds[integer] for integer in self._integer]
        highs = highspy.Highs()
        # a restart costs more than it wins in programs of seconds
        options: dict[str, Any] = {
            "output_flag": False, "time_limit": max(0.0, time_limit), "mip_rel_gap": gap,
            "objective_bound": cutoff, "mip_allow_restart": False,
        }  # fmt: skip
        for option, value in options.items():
            highs.setOptionValue(option, value)
        if highs.passModel(lp) == highspy.HighsStatus.kError:
            raise ValueError("HiGHS refused the program")
        _run_interruptibly(highs)
        values = np.array(highs.getSolution().col_value)
        if len(values) != len(self.costs):
            values = np.zeros(len(self.costs))
        status, statuses = highs.getModelStatus(), highspy.HighsModelStatus
        if status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible):
            return ProgramSolution("infeasible", values)
        return ProgramSolution("optimal" if status == statuses.kOptimal else "stopped", values)

    def _by_cbc(self, time_limit: float, gap: float) -> ProgramSolution:
        import pulp

        program = pulp.LpProblem("program", pulp.LpMinimize)
        x = []
        for i, bounds in enumerate(self._bounds):
            lower, upper = (bound if math.isfinite(bound) else None for bound in bounds)
            kind = "Integer" if self._integer[i] else "Continuous"
            x.append(program.add_variable(f"x{i}", lower, upper, kind))
        program.setObjective(pulp.LpAffineExpression(zip(x, self.costs, strict=True)))
        for row, (lower, upper) in zip(self._rows, self._row_bounds, strict=True):
            expression = pulp.LpAffineExpression([(x[i], c) for i, c in row])
            if math.isfinite(upper):
                program.addConstraint(expression <= upper)
            if math.isfinite(lower):
                program.addConstraint(expression >= lower)
        status = _run_cbc(program, time_limit, gap)
        values = np.array([v.value() or 0.0 for v in x])
        if status == pulp.LpStatusInfeasible:
            return ProgramSolution("infeasible", values)
        optimal = status == pulp.LpStatusOptimal and program.sol_status == pulp.LpSolutionOptimal
        return ProgramSolution("optimal" if optimal else "stopped", values)


def _run_interruptibly(highs: Any) -> None:
    """Solve so that Ctrl-C ends it: a signal reaches Python in the main thread only, and only
    between two of its instructions."""
    if threading.current_thread() is not threading.main_thread():
        highs.run()
        return
    highs.HandleUserInterrupt = True
    failures: list[BaseException] = []
    ended = threading.Event()  # `Thread.join` forgets a thread when a signal interrupts it

    def run() -> None:
        try:
            highs.run()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="HiGHS", daemon=True).start()
    try:
        while not ended.wait(1.0):
            pass
    except BaseException:
        highs.cancelSolve()
        ended.wait(_CANCEL_S)
        raise
    if failures:
        raise failures[0]


def _run_cbc(program: Any, time_limit: float, gap: float) -> int:
    """Solve a program of PuLP with CBC, in a process that ends with this call, also by Ctrl-C
    (PuLP's own would go on). Returns PuLP's status."""
    import pulp

    cbc = pulp.PULP_CBC_CMD.pulp_cbc_path  # PuLP 3 comes with it
    solver = pulp.COIN_CMD(path=cbc, msg=False, timeLimit=time_limit, gapRel=gap)
    with tempfile.TemporaryDirectory() as folder:
        model, answer = str(Path(folder, "program.mps")), str(Path(folder, "program.sol"))
        variables, *names, _ = program.writeMPS(model, rename=1)
        options = [word for option in solver.getOptions() for word in f"-{option}".split()]
        kind = "-solve" if program.isMIP() else "-initialSolve"
        command = [cbc, model, "-sec", str(max(0.0, time_limit)), *options, kind]
        command += ["-printingOptions", "all", "-solution", answer]
        nothing = subprocess.DEVNULL
        with subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing) as process:
            _PROCESSES.append(process)
            try:
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            finally:
                _PROCESSES.remove(process)
        if code:
            raise subprocess.CalledProcessError(code, command)
        status, values, *_, solution_status = solver.readsol_MPS(answer, program, variables, *names)
    program.assignVarsVals(values)
    program.assignStatus(status, solution_status)
    return int(status)
