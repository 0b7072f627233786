"""Capture of a model as one functional ATen graph."""

from autopar.ir.graph import ModelGraph, NodeInfo
from autopar.ir.guards import Guard
from autopar.tracer.tracer import ColoTracer

__all__ = ["ColoTracer", "Guard", "ModelGraph", "NodeInfo"]
