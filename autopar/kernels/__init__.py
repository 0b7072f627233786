"""Triton kernels that a pass may substitute for ATen operators.

Importing this package does not import Triton. `layer_norm` has the kernels and imports it.
`substitute` has the pass.
"""

from functools import cache

__all__ = ["kernels_run_on", "triton_available"]


@cache
def triton_available() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def kernels_run_on(device_type: str) -> bool:
    """Whether the kernels can run on this type of device.

    They run on GPUs, and on the CPU if Triton interprets them (`TRITON_INTERPRET=1`). The
    interpreter is for tests, because it is orders of magnitude slower than ATen.
    """
    if device_type not in ("cuda", "cpu") or not triton_available():
        return False
    import triton

    return device_type == "cuda" or bool(triton.knobs.runtime.interpret)
