"""Captures a call of a model, for the batch of all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from autopar.errors import CaptureError, MeshError
from autopar.ir.graph import ModelGraph
from autopar.ir.numbers import Origin
from autopar.runtime.batch import BatchLayout
from autopar.runtime.call import Call
from autopar.runtime.decoder_cache import with_cache
from autopar.runtime.donated_inputs import with_donations
from autopar.runtime.engine_options import EngineOptions
from autopar.runtime.loss_outside import with_loss
from autopar.tracer import ColoTracer


def capture_call(
    model: torch.nn.Module,
    call: Call,
    layout: BatchLayout,
    options: EngineOptions,
    device_type: str,
    varying: Collection[Origin],
    dynamic: bool | Mapping[int, Collection[int]] = False,
) -> ModelGraph:
    """The graph of a call.

    Args:
        layout: how the call's batch enters.
        varying: origins of numbers that are inputs of the program.
        dynamic: dims whose sizes are symbols, by the position of an input among the flattened ones.

    Raises:
        CaptureError: the model cannot be captured.
        MeshError: it cannot be captured for the samples of all ranks together.
    """
    inputs = layout.global_inputs(call)
    try:
        tracer = ColoTracer(
            device_type,
            precision=options.precision,
            cast_first=options.step.lowered,
            dynamic=dynamic,
        )
        with with_loss(model, options.loss_fn, call.kwargs), with_cache(model, call):
            graph = tracer.trace(model, *inputs, varying=varying)
        return with_donations(graph, call.leaves)
    except CaptureError as error:
        joined, lines = layout.joined, str(error).splitlines()
        if len(joined) < 2:
            raise
        listed = ", ".join(f"{name} (dim {dim})" for name, dim in joined.items())
        raise MeshError(
            "the model cannot be captured for all ranks' samples. With batch='local', these "
            f"inputs are joined over the ranks along the dim that has {layout.samples} "
            f"samples: {listed}. If one of them is not per sample (weights of classes, a mask "
            "of positions), pass batch_dim={'its name': None} to auto_engine, or the dim that "
            "holds its samples. Else:\n" + "\n".join(lines[1:] or lines)
        ) from error
