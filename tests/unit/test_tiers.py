"""Memory beyond the device's: what a cluster says of it, states on a drive, and what goes wrong
there."""

import copy
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from autopar import ClusterInfo, ShardingPlan, auto_engine
from autopar.cluster.link import Link
from autopar.cluster.tiers import HOST, NVME, StateBytes, Tier
from autopar.comm import world as environment
from autopar.compile import plan_step
from autopar.errors import EngineError, InfeasibleError, MeshError
from autopar.optim.elementwise import ELEMENTWISE
from autopar.report.headline import headline
from autopar.runtime import chunks
from autopar.runtime.chunk_files import ChunkFiles

ROWS = """
mesh: [2]
device: A100-80G
tiers:
- {name: host, capacity: 512GiB, bandwidth: 25.0e+9, latency: 12.0e-6, shared_by: 8}
- {name: nvme, capacity: 3TB, bandwidth: 5.0e+9, directory: /local/states}
"""


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    yield
    environment.stop()


# -- a cluster's tiers --------------------------------------------------------------------------


def test_tiers_are_rows_of_a_cluster_file():
    cluster = ClusterInfo.from_dict(yaml.safe_load(ROWS))
    assert cluster.host_link.beta == 1 / 25e9 and cluster.host_link.alpha == 12e-6
    assert cluster.host_memory_bytes == 512 * 2**30 / 8
    assert ClusterInfo.from_dict(yaml.safe_load(cluster.to_yaml())) == cluster


@pytest.mark.parametrize(
    "row, message",
    [
        ({"bandwidth": 0}, r"tier 'host': bandwidth must be positive and finite, got 0"),
        ({"capacity": 0}, r"tiers\[0\].capacity: memory size must be positive"),
        ({"latency": -1.0}, r"tier 'host': latency must be zero or positive"),
        ({"shared_by": 0}, r"tier 'host': shared_by is a number of devices, got 0"),
        ({"directory": "/tmp"}, r"tier 'host': directory= is where states are written"),
        ({"name": "tape"}, r"tier 'tape': a tier is named 'host' or 'nvme'"),
        ({"speed": 1}, r"tiers\[0\] must have bandwidth and name .*, got .*speed"),
        ({"name": "nvme"}, r"'nvme' needs one"),
        ({"name": "nvme", "directory": "/x"}, r"states on 'nvme' are stepped on the host; add a"),
    ],
)
def test_bad_rows_are_refused(row, message):
    data = {"mesh": [1], "device": "cpu", "tiers": [{"name": "host", "bandwidth": 1e9} | row]}
    with pytest.raises(ValueError, match=message):
        ClusterInfo.from_dict(data)


def test_one_way_to_say_it():
    data = yaml.safe_load(ROWS) | {"host_link": {"alpha": 0, "beta": 1e-9}}
    with pytest.raises(ValueError, match="leave host_link and host_memory_bytes out"):
        ClusterInfo.from_dict(data)
    data["tiers"] *= 2
    del data["host_link"]
    with pytest.raises(ValueError, match="host, nvme, host, nvme: give each name once"):
        ClusterInfo.from_dict(data)


def test_states_take_the_nearest_tier_with_room():
    states = StateBytes(100.0, 100.0, 200.0)
    drive = Tier(NVME, 1e9, directory="/x", capacity=600.0)

    def place(host_bytes: float, *more: Tier) -> str | None:
        return states.place((Tier(HOST, 1e9, capacity=2 * host_bytes, shared_by=2), *more))

    assert states.place(()) is None
    assert place(400.0) == HOST and place(399.0, drive) == NVME
    for refused, message in (
        ((399.0,), "need 400 B on the host, which has 399 B"),
        ((199.0, drive), "parameters and gradients still need 200 B there"),
        ((399.0, replace(drive, shared_by=2)), "need 600 B, and it has 300 B for a device"),
    ):
        with pytest.raises(ValueError, match=message):
            place(*refused)


# -- training with states on a drive ------------------------------------------------------------

HOST_BYTES = 45_000.0  # room for parameters and gradients


def built(kind: type = torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16), nn.Linear(16, 4))
    model = model.double()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    return model, kind(model.parameters(), lr=1e-2, **options)


# one of a kind: in what state they have, and in how they step
KINDS = (
    torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam, torch.optim.ASGD, torch.optim.Adagrad,
)  # fmt: skip
assert ELEMENTWISE.issuperset(KINDS)


def batch(step: int) -> torch.Tensor:
    return torch.randn(
        8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
    )  # fmt: skip


def engine(directory: Path | str, kind: type = torch.optim.AdamW, **options):
    tiers = (
        Tier(HOST, 1e9, capacity=HOST_BYTES),
        Tier(NVME, 1e9, directory=str(directory)),
    )
    model, optimizer = built(kind)
    cluster = replace(ClusterInfo.of("1"), tiers=tiers)
    return auto_engine(model, optimizer, cluster, memory=30e3, progress=False, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(model: nn.Module, alone: nn.Module) -> float:
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max((p.full_tensor() - q).abs().max().item() for p, q in pairs)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3000)


def test_a_report_tells_moves_of_states_from_recomputation():
    plan = _on_a_host(1e9)
    lines = dict(headline(plan))
    assert plan.states_on == HOST and "states off the device" in lines["step is"]
    assert "recomput" not in lines["made to fit by"]


def test_a_host_without_room_is_named():
    with pytest.raises(InfeasibleError, match=r"need .* on the host, which has 43\.9 KiB for it"):
        _on_a_host(45e3)


def _on_a_host(capacity: float) -> ShardingPlan:
    """Of a model whose states are too much for the device."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    cluster = replace(ClusterInfo.of("1"), tiers=(Tier(HOST, 1e9, capacity=capacity),))
    batch = (torch.zeros(8, 256),)
    joint = plan_step(model, batch, cluster=cluster.with_memory(3e6), steps_on=(HOST,))
    return joint.planned.plan


@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_a_drive_are_the_same(kind, tmp_path, small_chunks):
    (model, optimizer), (alone, beside) = engine(tmp_path, kind), built(kind)
    train(model, optimizer, range(2))
    train(alone, beside, range(2))
    assert model.plan.states_on == NVME and model.stored_steps == 2
    assert difference(model, alone) < 1e-12
    # whoever asks for the state finds it, and may change it
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        for key, value in beside.state[q].items():
            found = optimizer.state[p][key]
            whole = found.full_tensor() if hasattr(found, "full_tensor") else found
            assert torch.allclose(torch.as_tensor(whole), torch.as_tensor(value), atol=1e-12)
            if torch.is_tensor(value) and value.ndim:
                value.mul_(1.5)
                found.mul_(1.5)
    saved = optimizer.state_dict()
    train(model, optimizer, range(2, 4))
    train(alone, beside, range(2, 4))
    assert difference(model, alone) < 1e-12
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(4, 5))
    assert model.stored_steps == 5


def test_a_full_drive_loses_nothing(tmp_path, small_chunks, monkeypatch):
    (model, optimizer), (alone, beside) = engine(tmp_path), built()
    write = os.pwritev
    # which write of a step fails: of the version before the first step, of any chunk, of the last
    for step, fails in enumerate([(2, 7), (1,), (4, 3), ()]):
        model(batch(step)).square().mean().backward()
        before = [p.full_tensor().clone() for p in model.parameters()]
        for count in fails:
            left = [count]

            def full(*args, left=left):
                left[0] -= 1
                if not left[0]:
                    raise OSError(28, "No space left on device")
                return write(*args)

            monkeypatch.setattr(os, "pwritev", full)
            with pytest.raises(EngineError, match=r"No space left on device. Nothing is lost"):
                optimizer.step()
            monkeypatch.setattr(os, "pwritev", write)
            for p, q in zip(model.parameters(), before, strict=True):
                assert torch.equal(p.full_tensor(), q)
            assert model.stored_steps == step
        optimizer.step()
        optimizer.zero_grad()
    train(alone, beside, range(4))
    assert difference(model, alone) < 1e-12


KILLED = """
import os, signal, sys
from autopar.runtime import chunks
from autopar.runtime.chunk_files import ChunkFiles
from tests.unit.test_tiers import engine, train
chunks.CHUNK_BYTES = 3000
model, optimizer = engine(sys.argv[1])
train(model, optimizer, range(2))
write = os.pwritev
def amid(file, parts, offset):
    if model.stored_steps == 2 and b"0002." in os.readlink(f"/proc/self/fd/{file}").encode():
        write(file, [bytes(parts[0])[:100]], offset)  # a part of a chunk
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, parts, offset)
os.pwritev = amid
train(model, optimizer, range(2, 4))
"""


def test_a_run_that_was_killed_amid_a_write_goes_on(tmp_path, small_chunks):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, cwd=root, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with pytest.raises(EngineError, match="the states of a run after step 2; pass resume=True"):
        engine(tmp_path)
    model, optimizer = engine(tmp_path, resume=True)
    assert model.stored_steps == 2  # where the loop goes on, before the first batch
    # the parameters are those of a run that begins anew until the first plan
    for read in (model.full_state_dict, model.state_dict, optimizer.state_dict):
        with pytest.raises(EngineError, match=r"are those after step 2 from the first batch on"):
            read()
    with pytest.raises(EngineError, match="run a batch first"):
        copy.deepcopy(model)
    alone, beside = built()
    model.plan_for(batch(0))
    assert model.stored_steps == 2
    train(alone, beside, range(2))
    assert difference(model, alone) < 1e-12
    train(model, optimizer, range(2, 5))
    train(alone, beside, range(2, 5))
    assert difference(model, alone) < 1e-12
    environment.stop()
    del model, optimizer, read  # which keep the directory
    gc.collect()
    other = nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 4)).double()
    tiers = (Tier(HOST, 1e9, capacity=HOST_BYTES), Tier(NVME, 1e9, directory=str(tmp_path)))
    cluster = replace(ClusterInfo.of("1"), tiers=tiers)
    with pytest.raises(EngineError, match="are of other parameters than this rank's: "):
        auto_engine(
            other, torch.optim.AdamW(other.parameters()), cluster, memory=40e3, resume=True,
            example_inputs=batch(0), progress=False,
        )  # fmt: skip


def test_bad_drives_are_refused_at_the_start(tmp_path):
    model, optimizer = built()
    kept = list(model.parameters())
    (tmp_path / "file").write_text("")
    huge = replace(Tier(NVME, 1e9, directory=str(tmp_path)), capacity=1e18)
    for tier, message in (
        (Tier(NVME, 1e9, directory=str(tmp_path / "file")), "cannot be written: "),
        (huge, "GiB free, and tier 'nvme' of the cluster says"),
    ):
        cluster = replace(ClusterInfo.of("1"), tiers=(Tier(HOST, 1e9), tier))
        with pytest.raises(MeshError, match=message):
            auto_engine(model, optimizer, cluster, memory=30e3)
        environment.stop()
    with pytest.raises(EngineError, match="the cluster has no tier 'nvme'"):
        auto_engine(model, optimizer, "1", resume=True)
    pairs = zip(kept, model.parameters(), strict=True)
    assert all(p is q and type(p) is nn.Parameter for p, q in pairs)
    small = Tier(NVME, 1e9, directory=str(tmp_path), capacity=1e4)
    cluster = replace(ClusterInfo.of("1"), tiers=(Tier(HOST, 1e9, capacity=HOST_BYTES), small))
    with pytest.raises(InfeasibleError, match="two versions of parameters and optimizer's states"):
        auto_engine(model, optimizer, cluster, memory=30e3, example_inputs=batch(0))


class Own(torch.optim.Optimizer):
    """A user's own, by the norm of each gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.grad / p.grad.norm(), 0.1)
            p.sub_(mean, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("make", [torch.optim.Adafactor, lambda p: Own(p, {"lr": 0.01})])
def test_any_optimizer_steps_on_the_host(make):
    (model, _), (alone, _) = built(), built()
    optimizer, beside = make(model.parameters()), make(alone.parameters())
    cluster = replace(ClusterInfo.of("1"), tiers=(Tier(HOST, 1e9),))
    model, optimizer = auto_engine(model, optimizer, cluster, memory=20e3, progress=False)
    train(model, optimizer, range(3))
    train(alone, beside, range(3))
    assert model.plan.states_on == HOST and difference(model, alone) < 1e-12


def test_a_drive_takes_the_state_of_some_optimizers(tmp_path):
    model, _ = built()
    tiers = Tier(HOST, 1e9, capacity=HOST_BYTES), Tier(NVME, 1e9, directory=str(tmp_path))
    cluster = replace(ClusterInfo.of("1"), tiers=tiers)
    with pytest.raises(InfeasibleError, match="only an optimizer that treats each element by its"):
        auto_engine(
            model, Own(model.parameters(), {"lr": 0.01}), cluster, memory=20e3,
            example_inputs=batch(0), progress=False,
        )  # fmt: skip


def test_too_little_for_a_step_with_transfers_is_named():
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 17), nn.Linear(17, 4))
    cluster = replace(ClusterInfo.of("1"), host_link=Link(1e-9, 1e-15))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(InfeasibleError, match="Give at least"):
        auto_engine(
            model, optimizer, cluster, memory=11e3, example_inputs=batch(0).float(), progress=False
        )  # fmt: skip


def test_state_is_found_after_parameters_changed_their_places(tmp_path, small_chunks):
    (model, optimizer), (alone, beside) = engine(tmp_path), built()
    train(model, optimizer, range(2))
    train(alone, beside, range(2))
    for each in (optimizer, beside):
        each.param_groups[0]["params"].reverse()
    train(model, optimizer, range(2, 4))
    train(alone, beside, range(2, 4))
    assert difference(model, alone) < 1e-12
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        found = optimizer.state[p]["exp_avg"].full_tensor()
        assert torch.allclose(found, beside.state[q]["exp_avg"], atol=1e-12)


def test_a_directory_is_of_one_engine(tmp_path):
    model, optimizer = engine(tmp_path)
    model.plan_for(batch(0))
    other, _ = engine(tmp_path)
    with pytest.raises(EngineError, match="another engine, of this process or of another one, kee"):
        other.plan_for(batch(0))
    train(model, optimizer, range(1))
    assert model.stored_steps == 1


def test_files_that_vanish_are_named(tmp_path, small_chunks):
    model, optimizer = engine(tmp_path)
    train(model, optimizer, range(2))
    for file in tmp_path.rglob("*.bin"):
        file.unlink()
    with pytest.raises(EngineError, match=r"the states after step 2 cannot be read from .*No such"):
        train(model, optimizer, range(2, 3))


def test_states_of_microbatches_stay_on_the_device():
    model, optimizer = built()
    cluster = replace(ClusterInfo.of("1"), tiers=(Tier(HOST, 1e9),))
    with pytest.raises(InfeasibleError, match="a tier takes those of steps without microbatches="):
        auto_engine(
            model, optimizer, cluster, memory=40e3, microbatches=2, example_inputs=batch(0),
            progress=False,
        )  # fmt: skip


def test_a_damaged_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"autopar_states": 1, "vers')
    with pytest.raises(EngineError, match=r"manifest.json cannot be read: .*remove its directory"):
        ChunkFiles(tmp_path)
