"""What the results of a recorded operator are like."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.optim.recording import Formula, NumberOf, Recording, Ref, Slot, Value, filled


class Inference:
    """Runs each kind of call once on fake tensors."""

    def __init__(self) -> None:
        self._metas: dict[Any, list[Value] | None] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=False)

    def results(
        self, recording: Recording, op: Any, template: Any, named: Any
    ) -> list[Value] | None:
        """What an operator's results are like; None if it fails on these operands, or if its
        results depend on elements."""
        kinds = recording.kinds

        def described(place: Any) -> Any:
            kind = type(place)
            if kind is Ref:
                return kinds[place.number]
            if kind is tuple:
                return tuple([described(x) for x in place])
            if kind is Slot:
                return place.kind
            return float if kind is NumberOf or kind is Formula else place

        key = (id(op), described(template), *[(k, described(v)) for k, v in named])
        if key not in self._metas:
            self._metas[key] = _inferred(self._fake, recording, op, template, named)
        return self._metas[key]


def _inferred(
    fake_mode: FakeTensorMode, recording: Recording, op: Any, template: Any, named: Any
) -> list[Value] | None:
    values, numbers = recording.values, recording.numbers

    def fake(place: Any) -> Any:
        if type(place) is not Ref:
            return numbers[place.number] if type(place) is Slot else 1.0
        v = values[place.number]
        return torch.empty_strided(v.shape, v.stride, dtype=v.dtype, device=v.device)

    with fake_mode:
        args = filled(template, fake)
        kwargs = {k: filled(v, fake) for k, v in named}
        try:
            made = op(*args, **kwargs)
        except Exception:  # it says so itself, when it runs on DTensors
            return None
    results = [] if made is None else made if isinstance(made, list | tuple) else [made]
    if not all(isinstance(x, torch.Tensor) for x in results):
        return None
    return [Value(tuple(x.shape), tuple(x.stride()), x.dtype, x.device) for x in results]
