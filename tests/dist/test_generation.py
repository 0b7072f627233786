"""Engines generate the tokens of one process."""

import pytest
import torch

from tests.dist import generation_tasks as tasks

pytestmark = pytest.mark.dist

# of logits, which transformers rounds to float32
CLOSE = 1e-5


@pytest.mark.sample(0.5)
@pytest.mark.parametrize(
    ("family", "cache"),
    [("llama", "RS0RR"), ("llama", "RRS0R"), ("gpt2", None), ("mistral", "S0RRR")],
)
def test_tokens_of_two_ranks(pair, family, cache):
    for answer in pair.run(tasks.same_tokens, "2", family, cache):
        assert max(answer["gaps"].values()) < CLOSE
        assert answer["programs"] <= 6  # of a prompt and of a token: two batches, with padding
        assert answer["forwards"]
        assert answer["copies"] == 0  # caches are written in place
        if cache == "RRS0R":
            assert answer["attention"] == "keys"
        assert answer["caches"] == {cache} if cache else "RRRR" not in answer["caches"]


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_of_a_mesh(pool, family):
    """Two axes, for prompts with padding: two ranks have the other ways and batches."""
    ways, batches = ("sampling", "beams"), ((3, 7, 6, 5),)
    for answer in pool.run(tasks.same_tokens, "2x2", family, None, ways, batches):
        assert max(answer["gaps"].values()) < CLOSE
        assert answer["programs"] == 4


@pytest.mark.sample(0.34)
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_tokens_of_models_with_an_encoder(pair, family):
    for answer in pair.run(tasks.same_tokens_with_encoder, "2", family):
        assert max(answer["gaps"].values()) < CLOSE
        assert answer["caches"] == {"RS0RR"}  # of what was encoded, too
        assert answer["split"] >= ({"encoder", "decoder"} if family == "t5" else {"model"})
        assert answer["programs"] == 4


def test_prompts_of_many_lengths_share_programs(pair):
    for answer in pair.run(tasks.prompts_of_many_lengths, "2"):
        assert answer["gap"] < CLOSE
        assert answer["goes on"]
        assert answer["programs"] <= 5


@pytest.mark.sample(0.25)
@pytest.mark.parametrize(
    ("scheme", "sharded"),
    [("int8", True), ("int8-dynamic", False), ("float8", True), ("int4", False)],
)
def test_rounded_weights(pair, scheme, sharded):
    for answer in pair.run(tasks.rounded_weights, "2", scheme, sharded):
        assert answer["gap"] < CLOSE
        assert answer["dtypes"] == {torch.int8 if scheme.startswith("int8") else torch.uint8}
        assert answer["held"] == answer["predicted"]


def test_refusals_name_what_and_what_to_do(pair):
    for messages in pair.run(tasks.refusals, "2"):
        assert "past_key_values is a DynamicCache" in messages["a growing cache"]
        assert "cache_implementation='quantized'" in messages["a quantized cache"]
        assert "assistant_model=...) does not run on an engine" in messages["an assistant"]
        for name in ("first layers", "first layers, configured"):
            assert "assistant_early_exit=...) does not run on an engine" in messages[name]
