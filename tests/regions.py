"""Programs whose regions run in slices, for tests."""

from __future__ import annotations

import copy
import functools
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from autopar import ClusterInfo, autoplan
from autopar.comm.groups import planning_groups
from autopar.passes.apply_sharding import apply_sharding
from autopar.passes.lower import lower, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.passes.regions import Growth, as_model_graph, may_split
from autopar.passes.split_regions import calls_in_order, splittable
from autopar.plan_records import TimeSplit
from autopar.runtime.program import bind
from autopar.schedule.program import eager_schedule
from autopar.schedule.simulate import peak_bytes
from autopar.testing.live_memory import LiveMemory
from benchmarks.time_split_models import Head, PairStack, UNet, ViT
from tests.models import LanguageModel


class Llama(nn.Module):
    """Hugging Face Llama with its loss in the model's precision."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=37, max_position_embeddings=16, use_cache=False,
            )
        )  # fmt: skip

    def forward(self, x, target):
        logits = self.llama(input_ids=x).logits
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class Words(nn.Module):
    """GPT-2 without dropout, or with it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = LanguageModel(dropout=dropout, vocabulary=37)

    def forward(self, x, target):
        return self.model(x, target)


def _words() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (torch.randint(0, 37, (2, 12)) for _ in "xy")
    y[0, :3] = -100
    return x, y


def _like(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape).double(), torch.randn(shape).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "gpt2": (Words, _words),
    "dropout": (functools.partial(Words, 0.3), _words),
    "llama": (Llama, _words),
    "pairs": (lambda: PairStack(8, 2), lambda: _like((6, 6, 8))),
    "unet": (lambda: UNet(8), lambda: _like((1, 3, 8, 8))),
    "vit": (
        lambda: ViT(16, 2, 1),
        lambda: (torch.randn(2, 3, 16, 16).double(), torch.randint(0, 10, (2,))),
    ),
    "head": (
        lambda: Head(8, 50),
        lambda: (torch.randn(2, 12, 8).double(), torch.randint(0, 50, (2, 12))),
    ),
    "vit, many patches": (
        lambda: ViT(16, 2, 1),
        lambda: (torch.randn(1, 3, 64, 64).double(), torch.randint(0, 10, (1,))),
    ),
    "head, many words": (
        lambda: Head(8, 500),
        lambda: (torch.randn(2, 64, 8).double(), torch.randint(0, 500, (2, 64))),
    ),
}
SMALL = tuple(name for name in MODELS if "many" not in name and name != "head")


@dataclass
class Outcome:
    """A step that ran.

    Args:
        values: loss, and gradients of parameters.
        peak_bytes: measured, without results and gradients that are held from before.
        predicted_bytes: of the schedule.
    """

    values: list[torch.Tensor]
    peak_bytes: int
    predicted_bytes: int


class SplitCase:
    """A model's program on one device."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        make, draw = MODELS[name]
        self.model, batch = make().double().train(), draw()
        planned = autoplan(self.model, batch, {}, cluster=ClusterInfo.of("1"))
        local = apply_sharding(
            planned.graph, planned.plan, coords=(0,), groups=planning_groups((1,), (0,))
        )
        parameters, buffers = (
            dict(self.model.named_parameters()), dict(self.model.named_buffers()),
        )  # fmt: skip
        self.gm = local.gm
        self.arguments = [
            *(parameters[n] for n in planned.graph.parameters.values()),
            *(buffers[n] for n in planned.graph.buffers.values()),
            *planned.graph.constants.values(),
            *batch,
            *([torch.tensor(1234)] if local.takes_seed else []),
        ]
        self.trained = [t for t in self.arguments if t.requires_grad]

    def run(self, gm, schedule=None, *, again: bool = False) -> Outcome:
        """Train one step.

        Args:
            schedule: makes one of the step's program; what eager keeps if None.
            again: run the backward twice, as `retain_graph` allows.
        """
        traced = trace_step(copy.deepcopy(gm), self.arguments, LowerOptions(scheduled=True))
        chosen = (schedule or eager_schedule)(traced.program)
        step = bind(lower(traced, chosen))
        for p in self.trained:
            p.grad = None
        with LiveMemory() as live:
            (loss,) = step(*self.arguments)
            loss.backward(retain_graph=again)
            if again:
                loss.backward()
        values = [loss.detach(), *(p.grad for p in self.trained)]
        return Outcome(values, live.peak, peak_bytes(traced.program, chosen))

    @functools.cached_property
    def whole(self) -> Outcome:
        """The step without slices."""
        return self.run(self.gm)

    def random_splits(self, seed: int, count: int) -> list[TimeSplit]:
        """Random regions, in random numbers of slices."""
        gm = splittable(self.gm, self.arguments)
        order, graph = calls_in_order(gm), as_model_graph(gm)
        draw, known, splits = random.Random(seed), {}, list[TimeSplit]()
        starts = [
            k for k, node in enumerate(order)
            if may_split(node) and node.target is not operator.getitem
            and isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].ndim
        ]  # fmt: skip
        while len(splits) < count:
            start = draw.choice(starts)
            dim = draw.randrange(order[start].meta["val"].ndim)
            extent = int(order[start].meta["val"].shape[dim])
            if extent < 2:
                continue
            pieces = draw.choice([n for n in range(2, extent + 1) if extent % n == 0])
            growth = Growth(graph, order, start, dim, pieces, known)
            ends = []
            while growth.began:
                region = growth.region()
                if region is not None:
                    states = set(region.given.values())
                    ends.append((growth.end, states == {"P"} and len(region.given) == 1, region))
                if growth.end - start > 60 or not growth.advance():
                    break
            if not ends:
                continue
            end, is_sum, region = draw.choice(ends)
            scalar = is_sum and all(n.meta["val"].ndim == 0 for n, _ in region.given)
            slices = draw.randint(2, min(pieces, 5))
            splits.append(
                TimeSplit(
                    order[start].name,
                    order[end].name,
                    dim,
                    pieces,
                    slices,
                    at_once=scalar and draw.random() < 0.7,
                )
            )
        return splits


@functools.cache
def case_of(name: str) -> SplitCase:
    return SplitCase(name)
