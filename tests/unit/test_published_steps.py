"""Published steps: rows that are read or refused, frameworks as numbers, and what they predict."""

import json
from dataclasses import replace

import pytest
import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.curve import Curve
from autopar.cluster.device import device
from autopar.cluster.software import SOFTWARE, Software
from autopar.planner.baselines import baseline_plans
from autopar.planner.estimate import estimate_time
from autopar.planner.planner import build_problem
from benchmarks.published_models import Decoder, ModelShape
from benchmarks.published_plans import _Predictor, cluster_of, laid_out, predict
from benchmarks.published_rows import NotCovered, Run, halves, load, run_of
from benchmarks.published_steps import Compared, kendall, main, regret

SHAPE = ModelShape(1024, 4096, 8, 16, 16, 8192, 512)
RUN = Run(
    SHAPE, "A100-80G", "8x200G RoCE", "Megatron-LM", 2, 1, 2, "", False, 2, 4, 1, "none",
    "float16", "", False,
)  # fmt: skip
ROW = {
    "dataset": "vTrain-single", "model": "GPT", "hardware": "A100 (8/node; vTrain configs)",
    "source": "here", "n_gpus": 4, "hidden_size": 1024, "n_layers": 12, "n_heads": 16,
    "seq_len": 1024, "tp": 2, "pp": 2, "dp": 1, "global_batch": 16, "micro_batch": 2,
    "precision": "fp16", "step_time_s": 1.0,
}  # fmt: skip


def test_a_file_without_rows_is_refused_with_the_format(tmp_path, capsys):
    path = tmp_path / "rows.json"
    for text, message in (("{}", "no list of rows"), ('[{"model": "x"}]', "row 0"), ("[", "JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{message}.*Expected is a JSON list"):
            load(path)
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path / "none.json")])
    assert "step_time_s or derived_step_time_s" in capsys.readouterr().err
    path.write_text(json.dumps([ROW]))
    assert load(path) == [ROW]


def test_rows_are_runs_or_refused_with_the_reason():
    run = run_of(ROW)
    assert (run.pipe, run.data, run.tensor, run.microbatch, run.microbatches) == (2, 1, 2, 2, 8)
    assert run.software.endswith("timed alone") and run.megatron
    for change, reason in (
        ({"precision": "FP8"}, "8 or 4 bits"),
        ({"ep": 8}, "mixture of experts"),
        ({"hardware": "TPU v5"}, "not in the device table"),
        ({"dp": 2}, "do not multiply"),
        ({"micro_batch": 3}, "do not divide"),
        ({"dataset": "other"}, "no reader"),
        ({"step_time_s": None}, "no step time"),
    ):
        with pytest.raises(NotCovered, match=reason):
            run_of(ROW | change)


def test_rows_of_megatron_bridge_are_in_8_and_4_bits_within_a_rack():
    row = {
        "dataset": "Megatron-Bridge", "model": "LLAMA3_70B", "hardware": "DGX-GB300", "source": "",
        "n_gpus": 64, "seq_len": 8192, "tp": 2, "pp": 4, "cp": 2, "vp": 5, "fsdp": 0,
        "global_batch": 256, "micro_batch": 1, "precision": "NVFP4", "derived_step_time_s": 5.0,
    }  # fmt: skip
    run = run_of(row)
    assert (run.short, run.node_size, run.context, run.data) == ("nvfp4", 64, 2, 4)
    assert (run.sharded, run.sequence, run.stages_per_rank) == ("optimizer", True, 5)
    names = {"FP8-CS": "float8", "FP8-CS (FP8-MX)": "float8", "MXFP8": "mxfp8", "BF16": ""}
    for precision, short in names.items():
        assert run_of(row | {"precision": precision}).short == short
    assert run_of(row | {"fsdp": 64}).sharded == "parameters"
    cluster = cluster_of(run)
    assert cluster.links == (cluster.links[-1],) * 4  # all of them NVLink
    with pytest.raises(NotCovered, match="do not say enough"):
        run_of(row | {"model": "LLAMA3_9B"})


def test_halves_are_of_every_data_set_and_seeded():
    rows = [{"dataset": name} for name in "aabbbb"]
    assert halves(rows, 1) == halves(rows, 1)
    assert sum(halves(rows, 1)[:2]) == 1 and sum(halves(rows, 1)[2:]) == 2


def test_ranks_and_regret():
    rows = [Compared({}, False, m, p, None, None) for m, p in ((1.0, 3.0), (2.0, 2.0), (4.0, 5.0))]
    assert kendall(rows) == pytest.approx(1 / 3)
    assert regret(rows) == pytest.approx(100.0)  # the second is chosen


def test_a_pass_takes_what_its_host_takes():
    fast = predict(RUN)
    software = Software("slow host", forward_us=1e4, backward_us=2e4)
    with torch.device("meta"):
        model, ids = Decoder(replace(SHAPE, layers=1)).half(), torch.zeros(4, 512, dtype=torch.long)
    known = ClusterInfo.of("2", "A100-80G")
    times = {}
    for cluster in (known, replace(known, software=software)):
        space = build_problem(model, (), {"ids": ids, "labels": ids}, cluster=cluster).space
        (plan,) = baseline_plans(space, named="Megatron TP")
        times[cluster.software] = estimate_time(space, plan.choices)
    operators = [d for d in space.decisions if d.kind == "op"]
    least = 1e4 * len(operators)
    assert times[software].compute_us > least > times[None].compute_us
    assert fast.step_s < 1e-6 * least


def test_software_changes_a_device_and_survives_yaml(tmp_path):
    software = Software("eager", 20.0, 10.0, gap_us=5.0, traffic=2.0, attention=0.5)
    known = device("A100-80G")
    changed = software.on(known)
    name = "attention.float16"
    assert changed.flops_by_size[name].rates[-1] == known.flops_by_size[name].rates[-1] / 2
    assert changed.bytes_curve("read").us(1e9) == pytest.approx(
        2 * known.bytes_curve("read").us(1e9)
    )
    path = tmp_path / "cluster.yaml"
    cluster = ClusterInfo.of("2x8", "A100-80G", software=software)
    path.write_text(cluster.to_yaml())
    assert ClusterInfo.load(path) == cluster
    with pytest.raises(ValueError, match="software takes"):
        Software.from_dict({"speed": 1})


def test_a_saturating_rate_adds_the_same_time_to_all_work():
    curve = Curve.saturating(1e12, 1e9)
    for size in (1e8, 3e9, 1e10):
        assert float(curve.us(size)) == pytest.approx(1e6 * (size + 1e9) / 1e12, rel=0.02)


def test_recomputation_bubbles_and_splits_of_a_run():
    none, full = predict(RUN), predict(replace(RUN, recompute="full"))
    assert 1.2 < full.step_s / none.step_s < 1.4
    assert full.activation_gib < none.activation_gib / 3
    more = predict(replace(RUN, microbatches=40))
    # of 4 microbatches on 2 stages, the bubble is a fifth
    assert 0.75 < (more.step_s / 40) / (none.step_s / 4) < 0.9


def test_megatron_keeps_a_rank_s_tokens_and_recomputes_attention():
    """34 s b h / t bytes a layer (Korthikanti et al. 2022), where attention is recomputed."""
    shape = replace(SHAPE, dropout=0.1)
    run = replace(RUN, shape=shape, pipe=1, microbatches=1, megatron=True)
    held = [
        predict(replace(run, sequence=True, recompute="attention", shape=of)).activation_gib
        for of in (shape, replace(shape, layers=16))
    ]
    a_layer = (held[1] - held[0]) * 2**30 / 8
    assert a_layer == pytest.approx(34 * 512 * 2 * 1024 / 2, rel=0.02)


def test_megatron_sums_gradients_of_inputs_beside_products():
    """Two of a block's all-reduces are in its backward; the product hides a share of them."""
    run = replace(RUN, pipe=1, microbatches=1)
    exposed, hidden = (
        predict(replace(run, megatron=megatron)).parts_s["backward"] for megatron in (False, True)
    )
    nbytes = 2 * run.microbatch * SHAPE.tokens * SHAPE.hidden
    cluster = cluster_of(run)
    one_us = float(cluster.links[-1].collective_us("all_reduce", 2, nbytes))
    one_us = SOFTWARE[run.software].hides * (one_us + cluster.device.launch_us)
    assert exposed - hidden == pytest.approx(2e-6 * SHAPE.layers * one_us)


def test_nothing_between_products_is_split_without_sequence_parallelism():
    """Else all-reduces could become halves around split norms (which are cheaper)."""
    run = replace(RUN, pipe=1, microbatch=64, shape=replace(SHAPE, dropout=0.1))
    space, choices = laid_out(_Predictor(run).key())
    sums = [
        d.candidates[c].outputs[0]
        for d, c in zip(space.decisions, choices, strict=True)
        if d.kind == "op" and str(d.node.target).startswith("aten.add")
        and space.graph.info(d.node).module.startswith("layers.")
    ]  # fmt: skip
    assert sums and all(not any(spec.dims) for spec in sums)


def test_stages_of_torch_hold_their_messages():
    """The first of two stages: gradients that it receives and results that it sent."""
    run = replace(RUN, microbatches=8, recompute="full")
    plain, held = (predict(replace(run, stage_buffers=b)).peak_gib for b in (False, True))
    message = 2 * run.microbatch * SHAPE.tokens * SHAPE.hidden / 2**30
    logits = 2 * run.microbatch * SHAPE.tokens * SHAPE.vocabulary / run.tensor / 2**30
    assert 8 * 2 * message <= held - plain + 1e-9 <= 8 * (message + logits) + 1e-9


def test_hosts_wait_for_ranks_of_their_node():
    software = Software("waits", wait_us=100.0)
    waits = []
    for ranks in (2, 8, 16):
        run = replace(RUN, pipe=1, tensor=ranks, microbatches=1)
        cluster = replace(cluster_of(run), software=software)
        with torch.device("meta"):
            model = Decoder(replace(SHAPE, layers=1)).half()
            ids = torch.zeros(2, 512, dtype=torch.long)
        space = build_problem(model, (), {"ids": ids, "labels": ids}, cluster=cluster).space
        (plan,) = baseline_plans(space, named="Megatron TP")
        own = (space.collective_host_us(e, plan.choices) for e in space.edges if not e.weight)
        waits.append(max(max(us) for us in own))
    assert waits == [100.0, 700.0, 700.0]


def test_zero_gathers_once_or_twice():
    times = {}
    for sharded in ("parameters", "gradients"):
        run = replace(RUN, pipe=1, tensor=1, data=4, sharded=sharded, dtype="bfloat16", master=True)
        times[sharded] = predict(run)
    assert times["gradients"].peak_gib > times["parameters"].peak_gib
