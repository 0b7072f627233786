"""Fields of requests to the server: wrong types, and what it would leave out, are told."""

import json

import pytest

from autopar.integrations.request_fields import first_problem

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
PART = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 4, "temperature": 0, "top_p": 1.0, "seed": 3, "stream": True, "user": "me"},
        {"n": 1, "logprobs": None, "presence_penalty": 0, "response_format": {"type": "text"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"generation_config": json.dumps({"max_new_tokens": 3, "guidance_scale": 1.0})},
        {"stop": [], "seed": -(2**63), "frequency_penalty": -0.5, "logit_bias": {"3": 1}},
        {"stop": ["a", "b"], "seed": 2**64 - 1, "frequency_penalty": 2},
    ],
)
def test_what_the_server_follows_is_served(fields):
    assert first_problem(CHAT | fields, "messages") is None


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_tokens": "a"}, "max_tokens: Input should be a valid integer, not 'a'"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1, not 0"),
        ({"messages": "hello"}, "messages: Input should be a valid list, not 'hello'"),
        ({"messages": None}, "messages: the request has none"),
        ({"stop": "a\ud83d b"}, r"text with '\ud83d', which is half of a character"),
        ({"messages": [{"content": "x"}]}, "messages.0.role: Field required"),
        ({"messages": [{"role": "user", "content": [PART]}]}, "not 'image_url'"),
        ({"seed": 2**70}, "seed: Input should be less than 18446744073709551616, not 1180"),
        ({"seed": -(2**63) - 1}, "seed: Input should be greater than or equal to -92233720368547"),
        ({"frequency_penalty": -50.0}, "frequency_penalty: Input should be greater than -1 and at"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty: "),
        ({"temperature": float("inf")}, "temperature: Input should be a finite number"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"stop": ""}, "stop: Input should have no empty text, which ends nothing, not ''"),
        ({"stop": ["a", ""]}, "stop: Input should have no empty text"),
        ({"stop": [1]}, "stop."),
        ({"n": 2}, "n: Input should be 1, not 2"),
        ({"presence_penalty": 0.5}, "presence_penalty: "),
        ({"response_format": {"type": "json_object"}}, "response_format.type: "),
        ({"previous_response_id": "x"}, "previous_response_id: "),
        ({"generation_config": "{"}, "generation_config: not JSON: "),
        ({"generation_config": "[]"}, "generation_config: should be an object, not []"),
        ({"generation_config": '{"num_return_sequences": 2}'}, "one answer; leave out 2"),
        ({"generation_config": '{"guidance_scale": 2.0}'}, "guidance_scale: the server has no sec"),
        ({"generation_config": '{"return_dict_in_generate": true}'}, "return_dict_in_generate: "),
    ],
)
def test_others_are_refused_by_name(fields, problem):
    assert problem in first_problem(CHAT | fields, "messages")
