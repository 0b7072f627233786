"""What ranks compute for tests of regions in slices."""

import copy

import torch

from autopar import auto_engine
from autopar.testing.live_memory import LiveMemory
from benchmarks.time_split_models import Head

WORDS = 1000


def sliced_loss(samples: int, rows: int, constraints: dict[str, str], share: float) -> dict:
    """Trains a head within a share of its logits, with targets to be ignored on one rank."""
    torch.manual_seed(0)
    model = Head(16, WORDS).double()
    x, target = torch.randn(samples, rows, 16).double(), torch.randint(0, WORDS, (samples, rows))
    target[0, : rows // 2] = -100
    reference = copy.deepcopy(model)
    loss = reference(x, target)
    loss.backward()
    state = 2 * sum(p.nbytes for p in model.parameters())
    memory = state + share * target.numel() * WORDS * 8
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, _ = auto_engine(model, optimizer, "2", memory=memory, constraints=constraints)
    engine(x, target).backward()
    for p in engine.parameters():
        p.grad = None
    with LiveMemory() as live:
        result = engine(x, target)
        result.backward()
    pairs = zip(engine.parameters(), reference.parameters(), strict=True)
    errors = [(p.grad.full_tensor() - q.grad).abs().max().item() for p, q in pairs]
    return {
        "error": max(abs(result.item() - loss.item()), *errors),
        "peak": live.peak / (target.numel() * WORDS * 8),
        "slices": [(s.slices, s.at_once) for s in engine.plan.time_splits],
    }


def microbatched_peak(rows: int) -> dict:
    """Live bytes of a step in microbatches whose tokens are split over ranks, and what its plan
    says; the sums of gradients are as large as the parameters, which were there before."""
    torch.manual_seed(0)
    model = Head(16, WORDS).double()
    h, target = torch.randn(3, rows, 16).double(), torch.randint(0, WORDS, (3, rows))
    constraints = {"inputs.h": "RS0R", "inputs.target": "RS0", "**.weight": "RR"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, _ = auto_engine(model, optimizer, "2", microbatches=3, constraints=constraints)
    engine(h, target).backward()
    for p in engine.parameters():
        p.grad = None
    with LiveMemory() as live:
        engine(h, target).backward()
    return {"measured": live.peak, "planned": engine.plan.memory.total_bytes}
