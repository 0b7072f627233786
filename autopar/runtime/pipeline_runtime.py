"""Runs the actions of one pipeline rank by torch's schedule runtime.

Private to torch here: `_PipelineScheduleRuntime`, `_Action`, `_add_send_recv`, `_batch_p2p` and
`_wait_batch_p2p` of `torch.distributed.pipelining.schedules`, and what the runtime asks of a stage;
tested with 2.13.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules as torch_schedules

from autopar.comm.ranks import Ranks
from autopar.comm.world import explained_failures
from autopar.passes.cut import Crossing
from autopar.schedule.pipeline.actions import Kind, PipelineSchedule

# Values by name.
Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StageCalls:
    """What a stage does for one microbatch. Gradients are of the values that are differentiable.

    Args:
        forward: takes the microbatch and what is received, gives what is sent.
        backward: takes the microbatch, gradients of what was sent, and whether gradients of weights
            come with it; gives gradients of what was received.
        weights: computes the gradients of weights.
    """

    forward: Callable[[int, Values], Values]
    backward: Callable[[int, Values, bool], Values]
    weights: Callable[[int], None]


class _Sent:
    """Messages that other ranks may not have yet. Torch's runtime would hold those of all
    microbatches until the end of the step.

    A rank computes in the order of the schedule, and waits for what it takes. So a result of its
    says that it has all that it had to take until then.
    """

    def __init__(self, schedule: PipelineSchedule) -> None:
        self._rank_of = schedule.rank_of_stage
        # By stage, whether it is a forward, and microbatch: the place among its rank's actions.
        self._place = {
            (stage, kind is Kind.FORWARD, microbatch): k
            for row in schedule.ranks
            for k, (stage, kind, microbatch) in enumerate(row)
            if kind is not Kind.WEIGHT
        }
        self._under_way: dict[int, list[tuple[int, list[dist.Work]]]] = defaultdict(list)

    def send(self, ops: list[dist.P2POp], stage: int, forward: bool, microbatch: int) -> None:
        """Send what an action of a stage takes."""
        place = self._place[stage, forward, microbatch]
        works = torch_schedules._batch_p2p(ops)
        self._under_way[self._rank_of[stage]].append((place, works))

    def arrived(self, stage: int, forward: bool, microbatch: int) -> None:
        """Release what the rank of a stage had to take until an action, whose result is here."""
        self._release(self._rank_of[stage], self._place[stage, forward, microbatch])

    def finish(self) -> None:
        """Wait until all messages are sent."""
        for rank in self._under_way:
            self._release(rank, math.inf)

    def _release(self, rank: int, place: float) -> None:
        messages = self._under_way[rank]
        self._under_way[rank] = [(at, works) for at, works in messages if at > place]
        for at, works in messages:
            if at <= place:
                torch_schedules._wait_batch_p2p(works)


class _Stage:
    """A stage, as torch's runtime sees one."""

    submod = None  # not FSDP's
    has_backward = True

    def __init__(
        self,
        number: int,
        pipeline: Pipeline,
        calls: StageCalls,
        received: Callable[[int], Mapping[str, Crossing]],
        sent: Callable[[int], Mapping[str, Crossing]],
        messages: _Sent,
    ) -> None:
        self.stage_index, self.num_stages = number, pipeline.schedule.stages
        self.group_size, self.group_rank = len(pipeline.schedule.ranks), pipeline.rank
        self.stage_index_to_group_rank: dict[int, int] = {}
        self._calls, self._received, self._sent = calls, received, sent
        self._messages = messages
        self._group = pipeline.group
        self._inbox: dict[int, Values] = {}
        self._outbox: dict[int, Values] = {}
        self._gradients: dict[int, Values] = {}
        self._given: dict[int, Values] = {}

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1

    def _ops(self, kind: Any, values: Values, stage: int) -> list[dist.P2POp]:
        peer = self.stage_index_to_group_rank[stage]
        return [dist.P2POp(kind, x, group=self._group, group_peer=peer) for x in values.values()]

    def get_fwd_recv_ops(self, microbatch: int) -> list[dist.P2POp]:
        values = {name: x.empty() for name, x in self._received(microbatch).items()}
        self._inbox[microbatch] = values
        return self._ops(dist.irecv, values, self.stage_index - 1)

    def get_fwd_send_ops(self, microbatch: int) -> list[dist.P2POp]:
        return self._send(self._outbox.pop(microbatch), self.stage_index + 1, microbatch)

    def get_bwd_recv_ops(self, microbatch: int) -> list[dist.P2POp]:
        sent = self._sent(microbatch)
        values = {name: x.empty() for name, x in sent.items() if x.differentiable}
        self._gradients[microbatch] = values
        return self._ops(dist.irecv, values, self.stage_index + 1)

    def get_bwd_send_ops(self, microbatch: int) -> list[dist.P2POp]:
        return self._send(self._given.pop(microbatch), self.stage_index - 1, microbatch)

    def _send(self, values: Values, stage: int, microbatch: int) -> list[dist.P2POp]:
        """Send to a stage, and leave nothing to torch's runtime."""
        ops = self._ops(dist.isend, values, stage)
        self._messages.send(ops, stage, stage > self.stage_index, microbatch)
        return []

    def set_local_fwd_input(self, values: Values, microbatch: int) -> None:
        self._inbox[microbatch] = values

    def get_local_bwd_output(self, microbatch: int) -> Values:
        return self._given.pop(microbatch)

    def set_local_bwd_input(self, values: Values, microbatch: int) -> None:
        self._gradients[microbatch] = values

    def forward_one_chunk(self, microbatch: int, *_: Any, **__: Any) -> Values:
        if not self.is_first:
            self._messages.arrived(self.stage_index - 1, True, microbatch)
        values = self._calls.forward(microbatch, self._inbox.pop(microbatch, {}))
        if not self.is_last:
            self._outbox[microbatch] = values
        return values

    def backward_one_chunk(
        self, microbatch: int, loss: Any = None, full_backward: bool = True, **_: Any
    ) -> None:
        if not self.is_last:
            self._messages.arrived(self.stage_index + 1, False, microbatch)
        gradients = self._gradients.pop(microbatch, {})
        given = self._calls.backward(microbatch, gradients, full_backward)
        if not self.is_first:
            self._given[microbatch] = given

    def backward_weight_one_chunk(self, microbatch: int, last_backward: bool = False) -> None:
        self._calls.weights(microbatch)

    def perform_reduce_grad(self, factor: int) -> None:
        """Sums over ranks come after all microbatches."""

    def clear_runtime_states(self) -> None:
        self._outbox.clear()


class _Runtime(torch_schedules._PipelineScheduleRuntime):
    """Torch's runtime for stages that need no preparation."""

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        """They know the shapes of what they receive."""

    def _validate_and_set_stage_mapping(self, actions: Any) -> None:
        """`autopar.schedule.pipeline.check` has checked it."""


@dataclass(frozen=True)
class Pipeline:
    """The ranks of one pipeline.

    Args:
        schedule: of all of them.
        rank: this one's number.
        group: of the ranks.
        alike: all ranks of the run, of which those that run the same stages decide alike.
    """

    schedule: PipelineSchedule
    rank: int
    group: dist.ProcessGroup
    alike: Ranks

    @property
    def own(self) -> tuple[int, ...]:
        """This rank's stages."""
        return self.schedule.stages_of_rank[self.rank]

    @property
    def splits_backward(self) -> bool:
        """Gradients of weights are computed by actions of their own."""
        return any(a.kind is Kind.WEIGHT for row in self.schedule.ranks for a in row)

    @cached_property
    def _actions(self) -> dict[bool, Any]:
        return {}

    def run(
        self,
        calls: Mapping[int, StageCalls],
        received: Callable[[int, int], Mapping[str, Crossing]],
        *,
        backward: bool,
    ) -> None:
        """Run all actions of this rank.

        Args:
            calls: by stage of this rank.
            received: what a stage receives for a microbatch.
            backward: run backwards, too.
        """
        schedule = self.schedule if backward else self.schedule.forwards()
        messages = _Sent(schedule)
        stages = [
            _Stage(
                number, self, calls[number],
                partial(received, number), partial(received, number + 1), messages,
            )
            for number in self.own
        ]  # fmt: skip
        runtime = _Runtime(stages, schedule.microbatches, scale_grads=False)
        mapping = dict(enumerate(schedule.rank_of_stage))
        runtime.stage_index_to_group_rank = mapping
        for stage in stages:
            stage.stage_index_to_group_rank = mapping
        if backward not in self._actions:
            actions = {
                rank: [torch_schedules._Action.from_str(str(a)) for a in row]
                for rank, row in enumerate(schedule.ranks)
            }
            self._actions[backward] = torch_schedules._add_send_recv(
                actions, mapping.__getitem__, schedule.stages
            )
        runtime.pipeline_order_with_comms = self._actions[backward]
        with explained_failures():
            runtime._step_microbatches()
            messages.finish()

    def broadcast(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        """A value that the rank of a stage has, on all ranks of the pipeline."""
        source = self.schedule.rank_of_stage[stage]
        if x.numel():
            with explained_failures():
                dist.broadcast(x, group=self.group, group_src=source)
        return x

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum a tensor over the ranks of the pipeline, in place."""
        with explained_failures():
            dist.all_reduce(x, group=self.group)

    def exchange(
        self, gives: Sequence[tuple[torch.Tensor, int]], takes: Sequence[tuple[torch.Tensor, int]]
    ) -> None:
        """Send tensors to ranks of the pipeline, and receive others from them."""
        ops = [dist.P2POp(dist.isend, x, group=self.group, group_peer=r) for x, r in gives]
        ops += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=r) for x, r in takes]
        with explained_failures():
            for work in dist.batch_isend_irecv(ops) if ops else ():
                work.wait()
