"""The process in which Triton interprets, for all tests of kernels."""

from tests.interpreter import interpreted  # noqa: F401
