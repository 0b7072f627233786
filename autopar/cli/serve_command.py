"""The command that starts a server: `serve`."""

from __future__ import annotations

import os
import signal
import sys
import time
from importlib.util import find_spec
from types import FrameType
from typing import Any

import typer

from autopar.cli.common import check_devices, short_errors

_HOST = "127.0.0.1"  # of the ranks' store
_ASKED_EVERY_S = 0.2
_LAST_PORT = 65535
_NEEDS = ("transformers", "fastapi", "uvicorn", "openai", "pydantic")


def serve(
    model: str = typer.Argument(
        ...,
        metavar="MODEL",
        help="A folder with the configuration, the tokenizer and the safetensors of a language "
        "model of transformers, or an id of the Hugging Face hub.",
    ),
    mesh: str = typer.Option(
        "1",
        metavar="SIZES",
        help="Device mesh: 2, or 2x2. A process is started for each device, unless torchrun has.",
    ),
    host: str = typer.Option("localhost", metavar="NAME", help="Address to listen on."),
    port: int = typer.Option(
        8000, metavar="N", help="Port to listen on, up to 65535; 0 for one that is free."
    ),
    memory: str | None = typer.Option(
        None, metavar="SIZE", help="Budget per device: 20GiB, 512MB, or a share such as 0.8."
    ),
    precision: str | None = typer.Option(
        None, metavar="DTYPE", help="Compute and gather in bf16 or fp16.  [default: the model's]"
    ),
    quantize: str | None = typer.Option(
        None,
        metavar="SCHEME",
        help="Round the weights, as `autopar.quantize` does: int8, int8-dynamic, float8 or int4.",
    ),
    batch: int = typer.Option(
        4,
        metavar="N",
        min=1,
        help="Waiting requests with the same options that are generated together, at most.",
    ),
    warm_up: bool = typer.Option(
        True, help="Make the programs for prompts of all lengths before the first request."
    ),
) -> None:
    """Serve a language model over several devices, by the server of transformers.

    It has the endpoints of `transformers serve` that generate text: /v1/chat/completions,
    /v1/completions and /v1/responses, with streaming. SIGINT and SIGTERM end it.
    """
    with short_errors(ValueError, OSError, ImportError):
        if missing := [name for name in _NEEDS if find_spec(name) is None]:
            needed = ", ".join(missing)
            raise ImportError(f"the server needs {needed}: pip install autopar[serve]")
        if not 0 <= port <= _LAST_PORT:
            raise ValueError(
                f"--port {port} is no port: they are 1 to {_LAST_PORT}, and 0 takes a free one"
            )
        from autopar.integrations.model_folder import model_folder

        # before processes start, and downloaded once
        folder = model_folder(model) if "WORLD_SIZE" not in os.environ else None
        ranks = _ranks(mesh, started=folder is None)
        from autopar.integrations.serve_options import ServeOptions, leave

        if quantize is not None:
            from autopar.quantization import check_scheme  # seconds

            check_scheme(quantize)
        options = ServeOptions(model, mesh, memory, precision, quantize, host, port, warm_up, batch)
        if folder is None or ranks == 1:
            from autopar.integrations.serve import run_rank

            run_rank(options)
            return
    leave(_on_processes(options, ranks))


def _ranks(mesh: str, *, started: bool) -> int:
    """The devices of a mesh that can serve.

    Args:
        started: whether a process runs for each already, by torchrun.

    Raises:
        ValueError: it has stages, or more devices than a host.
    """
    from autopar.cluster.local import as_cluster

    cluster = as_cluster(mesh)
    if cluster.pipeline_ranks > 1:
        raise ValueError(
            f"mesh {cluster.mesh_text} has {cluster.pipeline_ranks} pipeline stages, which are of "
            "training: give the axis another name than pipe"
        )
    if not started:
        check_devices(f"mesh {cluster.mesh_text}", cluster.world_size, started=True)
    return cluster.world_size


def _on_processes(options: Any, ranks: int) -> int:
    """Serve on processes of this host, until they end; the exit code."""
    from torch._C._distributed_c10d import TCPStore
    from torch.multiprocessing.spawn import (
        ProcessExitedException,
        ProcessRaisedException,
        start_processes,
    )

    from autopar.integrations.serve_options import END_WITHIN_S

    # nobody else can take its port meanwhile
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = start_processes(
        _rank, (options, ranks, store.port), nprocs=ranks, join=False, start_method="spawn"
    )
    asked_at: float | None = None

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        asked_at = asked_at or time.monotonic()
        context.processes[0].terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        while not context.join(timeout=_ASKED_EVERY_S):
            if asked_at is not None and time.monotonic() - asked_at > END_WITHIN_S:
                for process in context.processes:
                    process.kill()
    except ProcessExitedException as error:
        if asked_at is None:
            print(f"autopar: {error}", file=sys.stderr)
            return 1
    except ProcessRaisedException as error:
        if asked_at is None:
            print(f"autopar: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            return 1
    return 0


def _rank(rank: int, options: Any, ranks: int, port: int) -> None:
    """One of the processes, with the environment that torchrun gives."""
    from autopar.integrations.serve import run_rank

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR=_HOST, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    run_rank(options)
