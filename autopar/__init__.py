"""autopar: turns a single-device PyTorch model into the fastest distributed one that fits."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.cluster.cluster import ClusterInfo
    from autopar.compile import autoplan
    from autopar.ir.precision import Precision
    from autopar.plan import ShardingPlan
    from autopar.quantization import quantize
    from autopar.runtime.auto_engine import auto_engine
    from autopar.runtime.deferred_init import deferred_init
    from autopar.tracer import ColoTracer

__version__ = "0.1.0"

__all__ = [
    "ClusterInfo",
    "ColoTracer",
    "Precision",
    "ShardingPlan",
    "auto_engine",
    "autoplan",
    "deferred_init",
    "quantize",
]

# Imported at first use: `autopar --help` should not wait for torch.
_HOMES = {
    "ClusterInfo": "autopar.cluster.cluster",
    "ColoTracer": "autopar.tracer",
    "Precision": "autopar.ir.precision",
    "ShardingPlan": "autopar.plan",
    "auto_engine": "autopar.runtime.auto_engine",
    "autoplan": "autopar.compile",
    "deferred_init": "autopar.runtime.deferred_init",
    "quantize": "autopar.quantization",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
