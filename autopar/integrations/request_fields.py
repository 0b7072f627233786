"""The fields of a request to the server: their types, and the values that it can serve.

Transformers' server takes any JSON, ignores fields that it does not follow, and fails somewhere at
a wrong type. Here a wrong type is told by the name of its field, and a field that would change the
answer is refused unless it asks for what happens anyway.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Zero = Annotated[float, Field(ge=0, le=0)]
_Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    type: Literal["text", "input_text", "output_text"]  # others would be left out
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: str
    content: str | list[_Part] | None = None


class _PlainText(BaseModel):
    type: Literal["text"]


class _Text(BaseModel):
    format: _PlainText | None = None


class _Body(BaseModel):
    """Of /v1/chat/completions, /v1/completions and /v1/responses."""

    model_config = ConfigDict(strict=True)

    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    prompt: str | None = None
    input: str | list[dict[str, Any]] | dict[str, Any] | None = None
    instructions: str | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    max_output_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    suffix: str | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    generation_config: str | None = None
    # fields that the server does not follow, with the values that ask for what it does
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    presence_penalty: _Zero | None = None
    response_format: _PlainText | None = None
    text: _Text | None = None
    tool_choice: Literal["auto"] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    audio: None = None
    function_call: None = None
    functions: None = None
    prediction: None = None
    web_search_options: None = None


def first_problem(body: dict[str, Any], prompt: str) -> str | None:
    """Why a request cannot be served, or None: `max_tokens: Input should be a valid integer, not
    'a'`.

    Args:
        body: of the request, from JSON.
        prompt: the field with the text to begin with.
    """
    if body.get(prompt) is None:
        return f"{prompt}: the request has none"
    try:
        _Body.model_validate(body)
    except ValidationError as error:
        # of a field that may have several types, the one that it comes closest to
        first = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}, not {_shown(first['input'])}"
    options = body.get("generation_config")
    if options is None:
        return None
    try:
        options = json.loads(options)
    except ValueError as error:
        return f"generation_config: not JSON: {error}"
    if not isinstance(options, dict):
        return f"generation_config: should be an object, not {_shown(options)}"
    if options.get("num_return_sequences") not in (None, 1):
        count = options["num_return_sequences"]
        return f"generation_config: num_return_sequences: the server gives one answer, not {count}"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
