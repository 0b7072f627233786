"""Forward hooks that exist when a model is captured: those that observe and those that change."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from autopar import ColoTracer
from autopar.errors import CaptureError
from autopar.ir.bound_reads import bind

X = torch.arange(12, dtype=torch.float64).reshape(3, 4) / 7
KEPT_BY_MODULE = {}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2))).double()


class Collector:
    """Holds what its hooks see."""

    def __init__(self):
        self.kept = []

    def hook(self, module, args, result):
        self.kept.append(result)

    def __call__(self, module, args, result):
        self.kept.append((args[0], result))


def closure(kept):
    return lambda module, args, result: kept.__setitem__("x", result)


def nested_closure(kept):
    def put(value):
        kept.setdefault("all", []).append(value)

    def hook(module, args, result):
        put(result)

    return hook


def default(kept):
    def hook(module, args, result, into=kept):
        into["x"] = result

    return hook


def of_its_module(kept):
    def hook(module, args, result):
        KEPT_BY_MODULE["x"] = result
        kept["x"] = result

    return hook


def values(kept):
    def hook(module, args, result):
        kept["norm"] = result.norm().item()
        kept["array"] = result.detach().numpy().tolist()

    return hook


def partial(kept):
    return functools.partial(lambda into, module, args, result: into.update(x=result), kept)


OBSERVING = [closure, nested_closure, default, of_its_module, values, partial]


def tensors(value):
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return [value]


def equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            assert type(x) is torch.Tensor
            assert torch.allclose(x, y, rtol=0, atol=1e-15)
            assert x.requires_grad == y.requires_grad
        else:
            assert x == y


@pytest.mark.parametrize("make", OBSERVING)
@pytest.mark.parametrize("layer", ["0", "2.0", "2", ""])
def test_observing_hooks_get_real_tensors_at_each_run(make, layer):
    model, alone = net(), net()
    kept, expected = {}, {}
    model.get_submodule(layer).register_forward_hook(make(kept))
    alone.get_submodule(layer).register_forward_hook(make(expected))
    KEPT_BY_MODULE.clear()
    graph = ColoTracer().trace(model, (X,))
    assert kept == {}
    assert KEPT_BY_MODULE == {}
    run = graph.bind(model)
    for step in range(2):
        assert torch.allclose(run(X + step), alone(X + step), rtol=0, atol=1e-15)
        equal(tensors(kept), tensors(expected))
        assert tensors(kept)
    ColoTracer().trace(model, (X[:2],))  # now the hook holds tensors with a history


def test_bound_methods_and_objects_are_called_themselves():
    model, alone = net(), net()
    collectors = [Collector() for _ in range(4)]
    for m, (a, b) in ((model, collectors[:2]), (alone, collectors[2:])):
        m[0].register_forward_hook(a.hook)
        m[1].register_forward_hook(b)
    graph = ColoTracer().trace(model, (X,))
    assert not collectors[0].kept
    graph.bind(model)(X)
    alone(X)
    for got, expected in zip(collectors[:2], collectors[2:], strict=True):
        equal(tensors(got.kept), tensors(expected.kept))


def test_gradients_flow_through_what_hooks_keep():
    grads = []
    for captured in (True, False):
        model, kept = net(), {}
        model[0].register_forward_hook(closure(kept))
        run = ColoTracer().trace(model, (X,)).bind(model) if captured else model
        (run(X).sum() + kept["x"].pow(2).sum()).backward()
        grads.append([p.grad for p in model.parameters()])
    equal(*grads)


def changes(model):
    model[0].register_forward_hook(lambda module, args, result: result * 2 + 1)


def changes_arguments(model):
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * 3,))


def writes(model):
    def hook(module, args, result):
        result.mul_(2)

    model[0].register_forward_hook(hook)


def writes_into_a_buffer(model):
    model[0].register_buffer("seen", torch.zeros(4, dtype=torch.float64))

    def hook(module, args, result):
        with torch.no_grad():
            module.seen.add_(result.mean(0))

    model[0].register_forward_hook(hook)


def assigns_what_the_forward_reads(model):
    nn.utils.weight_norm(model[0])


def with_keywords(model):
    model[0].register_forward_hook(
        lambda module, args, kwargs, result: result + len(kwargs), with_kwargs=True
    )


def on_the_root(model):
    model.register_forward_hook(lambda module, args, result: result * 2)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def with_a_module_of_the_model(model):
    other = model[2][0]
    model[1].register_forward_hook(lambda module, args, result: result * other.weight.sum())


CHANGING = [
    changes, changes_arguments, writes, writes_into_a_buffer, assigns_what_the_forward_reads,
    with_keywords, on_the_root, with_a_module_of_the_model,
]  # fmt: skip


@pytest.mark.parametrize("put", CHANGING)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_that_change_are_part_of_the_program(put):
    model, alone = net(), net()
    put(model)
    put(alone)
    graph = ColoTracer().trace(model, (X,))
    run = graph.bind(model)
    assert not graph.effects.hooks
    for step in range(2):
        actual, expected = run(X + step), alone(X + step)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-14)
    equal([*model.buffers()], [*alone.buffers()])
    grads = [
        torch.autograd.grad(value.sum(), list(m.parameters()))
        for value, m in ((actual, model), (expected, alone))
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_a_hook_that_assigns_to_its_module_is_called_with_real_tensors():
    model, alone = net(), net()
    for m in (model, alone):
        m[0].register_forward_hook(lambda module, args, result: setattr(module, "act", result))
        m[0].calls = 0

        def count(module, args):
            module.calls += 1

        m[0].register_forward_pre_hook(count)
    run = ColoTracer().trace(model, (X,)).bind(model)
    for _ in range(2):
        run(X)
        alone(X)
    equal([model[0].act, model[0].calls], [alone[0].act, alone[0].calls])


def test_a_hook_on_a_module_called_twice_sees_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x):
            return self.layer(self.layer(x))

    kept = []
    for captured in (True, False):
        model, seen = Twice(), []
        model.layer.register_forward_hook(lambda m, a, r, seen=seen: seen.append(r))
        (ColoTracer().trace(model, (X,)).bind(model) if captured else model)(X)
        kept.append(seen)
    equal(*kept)
    assert len(kept[0]) == 2


def test_a_hook_that_keeps_and_changes_does_both():
    values = []
    for captured in (True, False):
        model, kept = net(), []

        def hook(module, args, result, kept=kept):
            kept.append(result)
            return result * 2

        model[0].register_forward_hook(hook)
        run = ColoTracer().trace(model, (X,)).bind(model) if captured else model
        values.append([run(X), run(X + 1), *kept])
    equal(*values)


def test_arguments_that_a_hook_ignores_are_no_results():
    model, kept = net(), {}
    model[2][0].register_forward_hook(closure(kept))
    graph = ColoTracer().trace(model, (X,))
    assert len(graph.output.args[0]) == 2
    assert graph.effects.hooks[0].arguments.leaves[0] is None


def test_a_hook_that_keeps_and_writes_is_refused():
    model, kept = net(), []

    def hook(module, args, result):
        kept.append(result)
        result.mul_(2)

    model[0].register_forward_hook(hook)
    with pytest.raises(CaptureError, match=r"_hooks.py:\d+ on 0 keeps values and changes"):
        ColoTracer().trace(model, (X,))


def test_hooks_set_and_removed_later_make_a_new_program():
    model, kept = net(), {}
    graph = ColoTracer().trace(model, (X,))
    holds = bind(model, graph.reads)
    assert holds()
    handle = model[0].register_forward_hook(closure(kept))
    assert not holds()
    observed = ColoTracer().trace(model, (X,))
    still = bind(model, observed.reads)
    assert still()
    observed.bind(model)(X)
    assert kept.pop("x") is not None
    handle.remove()
    assert holds()
    assert not still()
    graph.bind(model)(X)
    assert not kept


def test_a_hook_that_changes_values_in_place_by_values_is_refused():
    def hook(module, args, result):
        if float(np.asarray(result.detach()).sum()) > -1e9:
            result.detach().mul_(0.5)

    model = net()
    model[0].register_forward_hook(hook)
    run = ColoTracer().trace(model, (X,)).bind(model)
    with pytest.raises(CaptureError, match=r"_hooks.py:\d+ on 0 changed a value in place"):
        run(X)


def test_a_hook_that_changes_and_then_asks_is_refused():
    def hook(module, args, result):
        result.mul_(0.5)
        if float(np.asarray(result.detach()).sum()) > -1e9:
            result.add_(1)

    model = net()
    model[0].register_forward_hook(hook)
    with pytest.raises(CaptureError):
        ColoTracer().trace(model, (X,))


def test_a_hook_whose_answer_depends_on_values_is_refused():
    def hook(module, args, result):
        return result * 2 if result.sum().item() > -1e9 else None

    model = net()
    model[0].register_forward_hook(hook)
    run = ColoTracer().trace(model, (X,)).bind(model)
    with pytest.raises(CaptureError, match=r"hook at .*_hooks.py:\d+ on 0 returned a value"):
        run(X)


def test_a_hook_that_holds_a_generator_is_refused():
    steps = (i for i in range(3))
    model = net()
    model[0].register_forward_hook(lambda module, args, result: next(steps) and None)
    with pytest.raises(CaptureError, match=r"hook at .*_hooks.py:\d+ holds something"):
        ColoTracer().trace(model, (X,))


class Installs(nn.Module):
    """Registers a hook when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.ready = nn.Linear(4, 4), False

    def forward(self, x):
        if not self.ready:
            self.ready = True
            self.layer.register_forward_hook(lambda module, args, output: 2 * output)
        return self.layer(x)


def test_a_hook_that_the_forward_registers_is_refused():
    with pytest.raises(CaptureError, match=r"registers the hook at .*test_forward_hooks.py:\d+ on"):
        ColoTracer().trace(Installs(), (torch.randn(2, 4),))


def test_hidden_states_that_transformers_hooks_at_the_first_call():
    from transformers import LlamaConfig, LlamaForCausalLM

    from autopar import auto_engine

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(config), torch.randint(0, 50, (2, 5))
    torch.manual_seed(0)
    engine, _ = auto_engine(LlamaForCausalLM(config), None, "1", progress=False)
    expected = model(ids, output_hidden_states=True).hidden_states
    for _ in range(3):
        hidden = engine(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(hidden, expected)


def test_hidden_states_of_an_evaluation_with_a_cache():
    """The blocks of GPT-2 get it by position, so that hooks see it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from autopar import auto_engine

    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(0, 50, (2, 5))
    torch.manual_seed(0)
    engine, _ = auto_engine(GPT2LMHeadModel(config).eval(), None, "1", progress=False)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
        for _ in range(2):
            results = engine(ids, output_hidden_states=True)
            torch.testing.assert_close(results.hidden_states, expected.hidden_states)
            torch.testing.assert_close(engine(ids).logits, expected.logits)


@pytest.mark.parametrize("of_class", [False, True])
def test_another_forward_of_a_module_makes_another_program(of_class, monkeypatch):
    class Doubling(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.Linear(4, 4), Doubling())
    x = torch.randn(2, 4)
    holds = bind(model, ColoTracer().trace(model, (x,)).reads)
    assert holds() and holds()
    owner = Doubling if of_class else model[1]
    forward = (lambda self, x: 3 * x) if of_class else (lambda x: 3 * x)
    monkeypatch.setattr(owner, "forward", forward)
    assert not holds()
    graph = ColoTracer().trace(model, (x,))
    assert torch.equal(graph.bind(model)(x), model(x))


def test_hooks_on_all_modules_are_refused():
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    holds = bind(model, ColoTracer().trace(model, (x,)).reads)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: 2 * o)
    try:
        assert not holds()
        with pytest.raises(CaptureError, match=r"test_forward_hooks.py:\d+ is on all modules"):
            ColoTracer().trace(model, (x,))
    finally:
        handle.remove()
    assert holds()
