"""Regions of a forward that the capture would not see as eager PyTorch runs them.

* `torch.inference_mode()` is set in C++, where the capture does not see it. A region of it is
  captured as a `no_grad` region, which gives the same values and no gradient.
  `torch.is_inference_mode_enabled()` stays true inside.
* `torch.cond` asks for its condition, as a Python `if` does, so that inputs may decide it.
* Hooks on saved tensors are refused: programs save other values, and gradients would miss what the
  hooks change. Those of torch's own (`save_on_cpu`, checkpoints) change nothing and are left out;
  of checkpoints in each other, a region would be captured without gradients (torch 2.13).
* A backward inside of a forward (`torch.autograd.grad`) is refused: graphs are captured without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.tracer.functions import capturing
from autopar.tracer.source import current_line

_LOCK = threading.Lock()
_PATCHES: dict[tuple[Any, str], tuple[int, Any]] = {}
_STATE = threading.local()


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """While on in some thread, an attribute is `make(original)`.

    Threads may capture at the same time (simulated ranks), so the first one in replaces it and the
    last one out restores it; the replacement asks `capturing()`.
    """
    key = (owner, name)
    with _LOCK:
        users, original = _PATCHES.get(key, (0, None))
        if not users:
            original = getattr(owner, name)
            setattr(owner, name, make(original))
        _PATCHES[key] = (users + 1, original)
    try:
        yield
    finally:
        with _LOCK:
            users, original = _PATCHES.pop(key)
            if users > 1:
                _PATCHES[key] = (users - 1, original)
            else:
                setattr(owner, name, original)


def _enter(original: Any) -> Any:
    def enter(region: Any) -> None:
        if not capturing():
            return original(region)
        region._inference_mode_context = _Region(region.mode)
        region._inference_mode_context.__enter__()
        return None

    return enter


class _Region:
    """The grad mode of an inference-mode region: off, and on where inference mode is left."""

    def __init__(self, mode: bool) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self.before = getattr(_STATE, "inference", False)
        _STATE.inference = self.mode
        self.grad_mode = torch.set_grad_enabled(not self.mode)

    def __exit__(self, *error: Any) -> None:
        _STATE.inference = self.before
        self.grad_mode.__exit__(*error)


def _enabled(original: Any) -> Any:
    return lambda: (capturing() and getattr(_STATE, "inference", False)) or original()


def _cond(original: Any) -> Any:
    def cond(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
        if not capturing() or not isinstance(pred, torch.Tensor):
            return original(pred, true_fn, false_fn, operands)
        taken, other = (true_fn, false_fn) if pred else (false_fn, true_fn)
        results = taken(*operands)
        if getattr(other, "__closure__", None) is None and not hasattr(other, "__self__"):
            return results
        # what the other side refers to has zeros for a gradient, not none
        take = torch.ones((), dtype=torch.bool, device=pred.device)
        return pytree.tree_map(lambda x, y: torch.where(take, x, y), results, other(*operands))

    return cond


def _enter_hooks(original: Any) -> Any:
    def enter(hooks: Any) -> None:
        if not capturing():
            original(hooks)
        elif type(hooks) is saved_tensors_hooks or not type(hooks).__module__.startswith("torch."):
            line = current_line()
            raise CaptureError(
                f"{line}: `{line.text}` has hooks on saved tensors, which would be left out: the "
                "plan decides what is saved; leave them out of the forward (memory= makes a step "
                "fit, and torch.autograd.graph.save_on_cpu is captured)"
            )

    return enter


def _exit_hooks(original: Any) -> Any:
    return lambda hooks, *error: None if capturing() else original(hooks, *error)


def _backward(original: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not capturing():
            return original(*args, **kwargs)
        line = current_line()
        raise CaptureError(
            f"{line}: `{line.text}` runs a backward inside of the forward, which a captured graph "
            "does not have. Take this gradient outside of the model, of what the engine returns "
            "(through an engine on one device, also with create_graph=True), or write out its "
            "formula"
        )

    return run


@contextmanager
def regions_as_run() -> Iterator[None]:
    """While on, inference-mode regions and conditions of a captured forward are as above."""
    with (
        replaced(torch.inference_mode, "__enter__", _enter),
        replaced(torch, "is_inference_mode_enabled", _enabled),
        replaced(torch, "cond", _cond),
        replaced(saved_tensors_hooks, "__enter__", _enter_hooks),
        replaced(saved_tensors_hooks, "__exit__", _exit_hooks),
        replaced(torch.autograd, "_engine_run_backward", _backward),
    ):
        yield
