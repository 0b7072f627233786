"""Peak memory against time with regions split over time, and against the same by hand.

    python -m benchmarks.time_splits [--quick] [--json FILE] [--only NAME] [--device cuda]

Each model runs in eager PyTorch, and as an engine with a budget of a fifth of the memory that eager
PyTorch takes for activations (or the smallest that it can do with); parameters, their gradients and
inputs are not counted. The steps take turns, and the median counts. The marks are AutoChunk's
(arXiv:2401.10652): activations down by more than 80% within 10% of time, and sequences 3.2 times as
long in the same memory. Heads are compared with a fused linear cross-entropy in chunks by hand, in
the way of Liger (arXiv:2410.10989), and MLPs with a tiled MLP by hand.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar import auto_engine
from autopar.errors import InfeasibleError
from autopar.testing.live_memory import LiveMemory
from benchmarks.common import Row, finish, machine, parser, turns
from benchmarks.time_split_models import Head, PairStack, TiledMLP, UNet, ViT, WideMLP, by_hand

_SHARE = 0.2  # of eager's activations: the budget
_MOST_TIME = 10.0  # percent more


@dataclass(frozen=True)
class Case:
    """A model and a batch for it.

    Args:
        make: the model.
        draw: its input and target.
        by_hand: the same by hand.
    """

    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    by_hand: Callable[[nn.Module], nn.Module] | None = None
    modes: tuple[str, ...] = ("inference", "training")


def cases(quick: bool) -> list[Case]:
    """The models, small ones to check that they run."""

    def pairs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, n, 16 if quick else 64), torch.randn(n, n, 16 if quick else 64)

    n, words, classes = (24, 64, 2000) if quick else (128, 1024, 128_000)
    pixels, channels = (32, 8) if quick else (96, 32)
    patches = 64 if quick else 192
    width = 16 if quick else 64
    return [
        Case("Evoformer pair stack", lambda: PairStack(width), lambda: pairs(n)),
        Case(
            "ViT at high resolution", lambda: ViT(width),
            lambda: (torch.randn(1, 3, patches, patches), torch.randint(0, 10, (1,))),
        ),
        Case(
            "U-Net", lambda: UNet(channels),
            lambda: (torch.randn(1, 3, pixels, pixels), torch.randn(1, 3, pixels, pixels)),
        ),
        Case(
            f"head with {classes} classes", lambda: Head(width, classes),
            lambda: (torch.randn(1, words, width), torch.randint(0, classes, (1, words))),
            by_hand, ("training",),
        ),
        Case(
            "wide MLP", lambda: WideMLP(width, 64),
            lambda: (torch.randn(1, 4 * words, width), torch.randn(1, 4 * words, width)),
            TiledMLP,
        ),
    ]  # fmt: skip


@dataclass
class Contestant:
    """A model that takes steps.

    Args:
        training: forward and backward; else forward.
    """

    model: Any
    batch: Sequence[torch.Tensor]
    training: bool
    seconds: list[float]

    def step(self) -> torch.Tensor:
        """One step."""
        for p in self.model.parameters():
            p.grad = None
        if not self.training:
            with torch.no_grad():
                result: torch.Tensor = self.model(self.batch[0])
                return result
        loss: torch.Tensor = self.model(*self.batch)
        loss.backward()
        return loss.detach()

    def timed(self) -> None:
        """One step, with its time."""
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.step()
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def peak_bytes(self) -> int:
        """The most that is alive besides parameters, inputs and gradients of parameters."""
        with LiveMemory() as live:
            self.step()
        gradients = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return live.peak - (gradients if self.training else 0)


def engine_of(
    model: nn.Module, batch: Sequence[torch.Tensor], training: bool, activation_bytes: float
) -> Any:
    """An engine with a budget for activations, or with the smallest budget that it can do with."""
    parameters = sum(p.nbytes for p in model.parameters())
    used = batch if training else batch[:1]
    resident = parameters * (2 if training else 1) + sum(x.nbytes for x in used)
    memory = resident + activation_bytes
    for _ in range(2):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1) if training else None
        engine, _ = auto_engine(own, optimizer, "1", memory=memory)
        try:
            Contestant(engine, batch, training, []).step()
            return engine
        except InfeasibleError as error:
            memory = 1.02 * error.smallest_bytes
    raise RuntimeError("the budget that an error named does not suffice")


def equality(case: Case, training: bool, share: float) -> float:
    """The largest difference to eager PyTorch in float64, relative to the largest."""
    torch.manual_seed(0)
    model = case.make().double().requires_grad_(training)
    batch = [x.double() if x.is_floating_point() else x for x in case.draw()]
    eager = Contestant(model, batch, training, [])
    engine = engine_of(model, batch, training, share * eager.peak_bytes())
    sliced = Contestant(engine, batch, training, [])
    pairs = [(sliced.step(), eager.step())]
    if training:
        pairs += [
            (p.grad.full_tensor(), q.grad)
            for p, q in zip(engine.parameters(), model.parameters(), strict=True)
        ]
    largest_value = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest_value


def measure(case: Case, mode: str, rounds: int, device: str, quick: bool) -> list[Row]:
    """Peak and time of a model in slices, and by hand."""
    training = mode == "training"
    torch.manual_seed(0)
    model = case.make().requires_grad_(training).to(device)
    batch = [x.to(device) for x in case.draw()]
    contestants = {"eager": Contestant(model, batch, training, [])}
    eager_bytes = contestants["eager"].peak_bytes()
    start = time.perf_counter()
    engine = engine_of(model, batch, training, _SHARE * eager_bytes)
    planned_s = time.perf_counter() - start
    contestants["slices"] = Contestant(engine, batch, training, [])
    if case.by_hand is not None and (training or case.name == "wide MLP"):
        contestants["by hand"] = Contestant(case.by_hand(copy.deepcopy(model)), batch, training, [])
    peaks = {name: c.peak_bytes() for name, c in contestants.items()}
    names = list(contestants)
    for order in turns(len(names), rounds):
        for k in order:
            contestants[names[k]].timed()
    times = {name: statistics.median(c.seconds) for name, c in contestants.items()}
    title = f"{case.name}, {mode}"
    slower = 100 * (times["slices"] / times["eager"] - 1)
    rows = [
        Row(title, "activations, eager", eager_bytes / 2**20, "MiB"),
        Row(title, "activations left", 100 * peaks["slices"] / eager_bytes, "%", 100 * _SHARE),
        Row(title, "more time", slower, "%", None if quick else _MOST_TIME),
        Row(title, "regions in slices", len(engine.plan.time_splits), ""),
        Row(title, "until the first step is done", planned_s, "s"),
    ]
    if "by hand" in peaks:
        of_hand = 100 * peaks["slices"] / peaks["by hand"]
        rows.append(Row(title, "activations, of those by hand", of_hand, "%"))
        rows.append(
            Row(
                title, "time, of that by hand", 100 * times["slices"] / times["by hand"], "%", 110.0
            )
        )
    if training and case.name.startswith("head"):
        logits = batch[1].numel() * model.head.weight.shape[0] * 4  # type: ignore[union-attr, operator]
        rows.append(
            Row(
                title,
                "largest value, of the logits",
                100 * largest(contestants["slices"]) / logits,
                "%",
                50.0,
            )
        )
    return rows


def largest(contestant: Contestant) -> int:
    """Bytes of the largest value that a step makes, besides gradients of parameters."""
    with LiveMemory() as live:
        contestant.step()
    gradients = {p.numel() * p.element_size() for p in contestant.model.parameters()}
    return max(n for _, n in live.changes if n not in gradients)


def longer(quick: bool) -> list[Row]:
    """What a pair representation 3.2 times as long takes in slices, of what eager PyTorch takes."""
    torch.manual_seed(0)
    n = 16 if quick else 40
    model = PairStack(32).requires_grad_(False)
    short, long = (torch.randn(k, k, 32) for k in (n, round(3.2 * n)))
    eager = Contestant(model, [short], False, []).peak_bytes()
    engine = engine_of(model, [long], False, float(eager))
    peak = Contestant(engine, [long], False, []).peak_bytes()
    title = "Evoformer pair stack, 3.2 times as long"
    return [Row(title, "activations, of the short one", 100 * peak / eager, "%", 100.0)]


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--only", metavar="NAME", help="models whose names have this in them")
    options.add_argument("--device", default="cpu")
    given = options.parse_args()
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    rounds = 3 if given.quick else 7
    for case in cases(given.quick):
        if given.only and given.only not in case.name:
            continue
        for mode in case.modes:
            rows += measure(case, mode, rounds, given.device, given.quick)
    if not given.only:
        rows += longer(given.quick)
    for case in cases(True):
        if given.only and given.only not in case.name:
            continue
        for mode in case.modes:
            training = mode == "training"
            error = equality(case, training, 0.4)
            rows.append(Row(f"{case.name}, {mode}, float64, small", "difference", error, "", 1e-9))
    left = [row.value for row in rows if row.metric == "activations left"]
    slower = [row.value for row in rows if row.metric == "more time"]
    headline = (
        f"in slices, {min(left):.0f} to {max(left):.0f}% of eager's activations are left, at "
        f"{min(slower):+.0f} to {max(slower):+.0f}% of time ({machine()})"
    )
    return finish("Regions split over time", rows, headline, given.json)


if __name__ == "__main__":
    raise SystemExit(main())
