"""Capture: what the graph holds, and that nothing of the user's changes."""

import pytest
import torch
from torch import nn

from autopar import ColoTracer
from tests.models import CASES, LanguageModel


@pytest.mark.parametrize("name", list(CASES))
def test_captured_graph_equals_eager(name):
    case = CASES[name]
    model, alone = case.build(), case.build()
    batch = case.batch(0)
    graph = ColoTracer().trace(model, (), batch)
    loss = graph.bind(model)(**batch)
    loss.backward()
    expected = alone(**batch)
    expected.backward()
    assert loss.item() == expected.item()
    for (n, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-12), n
    for (n, b), c in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.allclose(b, c, atol=1e-12), n


def test_tied_weights_are_one_input():
    model = LanguageModel(layers=2)
    graph = ColoTracer().trace(model, (), CASES["gpt2"].batch(0))
    names = list(graph.parameters.values())
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    assert graph.aliases == {"gpt2.lm_head.weight": "gpt2.transformer.wte.weight"}


def test_every_operator_says_where_it_came_from():
    graph = ColoTracer().trace(LanguageModel(layers=2), (), CASES["gpt2"].batch(0))
    modules = {graph.info(n).module for n in graph.compute_nodes()}
    assert {"gpt2.transformer.h.0.mlp.c_fc", "gpt2.transformer.h.1.attn"} <= modules
    assert all("modeling_gpt2.py:" in graph.info(n).source or "models.py:" in graph.info(n).source
               or "pytorch_utils.py:" in graph.info(n).source
               or "transformers" in graph.info(n).source
               for n in graph.compute_nodes())  # fmt: skip


def test_batch_statistics_are_outputs():
    graph = ColoTracer().trace(CASES["resnet"].build(), (), CASES["resnet"].batch(0))
    assert {"norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked"} <= set(
        graph.mutations
    )


def test_a_meta_model_gives_the_same_graph():
    batch = CASES["gpt2"].batch(0)
    with torch.device("meta"):
        meta = LanguageModel(layers=2)
    real = ColoTracer().trace(LanguageModel(layers=2), (), batch)
    assert ColoTracer().trace(meta, (), batch).fingerprint == real.fingerprint
    assert ColoTracer().trace(meta.eval(), (), batch).fingerprint is not None
    other = ColoTracer().trace(LanguageModel(layers=1), (), batch)
    assert other.fingerprint != real.fingerprint


def test_nothing_of_the_users_changes():
    model = CASES["resnet"].build()
    model.head.register_forward_hook(lambda *a: None)
    before = {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    ColoTracer().trace(model, (), CASES["resnet"].batch(0))
    after = model.state_dict(keep_vars=True)
    assert all(id(after[n]) == i and after[n].equal(t) for n, (i, t) in before.items())
    assert torch.get_rng_state().equal(state)
    assert model.training
    assert len(model.head._forward_hooks) == 1
    assert all(type(t) in (nn.Parameter, torch.Tensor) for t in after.values())
