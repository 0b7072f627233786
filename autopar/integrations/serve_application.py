"""The web application of transformers' server, with an engine's `generate` behind it.

Private to transformers here: `transformers.cli.serving`; tested with transformers 5.23.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from autopar.integrations.batched_requests import ClientLeftError
from autopar.integrations.client_watch import ClientWatch, client_left
from autopar.integrations.generation_check import RequestError
from autopar.integrations.request_fields import first_problem
from autopar.integrations.serving_threads import ThreadPerRequest
from autopar.integrations.shared_generation import SEED, ServerEndsError

_BAD_REQUEST, _LEFT, _NOT_SERVED, _ENDING = 400, 499, 501, 503  # nobody reads the second


def application(shared: Any, model: str, tokenizer: Any) -> Any:
    """The web application of transformers' server, for one model.

    Args:
        shared: a `SharedGeneration`.
        model: how requests name it.
    """

    class OneModel(ModelManager):
        """Has the engine, and loads and frees nothing."""

        def __init__(self) -> None:
            self.loaded_models: dict[str, Any] = {}
            self.force_model = model

        def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
            return shared, tokenizer

        async def load_model_streaming(self, *_: Any, **__: Any) -> Any:
            yield f'data: {{"status": "ready", "model": "{model}", "cached": true}}\n\n'

        def get_gen_models(self) -> list[dict[str, Any]]:
            return [{"id": model, "object": "model", "owned_by": "", "created": 0}]

        def shutdown(self) -> None:
            pass

    class Waiting(GenerateManager):
        """Requests wait for a generation side by side, so that they can be a batch. What is wrong
        with one is told before its answer begins, and a client that leaves ends its generation."""

        def __init__(self) -> None:
            self._thread = ThreadPerRequest()

        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **more: Any
        ) -> Any:
            shared.check(inputs, gen_config, streams=True)
            return super().generate_streaming(model, processor, inputs, gen_config, *rest, **more)

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **more: Any
        ) -> Any:
            # stop strings take a second in a large vocabulary
            await asyncio.to_thread(shared.check, inputs, gen_config, streams=False)
            return await super().generate_non_streaming(
                model, processor, inputs, gen_config, *rest, **more
            )

        def async_submit(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            return super().async_submit(function, *args, left=client_left(), **kwargs)

    class OneState(GenerationState):
        def get_manager(self, *_: Any, **__: Any) -> Any:
            return waiting

    def checked(handler: Any, prompt: str) -> Any:
        """A handler that checks the fields of a request, and gives the seed to the generation.
        Transformers' sets the generator of the process, also while another request draws from it.

        Args:
            prompt: the field with the text to begin with.
        """

        class Checked(handler):
            def _validate_request(self, body: dict[str, Any]) -> None:
                super()._validate_request(body)
                if problem := first_problem(body, prompt):
                    raise RequestError(problem)

            def _build_generation_config(self, body: Any, *args: Any, **kwargs: Any) -> Any:
                seed = body.pop("seed", None)
                for field in ("stop", "logit_bias"):
                    if not body.get(field, True):  # empty: as if left out
                        del body[field]
                try:
                    config = super()._build_generation_config(body, *args, **kwargs)
                except (TypeError, ValueError) as error:
                    raise RequestError(f"generation_config: {error}") from error
                config.use_cache = True  # the tokens are the same, and programs are warmed up
                config.return_dict_in_generate = False  # a model's own configuration may have it
                vars(config).pop(SEED, None)
                if seed is not None:
                    setattr(config, SEED, int(seed))
                return config

        return Checked(manager, state)

    state, manager, waiting = OneState(), OneModel(), Waiting()
    app = build_server(
        manager,
        checked(ChatCompletionHandler, "messages"),
        completion_handler=checked(CompletionHandler, "prompt"),
        response_handler=checked(ResponseHandler, "input"),
        transcription_handler=_NotServed(),
        systemone_handler=_NotServed(),
        generation_state=state,
    )
    for error in (RequestError, TemplateError):
        app.add_exception_handler(error, partial(_told, code=_BAD_REQUEST))
    app.add_exception_handler(ServerEndsError, partial(_told, code=_ENDING))
    app.add_exception_handler(ClientLeftError, partial(_told, code=_LEFT))
    app.add_exception_handler(Exception, _told)
    app.add_middleware(ClientWatch)
    return app


class _NotServed:
    """Of endpoints that call more of a model than `generate`."""

    async def handle_request(self, *_: Any) -> Any:
        raise HTTPException(_NOT_SERVED, "an engine serves text that is generated from text")


async def _told(_: Any, error: Exception, code: int = 500) -> Any:
    return JSONResponse({"error": str(error)}, status_code=code)
