"""Results as loops use them: gradients of inputs, other methods, states carried over batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.scripts.case import Found, Wrap, case
from tests.scripts.helpers import Model, Run, apart, close, data, fit, gap, pair, tokens

# splits that every mesh of the cases has room for
SPLIT_ROWS = "S0R"


def _adam(q: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(q.parameters(), lr=1e-3)


@case("mmgeneration#286, pytorch#22436")
def generator_and_discriminator(wrap: Wrap) -> Found:
    """Two models and two optimizers; the generator's gradient goes through the discriminator."""
    makers = pair(wrap, nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32)), _adam)
    judges = pair(
        wrap, nn.Sequential(nn.Linear(32, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)), _adam
    )
    bce = F.binary_cross_entropy_with_logits
    one, zero = torch.ones(16, 1), torch.zeros(16, 1)
    for step in range(4):
        z, real = data(step, 16, 8), data(step + 50, 16, 32)
        for maker, judge in zip(makers, judges, strict=True):
            fake = maker.model(z)
            made = fake.detach()
            judge.step(lambda d, real=real, made=made: bce(d(real), one) + bce(d(made), zero))
            maker.step(lambda _, judge=judge, fake=fake: bce(judge.model(fake), one))
    return {
        "generator": gap(makers[1].model, makers[0].model),
        "discriminator": gap(judges[1].model, judges[0].model),
    }


@case("adversarial training, saliency")
def gradient_of_the_input(wrap: Wrap) -> Found:
    """The gradient of the loss by the input, on a model that has run without it before."""
    runs = pair(wrap, nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)))
    labels = torch.arange(16) % 4
    found: Found = {}
    for step in range(3):
        x, grads = data(step, 16, 32), []
        for run in runs:
            F.cross_entropy(run.model(x), labels).backward()
            run.optimizer.zero_grad()
            changed = x.clone().requires_grad_()
            F.cross_entropy(run.model(changed), labels).backward()
            if changed.grad is None:
                return {"the input has a gradient": False}
            grads.append(changed.grad)
            worse = (changed + 0.1 * changed.grad.sign()).detach()
            run.step(lambda q, worse=worse: F.cross_entropy(q(worse), labels))
        found[f"gradient of the input at step {step}"] = apart(*grads)
    return found | {"parameters": gap(runs[1].model, runs[0].model)}


class AutoEncoder(nn.Module):
    """Has a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(32, 16), nn.Linear(16, 32)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.enc(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.dec(self.encode(x)), x)


@case("pytorch#109385, pytorch#14616", may_refuse=True)
def other_method(wrap: Wrap) -> Found:
    """A method that is not forward (encode, features), before the first batch and after."""
    alone, other = pair(wrap, AutoEncoder(), constraints={"enc.weight": SPLIT_ROWS})
    x = data(0, 16, 32)
    before = apart(other.model.encode(x), alone.model.encode(x))
    other.model(x).backward()
    return {
        "before the first batch": before,
        "after": apart(other.model.encode(x), alone.model.encode(x)),
    }


@case("transformers#30228", may_refuse=True, dtype=torch.float32)
def generate_after_training(wrap: Wrap) -> Found:
    """`generate()` after some steps of training gives the tokens of one process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=96, n_positions=64,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=95,
    )  # fmt: skip
    runs = pair(wrap, GPT2LMHeadModel(config), lambda q: torch.optim.AdamW(q.parameters(), lr=1e-2))
    ids = tokens(1, 95, 4, 16)
    for run in runs:
        for _ in range(3):
            run.step(lambda q: q(input_ids=ids, labels=ids).loss)
        run.model.eval()
    alone, other = (
        run.model.generate(ids[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
        for run in runs
    )
    return {"tokens": torch.equal(alone, other)}


def _language_model(family: str) -> Any:
    """A small model of transformers, with the settings that it has by default."""
    import transformers as hf

    common = {"vocab_size": 96, "eos_token_id": 95, "pad_token_id": 0}
    if family == "gpt2":
        common |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0}
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=32, n_head=4, **common))
    if family == "llama":
        common |= {"hidden_size": 32, "intermediate_size": 64, "bos_token_id": 1}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**heads, **common))
    common |= {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    common |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**common))


def _cached(cache: Any) -> list[torch.Tensor]:
    """The keys and values of a cache."""
    if hasattr(cache, "self_attention_cache"):
        return _cached(cache.self_attention_cache) + _cached(cache.cross_attention_cache)
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


@case("transformers: Trainer.evaluate", family=("gpt2", "llama", "t5"))
def evaluate_with_the_default_configuration(wrap: Wrap, family: str) -> Found:
    """Losses, logits and key-value caches of evaluation, before, between and after steps of
    training; then `generate`."""
    runs = pair(wrap, _language_model(family))
    ids = tokens(1, 90, 4, 12)
    found: Found = {}
    for when in ("first", "after training", "at the end"):
        for run in runs:
            run.model.eval()
        with torch.no_grad():
            alone, other = (run.model(input_ids=ids, labels=ids) for run in runs)
        caches = [_cached(out.past_key_values) for out in (alone, other)]
        found[f"{when}: loss"] = close(alone.loss, other.loss)  # transformers' are in float32
        found[f"{when}: logits"] = apart(alone.logits, other.logits)
        found[f"{when}: class"] = type(alone.past_key_values) is type(other.past_key_values)
        found[f"{when}: cache"] = max(map(apart, *caches), default=1.0)
        for run in runs:
            run.model.train()
        fit(runs, lambda q, step: q(input_ids=ids, labels=ids).loss, steps=2)
        found[f"{when}: parameters"] = gap(runs[0].model, runs[1].model)
    for run in runs:
        run.model.eval()
    alone, other = (run.model.generate(ids[:, :4], max_new_tokens=8, num_beams=2) for run in runs)
    return found | {"tokens": torch.equal(alone, other)}


class RecurrentLM(nn.Module):
    """Takes and returns the state of its LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 32, num_layers=2, batch_first=True)
        self.out = nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        h, state = self.rnn(self.emb(ids), state)
        return self.out(h), state


@case("truncated backpropagation through time")
def hidden_state_carried(wrap: Wrap) -> Found:
    """The hidden state goes from batch to batch, detached; gradients are clipped."""
    runs = pair(wrap, RecurrentLM(), lambda q: torch.optim.SGD(q.parameters(), lr=0.5))
    states: list[Any] = [None, None]
    for step in range(4):
        ids = tokens(step, 50, 8, 7)
        states = [_carry(run, ids, state) for run, state in zip(runs, states, strict=True)]
    return {
        "parameters": gap(runs[1].model, runs[0].model),
        "state": max(apart(a, b) for a, b in zip(*states, strict=True)),
    }


def _carry(run: Run, ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, ...]:
    run.optimizer.zero_grad()
    model: Model = run.model
    logits, after = model(ids[:, :-1], state)
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    run.optimizer.step()
    return tuple(t.detach() for t in after)
