"""transformers' server with an engine behind it.

The server, its endpoints and its threads are those of `transformers serve`. Rank 0 runs it, with an
engine in the place of the model that it would load (`serve_application.py`); the other ranks follow
its `generate` (`shared_generation.py`).
"""

from __future__ import annotations

import copy
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf

from autopar.comm import world
from autopar.errors import EngineError
from autopar.integrations.model_folder import model_folder
from autopar.integrations.serve_options import END_WITHIN_S, ServeOptions, leave
from autopar.quantization import quantize
from autopar.runtime.auto_engine import auto_engine
from autopar.runtime.deferred_init import deferred_init

# Prompts that are generated from before the server starts, and what their caches hold: the third
# finds how programs depend on both, and further ones need no capture.
_FIRST = ((12, 16), (16, 1000), (24, 2000))
_GRACE_S = 2  # for answers to requests that run when the server is told to end


def run_rank(options: ServeOptions) -> None:
    """Read the model, and serve it until the process is told to end; on every rank. The process
    ends here: freeing a model and shutting torch down would take seconds.

    Raises:
        EngineError: the model is none that generates text from text, or another rank has died.
    """
    from autopar.integrations.shared_generation import SharedGeneration

    place = _bound(options) if int(os.environ.get("RANK", "0")) == 0 else None
    engine, tokenizer = load(options)
    shared = SharedGeneration(engine, tokenizer, options.batch)
    try:
        if place is not None:
            from autopar.integrations.serve_application import application

            _listen(place, application(shared, options.model, tokenizer), options.model, shared)
            shared.end()
        else:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # rank 0 says when to end
            shared.follow()
    except BaseException:
        world.stop()
        raise
    leave()


def _bound(options: ServeOptions) -> socket.socket:
    """A port that is taken is told before the model is read."""
    place = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((options.host, options.port))
    except OSError as error:
        raise OSError(f"port {options.port} of {options.host}: {error}") from error
    return place


def load(options: ServeOptions) -> tuple[Any, Any]:
    """The engine, with its weights and programs, and the tokenizer.

    Raises:
        EngineError: the model is none that generates text from text.
    """
    folder = model_folder(options.model)
    config = hf.AutoConfig.from_pretrained(folder)
    if config.is_encoder_decoder:
        raise EngineError(
            f"{options.model} is a {config.model_type}, and the server takes decoders; call "
            "engine.generate of an encoder with a decoder"
        )
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    with deferred_init():  # no rank holds the whole model
        model = hf.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    if (Path(folder) / "generation_config.json").exists():
        model.generation_config = hf.GenerationConfig.from_pretrained(folder)
    model.name_or_path = options.model
    engine, _ = auto_engine(
        model.eval(), None, options.mesh, weights=folder, memory=options.memory,
        precision=options.precision,
    )  # fmt: skip
    first: Sequence[tuple[int, int]] = _FIRST if options.warm_up else _FIRST[:1]
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or _FIRST[-1][1]
    first = tuple((min(n, longest - 2), min(held, longest)) for n, held in first)
    if options.quantization is not None:
        _generate(engine, first[:1])  # reads the weights
        quantize(engine, options.quantization)
    _generate(engine, first)
    if options.warm_up and options.batch > 1:
        _generate(engine, first, options.batch)
    return engine, tokenizer


def _generate(engine: Any, prompts: Iterable[tuple[int, int]], rows: int = 1) -> None:
    device = next(engine.parameters()).device
    for length, held in prompts:
        ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
        config = copy.deepcopy(engine.generation_config)
        config.max_cache_len, config.do_sample = held, False
        config.min_new_tokens = config.max_new_tokens = 2
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[:, 0] = 0  # as batches have
        engine.generate(input_ids=ids, attention_mask=mask, generation_config=config)


def _listen(place: socket.socket, app: Any, model: str, shared: Any) -> None:
    """Serve until a signal asks to end."""
    import uvicorn

    host, port = place.getsockname()[:2]

    class Server(uvicorn.Server):
        async def startup(self, *args: Any, **kwargs: Any) -> None:
            await super().startup(*args, **kwargs)
            ranks = dist.get_world_size()
            line = f"autopar: serving {model} on {ranks} ranks at http://{host}:{port}"
            print(line, file=sys.stderr, flush=True)

        def handle_exit(self, *args: Any) -> None:
            if self.should_exit:  # the terminal and the parent process both tell it
                return
            last = threading.Timer(END_WITHIN_S, os._exit, [0])
            last.daemon = True
            last.start()
            shared.stop()
            super().handle_exit(*args)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises it again when it has ended
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_S)
    Server(config).run([place])
