"""FlexAttention is captured as products, with the values of torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
    or_masks,
)

from autopar.errors import CaptureError
from autopar.tracer import ColoTracer

torch.manual_seed(0)
HEADS, TOKENS, WIDTH = 4, 12, 8
X = torch.randn(2, TOKENS, HEADS * WIDTH, dtype=torch.float64)
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 2 + [1] * 4 + [2] * 6])


def causal(b, h, q, k):
    return q >= k


def window(b, h, q, k):
    return (q >= k) & (q - k < 4)


def nothing_before(b, h, q, k):
    return k > q


class Model(nn.Module):
    """Attention whose mask and scores are functions of positions."""

    def __init__(self, mask=None, score=None, keys=HEADS, compiled=False, **options):
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 2 * keys * WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.mask, self.score, self.keys, self.options = mask, score, keys, options
        self.attention = torch.compile(flex_attention) if compiled else flex_attention

    def forward(self, x, documents):
        def same_document(b, h, q, k):
            return (documents[b, q] == documents[b, k]) & (q >= k)

        def biased(score, b, h, q, k):
            return torch.tanh(score / 5) * 5 + self.bias[h, q, k] * 2.0 ** -(h + 1)

        mask = same_document if self.mask == "documents" else self.mask
        score = biased if self.score == "biased" else self.score
        q = self.q(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        k, v = self.k(x).unflatten(-1, (2, self.keys, WIDTH)).permute(2, 0, 3, 1, 4)
        blocks = None if mask is None else create_block_mask(mask, 2, None, TOKENS, TOKENS, "cpu")
        out = self.attention(q, k, v, score, blocks, enable_gqa=self.keys < HEADS, **self.options)
        if isinstance(out, tuple):
            out = out[0] + out[1].lse.unsqueeze(-1)
        return out.transpose(1, 2).flatten(-2)


CASES = {
    "plain": {},
    "causal": {"mask": causal},
    "window, grouped heads": {"mask": window, "keys": 2},
    "documents": {"mask": "documents"},
    "scores": {"score": "biased"},
    "scores and documents, grouped heads": {"score": "biased", "mask": "documents", "keys": 2},
    "queries that see nothing": {"mask": nothing_before, "score": "biased"},
    "log-sum-exp": {"mask": causal, "return_aux": AuxRequest(lse=True), "scale": 0.3},
    "compiled": {"mask": causal, "compiled": True},
}


@pytest.mark.parametrize("name", list(CASES))
def test_values_are_torchs(name, monkeypatch):
    options = CASES[name]
    torch.manual_seed(1)
    model = Model(**options).double()
    graph = ColoTracer().trace(model, (X, DOCUMENTS))
    # torch has no backward on CPUs, and compiles for each shape
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    model.attention = flex_attention
    with torch.no_grad():
        expected = model(X, DOCUMENTS)
    found = graph.bind(model)(X, DOCUMENTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["scores and documents, grouped heads", "log-sum-exp"])
def test_gradients_are_those_of_differences(name):
    torch.manual_seed(1)
    model = Model(**CASES[name]).double()
    bound = ColoTracer().trace(model, (X, DOCUMENTS)).bind(model)
    weight, direction = model.k.weight, torch.randn(model.k.weight.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(bound(X, DOCUMENTS).sin().sum(), weight)
    step = 1e-6
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight += sign * step * direction
            ends.append(bound(X, DOCUMENTS).sin().sum())
            weight -= sign * step * direction
    slope = (ends[0] - ends[1]) / (2 * step)
    assert math.isclose(slope, (gradient * direction).sum(), rel_tol=1e-7)


def of_a_row(b, h, q, k):
    return q.cumsum(-1) >= k


def of_part(score, b, h, q, k):
    return score + DOCUMENTS[b][q]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": of_a_row}, "of_a_row of flex_attention uses 'cumsum'"),
        ({"score": lambda z, b, h, q, k: z / z.abs().max()}, "uses 'max'"),
        ({"score": lambda z, b, h, q, k: z - z.min(-1)[0]}, "uses 'min'"),
        ({"score": of_part}, "of_part of flex_attention uses 'getitem'.*all of their dims at once"),
    ],
)
def test_what_is_not_pointwise_is_refused(options, words):
    with pytest.raises(CaptureError, match=words):
        ColoTracer().trace(Model(**options).double(), (X, DOCUMENTS))


class Masked(nn.Module):
    """Attention whose block mask is made at construction (`early`) or in the forward."""

    def __init__(self, make, early=False, score=None):
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 64)
        self.register_buffer("documents", DOCUMENTS)
        self.make, self.score, self.early = make, score, early
        self.blocks = make(self) if early else None

    def forward(self, x, dense=None):
        q = self.q(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        k, v = self.k(x).unflatten(-1, (2, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        if dense is not None:
            out = F.scaled_dot_product_attention(q, k, v, dense)
        else:
            blocks = self.blocks if self.early else self.make(self)
            out = flex_attention(q, k, v, self.score, blocks)
        return out.sin().sum()


def captured(model, dense):
    """The operators; the loss and gradients are those of a dense mask."""
    graph = ColoTracer().trace(model, (X,))
    bound = graph.bind(model)
    expected, found = model(X, dense), bound(X)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, weights),
        torch.autograd.grad(expected, weights),
        atol=1e-12,
        rtol=0,
    )
    return [str(n.target) for n in graph.gm.graph.nodes if n.op == "call_function"]


def dense_of(function):
    """A mask of all positions, an element at a time."""
    tensors = [list(map(torch.tensor, range(n))) for n in (2, HEADS, TOKENS, TOKENS)]
    rows = [
        [[[bool(function(b, h, q, k)) for k in tensors[3]] for q in tensors[2]] for h in tensors[1]]
        for b in tensors[0]
    ]
    return torch.tensor(rows)


def by_kinds(kinds, size, function=None, full=True):
    """A block mask of blocks that are empty (0), partial (1) or full (2), and the dense mask."""

    def listed(chosen):
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1).int(), order.int()

    def make(model):
        lists = listed(kinds == 1) + (listed(kinds == 2) if full else ())
        return BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=size, mask_mod=function, seq_lengths=(TOKENS, TOKENS)
        )

    at = kinds.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[..., :TOKENS, :TOKENS]
    return make, (at == 2) & full | (at == 1) & dense_of(function or noop_mask)


def kinds_of(samples, heads, size):
    counts = (-(-TOKENS // n) for n in size)
    return torch.randint(3, (samples, heads, *counts), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
@pytest.mark.parametrize(
    ("function", "full"), [(None, False), (None, True), (causal, False), (window, True)]
)
@pytest.mark.parametrize("shape", [(1, 1), (2, HEADS)])
def test_blocks_are_part_of_the_mask(function, full, size, shape, early):
    make, dense = by_kinds(kinds_of(*shape, size), size, function, full)
    operators = captured(Masked(make, early).double(), dense)
    assert any("index_select" in name for name in operators)


def same_document(b, h, q, k):
    return (DOCUMENTS[b, q] == DOCUMENTS[b, k]) & (q >= k)


@pytest.mark.parametrize("function", [causal, window, same_document])
def test_blocks_that_follow_from_the_function_are_left_out(function):
    def derived(model):
        samples = 2 if function is same_document else None
        return create_block_mask(function, samples, None, TOKENS, TOKENS, "cpu", BLOCK_SIZE=5)

    def wider(model):  # the function decides in every block
        return by_kinds(torch.ones(2, 1, 3, 3), (5, 5), function)[0](model)

    models = [Masked(derived), Masked(derived, early=True), Masked(wider, early=True)]
    found = [captured(m.double(), dense_of(function)) for m in models]
    assert found[0] == found[1] == found[2]
    assert not any("scatter" in name or "index_select" in name for name in found[0])


def test_functions_of_buffers_are_captured_with_their_blocks():
    def make(model):
        def function(b, h, q, k):
            return model.documents[b, q] == model.documents[b, k]

        return create_block_mask(function, 2, None, TOKENS, TOKENS, "cpu", BLOCK_SIZE=4)

    captured(
        Masked(make, early=True).double(),
        dense_of(lambda b, h, q, k: DOCUMENTS[b, q] == DOCUMENTS[b, k]),
    )


@pytest.mark.parametrize("early", [True, False])
def test_another_function_or_fewer_samples_keep_the_blocks(early):
    def renamed(model):
        blocks = create_block_mask(causal, None, None, TOKENS, TOKENS, "cpu", BLOCK_SIZE=4)
        blocks.mask_mod = nothing_before
        return blocks

    def of_one_sample(model):
        return create_block_mask(same_document, 1, None, TOKENS, TOKENS, "cpu", BLOCK_SIZE=2)

    i = torch.arange(TOKENS)
    block = i.unsqueeze(-1) // 4, i // 4
    dense = (block[0] > block[1]) | (block[0] == block[1]) & dense_of(nothing_before)
    captured(Masked(renamed, early).double(), dense)

    first = dense_of(same_document)[0, 0].view(6, 2, 6, 2)  # as torch's kernels see the second one
    full, seen = (
        x.repeat_interleave(2, 0).repeat_interleave(2, 1)
        for x in (first.all(-1).all(1), first.any(-1).any(1))
    )
    captured(Masked(of_one_sample, early).double(), full | seen & dense_of(same_document))


def near(b, h, q, k):
    return (
        ((q // 5 - k // 5).abs() <= 1)
        & (abs(q % 3 - k % 3) <= 1)
        & (5 - q < k**2 / 2 + 40 // (k + 1))
    )


def late(b, h, q, k):
    return (k < torch.tensor(3)) | (7 % (k + 1) > 2) | (q >> 1 > k)


@pytest.mark.parametrize(
    "function",
    [and_masks(causal, near), or_masks(causal, near), and_masks(), or_masks(late, causal), late],
)
def test_functions_that_make_scalars_and_divide(function):
    def make(model):
        return create_block_mask(function, None, None, TOKENS, TOKENS, "cpu", BLOCK_SIZE=4)

    captured(Masked(make).double(), dense_of(function))


def unchanged(score, b, h, q, k):
    return score


def doubled(score, b, h, q, k):
    return score.mul_(2)


@pytest.mark.parametrize("score", [unchanged, doubled])
def test_scores_that_are_returned_as_they_are_keep_attention_whole(score):
    def make(model):
        return create_block_mask(causal, None, None, TOKENS, TOKENS, "cpu")

    model = Masked(make, score=score).double()
    operators = [str(n.target) for n in ColoTracer().trace(model, (X,)).gm.graph.nodes]
    whole = any("scaled_dot_product_attention" in name for name in operators)
    assert whole == (score is unchanged) and not any("zeros" in name for name in operators)
    if whole:
        captured(model, dense_of(causal))


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_transformers_models_have_the_values_of_their_dense_masks(kind):
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 41}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"sliding_window": 5} if kind == "Mistral" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **window, use_cache=False)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double()
    ids = torch.randint(3, 41, (2, TOKENS))
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[0, :3] = 0
    arguments = (ids, padding) if kind == "Llama" else (ids,)
    model.set_attn_implementation("sdpa")
    expected = model(*arguments).logits[padding.bool()]
    model.set_attn_implementation("flex_attention")
    graph = ColoTracer().trace(model, arguments)
    found = graph.bind(model)(*arguments).logits[padding.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = list(model.parameters())
    gradients = (torch.autograd.grad(y.sin().sum(), weights) for y in (found, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    operators = [str(n.target) for n in graph.gm.graph.nodes]
    assert any("attention" in name for name in operators)  # scores were returned as they are
