"""Steps of deep models, read from a few of their blocks."""

import math
from dataclasses import replace

import pytest
import torch
import transformers

from autopar import ClusterInfo
from autopar.cluster.device import device as device_of
from autopar.compile import plan_batch, plan_to_fit
from autopar.errors import InfeasibleError
from autopar.ir.shorten import shortened
from autopar.passes import local_step as steps
from autopar.planner.joint import without_reshard
from autopar.planner.planner import PlanningProblem, build_problem, make_plan
from autopar.schedule.budget import plan_memory
from autopar.schedule.simulate import check, peak_bytes
from autopar.schedule.stages import linearize
from autopar.schedule.unroll import Gap, unrolled

APART = frozenset({"bucket_collectives"})


class Block(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Stack(torch.nn.Module):
    """Residual blocks.

    Args:
        all_read: the loss reads what every block gives.
    """

    def __init__(self, layers: int, all_read: bool = False) -> None:
        super().__init__()
        self.all_read = all_read
        self.layers = torch.nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = []
        for layer in self.layers:
            x = layer(x)
            given.append(x)
        return torch.stack(given).square().mean() if self.all_read else x.square().mean()


def llama(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=layers, vocab_size=512, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16().train()
        tokens = torch.zeros(8, 256, dtype=torch.long)
    return model, {"input_ids": tokens, "labels": tokens}


def problem_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], mesh: str, **options):
    return build_problem(model, (), batch, cluster=ClusterInfo.of(mesh, "H100"), **options)


def traced(graph, whole, plan, trainable, disable=APART) -> steps.LocalStep:
    """The step of a graph as it is."""
    step = steps.untraced_step(graph, whole, plan, trainable, None, disable=disable)
    return step.local()


def step_of(problem: PlanningProblem, *, short: bool) -> steps.LocalStep:
    """The step of the plan without a limit, its buckets apart."""
    space = problem.space
    choices = without_reshard(space, problem.decide(math.inf).choices)
    plan = make_plan(space, choices, problem.model)
    trainable = space.workload.trainable
    if short:
        return steps.local_step(space.graph, plan, trainable=trainable, choices={})
    return traced(space.graph, space.graph, plan, trainable)


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("mesh", ["4", "2x2"])
def test_a_program_from_four_blocks_is_that_of_all(mesh):
    problem = problem_of(*llama(7), mesh, constraints={"inputs.input_ids": "S0R"})
    short, whole = (step_of(problem, short=short) for short in (True, False))
    a, b = short.program, whole.program
    assert shortened(problem.space.graph, {}) is not None
    assert a.same_as(b) and len(a.ops) == len(b.ops)
    for field in ("gradients", "weights", "tangents", "gradient_bytes", "splits", "order"):
        assert getattr(a, field) == getattr(b, field), field
    names = [(op.kind, op.module, op.us, op.overwrites) for op in a.ops]
    assert names == [(op.kind, op.module, op.us, op.overwrites) for op in b.ops]
    assert [t.shape for t in short.arguments] == [t.shape for t in whole.arguments]


def test_blocks_that_others_read_are_not_left_out():
    batch = {"x": torch.zeros(16, 64)}
    assert shortened(problem_of(Stack(8), batch, "2").space.graph, {}) is not None
    assert shortened(problem_of(Stack(8, all_read=True), batch, "2").space.graph, {}) is None
    assert shortened(problem_of(Stack(5), batch, "2").space.graph, {}) is None


def test_blocks_with_other_choices_stay():
    graph = problem_of(Stack(9), {"x": torch.zeros(16, 64)}, "2").space.graph
    every_second = {
        node: int(graph.info(node).module.split(".")[1]) % 2
        for node in graph.compute_nodes()
        if graph.info(node).module.startswith("layers.")
    }
    assert shortened(graph, every_second) is None
    ends = {
        node: graph.info(node).module.startswith(("layers.0", "layers.8")) for node in every_second
    }
    assert shortened(graph, ends) is not None


def test_buckets_over_blocks_are_not_unrolled():
    data_parallel = {"layers.*.*.weight": "RR"}
    problem = problem_of(Stack(9), {"x": torch.zeros(2**18, 64)}, "2", constraints=data_parallel)
    short = shortened(problem.space.graph, {})
    plan = make_plan(problem.space, problem.decide(math.inf).choices, problem.model)
    trainable = problem.space.workload.trainable
    gap = Gap(short.blocks, short.before, short.after)
    for disable in (APART, frozenset()):
        step = traced(short.graph, problem.space.graph, plan, trainable, disable)
        buckets = any("many" in op.kind for op in step.program.ops)
        assert (unrolled(step.program, gap) is None) == buckets == (disable != APART)


def test_gathered_weights_do_not_fuse_the_chain():
    constraints = {"*.weight": "S0R"}
    model, batch = llama(8)
    program = step_of(problem_of(model, batch, "4", constraints=constraints), short=True).program
    assert sum(op.kind.startswith("autopar.all_gather") for op in program.ops) > 8
    kinds = [stage.kind for stage in linearize(program)]
    assert max(map(kinds.count, kinds)) >= 6
    eager = peak_bytes(program, plan_memory(program, math.inf).schedule)
    plan = plan_memory(program, 0.6 * eager)
    check(program, plan.schedule)
    assert plan.peak_bytes <= 0.6 * eager


def small_device(gib: float) -> ClusterInfo:
    """Two H100 with less memory."""
    return ClusterInfo.of("2", replace(device_of("H100"), memory_bytes=gib * 2**30))


def test_what_does_not_fit_is_recomputed_without_being_asked():
    model, batch = llama(6)
    free = plan_to_fit(model, (), batch, cluster=small_device(80))
    assert free.memory is None
    needed = free.planned.plan.memory.total_bytes / 2**30
    joint = plan_to_fit(model, (), batch, cluster=small_device(0.7 * needed), time_limit=5)
    plan = joint.planned.plan
    assert plan.memory.total_bytes <= 0.7 * needed * 2**30
    assert plan.step is not None or plan.microbatches > 1


class OneHot(torch.nn.Module):
    """A loss with a check of its inputs whose result nobody reads.

    Args:
        returns: the hidden values too.
    """

    def __init__(self, returns: bool = False) -> None:
        super().__init__()
        self.returns = returns
        self.up, self.down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor):
        hidden = self.up(x).relu()
        scores = self.down(hidden).log_softmax(-1)
        loss = -(torch.nn.functional.one_hot(y, 16) * scores).sum(-1).mean()
        return (loss, hidden) if self.returns else loss


def test_checks_are_scheduled():
    batch = {"x": torch.zeros(4096, 64), "y": torch.zeros(4096, dtype=torch.long)}
    cluster = small_device(5 / 1024)
    plan = plan_to_fit(OneHot(), (), batch, cluster=cluster, time_limit=8).planned.plan
    assert plan.memory.total_bytes <= cluster.budget_bytes


def test_what_cannot_fit_says_what_would():
    batch = {"x": torch.zeros(4096, 64), "y": torch.zeros(4096, dtype=torch.long)}
    with pytest.raises(
        InfeasibleError, match=r"Give at least .* Microbatches that keep everything need"
    ):
        plan_to_fit(OneHot(), (), batch, cluster=small_device(0.01 / 1024), time_limit=3)


def test_microbatches_count_the_batch_and_its_results():
    batch = {"x": torch.zeros(4096, 64), "y": torch.zeros(4096, dtype=torch.long)}
    results = 4096 * 256 * 4
    for returns in (False, True):
        planner = {"cluster": ClusterInfo.of("1", "H100"), "microbatches": 8}
        memory = plan_batch(OneHot(returns), (), batch, **planner).plan.memory
        least = sum(x.nbytes for x in batch.values()) + returns * 2 * results
        assert memory.buffers_bytes + memory.activations_bytes >= least
        assert (memory.total_bytes > 2 * results) == returns
