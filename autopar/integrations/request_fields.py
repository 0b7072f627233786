"""The fields of a request to the server: their types, and the values that it can serve.

Transformers' server takes any JSON, ignores fields that it does not follow, and fails somewhere at
a wrong type. Here a wrong type is told by the name of its field, and a field that would change the
answer is refused unless it asks for what happens anyway.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

# Options in generation_config with the values that ask for what the server does, and why.
_OF_GENERATION: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_return_sequences": ((None, 1), "the server gives one answer"),
    "return_dict_in_generate": ((None, False), "the server answers with text alone"),
    "guidance_scale": ((None, 1), "the server has no second prompt, nor a cache for one"),
}


def _repetition(penalty: float) -> float:
    if not -1 < penalty <= 2:
        raise PydanticCustomError(
            "penalty",
            "Input should be greater than -1 and at most 2: transformers' server adds 1 to it for "
            "a repetition_penalty, which is positive",
        )
    return penalty


def _of_some_text(stop: str | list[str]) -> str | list[str]:
    if "" in ([stop] if isinstance(stop, str) else stop):
        raise PydanticCustomError("stop", "Input should have no empty text, which ends nothing")
    return stop


_Zero = Annotated[float, Field(ge=0, le=0)]
_Count = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # that torch takes
_Token = Annotated[str, Field(pattern=r"^\d+$")]


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

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    prompt: str | None = None
    input: str | list[dict[str, Any]] | dict[str, Any] | None = None
    instructions: str | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    max_output_tokens: _Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, AfterValidator(_repetition)] | None = None
    logit_bias: dict[_Token, float] | None = None
    seed: _Seed | None = None
    stop: Annotated[str | list[str], AfterValidator(_of_some_text)] | None = None
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
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"text with {error.object[error.start]!a}, which is half of a character"
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
    for name, (served, why) in _OF_GENERATION.items():
        if options.get(name) not in served:
            return f"generation_config: {name}: {why}; leave out {_shown(options[name])}"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
