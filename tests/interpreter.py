"""Runs checks of Triton kernels on the CPU, through Triton's interpreter.

Triton decides whether it interprets when it is imported, so checks (`check_*`) run in a process of
their own; tests only send them there.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch

from autopar.kernels import triton_available

Interpreter = Callable[..., None]

needs_triton = pytest.mark.skipif(not triton_available(), reason="Triton is not installed")


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """Runs a check, with its arguments, where Triton interprets."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(torch.set_num_threads, 1).result()  # starts the process
        yield lambda check, *args: pool.submit(_run, check, args).result()


def _run(check: Callable[..., None], args: tuple[object, ...]) -> None:
    from autopar.kernels import launch

    torch.manual_seed(0)
    check(*args)
    assert not launch.failed, "ATen ran in the place of a kernel"


def tolerance(dtype: torch.dtype, scale: float = 1.0) -> dict[str, float]:
    """A few roundings of numbers of this scale."""
    epsilon = torch.finfo(dtype).eps
    return {"rtol": 10 * epsilon, "atol": 30 * epsilon * scale}
