"""Values that a model gets at the start, on one process: what is computed, kept and refused."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from autopar import auto_engine, deferred_init
from autopar.errors import AutoparError, EngineError
from autopar.runtime.deferred_parameters import DeferredParameter
from autopar.runtime.deferred_tensors import DeferredTensor
from autopar.runtime.sharded_values import ShardedParameter

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def deferred():
    with deferred_init():
        return net()


def on_meta(build=net):
    with torch.device("meta"):
        return build()


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def train(model, optimizer):
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("build", [deferred, on_meta])
@pytest.mark.parametrize("when", ["before", "after"])
def test_optimizers_hold_the_parameters_that_train(build, when):
    torch.manual_seed(0)
    eager = net()
    if build is on_meta:
        eager = on_meta().to_empty(device="cpu")
        torch.manual_seed(0)
        for module in list(eager):
            module.reset_parameters()
    torch.manual_seed(0)
    model = build()
    kept = list(model.parameters())
    optimizer = sgd(kept) if when == "before" else None
    engine, optimizer = auto_engine(model, optimizer, "1")
    parameters = list(engine.parameters())
    assert all(isinstance(p, DeferredParameter) for p in parameters)
    optimizer = optimizer or sgd(engine.parameters())
    train(eager, sgd(eager.parameters()))
    train(engine, optimizer)
    assert list(map(id, engine.parameters())) == list(map(id, parameters))
    for old, p, q in zip(kept, engine.parameters(), eager.parameters(), strict=True):
        assert type(p) is ShardedParameter
        torch.testing.assert_close(p.full_tensor(), q)
        torch.testing.assert_close(old * 1, p * 1)  # the object from before stands for it
    for a, b in zip(engine.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_state_that_an_optimizer_makes_at_once():
    torch.manual_seed(0)
    eager = net()
    train(eager, torch.optim.Adagrad(eager.parameters(), 0.01, initial_accumulator_value=0.1))
    torch.manual_seed(0)
    model = deferred()
    made = torch.optim.Adagrad(model.parameters(), 0.01, initial_accumulator_value=0.1)
    engine, optimizer = auto_engine(model, made, "1")
    train(engine, optimizer)
    for p, q in zip(engine.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q)
    model = on_meta()
    with pytest.raises(EngineError, match="'sum' of Adagrad is on the meta device"):
        auto_engine(model, torch.optim.Adagrad(model.parameters()), "1")


def test_the_engine_is_made_after_the_context():
    with deferred_init(), pytest.raises(EngineError, match="after the with block"):
        auto_engine(net(), None, "1")


def test_values_are_computed_with_example_inputs():
    torch.manual_seed(0)
    eager = net()
    torch.manual_seed(0)
    engine, _ = auto_engine(deferred(), None, "1", example_inputs=X)
    for p, q in zip(engine.parameters(), eager.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)


def test_a_transformers_model_on_the_meta_device_initializes_itself():
    model = on_meta(gpt2)
    reference = on_meta(gpt2).to_empty(device="cpu")
    reference.tie_weights()  # to_empty() makes two of one
    torch.manual_seed(0)
    reference.initialize_weights()
    torch.manual_seed(0)
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    engine, _ = auto_engine(model, None, "1", example_inputs=inputs)
    assert engine.lm_head.weight is engine.transformer.wte.weight
    for (name, p), q in zip(engine.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q), name


def test_a_first_step_that_fails_gives_the_model_back():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.fails = True

        def forward(self, x):
            if self.fails:
                raise ValueError("not yet")
            return self.layer(x)

    for build in (lambda: on_meta(Fails), lambda: _within_deferred_init(Fails)):
        model = build()
        before = model.layer.weight
        kind = type(before)
        engine, _ = auto_engine(model, None, "1")
        with pytest.raises(AutoparError, match="not yet"):
            engine(X)
        assert model.layer.weight is before and type(before) is kind
        assert before.shape == (4, 4)
        model.fails = False
        assert engine(X).shape == (2, 4)
        assert type(model.layer.weight) is ShardedParameter


def _within_deferred_init(build):
    with deferred_init():
        return build()


def test_tensors_of_modules_have_values():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.mask = torch.ones(4).cumsum(0)
            self.more = [torch.full((4,), 2.0)]
            self.register_buffer("shift", torch.arange(4.0), persistent=False)

        def forward(self, x):
            return self.layer(x) * self.mask + self.more[0] + self.shift

    torch.manual_seed(0)
    eager = Masked()
    torch.manual_seed(0)
    model = _within_deferred_init(Masked)
    assert isinstance(model.mask, DeferredTensor)
    engine, _ = auto_engine(model, None, "1")
    torch.testing.assert_close(engine(X), eager(X))


def test_nothing_reads_or_writes_values_before_there_are_any():
    engine, _ = auto_engine(deferred(), None, "1")
    p = engine[0].weight
    acts = (
        lambda: p + 1, lambda: p.data, lambda: p.detach().mul_(2), lambda: p.full_tensor(),
        lambda: p.to_local(), lambda: p[0], lambda: nn.init.zeros_(p), lambda: engine.state_dict(),
        lambda: copy.deepcopy(engine),
    )  # fmt: skip
    for act in acts:
        with pytest.raises(EngineError, match=r"0\.weight has no values before.*example_inputs"):
            act()
    assert "without values" in repr(p)


def test_modules_that_cannot_initialize_themselves_are_refused():
    class Partly(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("angles", torch.arange(4.0), persistent=False)

    def half_real():
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(torch.empty(4, 4, device="meta"))
        return model

    cases = {
        r"0\.in_proj_weight .*MultiheadAttention.*no reset_parameters": lambda: on_meta(
            lambda: nn.Sequential(nn.MultiheadAttention(4, 2))
        ),
        r"scale .*Partly.*does not compute": lambda: on_meta(Partly),
        r"angles .*Rotary.*no reset_parameters": lambda: on_meta(Rotary),
        r"weight .*but bias .*has values": half_real,
    }
    for message, build in cases.items():
        with pytest.raises(EngineError, match=f"{message}.*deferred_init.*weights="):
            auto_engine(build(), None, "1")


def test_a_module_without_values_cannot_come_later():
    engine, _ = auto_engine(net(), None, "1")
    engine(X)
    engine[2] = on_meta(lambda: nn.Linear(6, 3))
    with pytest.raises(EngineError, match=r"2\.weight came into the model after its first batch"):
        engine(X)


def test_a_checkpoint_of_tied_weights(tmp_path):
    reference = gpt2()
    state = reference.state_dict()
    del state["lm_head.weight"]  # as transformers saves it
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    for model in (on_meta(gpt2), gpt2()):
        engine, _ = auto_engine(model, None, "1", weights=tmp_path, example_inputs=inputs)
        assert engine.lm_head.weight is engine.transformer.wte.weight
        for p, q in zip(engine.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.full_tensor(), q)


def test_a_copy_of_an_engine_keeps_what_it_has_learned(tmp_path):
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    model = on_meta()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine, optimizer = auto_engine(model, optimizer, "1", weights=tmp_path)
    train(engine, optimizer)
    twin = copy.deepcopy(engine)
    for p, q in zip(twin.parameters(), engine.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())


def test_a_checkpoint_that_does_not_fit_is_refused_at_once(tmp_path):
    state = net().state_dict()
    state["3.weight"] = state.pop("2.weight")
    state["0.weight"] = state["0.weight"].half()
    state["0.bias"] = torch.zeros(7)
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(EngineError) as refused:
        auto_engine(model, None, "1", weights=file)
    message = str(refused.value)
    for part in (
        str(file),
        "1 missing in it: 2.weight",
        "1 unknown to the model: 3.weight",
        "2 of another shape or dtype: 0.weight is [6, 4] float16 there and [6, 4] float32 in",
        "0.bias is [7] float32 there and [6] float32 in the model",
    ):
        assert part in message
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(EngineError, match="is no checkpoint that autopar reads"):
        auto_engine(net(), None, "1", weights=tmp_path / "nothing")
