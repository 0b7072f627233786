"""Arguments that the forward writes: inputs are written for the caller, others are refused."""

import copy

import pytest
import torch
from torch import nn

from autopar import ColoTracer, auto_engine
from autopar.comm import world
from autopar.errors import CaptureError


class Writes(nn.Module):
    """A forward that is a function of (layer, *arguments)."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, *arguments):
        return self.function(self.layer, *arguments)


def clamps(layer, x):
    x.clamp_(-0.1, 0.1)
    return layer(x)


def fills_a_list(layer, x, kept):
    kept.append(layer(x))
    return layer(x)


def fills_a_dict(layer, x, kept):
    kept["h"] = layer(x)
    return layer(x)


TRAINED = torch.ones(3, 4, requires_grad=True)


def test_inputs_are_written_for_the_caller():
    plain = Writes(clamps)
    engine, _ = auto_engine(copy.deepcopy(plain), None, "1")
    try:
        for step in range(2):
            found = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            expected = found.clone()
            torch.testing.assert_close(engine(found), plain(expected))
            assert torch.equal(found, expected) and found.abs().max() <= 0.1
    finally:
        world.stop()


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (fills_a_list, (torch.ones(3, 4), []), r"1 value\(s\) into a list or dict.*return them"),
        (fills_a_dict, (torch.ones(3, 4), {}), r"1 value\(s\) into a list or dict.*return them"),
        (clamps, (TRAINED,), "requires grad is being used in an in-place operation"),
    ],
    ids=["list", "dict", "an input that requires grad"],
)
def test_refused(function, arguments, words):
    with pytest.raises(CaptureError, match=words):
        ColoTracer().trace(Writes(function), arguments)
