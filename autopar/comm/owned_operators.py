"""What operators do with tensors that one coordinate of a mesh axis owns (`owned_shards.py`).

torch's rules of sharding know chunks of equal size, and for owned tensors they would be wrong in
silence: a mean over an even number of rows counts as the average of the shards' means, a maximum of
an empty shard is an error on the ranks that have one, and no others. So there are three kinds:

* Operators on each element run on the local tensors. Operands of another owner, and replicated
  ones, are brought to the owner of the tensor that is written, or else of the first one.
* Views, and reductions for which an empty tensor is neutral, follow torch's rules for shards, with
  local shapes of their own.
* All others take tensors that each coordinate of the axis has. One that writes an owned tensor goes
  on to `dtensor_rules`, which runs it on whole tensors.

All ranks decide alike, since the owner is a part of what they decide by.

Private to torch here: `ShardingPropagator.propagate_op_sharding` and `..._non_cached`,
`_adjust_shape_and_stride_args`, `OutputSharding`, `OpSchema`, `DTensor._op_dispatcher` with its
`_custom_op_handlers`, and `OffsetBasedRNGTracker._distribute_region`; tested with 2.13.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, _random
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OutputSharding
from torch.distributed.tensor._sharding_prop import LocalLRUCache
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.utils import _pytree as pytree

from autopar.comm import owned_shards as convert
from autopar.comm.owned_shards import (
    Owned,
    is_owned,
    over_all_coordinates,
    owned_axis,
    with_placement,
)

# On each element, though torch does not tag them so.
_ELEMENTWISE = {
    "copy_", "_to_copy", "zero_", "fill_", "masked_fill", "masked_fill_", "empty_like",
    "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "normal_",
    "uniform_", "bernoulli", "bernoulli_", "native_dropout", "lift_fresh",
}  # fmt: skip

# Tagged so, and more than that.
_NOT_ELEMENTWISE = {"equal"}

_VIEWS = {
    "alias", "detach", "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze",
}  # fmt: skip

# Whose order the second argument is.
_NORMS = {"linalg_vector_norm", "norm", "_foreach_norm"}


class _OnAllCoordinates(Exception):
    """An operator is for tensors that each coordinate of the axis has."""


@dataclass(frozen=True)
class _Target:
    """How the operands and results of an operator on each element are owned.

    Args:
        owner: the coordinate.
        position: the dim of which others have length 0, counted from the last one as operands of
            fewer dims are aligned; negative.
        size: of that dim; an operand that is expanded along it is replicated.
    """

    owner: int
    position: int
    size: int

    def fits(self, spec: DTensorSpec) -> bool:
        return spec.ndim >= -self.position and spec.shape[self.position] == self.size

    def placement(self, spec: DTensorSpec) -> Placement:
        dim = spec.ndim + self.position
        return Owned(dim, self.owner) if self.fits(spec) else Replicate()


def propagate(before: Any, schema: OpSchema) -> OutputSharding:
    """How an operator's arguments and results are laid out.

    Args:
        before: torch's own function.
    """
    specs = _specs((schema.args_schema, schema.kwargs_schema))
    axis = next((a for s in specs if (a := owned_axis(s.placements)) is not None), None)
    if axis is None:
        sharding: OutputSharding = before(schema)
        return sharding
    name = schema.op._schema.name.removeprefix("aten::")
    try:
        if any(_owner(s, axis) for s in _specs(schema.kwargs_schema)):
            raise _OnAllCoordinates
        if name in _VIEWS or _is_neutral(name, schema):
            return _as_shards(before, schema, axis)
        if _is_elementwise(name, schema):
            return _on_elements(before, schema, axis)
        raise _OnAllCoordinates
    except _OnAllCoordinates:
        return _on_all_coordinates(before, schema, axis)


def _specs(values: Any) -> list[DTensorSpec]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, DTensorSpec)]


def _owner(spec: DTensorSpec, axis: int) -> Owned | None:
    placement = spec.placements[axis]
    return placement if isinstance(placement, Owned) else None


def _takes_lists(schema: OpSchema) -> bool:
    """Whether an operator treats the tensors of each index of its lists by themselves."""
    return schema.op._schema.name.startswith(("aten::_foreach_", "aten::_fused_"))


def _is_elementwise(name: str, schema: OpSchema) -> bool:
    if _takes_lists(schema):
        return name not in ("_foreach_max", "_foreach_norm")
    return name in _ELEMENTWISE or (
        torch.Tag.pointwise in schema.op.tags and name not in _NOT_ELEMENTWISE
    )


def _is_neutral(name: str, schema: OpSchema) -> bool:
    """Whether it is a reduction to which empty tensors add nothing."""
    order = schema.args_schema[1] if len(schema.args_schema) > 1 else 2
    finite = isinstance(order, int | float) and 0 < order < math.inf
    return name == "sum" or (name in _NORMS and finite)


# A spec, and the index in the lists of an operator that takes lists (of one that does not, 0).
_Change = Callable[[DTensorSpec, int | None], DTensorSpec]


def _changed(arguments: Sequence[Any], change: _Change, lists: bool) -> tuple[Any, ...]:
    """Arguments of an operator with other specs."""

    def one(value: Any, index: int | None) -> Any:
        return change(value, index) if isinstance(value, DTensorSpec) else value

    def argument(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(one(x, i if lists else 0) for i, x in enumerate(value))
        return one(value, None if lists else 0)

    return tuple(argument(value) for value in arguments)


def _at(arguments: Sequence[Any], index: int, lists: bool) -> list[DTensorSpec]:
    """The tensors among an operator's arguments that belong together."""
    if not lists:
        return _specs(arguments)
    values = [x[index] for x in arguments if isinstance(x, list | tuple) and len(x) > index]
    return [x for x in values if isinstance(x, DTensorSpec)]


def _count(schema: OpSchema) -> int:
    first = schema.args_schema[0]
    return len(first) if _takes_lists(schema) and isinstance(first, list | tuple) else 1


def _target(operands: Sequence[DTensorSpec], axis: int, writes: bool) -> _Target | None:
    """None if the results are replicated over the axis."""
    candidates = operands[:1] if writes else operands
    for spec in candidates:
        owned = _owner(spec, axis)
        if owned is not None:
            position = owned.dim - spec.ndim
            sizes = {s.shape[position] for s in operands if s.ndim >= -position} - {1}
            return _Target(owned.owner, position, min(sizes, default=1))
    return None


def _on_elements(before: Any, schema: OpSchema, axis: int) -> OutputSharding:
    """An operator on each element. Torch lays out the other axes, for operands that are replicated
    along the owned one."""
    lists, writes = _takes_lists(schema), bool(_written(schema))
    groups = [_at(schema.args_schema, i, lists) for i in range(_count(schema))]
    targets = [_target(operands, axis, writes) for operands in groups]
    concerned = [any(_owner(s, axis) for s in operands) for operands in groups]

    def replicated(spec: DTensorSpec, index: int | None) -> DTensorSpec:
        free = index is not None and not concerned[index]
        return spec if free else with_placement(spec, axis, Replicate())

    def owned(spec: DTensorSpec, index: int | None) -> DTensorSpec:
        target = None if index is None else targets[index]
        return spec if target is None else with_placement(spec, axis, target.placement(spec))

    sharding = _propagated(before, schema, replicated, owned, lists)
    for i, spec in enumerate(_specs(sharding.output_spec)):
        target = targets[i if lists else 0]
        if target is not None and not target.fits(spec):
            raise _OnAllCoordinates  # its result has another shape
    return sharding


def _as_shards(before: Any, schema: OpSchema, axis: int) -> OutputSharding:
    """A view or a reduction of one tensor, or of each in a list, by torch's rules for shards."""
    lists = _takes_lists(schema)
    owners = [_owner(_at(schema.args_schema, i, lists)[0], axis) for i in range(_count(schema))]

    def shard(spec: DTensorSpec, index: int | None) -> DTensorSpec:
        owner = _owner(spec, axis)
        return spec if owner is None else with_placement(spec, axis, Shard(owner.dim))

    def owned(spec: DTensorSpec, index: int | None) -> DTensorSpec:
        if any(isinstance(p, _StridedShard) for p in spec.placements):
            raise _OnAllCoordinates  # it counts the rows of a chunk
        owner, placement = None if index is None else owners[index], spec.placements[axis]
        if owner is None or not isinstance(placement, Shard):
            return spec
        return with_placement(spec, axis, Owned(placement.dim, owner.owner))

    try:
        sharding = _propagated(before, schema, shard, owned, lists)
    except Exception as error:  # what torch's rules raise is of many types
        raise _OnAllCoordinates from error
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    result: Any = sharding.output_spec
    if sharding.use_val_from_redistribute_schema and isinstance(result, DTensorSpec):
        # the shape that a view is told, of the local tensor
        sharding.redistribute_schema = propagator._adjust_shape_and_stride_args(
            result.tensor_meta, sharding.redistribute_schema, result
        )
    return sharding


def _on_all_coordinates(before: Any, schema: OpSchema, axis: int) -> OutputSharding:
    """An operator on tensors that each coordinate of the axis has.

    Raises:
        RuntimeError: it writes an owned one, or takes it by keyword, which torch does not convert.
    """
    kept = [*_written(schema), *_specs(schema.kwargs_schema)]
    if any(_owner(spec, axis) for spec in kept):
        raise RuntimeError(f"{schema.op} has no rule for a tensor that one coordinate owns.")

    def replicated(spec: DTensorSpec, index: int | None) -> DTensorSpec:
        return with_placement(spec, axis, Replicate()) if _owner(spec, axis) else spec

    return _propagated(before, schema, replicated, lambda spec, _: spec, False)


def _propagated(
    before: Any, schema: OpSchema, given: _Change, change: _Change, lists: bool
) -> OutputSharding:
    """What torch decides for other layouts, as a decision for those that the arguments have.

    Args:
        given: the layouts that torch has a rule for.
        change: of what torch decides.

    Raises:
        RuntimeError: a tensor that is written would get another layout.
    """
    arguments = _changed(schema.args_schema, given, lists)
    known = OpSchema(schema.op, arguments, schema.kwargs_schema, schema_info=schema.schema_info)
    sharding: OutputSharding = before(known)
    suggested = sharding.redistribute_schema or known
    taken = OpSchema(
        suggested.op, _changed(suggested.args_schema, change, lists), suggested.kwargs_schema
    )
    results: Any = sharding.output_spec
    if isinstance(results, DTensorSpec):
        results = change(results, 0)
    elif results is not None:
        results = _changed([results], change, lists)[0]
    if any(
        now.placements != then.placements
        for now, then in zip(_written(schema), _written(taken), strict=True)
    ):
        raise RuntimeError(f"{schema.op} would write a tensor in another layout than it has.")
    converts = any(
        now.placements != then.placements
        for now, then in zip(_specs(schema.args_schema), _specs(taken.args_schema), strict=True)
    )
    by_value = sharding.use_val_from_redistribute_schema
    return OutputSharding(
        results,
        taken if converts or by_value else None,
        needs_redistribute=converts or by_value,
        use_val_from_redistribute_schema=by_value,
    )


def _written(schema: OpSchema) -> list[DTensorSpec]:
    """The tensors among the arguments that an operator writes."""
    arguments = zip(schema.op._schema.arguments, schema.args_schema, strict=False)
    written = (x for a, x in arguments if a.alias_info is not None and a.alias_info.is_write)
    return _specs(list(written))


def _check_finite(before: Any, op: Any, args: Any, kwargs: Any) -> None:
    """Unscale gradients, and find on all ranks whether one of them is not finite. Torch asks along
    the axes that split the first of them, which may be a replicated one."""
    gradients, found, inverse_scale = args
    if not any(map(is_owned, gradients)):
        before(op, args, kwargs)
        return
    op([g._local_tensor if isinstance(g, DTensor) else g for g in gradients], found, inverse_scale)
    mesh = next(g.device_mesh for g in gradients if is_owned(g))
    for axis in range(mesh.ndim):  # of all, since stages may be split by different ones
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=mesh.get_group(axis))


def _on_replicated(before: Any, op: Any, args: Any, kwargs: Any) -> Any:
    """Operators of which torch does not ask the rules above."""
    args, kwargs = pytree.tree_map_only(DTensor, over_all_coordinates, (args, kwargs))
    return before(op, args, kwargs)


_HANDLED = {
    torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default: _check_finite,
    torch.ops.aten.argmax.default: _on_replicated,
    torch.ops.aten.argmin.default: _on_replicated,
    torch.ops.aten.convolution.default: _on_replicated,
    torch.ops.aten.convolution_backward.default: _on_replicated,
}


def _draw(before: Any, tracker: Any, spec: DTensorSpec, *args: Any, **kwargs: Any) -> Any:
    """A region of random numbers: the owner draws what a replica would, and so do all ranks count
    as many."""
    axis = owned_axis(spec.placements)
    spec = spec if axis is None else with_placement(spec, axis, Replicate())
    return before(tracker, spec, *args, **kwargs)


@functools.cache
def install() -> None:
    """Let operators take owned tensors. Nothing changes for other ones."""
    convert.install()
    dispatcher: Any = DTensor._op_dispatcher
    propagator = dispatcher.sharding_propagator
    rule = functools.partial(propagate, propagator.propagate_op_sharding_non_cached)
    propagator.propagate_op_sharding_non_cached = rule
    propagator.propagate_op_sharding = LocalLRUCache(rule)
    handlers: dict[Any, Any] = dispatcher._custom_op_handlers
    for op, handler in _HANDLED.items():
        if op in handlers:  # another version of torch may have a rule in its place
            handlers[op] = functools.partial(handler, handlers[op])
    tracker: Any = _random.OffsetBasedRNGTracker
    tracker._distribute_region = convert.around(tracker._distribute_region, _draw)
