"""Questions that `autopar plan --find` answers by planning for several sizes: the largest batch,
the longest sequence, the fewest devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from autopar.cli.model_library import example_of
from autopar.cli.plan import AnyMesh, target_of
from autopar.cluster.cluster import ClusterInfo
from autopar.compile import plan_step, plan_to_fit
from autopar.errors import CaptureError, ConflictError, InfeasibleError
from autopar.plan import ShardingPlan
from autopar.plan_records import TriedSize
from autopar.planner.joint import JointPlan
from autopar.progress import Progress
from autopar.units import budget_text, bytes_text, mesh_text, time_text

QUESTIONS = ("largest-batch", "longest-sequence", "fewest-devices")
_MOST_DEVICES = 4096
_TOKENS = 128  # lengths are multiples of it
_FIRST_LENGTH = 32 * _TOKENS
_FINE = 16  # the answer is known to a part of itself
_TOO_LARGE = "does not fit"
_MOST = 2**24  # samples or tokens


@dataclass(frozen=True)
class Answer:
    """
    Args:
        sizes: of the batch to plan for.
        target: the same of meshes.
        tried: all sizes.
        joint: the plan of the answer.
    """

    sizes: dict[str, int | None]
    target: ClusterInfo | AnyMesh
    tried: tuple[TriedSize, ...]
    joint: JointPlan


def target_for(
    question: str, mesh: str | None, devices: int | None, per_node: int | None, device: str | None,
    file: Path | None, memory: str | None,
) -> ClusterInfo | AnyMesh:  # fmt: skip
    """What to plan for, according to the question and the options of `target_of`.

    Raises:
        ValueError: there is no such question, or the options do not go with it.
    """
    if question not in QUESTIONS:
        raise ValueError(f"--find answers {', '.join(QUESTIONS)}, not {question!r}")
    if question == "fewest-devices":
        if (mesh or "auto") != "auto" or file is not None:
            raise ValueError(
                "--find fewest-devices looks at meshes of 1, 2, 4, ... devices: leave out --mesh "
                f"and --cluster; --devices is the largest number  [default: {_MOST_DEVICES}]"
            )
        return target_of("auto", devices or _MOST_DEVICES, per_node, device, None, memory)
    target = target_of(mesh, devices, per_node, device, file, memory)
    if isinstance(target, AnyMesh) or target.pipeline_ranks > 1:
        raise ValueError(f"--find {question} is of one mesh without stages, such as --mesh 2x4")
    return target


def find(
    question: str,
    model: str,
    target: ClusterInfo | AnyMesh,
    sizes: Mapping[str, int | None],
    say: Progress,
    **options: Any,
) -> Answer:
    """Plan for sizes until the largest, or the fewest devices, are known.

    Args:
        sizes: of the batch, as given: `batch`, `sequence`.
        options: of `build_problem`.

    Raises:
        ValueError: the sizes of the model's batch cannot be chosen.
        InfeasibleError: nothing fits.
    """
    tried: list[TriedSize] = []
    best: JointPlan | None = None  # the last that fits: each is larger, or the first at all
    forward = bool(options.get("forward"))
    to_fit = partial(plan_to_fit, smallest_budget=False)  # another size is tried next

    def told(size: str, attempt: Callable[[], JointPlan]) -> bool:
        nonlocal best
        with say.as_one(size) as stage:
            one, joint = _tried(size, attempt)
            fits = joint is not None
            best = joint or best
            stage.done = f"{size}: " + (
                f"{time_text(one.step_us)}, {bytes_text(one.memory_bytes)}" if fits else one.note
            )
        tried.append(one)
        return fits

    def plan(fastest: Callable[..., JointPlan], of: ClusterInfo, **changed: int) -> JointPlan:
        example, _ = example_of(model, forward=forward, **{**sizes, **changed})
        args, kwargs = example.args, example.kwargs
        return fastest(example.model, args, kwargs, cluster=of, progress=say, **options)

    if isinstance(target, AnyMesh):
        for cluster in _clusters(target):
            size = f"{cluster.world_size} devices, mesh {cluster.mesh_text}"
            if told(size, partial(plan, plan_step if forward else to_fit, cluster)):
                assert best is not None
                return Answer(dict(sizes), cluster, tuple(tried), best)
        least = min(one.memory_bytes for one in tried)
        raise InfeasibleError(
            f"nothing fits {target.devices} x {target.device}; the least memory that was found is "
            f"{bytes_text(least)}",
            budget_bytes=cluster.budget_bytes, smallest_bytes=least,
        )  # fmt: skip
    key, words = ("batch", "samples") if question == "largest-batch" else ("sequence", "tokens")
    # microbatches fit nearly any batch, but what a device computes at once is asked
    fastest = plan_step if key == "batch" or forward else to_fit

    def attempt(size: int) -> bool:
        return told(f"{size:,} {words}", partial(plan, fastest, target, **{key: size}))

    unit = 1 if key == "batch" else _TOKENS
    example_of(model, forward=forward, **{**sizes, key: unit})  # refuses what takes no sizes
    start = sizes[key] or (target.world_size if key == "batch" else _FIRST_LENGTH)
    most = largest(attempt, max(1, start // unit), unit)
    if best is None:
        size = "1 sample" if unit == 1 else f"{unit} {words}"
        raise InfeasibleError(
            f"{size} is too much: {_why(tried[-1], target)}",
            budget_bytes=target.budget_bytes, smallest_bytes=tried[-1].memory_bytes,
        )  # fmt: skip
    return Answer({**sizes, key: most}, target, tuple(tried), best)


def largest(fits: Callable[[int], bool], start: int, unit: int = 1) -> int:
    """The largest multiple of a unit that fits, to a sixteenth of itself; 0 if none does. What fits
    is taken to fit in smaller sizes as well.

    Args:
        start: multiples to try first.
    """
    low, high, at = 0, None, start
    while True:
        if fits(at * unit):
            low = at
        else:
            high = at
        if high is None:
            if 2 * at * unit > _MOST:
                return low * unit
            at *= 2
        elif high - low <= max(1, low // _FINE):
            return low * unit
        elif not low:
            at = 1  # often that is too much, too
        else:
            at = max(low + 1, math.isqrt(low * high)) if high > 2 * low else (low + high) // 2


def _clusters(target: AnyMesh) -> Iterator[ClusterInfo]:
    """1, 2, 4, ... devices, whole nodes where there are several."""
    count = 1
    while count <= target.devices:
        nodes, rest = divmod(count, target.per_node)
        mesh = (count,) if nodes <= 1 or rest else (nodes, target.per_node)
        yield ClusterInfo.of(mesh_text(mesh), target.device).with_memory(target.memory)
        count *= 2


def _tried(size: str, attempt: Callable[[], JointPlan]) -> tuple[TriedSize, JointPlan | None]:
    """What came of a size, and its plan if it has one."""
    try:
        joint = attempt()
    except ConflictError:
        raise
    except InfeasibleError as error:
        return TriedSize(size, math.inf, error.smallest_bytes, _TOO_LARGE), None
    except (CaptureError, ValueError) as error:  # a model may have a longest sequence
        return TriedSize(size, math.inf, math.inf, str(error).partition("\n")[0]), None
    plan = joint.planned.plan
    memory = plan.memory.total_bytes
    return TriedSize(size, plan.time.step_us, memory, _words(plan), plan.work), joint


def _why(one: TriedSize, cluster: ClusterInfo) -> str:
    """Why the smallest size has no plan."""
    if one.note != _TOO_LARGE:
        return one.note
    budget = f"the budget of a device is {bytes_text(cluster.budget_bytes)}"
    if math.isfinite(one.memory_bytes):
        budget += f", and the least that was found to do is {budget_text(one.memory_bytes)}"
    return f"{budget}; give more --memory, or a mesh of more devices"


def _words(plan: ShardingPlan) -> str:
    words = [f"{plan.microbatches} microbatches"] if plan.microbatches > 1 else []
    if plan.added_us:
        words.append(f"{time_text(plan.added_us)} of recomputation")
    return ", ".join(words)
