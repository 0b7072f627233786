"""Requests that wait together are one batch, and get the tokens that each gets alone."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf

from autopar import auto_engine
from autopar.comm import world
from autopar.errors import EngineError
from autopar.integrations.batched_requests import ClientLeftError
from autopar.integrations.serve import load
from autopar.integrations.serve_options import ServeOptions
from autopar.integrations.shared_generation import SEED, RequestError, SharedGeneration

ROWS, POSITIONS = 3, 64


@pytest.fixture(scope="module")
def models():
    """A model and its twin in an engine; every fourth token of the vocabulary ends a text."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, initializer_range=0.2, bos_token_id=None,
        eos_token_id=list(range(0, 64, 16)), pad_token_id=0, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    engine, _ = auto_engine(copy.deepcopy(model), None, "1", progress=False)
    yield model, engine
    world.stop()


class Collected:
    """A streamer that keeps what it gets, or fails at a token."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.tokens, self.ended, self.fails_at = [], False, fails_at

    def put(self, value: torch.Tensor) -> None:
        if len(self.tokens) == self.fails_at:
            raise ConnectionError("who asked has left")
        self.tokens.append(value)

    def end(self) -> None:
        self.ended = True


def options(model, **given) -> hf.GenerationConfig:
    config = copy.deepcopy(model.generation_config)
    for name, value in {"max_new_tokens": 12, "do_sample": False, **given}.items():
        setattr(config, name, value)
    return config


def inputs(length: int, config: hf.GenerationConfig) -> dict:
    ids = torch.arange(1, length + 1)[None] * 5 % 63 + 1
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "generation_config": copy.deepcopy(config),
    }  # fmt: skip


def all_at_once(engine, requests, batch=ROWS):
    """Results, or errors, of requests that wait behind a first one, and the rows of each batch."""
    shared, rows = SharedGeneration(engine, None, batch), []
    begun, arrived = threading.Event(), threading.Event()

    class Watched:
        config = engine.config
        parameters = engine.parameters

        def generate(self, **arguments):
            rows.append(len(arguments["input_ids"]))
            begun.set()
            assert arrived.wait(60)
            return engine.generate(**arguments)

    shared.engine = Watched()
    with ThreadPoolExecutor(len(requests)) as pool:
        futures = []
        for k, request in enumerate(requests):
            futures.append(pool.submit(shared.generate, **request))
            assert begun.wait(60)  # the first one runs
            deadline = time.monotonic() + 60
            while len(shared._waiting) < k and time.monotonic() < deadline:
                time.sleep(0.01)
        arrived.set()
        answers = [f.exception(120) or f.result() for f in futures]
    shared.end()
    with pytest.raises(EngineError, match="the server is ending"):
        shared.generate(**requests[0])
    return answers, rows


def test_a_batch_generates_what_each_request_does_alone(models):
    model, engine = models
    streams = Collected(), Collected(fails_at=3)
    greedy = options(model)
    requests = [
        inputs(4, greedy),  # generated alone: nothing else waits
        inputs(3, greedy),
        inputs(9, options(model, max_new_tokens=5)),
        inputs(6, greedy) | {"streamer": streams[0]},
        inputs(5, greedy) | {"streamer": streams[1]},
        inputs(7, greedy),
    ]
    answers, rows = all_at_once(engine, requests)
    assert rows == [1, ROWS, ROWS]  # the second has two requests
    assert isinstance(answers[4], ConnectionError)
    lengths = set()
    for request, answer in zip(requests, answers, strict=True):
        if request is not requests[4]:
            given = {k: v for k, v in request.items() if k != "streamer"}
            expected = model.generate(**given)
            assert torch.equal(answer, expected)
            lengths.add(answer.shape[1] - request["input_ids"].shape[1])
    assert len(lengths) > 1  # some end by a token, some by their limit
    prompt, *tokens = streams[0].tokens
    assert torch.equal(prompt, requests[3]["input_ids"]) and streams[0].ended
    assert torch.equal(torch.cat([prompt[0], *tokens]), answers[3][0])


def test_other_options_and_seeds_run_alone(models):
    model, engine = models
    seeded = options(model, do_sample=True, temperature=0.7)
    setattr(seeded, SEED, 3)
    requests = [
        inputs(4, options(model)),
        inputs(5, options(model)),
        inputs(6, options(model, repetition_penalty=1.3)),
        inputs(7, seeded),
        inputs(8, options(model)),  # goes with the second, past others
    ]
    answers, rows = all_at_once(engine, requests)
    assert rows == [1, ROWS, 1, 1]
    vars(seeded).pop(SEED)
    for k, request in enumerate(requests):
        torch.manual_seed(3)
        config = seeded if k == 3 else request["generation_config"]
        assert torch.equal(answers[k], model.generate(**inputs(k + 4, config)))


def test_prompts_have_to_fit_the_positions(models):
    model, engine = models
    shared = SharedGeneration(engine, None, ROWS)
    with pytest.raises(RequestError, match=r"has 64 tokens, and the model has 64 positions, .* 63"):
        shared.generate(**inputs(POSITIONS, options(model)))
    with pytest.raises(RequestError, match="the prompt is empty"):
        shared.generate(**inputs(0, options(model)))
    request = inputs(POSITIONS - 2, options(model, max_new_tokens=1000, eos_token_id=None))
    assert shared.generate(**request).shape[1] == POSITIONS
    assert request["generation_config"].max_new_tokens == 2
    shared.end()


def test_a_client_that_leaves_ends_its_generation(models):
    """In a batch as alone, and before it has begun; others get their tokens."""
    model, engine = models
    lefts = threading.Event(), threading.Event()
    config = options(model, eos_token_id=None, max_new_tokens=50)

    class Leaves(Collected):
        def __init__(self, left):
            super().__init__()
            self.left = left

        def put(self, value):
            super().put(value)
            if len(self.tokens) == 5:
                self.left.set()

    streams = [Leaves(left) for left in lefts]
    requests = [
        inputs(6, config) | {"left": lefts[0], "streamer": streams[0]},  # alone
        inputs(4, config) | {"left": lefts[1]},
        inputs(5, config) | {"streamer": streams[1]},
        inputs(7, options(model, repetition_penalty=1.3)) | {"left": lefts[1]},
    ]
    answers, rows = all_at_once(engine, requests)
    assert rows == [1, ROWS]
    for k in (0, 1, 3):
        assert isinstance(answers[k], ClientLeftError)
    assert len(streams[0].tokens) <= 5 + 8
    assert torch.equal(answers[2], model.generate(**inputs(5, config)))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' is no cache of"),
        ({"assistant_early_exit": 1}, r"assistant_early_exit=...\) does not run on an engine"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "ask for contrastive_search, and the server gener"),
        ({"repetition_penalty": -3.0}, "`penalty` has to be a strictly positive float"),
        ({"guidance_scale": 2.0}, r"guidance_scale=...\) does not run on an engine"),
        ({"sequence_bias": {(9999,): 1.0}}, "9999"),
        ({"temperature": "hot", "do_sample": True}, "`temperature`"),
        ({"eos_token_id": 2**70}, "the options of generation: "),
        ({"max_length": "long", "max_new_tokens": None}, "the options of generation: "),
    ],
)
def test_what_generate_refuses_is_the_fault_of_the_request(models, given, problem):
    model, engine = models
    shared, request = SharedGeneration(engine, None, ROWS), inputs(4, options(model, **given))
    before = request["generation_config"].to_dict()
    with pytest.raises(RequestError, match=problem):
        shared.check(request, request["generation_config"], streams=False)
    assert request["generation_config"].to_dict() == before
    shared.end()


def test_a_check_changes_and_runs_nothing(models):
    model, engine = models
    shared, steps = SharedGeneration(engine, None, ROWS), len(engine.steps)
    for given in (
        {},
        {"do_sample": True, "top_p": 0.5},
        {"num_beams": 2},
        {"bad_words_ids": [[1]]},
    ):
        config = options(model, **given)
        before = config.to_dict()
        shared.check(inputs(4, config), config, streams=False)
        assert config.to_dict() == before and len(engine.steps) == steps
    with pytest.raises(RequestError, match="num_beams: beams have no tokens to stream"):
        shared.check(inputs(4, config), options(model, num_beams=2), streams=True)
    shared.end()


def test_a_model_with_an_encoder_is_refused_by_name(tmp_path):
    hf.T5Config(
        d_model=16, num_layers=1, architectures=["T5ForConditionalGeneration"]
    ).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EngineError, match="is a t5, and the server takes decoders"):
        load(ServeOptions(str(tmp_path)))
