"""Steps of small models on one device, and their schedules' programs, for tests and benchmarks."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from autopar import ClusterInfo, autoplan
from autopar.comm.groups import planning_groups
from autopar.passes.apply_sharding import apply_sharding
from autopar.runtime.program import Program as RunnableStep
from autopar.schedule.order import in_order
from autopar.schedule.pareto import ScheduleFront
from autopar.schedule.program import INPUT, Op, Program, Schedule
from autopar.testing.live_memory import LiveMemory
from tests.lowering import lowered, program_of
from tests.models import CASES, LanguageModel

SEED = 1234


class LiveActivations(LiveMemory):
    """Live bytes without gradients of parameters, which can be told apart at the end only."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, tuple[int, ...]] = {}  # of the tensors that storages were made for
        self.forward: set[int] = set()

    def record(self, nbytes: int, shape: tuple[int, ...] = ()) -> int:
        number = super().record(nbytes, shape)
        self.shapes[number] = shape
        return number

    def start_backward(self) -> None:
        """Storages made from here on may be gradients of parameters."""
        self.forward = set(self.shapes)

    def peak_without_gradients(self, parameters: Sequence[torch.Tensor]) -> int:
        """The peak without gradients of parameters: those in `.grad`, and what the backward made
        in the shape of a parameter (terms of a gradient that is a sum)."""
        addresses = {p.grad.untyped_storage()._cdata for p in parameters if p.grad is not None}
        gradients = {self.numbers[a] for a in addresses if a in self.numbers}
        shapes = {tuple(p.shape) for p in parameters}
        backward = self.shapes.keys() - self.forward
        gradients.update(k for k in backward if self.shapes[k] in shapes)
        changes = (n for number, n in self.changes if number not in gradients)
        return max(itertools.accumulate(changes, initial=0))


def without_gradients(program: Program) -> Program:
    """The program with gradients of parameters, and the terms that they are sums of, for free."""
    ops, maker = program.ops, program.maker
    reads = Counter(s for op in ops for s in op.reads)
    forward = set(program.forward)
    terms: set[int] = set()
    stack = list(program.gradient_bytes.items())
    while stack:
        total, nbytes = stack.pop()
        op = ops[maker[total]]
        for s in op.reads if op.kind.startswith("aten.add.Tensor ") else ():
            own = maker[s] not in (INPUT, *forward) and reads[s] == 1
            if own and s not in terms and program.nbytes[s] == nbytes:
                terms.add(s)
                stack.append((s, nbytes))
    counted = (0 if s in terms else n for s, n in enumerate(program.nbytes))
    return replace(program, nbytes=tuple(counted), gradient_bytes={})


def without_overwriting(program: Program) -> Program:
    """The program with every result in memory of its own."""
    return replace(program, ops=tuple(replace(op, overwrites=()) for op in program.ops))


class Mixture(nn.Module):
    """Hugging Face Mixtral: grouped products of its experts, which do without float64."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import MixtralConfig, MixtralForCausalLM

        config = MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, vocab_size=101,
            max_position_embeddings=64, use_cache=False,
        )  # fmt: skip
        self.mixtral = MixtralForCausalLM(config)

    def forward(self, input_ids, labels=None):
        return self.mixtral(input_ids=input_ids, labels=labels).loss


class Step:
    """A model's local program on one device, to be lowered with schedules."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        planned = autoplan(model, (), batch, cluster=ClusterInfo.of("1"))
        groups = planning_groups((1,), (0,))
        program = apply_sharding(planned.graph, planned.plan, coords=(0,), groups=groups)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self.gm, self.mutated = program.gm, len(planned.graph.mutations)
        self.arguments = [
            *(parameters[n] for n in planned.graph.parameters.values()),
            *(buffers[n] for n in planned.graph.buffers.values()),
            *planned.graph.constants.values(),
            *batch.values(),
            *([torch.tensor(SEED)] if program.takes_seed else []),
        ]
        self.trained = [t for t in self.arguments if t.requires_grad]

    @functools.cached_property
    def program(self) -> Program:
        return in_order(without_gradients(program_of(self.gm, self.arguments)))

    @functools.cached_property
    def front(self) -> ScheduleFront:
        return ScheduleFront(self.program)

    def lowered(self, schedule: Schedule | None = None, **options) -> RunnableStep:
        return lowered(self.gm, self.arguments, schedule, **options)

    def run(self, step: RunnableStep) -> tuple[int, list[torch.Tensor], list[torch.Tensor]]:
        """Peak, gradients, and updated buffers."""
        for p in self.trained:
            p.grad = None
        with LiveActivations() as live:
            results = step(*self.arguments)
            loss = results[self.mutated]
            updated = [t.clone() for t in results[: self.mutated]]
            del results
            live.start_backward()
            loss.backward()
        grads = [p.grad.clone() for p in self.trained if p.grad is not None]
        return live.peak_without_gradients(self.trained), grads, updated


@functools.cache
def step_of(name: str, dropout: float = 0.0) -> Step:
    case = CASES.get(name, CASES["gpt2"])
    torch.manual_seed(0)
    if name == "gpt2":
        model = LanguageModel(layers=2, dropout=dropout).double()
    else:
        model = Mixture() if name == "mixtral" else case.build()
    return Step(model.train(), case.batch(0))


def chain(sizes: list[int]) -> Program:
    """x -> a -> b -> loss and back: the backward of an operator reads its input and a gradient.

    Storages: 0 is given, then one per forward operator, the tangent, one per backward operator.
    """
    n = len(sizes)
    forward = [Op(f"f{k}", "f", (k,), (k + 1,), 10.0, 1.0) for k in range(n)]
    tangent = n + 1
    backward = []
    for m, k in enumerate(reversed(range(n))):
        gradient = tangent if m == 0 else tangent + m
        backward.append(Op(f"b{k}", "b", (gradient, k), (tangent + m + 1,), 20.0, 2.0))
    nbytes = [0, *sizes, 0, *reversed(sizes)]
    nbytes[tangent + n] = 0
    return Program(
        (*forward, *backward), tuple(range(n)), tuple(nbytes), frozenset({n}),
        frozenset({tangent + n}), frozenset({tangent}),
    )  # fmt: skip
