"""Repeated blocks are captured once: of the others, the nodes are copied.

Running a block's Python under the tracer takes milliseconds per operator; copying what was recorded
of the first one, tens of microseconds. A block is a copy of another if running it could not give
other nodes: both stand in one list of modules, they are of the same classes with the same tensors
and the same attributes (`blocks.py`), are called alike, and

* attributes that differ (a layer's number), the first run did not read, but inside of modules that
  have them for their own (the rate of a stochastic depth): these are run in their places, and must
  capture the same operators, with whatever numbers;
* no hooks watch the modules inside of them;
* the first run asked for no values (`BranchResolver`), and changed no attribute of its modules;
* it computed with nothing but its arguments and its own tensors, and wrote into the latter only
  (`recording.py`).

Everything else is run as before. The tracer's slots and its module stack are private
(torch.fx.experimental.proxy_tensor; tested with torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_slot
from torch.utils import _pytree as pytree

from autopar.tracer.blocks import PLAIN, Block, described, kinds_of
from autopar.tracer.branches import BranchResolver, current_tracer
from autopar.tracer.copying import copied
from autopar.tracer.recording import NotAlike, Record, Recorder, modes


class Copies:
    """Watches the blocks of a module that is about to be captured.

    Args:
        module: a copy that belongs to the capture; the forwards of its blocks are replaced.
        resolver: of the capture.
    """

    def __init__(self, module: torch.nn.Module, resolver: BranchResolver) -> None:
        self._resolver = resolver
        self._recorder = Recorder()
        self._records: dict[Any, list[Record]] = {}
        names = [m for _, m in module.named_modules(remove_duplicate=False)]
        if len(names) > len({*names}):
            return  # with modules of two names, the tracer runs stand-ins for them
        for kind, blocks in enumerate([*kinds_of(module)]):
            for block in blocks:
                self._recorder.watch(block)
                block.module.forward = self._forward(kind, block)

    def _forward(self, kind: int, block: Block) -> Callable[..., Any]:
        run = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            key, leaves = self._key(kind, block, args, kwargs)
            if key is None:
                return run(*args, **kwargs)
            known = self._records.setdefault(key, [])
            for record in [*known]:
                if record.stands_for(block):
                    try:
                        return copied(record, block, leaves)
                    except NotAlike:
                        known.remove(record)  # it costs as much as it saves
            result, found = self._recorder.record(
                block, leaves, lambda: run(*args, **kwargs), lambda: self._resolver.asked
            )
            if found is not None:
                known.append(found)
            return result

        return forward

    def _key(
        self, kind: int, block: Block, args: Any, kwargs: Any
    ) -> tuple[Any, list[torch.Tensor]]:
        """How a block is called, and its tensor arguments; None if that says too little."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tracer = current_tracer()
        if self._recorder.busy or tracer is None or not self._resolver.active:
            return None, []  # inside of another block, or not in the forward
        if block.hooked:
            return None, []
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        for t in (*tensors, *block.tensors()):
            slot = get_proxy_slot(t, tracer, None) if isinstance(t, FakeTensor) else None
            if slot is None or slot.constant is not None:
                return None, []
        seen = []
        for x in leaves:
            if isinstance(x, torch.Tensor):
                first = next(i for i, t in enumerate(tensors) if t is x)
                seen.append(("tensor", first, *described(x), x.requires_grad))
            elif isinstance(x, PLAIN):
                seen.append((type(x), x))
            else:
                return None, []
        own = block.tensors()
        mixed = tuple(next((i for i, o in enumerate(own) if o is t), -1) for t in tensors)
        return (kind, str(spec), tuple(seen), mixed, modes(), tracer.graph), tensors
