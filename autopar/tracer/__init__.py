"""Capture of a model as one functional ATen graph."""

from autopar.tracer.graph import ModelGraph, NodeInfo
from autopar.tracer.tracer import ColoTracer

__all__ = ["ColoTracer", "ModelGraph", "NodeInfo"]
