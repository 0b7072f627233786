"""Precision policies: parameters at rest, compute and gathers, and the sums of gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from autopar import ClusterInfo, Precision, ShardingPlan, auto_engine, autoplan
from autopar.comm import world
from autopar.compile import compile_first_rank, plan_step
from autopar.errors import EngineError, PlanError
from autopar.planner.joint import JointPlan
from tests.models import CASES


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    yield
    world.stop()


def _in_float32(name: str):
    batch = CASES[name].batch(0)
    floats = {k: x.float() if x.is_floating_point() else x for k, x in batch.items()}
    return CASES[name].build().float(), floats


def _cast_by_hand(model: nn.Module, batch, dtype: torch.dtype, keep: str = " "):
    """Loss and gradients of a model whose parameters and inputs are cast."""
    parameters = {name: p if keep in name else p.to(dtype) for name, p in model.named_parameters()}
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}
    loss = torch.func.functional_call(model, parameters, (), inputs)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("memory", [None, 2.0**26])
@pytest.mark.parametrize("name", ["mlp", "gpt2", "vit"])
def test_a_step_is_that_of_a_model_cast_by_hand(name, memory):
    (alone, batch), (model, _) = _in_float32(name), _in_float32(name)
    expected, expected_grads = _cast_by_hand(alone, batch, torch.bfloat16)
    engine, _ = auto_engine(model, None, "1", precision="bf16", memory=memory)
    loss = engine(**batch)
    loss.backward()
    assert loss.dtype is expected.dtype
    torch.testing.assert_close(loss.detach(), expected)
    for parameter, p in engine.named_parameters():
        assert p.dtype is p.grad.dtype is torch.float32
        torch.testing.assert_close(
            p.grad.to_local(), expected_grads[parameter], rtol=2e-2, atol=2e-3
        )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_a_step_is_as_close_to_float32_as_the_dtype_allows(name, precision):
    (alone, batch), (model, _) = _in_float32(name), _in_float32(name)
    expected = alone(**batch)
    expected.backward()
    engine, _ = auto_engine(model, None, "1", precision=precision)
    loss = engine(**batch)
    loss.backward()
    digits = torch.finfo(torch.bfloat16 if precision == "bf16" else torch.float16).eps
    assert loss.item() == pytest.approx(expected.item(), rel=2 * digits)
    exact = torch.cat([p.grad.flatten() for p in alone.parameters()])
    short = torch.cat([p.grad.to_local().flatten() for p in engine.parameters()])
    assert (short - exact).norm() < 2 * digits * exact.norm()


def _casts(engine):
    """The casts of the engine's last program, by names of parameters and inputs."""
    graph = engine._autopar_runner.steps[-1].compiled.graph
    return {graph.parameters.get(name, name): cast for name, cast in graph.casts.items()}


class Sharded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(512, 2048, bias=False), nn.Linear(2048, 512, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu()).float().square().mean()


ZERO = {"up.weight": "S0R reshard", "down.weight": "S0R reshard", "inputs.x": "S0R"}


def _zero(**options) -> JointPlan:
    """A plan that stores weights split and gathers them twice, for a large batch."""
    return plan_step(
        Sharded(), (torch.randn(32768, 512),), cluster=ClusterInfo.of("4", "l4"),
        constraints=ZERO, **options,
    )  # fmt: skip


def _weight_bytes(joint: JointPlan) -> dict[str, int]:
    """Bytes that the first rank gathers and gets of sums, of weights."""
    step = compile_first_rank(joint).lowered
    moved = {"all_gather": 0, "reduce_scatter": 0}
    for gm in (step.forward, step.backward):
        for node in gm.graph.nodes:
            for kind in moved:
                if node.op == "call_function" and f"{kind}_" in str(node.target):
                    value = node.meta["val"]
                    size = value.numel() * value.element_size()
                    moved[kind] += size * (kind in str(node.target))
    return moved


@pytest.mark.parametrize("how", ["policy", "autocast", "sums in bfloat16", "none"])
def test_gathers_are_of_the_short_dtype_and_sums_of_the_long_one(how):
    policy = {
        "policy": "bf16", "sums in bfloat16": Precision(reductions="bf16"),
    }.get(how)  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        moved = _weight_bytes(_zero(precision=policy))
    elements = 512 * 2048  # of each of two weights; the backward reads one of them again
    gathered, summed = {"none": (4, 4), "sums in bfloat16": (2, 2)}.get(how, (2, 4))
    assert moved["all_gather"] == 3 * gathered * elements
    assert moved["reduce_scatter"] == 2 * summed * elements // 4


def test_predictions_know_the_policy():
    short, sums, long = (
        _zero(precision=p).planned.plan for p in ("bf16", Precision(reductions="bf16"), None)
    )
    assert short.time.compute_us < long.time.compute_us
    assert sums.time.weights_us < short.time.weights_us < long.time.weights_us
    for kind in ("parameters_bytes", "optimizer_bytes"):
        assert getattr(short.memory, kind) == getattr(long.memory, kind)
    assert short.memory.activations_bytes < long.memory.activations_bytes


def test_the_cast_copies_of_weights_are_counted():
    """Replicated weights are kept a second time in the dtype of compute."""
    joint = plan_step(
        Sharded(), (torch.randn(8192, 512),), cluster="1", precision="bf16", schedule=True,
        optimizer_state=0.0,
    )  # fmt: skip
    step, memory = joint.planned.plan.step, joint.planned.plan.memory
    assert memory.activations_bytes > 2 * 2 * 512 * 2048
    assert memory.total_bytes == pytest.approx(step.peak_bytes + step.resident_bytes, rel=0.03)


def test_a_plan_carries_its_policy(tmp_path):
    policy = Precision("float16", keep=("down",))
    x = torch.randn(4, 512)
    plan = autoplan(Sharded(), (x,), cluster="1", precision=policy).plan
    plan.save(tmp_path / "plan.json")
    assert ShardingPlan.load(tmp_path / "plan.json").precision == policy
    engine, _ = auto_engine(Sharded(), None, "1", plan=tmp_path / "plan.json")
    engine(x).backward()
    casts = _casts(engine)
    assert {c.compute for c in casts.values()} == {torch.float16}
    assert sorted(casts) == ["up.weight", "x"]
    world.stop()
    engine, _ = auto_engine(Sharded(), None, "1", plan=plan, precision="bf16")
    with pytest.raises(PlanError, match=r"compute float16.*compute bfloat16"):
        engine(x)


def test_bfloat16_parameters_get_master_weights():
    """Small updates are lost in bfloat16, and add up in float32."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4).bfloat16()
    weight, before = model.weight, model.weight.detach().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    engine, optimizer = auto_engine(model, optimizer, "1", precision="bf16")
    for _ in range(8):
        engine(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weight.dtype is engine.weight.dtype is torch.float32
    moved = engine.weight.full_tensor() - before
    torch.testing.assert_close(moved, torch.full((4, 8), -16e-4), rtol=1e-2, atol=1e-6)


def test_a_failed_step_gives_bfloat16_parameters_back():
    model = nn.Linear(8, 4).bfloat16()
    before = model.weight.detach().clone()
    engine, _ = auto_engine(model, None, "1", precision="bf16")
    with pytest.raises(Exception, match=r"shape|size"):
        engine(torch.ones(2, 7))
    assert model.weight.dtype is torch.bfloat16
    assert torch.equal(model.weight.detach(), before)


def test_a_scaler_skips_steps_that_overflow():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    engine, optimizer = auto_engine(model, optimizer, "1", precision="fp16")
    x = torch.randn(8, 16)
    before = engine.get_parameter("0.weight").full_tensor().clone()
    losses, scales = [], []
    for _ in range(12):
        loss = engine(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        if scales[-1] == 2.0**19:
            assert torch.equal(before, engine.get_parameter("0.weight").full_tensor())
    assert scales[0] == 2.0**19
    assert scales[-1] == scales[-2]
    assert losses[-1] < 0.5 * losses[0]


def test_batch_normalization_stays_in_float32():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    engine, _ = auto_engine(model, None, "1", precision=Precision(outputs="float32"))
    out = engine(torch.randn(4, 3, 8, 8))
    out.square().mean().backward()
    assert out.dtype is torch.float32
    assert engine.get_parameter("1.weight").grad is not None
    assert sorted(_casts(engine)) == ["0.bias", "0.weight", "input"]
    assert engine.get_buffer("1.running_mean").dtype is torch.float32


@pytest.mark.parametrize("precision", ["int8", "bf17", torch.int32])
def test_other_dtypes_are_refused(precision):
    with pytest.raises(ValueError, match="no dtype to train in"):
        auto_engine(nn.Linear(2, 2), None, "1", precision=precision)


def test_what_cannot_be_put_in_force_is_refused():
    with pytest.raises(ValueError, match="lower=False"):
        auto_engine(nn.Linear(2, 2), None, "1", precision="bf16", lower=False)
    with torch.device("meta"):
        model = nn.Linear(2, 2).bfloat16()
    with pytest.raises(EngineError, match="weight has no values yet"):
        auto_engine(model, None, "1", precision="bf16")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.head.weight = self.table.weight
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, ids):
        h = self.table(ids)
        for layer in self.layers:
            h = layer(h)
        return self.criterion(self.head(h), ids)

    def encode(self, h):
        return self.layers[0](h)

    def loss_of(self, ids):
        return self(ids)


def _kept_by_hand(model: Tied, ids: torch.Tensor, keep: str) -> torch.Tensor:
    """The loss with one part in float32 and the rest in bfloat16."""
    short, whole = torch.bfloat16, torch.float32
    part = {name: whole if name == keep else short for name in ("tied", "layers", "criterion")}
    h = model.table.weight.to(part["tied"])[ids].to(short)
    for layer in model.layers:
        h = h.to(part["layers"])
        h = nn.functional.linear(
            h, layer.weight.to(part["layers"]), layer.bias.to(part["layers"])
        ).to(short)
    logits = (h.to(part["tied"]) @ model.head.weight.to(part["tied"]).t()).to(short)
    return model.criterion(logits.to(part["criterion"]), ids)


@pytest.mark.parametrize(
    ("keep", "part"),
    [(("table", "head"), "tied"), ("layers", "layers"), ("layers.*", "layers"),
     ("criterion", "criterion")],
)  # fmt: skip
def test_kept_modules_compute_in_the_dtype_at_rest(keep, part):
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(16)
    expected = _kept_by_hand(model, ids, part)
    engine, _ = auto_engine(model, None, "1", precision=Precision(keep=keep))
    loss = engine(ids)
    assert loss.dtype is expected.dtype
    assert loss.item() == expected.item()
    loss.backward()
    assert engine.get_parameter("table.weight").grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("head", "head.weight, which is the same parameter as table.weight; keep both"),
        ("laiers", "no module is called 'laiers', as keep says; did you mean 'layers'"),
        (3, "keep takes names of modules, got 3"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, words):
    with pytest.raises(ValueError, match=words):
        auto_engine(Tied(), None, "1", precision=Precision(keep=keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_methods_compute_in_the_dtype_of_compute(dtype):
    torch.manual_seed(0)
    ids, h = torch.arange(16), torch.randn(4, 8).to(dtype)
    engine, _ = auto_engine(Tied().to(dtype), None, "1", precision="bf16")
    loss = engine(ids)
    assert engine.encode(h).dtype is torch.bfloat16
    assert engine.loss_of(ids).item() == loss.item()
    with torch.no_grad():
        assert engine.loss_of(ids).item() == pytest.approx(loss.item(), rel=1e-2)
    assert len(engine.steps) == 1


def test_policies_are_told_apart_in_words():
    kept = Precision(keep=("table", "head"), cast_inputs=False)
    assert str(kept) == f"{Precision()}, inputs as they are, kept: table, kept: head"
