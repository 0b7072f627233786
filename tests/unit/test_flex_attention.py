"""FlexAttention is captured as products, with the values of torch's own."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

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
        ({"score": of_part}, "of_part of flex_attention uses 'getitem'.*all of their dims at once"),
    ],
)
def test_what_is_not_pointwise_is_refused(options, words):
    with pytest.raises(CaptureError, match=words):
        ColoTracer().trace(Model(**options).double(), (X, DOCUMENTS))
