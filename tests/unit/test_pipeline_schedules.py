"""Pipeline schedules: as text and CSV, valid for all sizes, and equal to the published orders."""

import csv
import re
from pathlib import Path

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from autopar.errors import PlanError
from autopar.schedule.pipeline.actions import Action, Kind, PipelineSchedule
from autopar.schedule.pipeline.check import check
from autopar.schedule.pipeline.execution import execution
from autopar.schedule.pipeline.schedules import SCHEDULES, Placement, make_schedule, rank_of_stage

STAGES_PER_RANK = {"interleaved": (2, 3), "forward-only": (1, 2)}
RANKS, MICROBATCHES = range(1, 7), range(1, 13)


def every_schedule(name: str) -> list[PipelineSchedule]:
    return [
        make_schedule(name, p, m, v)
        for p in RANKS
        for m in MICROBATCHES
        for v in STAGES_PER_RANK.get(name, (None,))
    ]


def parse(text: str, **sizes: int) -> PipelineSchedule:
    lines = (line.strip() for line in text.strip().splitlines())
    return PipelineSchedule.parse("\n".join(lines), **sizes)


# --- text ---------------------------------------------------------------------------------------


def test_actions_print_and_parse_as_torch_s():
    for text in ("2F0", "1B3", "1I3", "10W12"):
        action = Action.parse(text)
        assert str(action) == text == str(torch_schedules._Action.from_str(text))
    assert Action.parse("2F0") == Action(2, Kind.FORWARD, 0)
    for text in ("", "F0", "2X0", "2F", "2F0 1B0", "3SEND_F1", "-1F0"):
        with pytest.raises(PlanError, match=r"is not an action of a pipeline; .* such as 2F0"):
            Action.parse(text)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_round_trip_through_text_and_csv(name: str, tmp_path: Path):
    schedule = make_schedule(name, 3, 5)
    assert PipelineSchedule.parse(str(schedule), name) == schedule
    assert PipelineSchedule.parse(str(schedule) + "\n", name) == schedule
    assert PipelineSchedule.from_csv(schedule.to_csv(), name) == schedule
    schedule.write_csv(tmp_path / f"{name}.csv")
    again = PipelineSchedule.read_csv(tmp_path / f"{name}.csv")
    assert again == schedule
    assert hash(again) == hash(schedule)


def test_torch_reads_our_csv_and_we_read_torch_s(tmp_path: Path):
    ours = make_schedule("zbv", 4, 9)
    ours.write_csv(tmp_path / "ours.csv")
    runtime = torch_like(torch_schedules.PipelineScheduleMulti, pp_group_size=4, microbatches=9)
    runtime.pipeline_order, runtime._stages, runtime._num_stages = {}, [], 8
    runtime._load_csv(str(tmp_path / "ours.csv"))
    assert runtime.stage_index_to_group_rank == dict(enumerate(ours.rank_of_stage))

    # with idle cells, and with pairs of a forward and a backward in one cell
    rows = torch_orders(torch_schedules.ScheduleDualPipeV, 4, 9)
    assert "OVERLAP_F_B" in str(rows)
    with open(tmp_path / "dualpipev.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert PipelineSchedule.read_csv(tmp_path / "dualpipev.csv") == make_schedule("dualpipev", 4, 9)


def test_errors_of_text_say_where(tmp_path: Path):
    (tmp_path / "x.csv").write_text("0F0,,0B0\n1F0,1X0\n")
    with pytest.raises(PlanError, match=re.escape("x.csv, row 2, cell 2: '1X0' is not an action")):
        PipelineSchedule.read_csv(tmp_path / "x.csv")
    with pytest.raises(PlanError, match="custom, row 1, cell 3: '0'"):
        PipelineSchedule.parse("0F0 0B0 0")
    with pytest.raises(PlanError, match=r"cannot read the pipeline schedule .*absent.csv"):
        PipelineSchedule.read_csv(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        ("0F0 1F0\n\n2F0", {}, "rank 1 of 3 has no actions; give it a stage"),
        ("0F0 1F0\n2F0 1B0", {}, r"stage 1 is on ranks 0 and 1 \(in 1B0\); keep all its actions"),
        ("0F0\n2F0", {}, "no rank runs stage 1 of 3; add its actions"),
        ("0F0 0F2", {"microbatches": 2}, "rank 0 runs 0F2, but there are 1 stages and 2 micro"),
        ("", {}, "rank 0 of 1 has no actions"),
    ],
)
def test_schedules_are_validated_when_made(text: str, sizes: dict[str, int], message: str):
    with pytest.raises(PlanError, match=message):
        parse(text, **sizes)
    with pytest.raises(PlanError, match="pipeline schedule empty has no ranks"):
        PipelineSchedule.from_csv("", "empty")


# --- validity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_valid_for_all_sizes(name: str):
    row = SCHEDULES[name]
    for schedule in every_schedule(name):
        check(schedule)
        assert schedule.trains == row.trains
        kinds = {action.kind for actions in schedule.ranks for action in actions}
        assert (Kind.WEIGHT in kinds) <= row.splits_backward
        per_rank = schedule.stages // len(schedule.ranks)
        mapping = rank_of_stage(row.placement, len(schedule.ranks), per_rank)
        assert schedule.rank_of_stage == mapping
        if schedule.trains:
            torch_schedules._validate_schedule(
                {r: torch_actions(row) for r, row in enumerate(str(schedule).split("\n"))},
                len(schedule.ranks), schedule.stages, schedule.microbatches,
            )  # fmt: skip
            check(schedule.forwards())
            assert not schedule.forwards().trains


def test_placements():
    assert rank_of_stage(Placement.LOOP, 3, 2) == (0, 1, 2, 0, 1, 2)
    assert rank_of_stage(Placement.V, 3, 2) == (0, 1, 2, 2, 1, 0)
    assert make_schedule("zbv", 3, 4).stages_of_rank == ((0, 5), (1, 4), (2, 3))


@pytest.mark.parametrize("name", [row.name for row in SCHEDULES.values() if row.limits])
def test_microbatches_in_flight_can_be_limited(name: str):
    for limit in range(1, 7):
        for p in RANKS:
            schedule = make_schedule(name, p, 8, in_flight=limit)
            check(schedule)
            for actions in schedule.ranks:
                assert most_in_flight(actions) <= limit
    assert make_schedule(name, 3, 8, in_flight=8) == make_schedule(name, 3, 8)


def most_in_flight(actions: tuple[Action, ...]) -> int:
    """Microbatches between F and the last action of their backward."""
    change = {Kind.FORWARD: 1, Kind.INPUT: 0, Kind.BACKWARD: -1, Kind.WEIGHT: -1}
    live, most = 0, 0
    for action in actions:
        live += change[action.kind]
        most = max(most, live)
    return most


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0F0 0B0 0F1",
            "rank 0 runs 1 × 0F1 for stage 0 and microbatch 1; make it one 0F1 and one",
        ),
        ("0F0 0B0 0B0", "rank 0 runs 1 × 0F0, 2 × 0B0 for stage 0"),
        ("0F0 0I0", "rank 0 runs 1 × 0F0, 1 × 0I0 for stage 0 .* one 0F0, one 0I0 and one 0W0"),
        ("0F0 0B0 0W0", "rank 0 runs 1 × 0F0, 1 × 0B0, 1 × 0W0"),
        ("0F0\n1F0 1B0", "rank 0 runs 1 × 0F0 for stage 0 and microbatch 0"),
        ("0F0 0B0\n1F1 1B1", "rank 0 runs nothing for stage 0 and microbatch 1"),
    ],
)
def test_incomplete_schedules_are_refused(text: str, message: str):
    with pytest.raises(PlanError, match=message):
        check(parse(text))


def test_schedules_that_never_end_are_refused():
    with pytest.raises(
        PlanError, match=r"rank 0 waits at 0B0 \(number 1 of 2\) for 0F0, later on t"
    ):
        check(parse("0B0 0F0"))
    with pytest.raises(
        PlanError, match=r"waits at 0W0 \(number 2 of 3\) for 0I0, later on this rank"
    ):
        check(parse("0F0 0W0 0I0"))
    # the first rank wants a gradient before it sends what the second needs for it
    with pytest.raises(PlanError) as error:
        check(parse("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"))
    assert str(error.value) == (
        "pipeline schedule custom never ends: rank 0 waits at 0B0 (number 2 of 4) for 1B0, which"
        " rank 1 runs later; rank 1 waits at 1F1 (number 2 of 4) for 0F1, which rank 0 runs later;"
        " run what is waited for earlier"
    )
    with pytest.raises(PlanError, match="for 1I0, which no rank runs"):
        execution(parse("0F0 0B0\n1F0"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_executions_run_what_is_waited_for_first(name: str):
    schedule = make_schedule(name, 4, 6)
    step = execution(schedule)
    for rank, actions in enumerate(schedule.ranks):
        assert (
            tuple(a for a, r in zip(step.actions, step.ranks, strict=True) if r == rank) == actions
        )
    assert all(wait < at for at, wait in enumerate(step.waits_for))
    assert step.first == tuple(
        next(i for i, a in enumerate(step.actions) if a.stage == s) for s in range(schedule.stages)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 2), "no pipeline schedule '2f2b'; choose one of gpipe, 1f1b"),
        (("1f1b", 0, 2), "1f1b of 0 ranks and 2 microbatches: each has to be 1 or more"),
        (("1f1b", 2, 2, 2), "1f1b with 2 stages per rank: it has 1; change stages_per_rank"),
        (("interleaved", 2, 2, 1), "interleaved with 1 stages per rank: it has 2 or more"),
    ],
)
def test_sizes_that_a_schedule_lacks(arguments: tuple, message: str):
    with pytest.raises(PlanError, match=message):
        make_schedule(*arguments)
    with pytest.raises(PlanError, match="only gpipe, 1f1b, zb-h1 can be limited"):
        make_schedule("zbv", 2, 2, in_flight=1)
    with pytest.raises(PlanError, match="2 microbatches and 0 in flight: each"):
        make_schedule("1f1b", 2, 2, in_flight=0)


# --- published orders ---------------------------------------------------------------------------


def torch_like(kind: type, pp_group_size: int, microbatches: int, stages_per_rank: int = 2):
    """A schedule of torch's without stages and process groups, which make orders alike."""
    self = kind.__new__(kind)
    self.pp_group_size, self._n_microbatches = pp_group_size, microbatches
    self.n_local_stages, self.num_stages = stages_per_rank, stages_per_rank * pp_group_size
    self._num_stages = pp_group_size
    self.microbatches_per_round = microbatches // max(1, microbatches // pp_group_size)
    return self


def torch_orders(kind: type, p: int, m: int, v: int = 2) -> list[list]:
    self = torch_like(kind, p, m, v)
    if issubclass(kind, torch_schedules.PipelineScheduleSingle):
        return [self._get_pipeline_order()[rank] for rank in range(p)]
    return [self._calculate_single_rank_operations(rank) for rank in range(p)]


def torch_actions(text: str) -> list:
    return [torch_schedules._Action.from_str(cell) for cell in text.split()]


def torch_rows(kind: type, p: int, m: int, v: int = 2) -> list[str]:
    """Without idle cells and gradient reductions, pairs as two actions."""
    flat = [
        [part for a in row if a is not None for part in a.sub_actions or (a,)]
        for row in torch_orders(kind, p, m, v)
    ]
    return [" ".join(str(a) for a in row if "REDUCE" not in str(a)) for row in flat]


def rows(schedule: PipelineSchedule) -> list[str]:
    return str(schedule).split("\n")


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
def test_orders_are_torch_s(p: int):
    for m in (p, p + 1, 2 * p, 3 * p + 1):
        gpipe, single = torch_schedules.ScheduleGPipe, torch_schedules.Schedule1F1B
        assert rows(make_schedule("gpipe", p, m)) == torch_rows(gpipe, p, m)
        *others, last = rows(make_schedule("1f1b", p, m))
        assert others == torch_rows(single, p, m)[:-1]  # 2.13 counts the last rank's F from 1
        assert last == " ".join(f"{p - 1}F{k} {p - 1}B{k}" for k in range(m))
    for m in (1, 2, p, 2 * p, 3 * p, 2 * p + 2):
        zero_bubble = torch_schedules.ScheduleInterleavedZeroBubble
        assert rows(make_schedule("zb-h1", p, m)) == torch_rows(zero_bubble, p, m, 1)
        if m % max(1, m // p):  # torch refuses these
            continue
        for v in (2, 3):
            ours = rows(make_schedule("interleaved", p, m, v))
            assert ours == torch_rows(torch_schedules.ScheduleInterleaved1F1B, p, m, v)
    for m in (2 * p, 2 * p + 1, 4 * p):
        kind = torch_schedules.ScheduleDualPipeV
        assert rows(make_schedule("dualpipev", p, m)) == torch_rows(kind, p, m)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
def test_zbv_is_torch_s_but_for_the_last_weight_gradients(p: int):
    """Torch's last W are those of one stage, then of the other; ours are the oldest first."""
    for m in (1, p, 2 * p - 1, 2 * p, 4 * p):
        theirs = torch_rows(torch_schedules.ScheduleZBVZeroBubble, p, m)
        for ours, row in zip(rows(make_schedule("zbv", p, m)), theirs, strict=True):
            assert re.sub(r"\d+W\d+", "W", ours) == re.sub(r"\d+W\d+", "W", row)


def test_first_actions_as_published():
    """Figure 4 of arXiv:2104.04473 (1F1B, interleaved) and the schedules of arXiv:2401.10241."""
    first = {name: rows(make_schedule(name, 4, 8)) for name in SCHEDULES}
    assert first["1f1b"][0].startswith("0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2")
    assert first["1f1b"][3].startswith("3F0 3B0 3F1 3B1")
    assert first["interleaved"][0].startswith("0F0 0F1 0F2 0F3 4F0 4F1 4F2 4F3 0F4 0F5 0F6 4B0 0F7")
    assert first["interleaved"][3].startswith("3F0 3F1 3F2 3F3 7F0 7B0 7F1 7B1")
    assert first["zb-h1"][0].startswith("0F0 0F1 0F2 0F3 0I0 0W0 0F4 0I1 0W1")
    assert first["zb-h1"][3].startswith("3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1")
    assert first["zbv"][3].startswith("3F0 4F0 3F1 4F1 3F2 4F2 3F3 4F3 4I0 4W0 3F4 3I0 3W0")
