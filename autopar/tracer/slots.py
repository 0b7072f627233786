"""Attributes in `__slots__`, which a capture cannot follow."""

from __future__ import annotations

from types import MemberDescriptorType

import torch

from autopar.errors import CaptureError


def refuse_slots(model: torch.nn.Module) -> None:
    """Refuse modules with attributes outside of their `__dict__`: copies of a module lose them, and
    nobody sees them change between two calls.

    Raises:
        CaptureError: naming the class and its slots.
    """
    for module in model.modules():
        for klass in type(module).__mro__:
            slots = [n for n, x in vars(klass).items() if isinstance(x, MemberDescriptorType)]
            if slots:
                raise CaptureError(
                    f"{klass.__qualname__} keeps {', '.join(slots)} in __slots__, which copies of "
                    f"a module lose (torch copies its __dict__); leave __slots__ out of "
                    f"{klass.__qualname__}"
                )
