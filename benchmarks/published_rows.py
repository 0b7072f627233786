"""Rows of published measurements: read, checked, and put into autopar's words.

The file is a JSON list of objects. Every row has `dataset`, `model`, `hardware`, `source`
and a step time in seconds (`step_time_s`, or `derived_step_time_s` where the source gives tokens
per second). `seq_len`, `global_batch`, `micro_batch`, `tp`, `pp`, `dp`, `cp`, `ep`, `vp`,
`precision`, `recompute` or `activation_checkpointing`, `sharding`, `hidden_size`, `n_layers` and
`n_heads` say what was run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.published_models import ModelShape

NEEDED = ("dataset", "model", "hardware", "source")


class NotCovered(Exception):
    """Why a row is outside of what is predicted."""


@dataclass(frozen=True)
class Run:
    """A measured step in autopar's words.

    Args:
        shape: of the model.
        device: a key of `autopar.cluster.device.DEVICES`.
        network: a key of `autopar.cluster.link.NETWORKS`: the links between hosts.
        software: a key of `autopar.cluster.software.SOFTWARE`.
        pipe, data, context, tensor: degrees. Context ranks split the tokens of a sample, and
            attention is a ring over them.
        sharded: what the data ranks split: "optimizer" states alone (ZeRO-1); also "gradients", and
            parameters from a step to the next forward (ZeRO-2); "parameters", which are gathered
            for the forward and for the backward (ZeRO-3, FSDP); or nothing, "".
        sequence: activations between products are split over the tensor ranks by tokens.
        microbatch: samples of one data rank that are processed at a time.
        microbatches: how often, in a step.
        stages_per_rank: 1, or more of an interleaved schedule.
        recompute: "none", "full" (all of a block) or "attention" (scores and what they become).
        sums: dtype of the sums of gradients, if it differs from that of compute.
        master: weights are held in float32 and cast before they are gathered.
        asynchronous: products may run in steps beside the collective on their operand or result.
        short: how products of blocks with weights are in 8 or 4 bits: "float8" with one scale per
            tensor, "mxfp8" with one per 32 elements, "nvfp4" with one per 16; or "".
        node_size: devices that NVLink connects.
        megatron: products are Megatron's (`LinearWithGradAccumulationAndAsyncCommunication`): the
            gradient of an input is summed over tensor ranks beside the product for the weight's;
            with `sequence`, inputs keep the tokens of a rank, and are gathered again beside the
            product for the input's gradient.
        stage_buffers: stages of a pipeline hold what they send and receive of all microbatches, as
            torch's do.
    """

    shape: ModelShape
    device: str
    network: str
    software: str
    pipe: int
    data: int
    tensor: int
    sharded: str
    sequence: bool
    microbatch: int
    microbatches: int
    stages_per_rank: int
    recompute: str
    dtype: str
    sums: str
    master: bool
    asynchronous: bool = False
    context: int = 1
    short: str = ""
    megatron: bool = False
    stage_buffers: bool = False
    node_size: int = 8


def load(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a file.

    Raises:
        ValueError: the file does not exist, or is not a list of rows; the message says what is
            expected.
    """
    expected = (
        f"Expected is a JSON list of objects with {', '.join(NEEDED)} and step_time_s or "
        f"derived_step_time_s; {__name__.replace('.', '/')}.py lists the other keys"
    )
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read measured steps from {path}: {error}. {expected}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. {expected}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} has no list of rows. {expected}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or any(row.get(key) is None for key in NEEDED):
            has = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"row {number} of {path} has {has}. {expected}")
    return rows


def measured_s(row: Mapping[str, Any]) -> float:
    """The measured step.

    Raises:
        NotCovered: the row has none.
    """
    value = row.get("step_time_s") or row.get("derived_step_time_s")
    if value is None:
        raise NotCovered("no step time (rates of unstated batches alone)")
    return float(value)


def run_of(row: Mapping[str, Any]) -> Run:
    """What a row measured.

    Raises:
        NotCovered: it says too little, or it is something that the search space lacks.
    """
    _check_common(row)
    reader = _READERS.get(row["dataset"])
    if reader is None:
        raise NotCovered("no reader: the data set's rows do not say enough of the model")
    return reader(row)


# Hardware by a part of its description, to device and network between hosts.
_HARDWARE = (
    ("A100 (8/node; vTrain", "A100-80G", "4x200G InfiniBand"),
    ("A100 80GB (Selene)", "A100-80G", "8x200G InfiniBand"),
    ("a100_40gb", "A100-40G", "8x200G RoCE"),
    ("a100_80gb", "A100-80G", "8x200G RoCE"),
    ("h100_80gb", "H100", "8x400G RoCE"),
    ("H100 SXM 96GB HBM2e", "H100-96G-500W", "8x400G RDMA"),
    ("DGX-H100", "H100", "8x400G InfiniBand"),
    ("DGX-B200", "B200", "8x400G InfiniBand"),
    ("DGX-B300", "B300", "8x800G InfiniBand"),
    ("DGX-GB200", "GB200", "8x400G InfiniBand"),
    ("DGX-GB300", "GB300", "8x800G InfiniBand"),
    ("H100 80GB HBM3 700W, RoCE 400", "H100", "8x400G RoCE"),
)


# How data sets call products in 8 bits; and data sets whose context parallelism is a ring.
_SHORT_PRODUCTS = {"torchtitan": ("float8",), "Megatron-Bridge": ("fp8", "nvfp4")}
_RINGS = ("torchtitan", "Megatron-Bridge")


def _hardware(row: Mapping[str, Any]) -> tuple[str, str]:
    for part, device, network in _HARDWARE:
        if part in row["hardware"]:
            return device, network
    raise NotCovered("the hardware is not in the device table")


def _check_common(row: Mapping[str, Any]) -> None:
    if (row.get("ep") or 1) > 1 or re.search("MoE|GPT.OSS", row["model"]):
        raise NotCovered("mixture of experts: routing and expert placement are not stated")
    _hardware(row)
    measured_s(row)
    precision = str(row.get("precision") or "").lower()
    if not precision:
        raise NotCovered("the precision is not stated")
    if "rowwise" in precision:
        raise NotCovered("float8 with a scale per row: kernels that the device table lacks")
    known = ("bf16", "fp16", *_SHORT_PRODUCTS.get(row["dataset"], ()))
    if not any(name in precision for name in known):
        raise NotCovered("products in 8 or 4 bits by a framework that the table lacks")
    if (row.get("cp") or 1) > 1 and row["dataset"] not in _RINGS:
        raise NotCovered("context parallelism in a row without a stated ring")
    if "LoRA" in str(row.get("task", "")):
        raise NotCovered("low-rank adaptation: ranks and targets are not stated")


def _degrees(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """Pipe, data, tensor."""
    pipe, tensor = int(row.get("pp") or 1), int(row.get("tp") or 1)
    data, rest = divmod(int(row["n_gpus"]), pipe * tensor * int(row.get("cp") or 1))
    stated = row.get("dp") or row.get("fsdp") or data
    if rest or int(stated) != data:
        raise NotCovered("degrees do not multiply to the number of GPUs")
    return pipe, data, tensor


def _microbatches(row: Mapping[str, Any], data: int) -> tuple[int, int]:
    """Samples of a microbatch, and how many microbatches."""
    size = int(row.get("micro_batch") or row.get("local_batch_per_dp") or 0)
    if not size:
        raise NotCovered("the microbatch is not stated")
    count, rest = divmod(int(row["global_batch"]), size * data)
    if rest or not count:
        raise NotCovered("microbatches do not divide the batch")
    return size, count


def _gpt(row: Mapping[str, Any], **more: Any) -> ModelShape:
    """GPT as Megatron builds it, with its usual padded vocabulary."""
    h, heads = int(row["hidden_size"]), int(row["n_heads"])
    return ModelShape(
        h, 4 * h, int(row["n_layers"]), heads, heads, int(row.get("vocab") or 51200),
        int(row["seq_len"]), **more,
    )  # fmt: skip


def _vtrain(row: Mapping[str, Any]) -> Run:
    pipe, data, tensor = _degrees(row)
    size, count = _microbatches(row, data)
    device, network = _hardware(row)
    # Nobody states whether it was on; the single-node times exclude it (docs/accuracy.md).
    alone = row["dataset"] == "vTrain-single"
    recompute = "none" if alone else "full"
    software = "Megatron-DeepSpeed, layers timed alone" if alone else "Megatron-DeepSpeed"
    # Vocabularies are padded for tensor parallelism alone.
    row = {"vocab": 50257 if tensor == 1 else None, **row}
    return Run(
        _gpt(row, dropout=0.1), device, network, software, pipe, data, tensor,
        "optimizer", False, size, count, 1, recompute, "float16", "", False, megatron=True,
    )  # fmt: skip


def _korthikanti(row: Mapping[str, Any]) -> Run:
    pipe, data, tensor = _degrees(row)
    size, count = _microbatches(row, data)
    device, network = _hardware(row)
    full = str(row["recompute"]).startswith("full")
    return Run(
        _gpt(row, dropout=0.1), device, network, "Megatron-LM", pipe, data, tensor, "",
        not full, size, count, int(row.get("vp") or 1), "full" if full else "attention", "float16",
        "float32", False, megatron=True,
    )  # fmt: skip


def _mpt(row: Mapping[str, Any]) -> Run:
    pipe, data, tensor = _degrees(row)
    size, count = _microbatches(row, data)
    device, network = _hardware(row)
    sharded = {"FULL_SHARD": "parameters", "SHARD_GRAD_OP": "gradients"}.get(row["sharding"])
    if sharded is None:
        raise NotCovered(f"sharding {row['sharding']} of Composer")
    recompute = "full" if row.get("activation_checkpointing") else "none"
    sums = "float32" if row.get("mp_mode") == "DEFAULT" else ""
    return Run(
        _gpt(row, bias=False, flash=True), device, network, "Composer", pipe, data, tensor,
        sharded, False, size, count, 1, recompute, "bfloat16", sums, True,
    )  # fmt: skip


LLAMA = {
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "70b": (8192, 28672, 80, 64, 8, 128256),
    "405b": (16384, 53248, 126, 128, 8, 128256),
}


def _torchtitan(row: Mapping[str, Any]) -> Run:
    pipe, data, tensor = _degrees(row)
    size, count = _microbatches(row, data)
    device, network = _hardware(row)
    dims = LLAMA[row["model"].rsplit("-", 1)[1].lower()]
    shape = ModelShape(*dims, int(row["seq_len"]), gated=True, bias=False, tied=False, flash=True)
    software = "torchtitan, compiled" if row.get("torch_compile") else "torchtitan, eager"
    ac, extra = str(row.get("activation_checkpointing")), str(row.get("extra"))
    recompute = {"full": "full", "selective": "half", "per-op selective": "half"}[ac]
    stages_per_rank, sharded = 1, "parameters"
    if pipe > 1:  # as many microbatches as stages; weights stay gathered between them
        stages_per_rank, sharded = (2 if "interleaved" in extra else 1), "optimizer"
        count = pipe * stages_per_rank
        size, rest = divmod(size, count)
        if rest or not size:
            raise NotCovered("stages do not divide the batch of a data rank")
    return Run(
        shape, device, network, software, pipe, data, tensor, sharded, tensor > 1, size, count,
        stages_per_rank, recompute, "bfloat16", "float32", True, "async" in extra,
        int(row.get("cp") or 1), "float8" if "float8" in row["precision"] else "",
        stage_buffers=True,
    )  # fmt: skip


def _megatron_bridge(row: Mapping[str, Any]) -> Run:
    """Its recipes overlap tensor-parallel collectives with products (`tp_comm_overlap`), shard the
    optimizer's states, and recompute nothing in the models that are covered."""
    # What it calls FSDP is a degree in some tables and a flag in others.
    row = {key: value for key, value in row.items() if key != "fsdp"} | {
        "gathers": bool(row.get("fsdp"))
    }
    named = re.fullmatch(r"LLAMA3(?:\.1)?_(\d+B)", str(row["model"]), re.IGNORECASE)
    if named is None or named[1].lower() not in LLAMA:
        raise NotCovered("no reader: the data set's rows do not say enough of the model")
    pipe, data, tensor = _degrees(row)
    size, count = _microbatches(row, data)
    device, network = _hardware(row)
    shape = ModelShape(
        *LLAMA[named[1].lower()], int(row["seq_len"]), gated=True, bias=False, tied=False,
        flash=True,
    )  # fmt: skip
    return Run(
        shape, device, network, "Megatron-Bridge", pipe, data, tensor,
        "parameters" if row["gathers"] else "optimizer", tensor > 1, size, count,
        int(row.get("vp") or 1), "none", "bfloat16", "", False, True, int(row.get("cp") or 1),
        _short(row["precision"].lower()), megatron=True,
        node_size=64 if device.startswith("GB") else 8,  # of the 72 of a rack
    )  # fmt: skip


def _short(precision: str) -> str:
    if "bf16" in precision:
        return ""
    if precision.startswith("nvfp4"):
        return "nvfp4"
    return "mxfp8" if precision.startswith(("mxfp8", "fp8-mx")) else "float8"


_READERS = {
    "vTrain-single": _vtrain,
    "vTrain-multi": _vtrain,
    "Korthikanti-tab5": _korthikanti,
    "MPT-llm-foundry": _mpt,
    "torchtitan": _torchtitan,
    "Megatron-Bridge": _megatron_bridge,
}


def group_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Rows of one group do the same work on the same number of GPUs."""
    batch = row.get("global_batch")
    return row["dataset"], row["model"], row["hardware"], row["n_gpus"], batch, row.get("seq_len")


def halves(rows: Sequence[Mapping[str, Any]], seed: int) -> list[bool]:
    """Per row whether its numbers may be fitted to it: a random half of every data set."""
    import random

    order = random.Random(seed)
    fitted = [False] * len(rows)
    for name in sorted({row["dataset"] for row in rows}):
        members = [k for k, row in enumerate(rows) if row["dataset"] == name]
        for k in order.sample(members, math.ceil(len(members) / 2)):
            fitted[k] = True
    return fitted
