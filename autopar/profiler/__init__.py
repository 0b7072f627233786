"""Static costs: what every node computes, moves and saves."""

from autopar.profiler.model import ModelProfile, largest, profile_model, substitute
from autopar.profiler.profile import NodeProfile, profile_graph

__all__ = [
    "ModelProfile",
    "NodeProfile",
    "largest",
    "profile_graph",
    "profile_model",
    "substitute",
]
