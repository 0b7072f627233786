"""autopar: turns a single-device PyTorch model into the fastest distributed one that fits."""

from autopar.autoplan import autoplan
from autopar.plan import ShardingPlan
from autopar.profiler.cluster import ClusterInfo
from autopar.runtime.engine import auto_engine
from autopar.tracer import ColoTracer

__version__ = "0.1.0"

__all__ = ["ClusterInfo", "ColoTracer", "ShardingPlan", "auto_engine", "autoplan"]
