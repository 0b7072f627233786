"""`deferred_init`: a model is built without memory, and its values are computed later."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.runtime.deferred_tensors import DeferredTensor, record


class deferred_init(TorchDispatchMode):
    """A context in which new tensors have no memory.

    ```
    torch.manual_seed(0)
    with deferred_init():
        model = Transformer(config)
    model, optimizer = auto_engine(model, optimizer, "2x4")
    ```

    Operators that create tensors on the CPU give `DeferredTensor`s, and operators on these, within
    the context and after it, are recorded. `auto_engine` computes the values parameter by
    parameter, and each rank keeps its shards. Values are those of construction on the CPU, to the
    bit, under the state of the generator at entry. Random numbers are drawn twice: once here, on
    memory that is freed at once, so that later draws of the program are those after an undeferred
    construction; and once for the values.

    Where Python asks for values (`x.item()`, `x.tolist()`, `if x > 0`), they are computed at once.
    Tensors from elsewhere (NumPy, files, `torch.tensor([1, 2])`) are real and stay so.

    Raises:
        EngineError: a tensor on another device than the CPU, or a change that cannot be recorded.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(x, DeferredTensor) for x in leaves):
            return record(func, args, kwargs)
        has_device = any(argument.name == "device" for argument in func._schema.arguments)
        if not has_device or any(isinstance(x, torch.Tensor) for x in leaves):
            return func(*args, **kwargs)
        out = record(func, args, kwargs)
        # lazy modules put such a tensor into a class of their own
        return out if not isinstance(out, DeferredTensor) or out.numel() else out.compute()
