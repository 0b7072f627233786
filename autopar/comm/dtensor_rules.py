"""What operators of the caller's code do with DTensors where torch gives up or leaves values wrong.

* A plain tensor beside a DTensor counts as replicated.
* An operator that writes plain tensors alone (EMA) reads its DTensors whole.
* An operator that DTensor has no rule for runs on whole tensors.
* Random operators on CPUs draw other numbers for every shard, and the same for its replicas.
* A number read off a tensor that is not whole on this rank is refused, but in an optimizer's step,
  which all ranks make.

Private to torch here: `DTensor._op_dispatcher` with its `_custom_op_handlers`,
`_propagate_op_sharding_dispatch_slow_path` and `_dispatch_fast_path_python_tail`, and
`torch.distributed.tensor._random._rng_tracker`; tested with 2.13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed._functional_collectives import _are_we_tracing
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import _random as dtensor_random
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils import _pytree as pytree

from autopar.comm.owned_shards import Owned
from autopar.errors import EngineError

# The context of implicit replication, once it is entered.
_REPLICATION: list[Any] = []

# The optimizer that steps now, if any.
_STEPPING: list[torch.optim.Optimizer] = []


class UnsupportedOperator(EngineError, NotImplementedError):
    """An operator that neither shards nor whole tensors can carry out."""


def replicate_plain_tensors() -> None:
    """From now on, a plain tensor beside a DTensor in an operator counts as replicated."""
    if not _REPLICATION:
        _REPLICATION.append(implicit_replication())
        _REPLICATION[0].__enter__()


def install(device_type: str) -> None:
    """Put the rules in force."""
    dispatcher: Any = DTensor._op_dispatcher
    dispatcher._custom_op_handlers[torch.ops.aten._local_scalar_dense.default] = _number
    for name, rule in _RULES.items():
        before = getattr(dispatcher, name, None)  # another version of torch may not have it
        if before is not None and not isinstance(before, _Rule):
            setattr(dispatcher, name, _Rule(rule, before))
    install_for(_DRAWS, _draw)
    install_for(_wrong_in_place(), _in_place)
    if not _REPLICATION:
        install_for(_updates(), _update)
    if device_type == "cpu" and dtensor_random._rng_tracker is None:
        dtensor_random._rng_tracker = _CpuTracker()  # type: ignore[assignment]


def install_for(operators: Iterable[Any], rule: Callable[[Any, Any, Any], Any]) -> None:
    """Let a rule carry out some operators of DTensors.

    Args:
        rule: of the operator, its arguments and its keyword arguments.
    """
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    handlers.update(dict.fromkeys(operators, rule))


def by_dtensor(op: Any, args: Any, kwargs: Any) -> Any:
    """What DTensor itself does for an operator that has a rule."""
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    rule = handlers.pop(op)
    try:
        return op(*args, **kwargs)
    finally:
        handlers[op] = rule


class _Rule(functools.partial[Any]):
    """A step of torch's dispatcher, with what it did before as the first argument."""


def _layouts(before: Any, op: Any, args: Any, kwargs: Any, *rest: Any) -> Any:
    """The layouts of an operator's arguments and results, or its results themselves.

    Torch comes here for what its cache of layouts does not have.
    """
    if _writes_plain_tensors(op, args, kwargs):
        return op(*_whole(args), **_whole(kwargs))
    try:
        return before(op, args, kwargs, *rest)
    except RuntimeError as error:
        if _are_we_tracing():
            raise
        return _on_whole_tensors(op, args, kwargs, error)


def _finish(before: Any, op: Any, args: Any, *rest: Any) -> Any:
    """The result of an operator that writes its arguments.

    With a layout from the cache, a plain tensor was written already, from whole sources.
    """
    *_, in_place, _ = rest
    if in_place and isinstance(args[0], torch.Tensor) and not isinstance(args[0], DTensor):
        return args[0]
    return before(op, args, *rest)


# Torch looks the second one up once, at the first operator of the process that writes a DTensor.
_RULES = {
    "_propagate_op_sharding_dispatch_slow_path": _layouts,
    "_dispatch_fast_path_python_tail": _finish,
}


def _updates() -> Iterator[Any]:
    """Operators of moving averages. Where plain tensors do not count as replicated, torch refuses
    them before it comes to the rules above, and a handler per operator comes first."""
    for name in ("copy_", "add_", "sub_", "mul_", "div_", "lerp_", "addcmul_", "addcdiv_"):
        for packet in (getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"_foreach_{name}")):
            yield from (getattr(packet, overload) for overload in packet.overloads())


def _update(op: Any, args: Any, kwargs: Any) -> Any:
    if _writes_plain_tensors(op, args, kwargs):
        return op(*_whole(args), **_whole(kwargs))
    return by_dtensor(op, args, kwargs)


def _wrong_in_place() -> Iterator[Any]:
    """Operators that write with another layout than they leave on the tensor that they write."""
    for name in (
        "index_copy_", "index_add_", "index_fill_", "index_reduce_", "scatter_", "scatter_add_",
        "scatter_reduce_", "masked_scatter_", "put_", "index_put_", "fill_diagonal_", "eye",
    ):  # fmt: skip
        packet = getattr(torch.ops.aten, name)
        overloads = [o for o in packet.overloads() if name != "eye" or o.endswith("out")]
        yield from (getattr(packet, overload) for overload in overloads)


def _in_place(op: Any, args: Any, kwargs: Any) -> Any:
    if _writes_plain_tensors(op, args, kwargs):
        return op(*_whole(args), **_whole(kwargs))
    return _on_whole_tensors(op, args, kwargs, EngineError(f"{op} has no rule for shards."))


@functools.cache
def _written(op: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes."""
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _tensors_written(op: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written(op)]
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def _writes_plain_tensors(op: Any, args: Any, kwargs: Any) -> bool:
    written = _tensors_written(op, args, kwargs)
    return bool(written) and not any(isinstance(x, DTensor) for x in written)


@torch.no_grad()
def _whole(values: Any) -> Any:
    return pytree.tree_map_only(DTensor, DTensor.full_tensor, values)


@torch.no_grad()
def _on_whole_tensors(op: Any, args: Any, kwargs: Any, error: Exception) -> Any:
    """The results of an operator as replicated DTensors, and what it writes laid out as before."""
    arguments, returns = op._schema.arguments, op._schema.returns
    is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in arguments)
    before = _tensors_written(op, args, kwargs)
    # what takes no values in place gets another local tensor, which views of it would not see
    replaced = [x for x in before if isinstance(x, DTensor) and _is_replaced(op, x)]
    if (
        is_view
        or torch.Tag.nondeterministic_seeded in op.tags
        or any(type(x) is not DTensor or x._local_tensor._is_view() for x in replaced)
    ):
        raise UnsupportedOperator(
            f"{error} In the place of a sharded parameter p, give it p.full_tensor(), on all "
            "ranks, and write what was changed back by p.copy_(whole)."
        ) from error
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, DTensor)]
    mesh = tensors[0].device_mesh
    whole_args, whole_kwargs = _whole((args, kwargs))
    result = op(*whole_args, **whole_kwargs)
    after = _tensors_written(op, whole_args, whole_kwargs)
    for x, whole in zip(before, after, strict=True):
        if isinstance(x, DTensor):
            value = _replicated(whole, mesh)
            if _is_replaced(op, x):
                torch.Tensor.data.__set__(x, value)  # type: ignore[attr-defined]
                x._local_tensor, x._spec = value._local_tensor, value._spec
            else:
                x.copy_(value)
    if not before:
        return pytree.tree_map_only(torch.Tensor, lambda x: _replicated(x, mesh), result)
    if not returns:
        return None
    return before[0] if len(before) == 1 else tuple(before)


def _is_replaced(op: Any, x: DTensor) -> bool:
    return torch.Tag.inplace_view in op.tags or any(p.is_partial() for p in x.placements)


def _replicated(x: torch.Tensor, mesh: Any) -> DTensor:
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def enter_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A hook before an optimizer steps."""
    _STEPPING[:] = [optimizer]


def leave_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A hook after an optimizer stepped."""
    _STEPPING.clear()


def _number(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (x,) = args
    if not all(placement.is_replicate() for placement in x.placements):
        if _STEPPING:
            return op(x.full_tensor())
        raise EngineError(
            f"the number that is asked for is this rank's part of a sharded tensor "
            f"({', '.join(map(str, x.placements))}); write x.full_tensor().item() in the place of "
            "x.item() or float(x), on all ranks"
        )
    return op(x._local_tensor)


_DRAWS = [
    getattr(packet, overload)
    for packet in (
        torch.ops.aten.exponential_, torch.ops.aten.geometric_, torch.ops.aten.cauchy_,
        torch.ops.aten.log_normal_, torch.ops.aten.random_,
    )
    for overload in packet.overloads()
]  # fmt: skip


def _draw(op: Any, args: Any, kwargs: Any) -> Any:
    """Random operators that torch lets each rank run on its own."""
    x, *others = args
    generator = kwargs.pop("generator", None)
    if dtensor_random._rng_tracker is None:
        dtensor_random._rng_tracker = dtensor_random.OffsetBasedRNGTracker(x.device_mesh)
    with dtensor_random._rng_tracker._distribute_region(x._spec, generator=generator):
        op(x._local_tensor, *others, **kwargs)
    return x


class _CpuTracker:
    """A random state per shard, as DTensor's own trackers keep one on GPUs."""

    distribute_region_enabled = True

    @contextmanager
    def _distribute_region(
        self, spec: Any, generator: torch.Generator | None = None
    ) -> Iterator[None]:
        """While on, the generator draws for this rank's shard.

        Args:
            spec: of the DTensor that is drawn.
        """
        used = torch.default_generator if generator is None else generator
        seed = int(torch.randint(2**62, (), generator=used))  # alike on ranks in the same state
        shard = 0
        for axis, placement in enumerate(spec.placements):
            if placement.is_shard() and not isinstance(placement, Owned):
                shard = shard * spec.mesh.size(axis) + spec.mesh.get_local_rank(axis)
        after = used.get_state()
        used.manual_seed((seed + shard) % 2**62)
        try:
            yield
        finally:
            used.set_state(after)
