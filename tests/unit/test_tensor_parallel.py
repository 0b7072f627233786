"""1D, 2D, 2.5D and 3D tensor parallelism: what a rank sends and holds, and presets in words."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from autopar import ClusterInfo, autoplan
from autopar.cli.app import app
from autopar.errors import ConstraintError
from autopar.planner.tensor_schemes import SCHEMES
from tests.tensor_parallel import Block, Branches, Case, measure

MESHES = {"tp1d": "4", "tp2d": "2x2", "tp2.5d": "2x2x2", "tp3d": "2x2x2"}
P, D, Q = 4, 2, 2  # ranks of tp1d, depth, and ranks along the other axes

# float64 bytes of a block: its input and output, the values between its two products, each weight
ROWS, WIDTH = 32, 16
X_BYTES = 8 * ROWS * WIDTH
H_BYTES = 4 * X_BYTES
W_BYTES = 8 * 4 * WIDTH * WIDTH


@dataclass(frozen=True)
class PerBlock:
    sent: tuple[float, ...]
    parameters: int
    kept: int


@cache
def per_block(preset: str, regather: bool, block: type[nn.Module] = Block) -> PerBlock:
    """Of one block: the difference between two blocks and one, the same on every rank."""
    one, two = (
        measure(case, case.plan(MESHES[preset], preset), regather=regather)
        for case in (Case.blocks(count, ROWS, WIDTH, block) for count in (1, 2))
    )
    assert max(m.error for m in two.values()) < 1e-10
    (same,) = {
        PerBlock(
            tuple(b - a for a, b in zip(one[rank].sent, two[rank].sent, strict=True)),
            two[rank].parameters - one[rank].parameters,
            two[rank].kept - one[rank].kept,
        )
        for rank in one
    }
    return same


# -- bytes, against the published table ---------------------------------------------------------


def test_bytes_of_1d():
    """2 (P - 1) / P of the activations per product: one all-reduce forward, one backward."""
    block = per_block("tp1d", regather=False)
    assert block.sent == (2 * 2 * (P - 1) / P * X_BYTES,)
    assert block.parameters == 2 * W_BYTES / P
    # the input is whole on every rank; both values between the products are split
    assert block.kept == X_BYTES + 2 * H_BYTES / P


def test_bytes_of_2d():
    """6 (q - 1) / q per product, half of it in rows of X, half of it in columns of W."""
    block = per_block("tp2d", regather=True)
    of_weights = 3 * (Q - 1) / Q * (2 * W_BYTES / Q)
    of_activations = 3 * (Q - 1) / Q * ((X_BYTES + H_BYTES) / Q)
    assert block.sent == (of_weights, of_activations)
    assert block.parameters == 2 * W_BYTES / Q**2
    assert block.kept == (X_BYTES + 2 * H_BYTES) / Q**2


def test_bytes_of_2_5d():
    """3 (q - 1) (d + 1) / (d q) per product: of activations 1/d of 2D. The table leaves out that
    gradients of weights are summed over the depth."""
    block = per_block("tp2.5d", regather=True)
    over_depth = 2 * (D - 1) / D * (2 * W_BYTES / Q**2)
    of_weights = 3 * (Q - 1) / Q * (2 * W_BYTES / Q)
    of_activations = 3 * (Q - 1) / (D * Q) * ((X_BYTES + H_BYTES) / Q)
    assert block.sent == (over_depth, of_weights, of_activations)
    assert block.parameters == 2 * W_BYTES / Q**2
    assert block.kept == (X_BYTES + 2 * H_BYTES) / (D * Q**2)


def test_bytes_of_3d():
    """6 (q - 1) / q^3 per product: two of X, two of W and two of Y."""
    block = per_block("tp3d", regather=False)
    per_product = 2 * (Q - 1) / Q**3 * (X_BYTES + W_BYTES + H_BYTES)
    assert sum(block.sent) == 2 * per_product
    assert block.parameters == 2 * W_BYTES / Q**3
    # The table's memory without what was gathered costs a second gather of X and W.
    again = per_block("tp3d", regather=True)
    assert sum(again.sent) == 2 * per_product + (Q - 1) / Q**3 * (X_BYTES + H_BYTES + 2 * W_BYTES)
    assert again.kept == (X_BYTES + 2 * H_BYTES) / Q**3


@pytest.mark.parametrize(("preset", "depth"), [("tp2d", 1), ("tp2.5d", D)])
def test_gathered_operands_that_are_kept_save_a_third(preset, depth):
    kept, again = per_block(preset, regather=False), per_block(preset, regather=True)
    assert kept.sent[-2:] == tuple(2 / 3 * sent for sent in again.sent[-2:])
    gathered = (X_BYTES + H_BYTES) / (depth * Q) + 2 * W_BYTES / Q
    assert kept.kept == gathered + H_BYTES / (depth * Q**2)


def test_products_of_one_value_gather_it_once():
    """And reduce-scatter the sum of its gradients: 2 instead of 9 times."""
    block = per_block("tp2d", regather=False, block=Branches)
    assert block.sent[1] == 2 * (Q - 1) / Q * X_BYTES / Q


# -- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 1], ids=["a batch", "one text"])
@pytest.mark.parametrize("preset", list(MESHES))
def test_a_transformer_equals_a_single_device(preset, rows):
    """The rows of one text are its tokens."""
    case = Case.transformer(rows, 6 if rows > 1 else 12)
    planned = case.plan(MESHES[preset], preset)
    assert max(m.error for m in measure(case, planned).values()) < 1e-10
    words = {m.name: m.words for m in planned.plan.modules}
    expected = {
        "tp1d": "tensor parallel on axis 0, column",
        "tp2d": "2D tensor parallel on axes 0 and 1 (SUMMA)",
        "tp2.5d": "rows split over axis 0 (depth); 2.5D tensor parallel on axes 1 and 2 (SUMMA)",
        "tp3d": "3D tensor parallel on axes 0, 1 and 2",
    }[preset]
    for name in ("layers.*.up", "layers.*.down", "layers.*.attention.out", "head"):
        word = expected.replace("column", "row") if name.endswith(("down", "out")) else expected
        assert word in words[name], name


def test_1d_without_the_residual_stream_becomes_sequence_parallel():
    """Rows are then split between a pair of products and the next."""
    case = Case.blocks(2, ROWS, WIDTH)
    whole = case.plan("4", "tp1d").plan.constraints
    edited = {name: layout for name, layout in whole.items() if not name.endswith("add")}
    planned = case.plan("4", edited)
    assert planned.plan.choices["add"] == "d2"  # the rows
    assert max(m.error for m in measure(case, planned).values()) < 1e-10


def test_sizes_need_not_be_divisible():
    case = Case.blocks(1, 7, 6)
    planned = case.plan("2x2", "tp2d")
    assert max(m.error for m in measure(case, planned).values()) < 1e-10


def test_products_do_not_run_in_steps_unless_asked():
    """On devices that communicate beside compute, gather and scatter give the same layouts."""
    case = Case.blocks(2, ROWS, WIDTH)
    planned = case.plan("2x2", "tp2d", overlaps=True)
    assert planned.plan.constraints["blocks.*.up.linear"] == "S0S1 by b1 n"
    assert planned.plan.choices["linear"] == "b1 n"
    asked = {**planned.plan.constraints, "blocks.*.up.linear": "S0S1 by b1 gather"}
    assert case.plan("2x2", asked, overlaps=True).plan.choices["linear"] == "b1 gather"


# -- constraints --------------------------------------------------------------------------------


def test_a_preset_is_constraints_in_words():
    case = Case.blocks(3, ROWS, WIDTH)
    planned = case.plan("2x2x2", "tp3d")
    assert planned.plan.constraints == {
        "blocks.*.up.weight": "S2S01",
        "blocks.*.up.linear": "S1S2P0(sum) by b1 k n",
        "blocks.*.gelu": "S10S2",
        "blocks.*.down.weight": "S01S2",
        "blocks.*.down.linear": "S1S0P2(sum) by b1 k n",
        "blocks.*.add": "S12S0",
    }
    again = case.plan("2x2x2", planned.plan.constraints)
    assert again.plan.choices == planned.plan.choices


def test_axes_of_size_one_and_names():
    case = Case.blocks(1, ROWS, WIDTH)
    planned = case.plan("node=1,row=2,column=2", "tp2d")
    assert planned.plan.constraints["blocks.0.up.weight"] == "S2S1"
    words = {m.name: m.words for m in planned.plan.modules}
    assert words["blocks.0.up"] == "2D tensor parallel on row and column (SUMMA)"


def test_tensor_and_data_parallel_are_not_2d():
    """ZeRO over one axis, columns over the other and rows split over both: X is gathered, too."""
    case = Case.blocks(1, ROWS, WIDTH)
    layouts = {
        "blocks.0.up.weight": "S1S0", "blocks.0.up": "S0S1 by b1 n", "inputs.x": "S01R",
    }  # fmt: skip
    words = {m.name: m.words for m in case.plan("2x2", layouts).plan.modules}
    assert words["blocks.0.up"].startswith("data parallel on axis 0, ZeRO-")
    assert "tensor parallel on axis 1, column" in words["blocks.0.up"]


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "mesh", "message"),
    [
        ("tp2", "2x2", "there is no preset 'tp2'; presets are tp1d, tp2d, tp2.5d, tp3d"),
        ("tp1d", "1", "preset tp1d splits a model over devices, and the mesh has one"),
        ("tp1d", "2x2", "is for a mesh of one axis, and mesh 2x2 is not one; .* can be 4$"),
        ("tp2d", "4", "of two equal axes, and mesh 4 is not one; its 4 ranks can be 2x2"),
        ("tp2d", "2x4", "8 ranks have no such mesh; the nearest are 2x2 and 3x3"),
        ("tp2.5d", "2x4", "of three axes, of which the last two are equal, .* can be 2x2x2"),
        ("tp2.5d", "2x2", "4 ranks have no such mesh; the nearest are 2x2x2"),
        ("tp3d", "2x2x3", "of three equal axes, .* the nearest are 2x2x2 and 3x3x3"),
    ],
)
def test_meshes_that_are_refused(preset, mesh, message):
    with pytest.raises(ConstraintError, match=message):
        Case.blocks(1, ROWS, WIDTH).plan(mesh, preset)


def test_dims_that_are_too_small_are_refused():
    product = r"mesh .* leaves ranks without a part of every one of the model's 2: aten.linear.* "
    rows = product + r"would split rows of size 3 over 4 ranks. Take more samples or longer ones$"
    with pytest.raises(ConstraintError, match=rows):
        Case.blocks(1, 3, WIDTH).plan("2x2x2", "tp2.5d")
    both = r"rows of size 1 over 4 ranks and features of the result of size 2 over 4 ranks. Take"
    with pytest.raises(
        ConstraintError, match=both + " more samples or longer ones and a smaller mesh"
    ):
        Case.transformer(1, length=1, width=2).plan("4x4", "tp2d")
    features = product + r"would split features of the result of size 8 over 16 ranks. Take a sm"
    with pytest.raises(ConstraintError, match=features):
        Case.blocks(1, 1, 2).plan("16", "tp1d")


def test_a_model_without_products_is_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return (self.scale * x).sum()

    with pytest.raises(ConstraintError, match="such as linear layers, and the model has none"):
        autoplan(Scaled(), (torch.ones(4, 8),), cluster="2x2", constraints="tp2d")


def test_the_command_writes_constraints_that_it_reads(tmp_path):
    """And refuses a preset beside a file."""
    model, saved = "examples/mlp.py", tmp_path / "tp2d.yaml"
    base = ["plan", model, "--mesh", "2x2", "--no-baselines"]
    runner = CliRunner()
    result = runner.invoke(app, [*base, "--preset", "tp2d", "--save-constraints", str(saved)])
    assert result.exit_code == 0, result.output
    assert "2D tensor parallel on axes 0 and 1 (SUMMA)" in " ".join(result.output.split())
    assert set(SCHEMES) == {*MESHES}
    constraints = yaml.safe_load(saved.read_text())
    assert constraints["blocks.*.up.weight"] == "S1S0"
    again = runner.invoke(app, [*base, "--constraints", str(saved), "--json"])
    assert again.exit_code == 0, again.output
    both = runner.invoke(app, [*base, "--constraints", str(saved), "--preset", "tp2d"])
    assert both.exit_code != 0
    assert "give it alone" in " ".join(both.output.split())


class WithTable(nn.Module):
    """A product of a table of positions that the forward computes, as in Transformer-XL."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.arange(8.0)[:, None] * torch.arange(16.0) / 9
        return self.last(torch.relu(self.tokens(x) + self.positions(table.sin())))


@pytest.mark.parametrize(("preset", "mesh"), [("tp1d", "4"), ("tp2d", "2x2"), ("tp3d", "2x2x2")])
def test_a_product_that_no_input_is_in_is_laid_out(preset, mesh):
    x = torch.zeros(4, 8, 16)
    plan = autoplan(WithTable(), (x,), cluster=ClusterInfo.of(mesh), constraints=preset).plan
    assert "positions.weight" in plan.constraints
