"""Deferred construction gives the values of construction on the CPU, to the bit."""

import copy
import pickle

import pytest
import timm
import torch
import transformers
from torch import nn

from autopar import deferred_init
from autopar.errors import EngineError
from autopar.runtime.deferred_operations import history
from autopar.runtime.deferred_tensors import DeferredTensor, digests

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class Drawn(nn.Module):
    """Parameters and buffers that are computed in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.shuffled = nn.Parameter(torch.randn(20, 3)[torch.randperm(20)])
        self.part = nn.Parameter(torch.zeros(6, 5))
        with torch.no_grad():
            self.part[1:3, 2:].normal_(0, 2)
            self.part.t()[0].uniform_()
        self.chosen = nn.Parameter(torch.multinomial(torch.rand(9), 4).float())
        self.own = nn.Parameter(torch.empty(40))
        nn.init.normal_(self.own, generator=torch.Generator().manual_seed(9))
        self.whole = nn.Parameter(torch.full((3,), 2) / 3)
        self.register_buffer("mask", torch.ones(4, 4).tril().bool())
        self.register_buffer("table", torch.outer(torch.arange(5), 1 / torch.arange(1, 4)).cos())
        self.scale = torch.rand(()).item()
        self.rates = [x.item() for x in torch.linspace(0, 0.1, 3)]
        self.lists = torch.linspace(0, 1, 4).split(2)[1].tolist()
        self.numpy = torch.rand(2).numpy().tolist()


def initialized() -> nn.Module:
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    nn.init.orthogonal_(module[0].weight)
    nn.init.sparse_(module[1].weight, 0.3)
    nn.init.trunc_normal_(module[2].weight)
    nn.init.eye_(module[3].weight)
    nn.init.kaiming_normal_(module[4].weight)
    return module


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.Linear(256, 8)),
    "transformer": lambda: nn.Transformer(32, 4, 1, 1, batch_first=True),
    "lstm": lambda: nn.LSTM(8, 16, 2),
    "embedding": lambda: nn.Embedding(10, 4, padding_idx=2),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "initializers": initialized,
    "drawn": Drawn,
    "other dtype": lambda: nn.Linear(8, 8).double().half(),
    "copies": lambda: nn.ModuleList(copy.deepcopy(nn.Linear(4, 4)) for _ in range(2)),
    "ViT": lambda: timm.create_model("vit_tiny_patch16_224", depth=2),
    "Swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(1, 2), drop_path_rate=0.2
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=90, bos_token_id=0, eos_token_id=0
        )
    ),
    "Llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=32, vocab_size=90, **SMALL)
    ),
    "BERT": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(hidden_size=32, vocab_size=90, **SMALL)
    ),
    "T5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, num_layers=2, d_ff=64, num_heads=2, vocab_size=90)
    ),
}


def real(x):
    return x.compute() if isinstance(x, DeferredTensor) else x


def assert_equal(deferred, eager):
    for kind in ("named_parameters", "named_buffers"):
        pairs = [list(getattr(m, kind)(remove_duplicate=False)) for m in (deferred, eager)]
        assert [name for name, _ in pairs[0]] == [name for name, _ in pairs[1]]
        for (name, a), (_, b) in zip(*pairs, strict=True):
            assert isinstance(a, nn.Parameter) == isinstance(b, nn.Parameter), name
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), name
            assert a.requires_grad == b.requires_grad, name
            assert torch.equal(real(a), b), name


def built(build):
    """A model built eagerly and a deferred one, from the same seed."""
    torch.manual_seed(3)
    eager = build()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with deferred_init():
        deferred = build()
    assert torch.equal(torch.get_rng_state(), state)  # later draws are those after the eager one
    return deferred, eager


@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_eager_construction(name):
    deferred, eager = built(MODELS[name])
    assert any(isinstance(p, DeferredTensor) for p in deferred.parameters())
    state = torch.get_rng_state()
    assert_equal(deferred, eager)
    assert torch.equal(torch.get_rng_state(), state)  # values are drawn beside the generator
    for key in ("scale", "rates", "lists", "numpy"):
        assert getattr(deferred, key, None) == getattr(eager, key, None)


def test_nothing_large_is_allocated():
    with deferred_init():
        large = nn.ModuleList(nn.Embedding(10**6, 10**7, _weight=torch.zeros(10**6, 10**7))
                              for _ in range(2))  # fmt: skip
    assert large[0].weight.shape == (10**6, 10**7)  # 40 TB


def test_parameters_are_drawn_in_any_order():
    deferred, eager = built(MODELS["Llama"])
    pairs = list(zip(deferred.parameters(), eager.parameters(), strict=True))
    for a, b in reversed(pairs):
        assert torch.equal(a.compute(), b)


def test_ties_and_flags_are_kept():
    deferred, _ = built(MODELS["GPT-2"])
    assert deferred.lm_head.weight is deferred.transformer.wte.weight
    with deferred_init():
        frozen = nn.Linear(2, 2).requires_grad_(False)
    assert not frozen.weight.requires_grad
    assert not frozen.weight.compute().requires_grad


def test_a_value_that_is_overwritten_is_not_drawn():
    with deferred_init():
        x = torch.rand(20).mul_(2)
        x.normal_()
        x.add_(1)
    assert [op.func.__name__ for op in history(x._deferred.memory.last)] == [
        "rand.default", "normal_.default", "add_.Tensor",
    ]  # fmt: skip
    part = DeferredTensor.of(x._deferred)
    part[:3].normal_()  # the rest stays
    assert len(history(part._deferred.memory.last)) == 4


def test_what_happens_after_the_context_counts_too():
    def change(model):
        twin = copy.deepcopy(model)
        model[0].weight.data.mul_(3)
        model[0].bias.data = torch.arange(3.0)
        with torch.no_grad():
            model[1].weight.uniform_()
            model[1].bias += model[0].bias.sum()
        twin.to(torch.float64)
        return nn.ModuleList((model, twin))

    torch.manual_seed(0)
    eager = change(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    torch.manual_seed(0)
    with deferred_init():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    deferred = change(model)
    assert isinstance(deferred[1][0].weight, DeferredTensor)
    assert_equal(deferred, eager)
    assert pickle.loads(pickle.dumps(deferred[1][0].weight)).equal(eager[1][0].weight)
    assert deferred[0][0].weight.norm().item() == eager[0][0].weight.norm().item()
    assert repr(model[0].weight) == "deferred Parameter of shape [3, 3] and torch.float32"


def test_lazy_modules_wait_for_the_first_batch():
    with deferred_init():
        lazy = nn.LazyLinear(3)
    assert isinstance(lazy.weight, nn.UninitializedParameter)


def test_digests_tell_values_apart():
    def draw(seed, scale):
        torch.manual_seed(seed)
        with deferred_init():
            x = torch.rand(4)
            return x.mul_(torch.tensor([scale]))._deferred

    same, again, other_seed, other_scale = digests([draw(*a) for a in ((1, 2.0), (1, 2.0), (2, 2.0), (1, 3.0))])  # fmt: skip # noqa: E501
    assert same == again
    assert len({same, other_seed, other_scale}) == 3


def test_refusals():
    large = torch.zeros(2**20)
    with deferred_init():
        changed = torch.zeros(2**20) + large
        with pytest.raises(EngineError, match=r"on xla:0.*leave the device out"):
            torch.zeros(3, device="xla:0")
        with pytest.raises(EngineError, match=r"in place to \[3, 2\]"):
            torch.zeros(2, 3).t_()
        with pytest.raises(EngineError, match=r"other memory or another shape.*make a new"):
            torch.zeros(3).set_(torch.ones(4))
    large += 1
    with pytest.raises(EngineError, match=r"\[1048576\].*changed in place.*x\.clone"):
        changed.compute()


def test_an_operator_that_draws_without_saying_so_is_refused():
    @torch.library.custom_op("autopar_test::draws", mutates_args=())
    def draws(x: torch.Tensor) -> torch.Tensor:
        return torch.rand(x.shape)

    draws.register_fake(torch.empty_like)
    with deferred_init():
        x = draws(torch.zeros(3))
    with pytest.raises(EngineError, match="draws random numbers, but torch does not mark it"):
        x.compute()
