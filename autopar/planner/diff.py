"""The differences between two plans, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autopar.cluster.cluster import ClusterInfo
from autopar.plan import ShardingPlan
from autopar.plan_records import MEMORY_KINDS, TIME_KINDS, ModuleSummary
from autopar.planner.describe import grouped_names, indexed
from autopar.planner.names import copies_in
from autopar.units import bytes_text, time_text


@dataclass(frozen=True)
class Change:
    """One difference.

    Args:
        name: a name, or a pattern for several with the same difference.
        before, after: of the first and of the second plan.
        count: of the names that the pattern stands for.
    """

    name: str
    before: str
    after: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Difference:
    """The differences between two plans; empty if there are none.

    Args:
        setting: model, cluster, budget and constraints.
        figures: time and memory, in words; equal kinds are left out.
        parameters: how they are stored.
        modules: their words.
        decisions: operators, inputs and shared layouts.
        axes: what the numbers of axes in layouts stand for, if the axes have names.
    """

    setting: tuple[Change, ...]
    figures: tuple[Change, ...]
    parameters: tuple[Change, ...]
    modules: tuple[Change, ...]
    decisions: tuple[Change, ...]
    axes: str = ""

    @property
    def choices(self) -> tuple[Change, ...]:
        """Different choices: of modules, else of parameters, else of any decision."""
        return self.modules or self.parameters or self.decisions

    def __bool__(self) -> bool:
        return any((self.setting, self.figures, self.parameters, self.modules, self.decisions))


def diff(a: ShardingPlan, b: ShardingPlan) -> Difference:
    """The changes from plan `a` to plan `b`."""
    names = {k.partition("#")[0] for k in (*a.choices, *b.choices)}
    stored = {f"p_{n.replace('.', '_')}" for n in (*a.parameters, *b.parameters)} & names
    inner = [{k: _decision(p, k) for k in p.choices if k not in stored} for p in (a, b)]
    times = _figures(a.time, b.time, {"step": "step_us"} | TIME_KINDS, time_text)
    sizes = _figures(a.memory, b.memory, {"memory": "total_bytes"} | MEMORY_KINDS, bytes_text)
    axes = [ClusterInfo.from_dict(plan.cluster).axes_text for plan in (a, b)]
    return Difference(
        tuple(_setting(a, b)), (*times, *sizes), _changes(_storage(a), _storage(b)),
        tuple(_modules(a.modules, b.modules)), _changes(inner[0], inner[1]),
        "; ".join(dict.fromkeys(filter(None, axes))),
    )  # fmt: skip


def _setting(a: ShardingPlan, b: ShardingPlan) -> list[Change]:
    pairs: dict[str, list[str]] = {}
    for plan in (a, b):
        cluster = ClusterInfo.from_dict(plan.cluster)
        facts = {
            "model": f"{plan.model} (graph {plan.fingerprint})",
            "planned": f"a {plan.unit}" + ("" if plan.forward else " of training"),
            "mesh": cluster.mesh_text,
            "device": cluster.device.name,
            "links": ", ".join(f"{1e-9 / k.beta:.3g} GB/s" for k in cluster.links),
            "budget": bytes_text(plan.budget_bytes),
            "optimizer state": f"{plan.optimizer_state:g} bytes per byte of parameter",
            "precision": str(plan.precision or "of the model"),
            "constraints": "; ".join(f"{k}: {v}" for k, v in plan.constraints.items()) or "none",
        }
        for key, text in facts.items():
            pairs.setdefault(key, []).append(text)
    return [Change(key, one, other) for key, (one, other) in pairs.items() if one != other]


def _figures(
    a: object, b: object, kinds: Mapping[str, str], text: Callable[[float], str]
) -> list[Change]:
    """The attributes that differ visibly in the text, by kind."""
    changes = []
    for name, key in kinds.items():
        before, after = getattr(a, key), getattr(b, key)
        if abs(after - before) <= 1e-6 * max(abs(before), abs(after)):
            continue
        relative = f" ({after / before - 1:+.1%})" if before else ""
        changes.append(Change(name, text(before), text(after) + relative))
    return changes


def _storage(plan: ShardingPlan) -> dict[str, str]:
    again = set(plan.reshard_after_forward)
    return {
        name: (spec or "scalar") + (" reshard" if name in again else "")
        for name, spec in plan.parameters.items()
    }


def _decision(plan: ShardingPlan, decision: str) -> str:
    layout, choice = plan.layouts.get(decision, ""), plan.choices[decision]
    return choice if choice in (layout, "") or "#" in decision else f"{choice} ({layout})"


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[Change, ...]:
    """The entries that differ, copies in repeated blocks together."""
    same: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys((*a, *b)):
        before, after = a.get(name, "absent"), b.get(name, "absent")
        if before != after:
            same.setdefault((before, after), []).append(name)
    every = list(dict.fromkeys((*a, *b)))
    return tuple(
        Change(pattern, before, after, len(copies))
        for (before, after), names in same.items()
        for pattern, copies in grouped_names(names, every)
    )


# -- modules ------------------------------------------------------------------------------------


def _modules(a: Sequence[ModuleSummary], b: Sequence[ModuleSummary]) -> list[Change]:
    """Modules with different words. Their names are patterns, which may overlap: the intersection
    of two patterns is compared."""
    changes = []
    for one in a:
        for other in b:
            name = intersect(one.name, other.name)
            if name is not None and one.words != other.words:
                changes.append(Change(name or "(model)", one.words, other.words))
    changes += [Change(m.name or "(model)", m.words, "absent") for m in _unmatched(a, b)]
    return changes + [Change(m.name or "(model)", "absent", m.words) for m in _unmatched(b, a)]


def _unmatched(a: Sequence[ModuleSummary], b: Sequence[ModuleSummary]) -> list[ModuleSummary]:
    return [m for m in a if all(intersect(m.name, other.name) is None for other in b)]


def intersect(one: str, other: str) -> str | None:
    """The intersection of two patterns; None if it is empty."""
    parts, others = one.split("."), other.split(".")
    if len(parts) != len(others):
        return None
    common = [_common_part(x, y) for x, y in zip(parts, others, strict=True)]
    return None if None in common else ".".join(str(part) for part in common)


def _common_part(x: str, y: str) -> str | None:
    if x == y:
        return x
    if "*" in (x, y):
        part = y if x == "*" else x
        return part if _numbers(part) else None
    both = _numbers(x) & _numbers(y)
    return indexed(both) if both else None


def _numbers(part: str) -> set[int]:
    """The numbers of an index or a list of them; none for a word."""
    if part.isdigit():
        return {int(part)}
    return copies_in(part) if part.startswith("{") else set()
