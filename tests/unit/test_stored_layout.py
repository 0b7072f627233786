"""Which rows of a tensor each rank holds, with and without an axis of pipeline stages."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from autopar import ClusterInfo
from autopar.comm.owned_shards import Owned
from autopar.comm.stored_layout import StoredLayout, pipe_axis
from autopar.ir.spec import ShardingSpec


@dataclass
class Mesh:
    """What a layout asks of a DeviceMesh."""

    mesh_dim_names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def ndim(self):
        return len(self.shape)

    def size(self, axis):
        return self.shape[axis]

    def ranks(self):
        return itertools.product(*map(range, self.shape))


MESHES = [
    Mesh(("pipe", "data"), (2, 3)),
    Mesh(("data", "pipe"), (2, 2)),
    Mesh(("data", "pipe", "tensor"), (2, 3, 2)),
]


@pytest.mark.parametrize("text", ["", "R", "S1R", "S1R@0", "RS02@13", "RR@1"])
def test_layouts_read_as_they_print(text):
    assert str(StoredLayout.parse(text)) == text


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("stage", [None, 0, 1])
@pytest.mark.parametrize("split", [(), (0,), (1,)])
def test_the_ranks_of_one_stage_hold_each_element(mesh, stage, split):
    axis = pipe_axis(mesh)
    others = tuple(a for a in range(mesh.ndim) if a != axis)
    dims = [others if dim in split else () for dim in range(2)]
    layout = StoredLayout(ShardingSpec(tuple(dims)), stage)
    x, held = torch.arange(35).view(7, 5), torch.zeros(7, 5)
    for coords in mesh.ranks():
        part = layout.slices(x.shape, mesh, coords)
        assert torch.equal(layout.shard_of(x, mesh, coords), x[part])
        held[part] += 1
        if stage is not None and coords[axis] != stage:
            assert layout.shard_of(x, mesh, coords).shape[0] == 0
    replicas = (1 if split else torch.Size(mesh.shape).numel() // mesh.shape[axis]) * (
        1 if stage is not None else mesh.shape[axis]
    )
    assert (held == replicas).all()


def test_placements_name_the_owner():
    placements = StoredLayout.parse("S1R@1").placements(MESHES[0])
    assert placements[0] == Owned(0, 1) and placements[1].is_shard(0)
    assert Owned(0, 1) != Owned(0, 0) and Owned(0, 1) != placements[1] != Owned(0, 1)
    assert len({Owned(0, 1), Owned(0, 0), Owned(0, 1), placements[1]}) == 3


def test_clusters_know_their_pipe_axis():
    assert ClusterInfo.of("pipe=2,data=4").pipe_axis == 0
    assert ClusterInfo.of("data=4,pipe=2").pipe_axis == 1
    assert ClusterInfo.of("node=2,gpu=4").pipe_axis is None
    assert ClusterInfo.of("2x4").pipe_axis is None
