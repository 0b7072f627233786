"""What kernels share: dtypes, grids, and operators that run ATen where a kernel cannot be built."""

import functools
import logging
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

log = logging.getLogger(__name__)

# A row must fit the registers of one program: for wider ones ptxas (sm_90) spills.
MAX_WIDTH = 8192

# What building a kernel raises: Triton and ptxas, the C compiler, and its absence.
_BUILD_ERRORS = (TritonError, subprocess.CalledProcessError, OSError, RuntimeError)

# Operators that launch kernels.
names: set[str] = set()

# Operators whose kernels could not be built in this process, with the error.
failed: dict[str, str] = {}


def operator(name: str, *, instead: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that launches kernels as the operator `autopar::name`.

    Args:
        instead: the same in ATen's operators. It runs, after one line in the log, where the kernel
            cannot be built.
    """

    names.add(name)

    def register(launch: Callable[..., Any]) -> Any:
        @functools.wraps(launch)
        def run(*args: Any) -> Any:
            if name not in failed:
                try:
                    return launch(*args)
                except torch.OutOfMemoryError:
                    raise
                except _BUILD_ERRORS as error:
                    failed[name] = f"{type(error).__name__}: {error}"
                    log.warning(
                        "the kernel of autopar::%s cannot be built, ATen runs in its place: %s",
                        name, failed[name],
                    )  # fmt: skip
            return instead(*args)

        return torch.library.custom_op(f"autopar::{name}", run, mutates_args=())

    return register


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of arithmetic, as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def tile(name: str, width: int) -> tuple[int, int]:
    """The padded width of a row, a power of two, and the number of warps per row.

    Raises:
        ValueError: the row is too wide.
    """
    if width > MAX_WIDTH:
        raise ValueError(
            f"autopar::{name}: rows of {width} elements are wider than the {MAX_WIDTH} that "
            "fit the registers of one program; use the operator of ATen"
        )
    block = triton.next_power_of_2(width)
    return block, min(max(block // 256, 1), 16)


def programs_for(x: Tensor, rows: int, warps: int) -> int:
    """Number of programs that occupy the device, with 32 warps per multiprocessor."""
    if x.device.type != "cuda":
        return min(rows, 4)  # the interpreter: a few, so that tests cover the loop and the sum
    processors: int = torch.cuda.get_device_properties(x.device).multi_processor_count
    return min(rows, processors * (32 // warps))


def rows_and_width(x: Tensor) -> tuple[int, int]:
    """Rows are along the last dim."""
    width = x.shape[-1]
    return (x.numel() // width if width else 0), width


def as_rows(x: Tensor) -> Tensor:
    """[rows, width] with a last stride of 1: a view if the strides allow it, else a copy."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        try:
            return x.view(-1, x.shape[-1])
        except RuntimeError:
            pass
    return x.contiguous().view(-1, x.shape[-1])


def residual_gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of two operands that are added: that of their sum, where they need one."""
    first, second = (grad if need else None for need in ctx.needs_input_grad[:2])
    return first, second


def contiguous(x: Tensor | None) -> Tensor | None:
    """The same elements, contiguous."""
    return None if x is None else x.contiguous()
