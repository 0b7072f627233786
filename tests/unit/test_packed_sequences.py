"""Packed sequences around recurrent layers are captured as padded ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from autopar import ColoTracer
from autopar.errors import CaptureError

LAYERS = {
    "lstm": (nn.LSTM, {}),
    "lstm of two layers": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm with projection": (nn.LSTM, {"proj_size": 3, "bidirectional": True}),
    "lstm without bias": (nn.LSTM, {"bias": False}),
    "gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "tanh": (nn.RNN, {"bias": False}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


class Tagger(nn.Module):
    """Rows through an activation, a layer with a given state, and the final states."""

    def __init__(self, layer, options, *, batch_first, is_sorted, total):
        super().__init__()
        self.batch_first, self.is_sorted, self.total = batch_first, is_sorted, total
        self.rnn = layer(8, 4, batch_first=batch_first, **options)
        shape = self.rnn.num_layers * (1 + self.rnn.bidirectional), 4, 4
        hidden = nn.Parameter(torch.randn(*shape[:2], self.rnn.proj_size or 4) * 0.1)
        cells = [nn.Parameter(torch.randn(shape) * 0.1)] * (layer is nn.LSTM)
        self.states = nn.ParameterList([hidden, *cells])

    def forward(self, x, lengths):
        p = pack_padded_sequence(x, lengths, self.batch_first, self.is_sorted)
        rows = F.gelu(p.data)
        p = PackedSequence(rows, p.batch_sizes, p.sorted_indices, p.unsorted_indices)
        given = tuple(self.states) if len(self.states) > 1 else self.states[0]
        result, final = self.rnn(p, given)
        result, ends = pad_packed_sequence(result, self.batch_first, -0.5, self.total)
        finals = torch.cat([*final] if isinstance(final, tuple) else [final], -1)
        return result.cos().sum() + finals.sin().sum() + (ends * result.sum()).sum()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("total", [None, 7, 9])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_a_capture_serves_other_lengths(name, total, is_sorted):
    torch.manual_seed(0)
    layer, options = LAYERS[name]
    batch_first = is_sorted
    model = Tagger(layer, options, batch_first=batch_first, is_sorted=is_sorted, total=total)
    model = model.double()
    x = torch.randn(4, 7, 8, dtype=torch.float64)
    x = (x if batch_first else x.transpose(0, 1)).requires_grad_()
    batches = [[6, 5, 3, 1], [6, 6, 6, 2]] if is_sorted else [[2, 6, 3, 5], [1, 1, 6, 2]]
    graph = ColoTracer().trace(model, (x, torch.tensor(batches[0])))
    assert len(graph.guards) == 1 + (total is None)  # valid lengths; the longest one
    leaves = [x, *model.parameters()]
    for lengths in map(torch.tensor, batches):
        results = [call(x, lengths) for call in (model, graph.bind(model))]
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)
        expected, actual = (torch.autograd.grad(y, leaves) for y in results)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_total_length_that_may_be_too_short_is_guarded():
    model = Tagger(nn.GRU, {}, batch_first=True, is_sorted=False, total=6).double()
    x = torch.randn(4, 7, 8, dtype=torch.float64)
    graph = ColoTracer().trace(model, (x, torch.tensor([6, 2, 3, 1])))
    _, guard = graph.guards
    assert guard.holds({1: torch.tensor([1, 5, 3, 1])}, {})
    assert not guard.holds({1: torch.tensor([1, 7, 3, 1])}, {})
    with pytest.raises(CaptureError, match="total_length=6 and max sequence length"):
        ColoTracer().trace(model, (x, torch.tensor([7, 2, 3, 1])))


@pytest.mark.parametrize("lengths", [[3, 5, 2, 1], [7, 8, 1, 1], [7, 3, 2, 0]])
def test_lengths_that_torch_refuses(lengths):
    model = Tagger(nn.GRU, {}, batch_first=True, is_sorted=True, total=7).double()
    x = torch.randn(4, 7, 8, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError)):
        model(x, torch.tensor(lengths))
    with pytest.raises(CaptureError, match=r"1 to 7, and decrease where enforce_sorted=True"):
        ColoTracer().trace(model, (x, torch.tensor(lengths)))
    (guard,) = ColoTracer().trace(model, (x, torch.tensor([7, 3, 2, 2]))).guards
    assert not guard.holds({1: torch.tensor(lengths)}, {})


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.data.sum(),
        lambda p: p.data * 2,
        lambda p: p.data[0],
        lambda p: F.cross_entropy(p.data, p.data),
        lambda p: p.batch_sizes.sum(),
        lambda p: p.batch_sizes[1],
        lambda p: torch.cat([p.data, p.data]),
        lambda p: p.data.shape,
        lambda p: p.to(torch.float32),
        lambda p: p,
    ],
)
def test_other_uses_of_packed_rows_are_refused(use):
    class Uses(nn.Module):
        def forward(self, x, lengths):
            return use(pack_padded_sequence(x, lengths, enforce_sorted=False))

    with pytest.raises(CaptureError, match=r"(?s)test_packed_sequences\.py:\d+.*packed sequences"):
        ColoTracer().trace(Uses(), (torch.randn(5, 2, 3), torch.tensor([4, 5])))
