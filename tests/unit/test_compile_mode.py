"""What `compile=` asks for, and what holds of what Inductor has built."""

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.fx as fx
from torch import nn
from torch._inductor import config

from autopar import ClusterInfo, auto_engine
from autopar.comm import world
from autopar.errors import EngineError
from autopar.passes import compile_mode, inductor
from autopar.passes.compile_mode import CompileMode
from autopar.passes.verify import VerifyError
from autopar.runtime import compiled_graphs
from autopar.runtime.compiled_graphs import difference

NO_COMPILER = {"cpp.cxx": ("no-such-compiler",)}


@pytest.fixture(autouse=True)
def _quick_compiler() -> Iterator[None]:
    with config.patch({"cpp.simdlen": 0}):
        yield
    world.stop()


def step(**options) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a model with dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 6)).double()
    engine, _ = auto_engine(model, None, "1", **options)
    loss = engine(torch.randn(5, 6, dtype=torch.float64)).square().mean()
    loss.backward()
    return loss.item(), [p.grad.to_local().clone() for p in model.parameters()]


def test_modes():
    assert CompileMode.of(False, "cpu") == CompileMode.of("auto", "cpu") == CompileMode()
    assert CompileMode.of("auto", "cuda", lowered=False) == CompileMode()
    assert CompileMode.of(True, "cpu") == CompileMode(inductor=True)
    assert CompileMode.of("auto", "cuda") == CompileMode(inductor=True, verified=True)
    for option in ("auto", True, False):
        assert CompileMode.of(option, "cuda").option == option
    for option in (1, None, "yes"):
        with pytest.raises(ValueError, match="must be True, False, 'auto' or 'cudagraphs', got"):
            CompileMode.of(option, "cuda")
    with pytest.raises(ValueError, match="is not supported yet: a CUDA graph writes over"):
        CompileMode.of("cudagraphs", "cuda")
    with pytest.raises(ValueError, match=r"is for GPUs.* are cpus; pass compile=True"):
        auto_engine(nn.Linear(2, 2), None, "1", compile="cudagraphs")


def test_without_a_compiler(monkeypatch, caplog):
    with config.patch(NO_COMPILER):
        with pytest.raises(EngineError, match=r"C\+\+ compiler \(tried: no-such.*leave compile="):
            step(compile=True)
        world.stop()
        monkeypatch.setattr(compile_mode, "_AUTO_COMPILES", ("cpu",))
        loss, _ = step(compile="auto")
    assert "steps run uncompiled. Inductor needs what rank 0 has not: a C++ compiler" in caplog.text
    world.stop()
    assert loss == step()[0]


def test_auto_keeps_what_verifies(monkeypatch, caplog):
    """The forward is built wrong: it runs as ATen's operators; the backward stays compiled."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compile_mode, "_AUTO_COMPILES", ("cpu",))
    expected = step()
    world.stop()
    lines: list[str] = []
    build, runs = inductor.compile_graph, []

    def off_by_little(gm: fx.GraphModule, *, backward: bool) -> inductor.CompiledGraph:
        built = build(gm, backward=backward)

        def run(arguments):
            runs.append(backward)
            results = list(built.run(arguments))
            results[0] = results[0] if backward else results[0] * (1 + 1e-6)
            return results

        return inductor.CompiledGraph(run, built.from_cache)

    monkeypatch.setattr(compiled_graphs, "compile_graph", off_by_little)
    found = step(compile="auto", progress=lines.append)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert "the forward runs uncompiled: on rank 0, Inductor's differs from ATen's" in caplog.text
    assert "the backward runs uncompiled" not in caplog.text
    assert runs == [False, True]
    told = [line for line in lines if "compiled forward and backward by Inductor" in line]
    assert len(told) == 1 and told[0].endswith(" s)")

    def fails(gm: fx.GraphModule, *, backward: bool) -> inductor.CompiledGraph:
        raise RuntimeError("no kernel for this")

    world.stop()
    monkeypatch.setattr(compiled_graphs, "compile_graph", fails)
    torch.testing.assert_close(step(compile="auto"), expected, rtol=0, atol=0)
    assert "Inductor cannot build forward and backward: RuntimeError: no kernel" in caplog.text
    world.stop()
    with pytest.raises(RuntimeError, match="no kernel for this"):
        step(compile=True)


def communicating(group: str) -> fx.GraphModule:
    """Two collectives that do not depend on each other."""
    functional = torch.ops._c10d_functional
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 6)
    waited = []
    for reduction in ("sum", "max"):
        doubled = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
        reduced = graph.call_function(functional.all_reduce.default, (doubled, reduction, group))
        waited.append(graph.call_function(functional.wait_tensor.default, (reduced,)))
    graph.output(tuple(waited))
    return fx.GraphModule({}, graph)


def test_order_of_collectives_is_asserted_and_code_is_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cluster, cpu = ClusterInfo.of("1"), torch.device("cpu")
    (group,) = world.process_groups(world.start(cluster, cpu))
    gm = communicating(group)
    planned = inductor.ordered_calls(gm)
    assert planned == [
        ("all_reduce", "sum", group), ("wait_tensor",),
        ("all_reduce", "max", group), ("wait_tensor",),
    ]  # fmt: skip
    assert not inductor.compile_graph(gm, backward=False).from_cache
    assert inductor.compile_graph(gm, backward=False).from_cache
    monkeypatch.setattr(inductor, "ordered_calls", lambda gm: [*planned[2:], *planned[:2]])
    with pytest.raises(VerifyError, match=r"number 0 of 4 is \('all_reduce', 'max', "):
        inductor.compile_graph(gm, backward=False)


def test_what_the_backward_receives_is_asserted():
    planned = [inductor._described(torch.empty(3, 1)), inductor._described(torch.empty(2, 3))]
    inductor.check_results(planned, [((3, 1), torch.float32, (1, None)), planned[1]])
    with pytest.raises(VerifyError, match="gives 1 values, the plan 2"):
        inductor.check_results(planned, planned[:1])
    other = inductor._described(torch.empty(2, 3, dtype=torch.float64))
    with pytest.raises(VerifyError, match=r"float64, \(3, 1\)\) as value 1 of 2, the plan"):
        inductor.check_results(planned, [planned[0], other])


def test_equal_within_rounding():
    x = torch.randn(50)
    assert difference([x * (1 + 1e-5), None], [x, None]) is None
    assert "result 0 of torch.float32 is off by" in difference([x * 1.01], [x])
    assert difference([x.bfloat16()], [x.bfloat16() * 1.01]) is None
    tiny = torch.randn(50) * 1e-7  # zero but for rounding, next to the first
    assert difference([x, -tiny], [x, tiny]) is None
    assert "result 0" in difference([-tiny], [tiny])
    nan = torch.tensor([1.0, torch.nan, torch.inf])
    assert difference([nan], [nan]) is None
    assert "off by nan" in difference([nan], [torch.ones(3)])
    masks = torch.zeros(2000, dtype=torch.bool)
    assert difference([masks], [masks.clone().fill_(True)]) is not None
    assert difference([masks], [masks.index_fill(0, torch.tensor([7]), True)]) is None
