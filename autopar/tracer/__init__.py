"""Capture of a model as one functional ATen graph."""

from autopar.tracer.graph import ModelGraph, NodeInfo
from autopar.tracer.guards import Guard
from autopar.tracer.tracer import ColoTracer

__all__ = ["ColoTracer", "Guard", "ModelGraph", "NodeInfo"]
