"""Train, save every few steps, and go on from the last checkpoint after a crash or on another mesh.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 4 --max-restarts 2 examples/elastic.py --steps 20
    torchrun --nproc-per-node 2 examples/elastic.py --steps 30

Model, optimizer, schedule, step and random state are in one folder per save, written beside the
last one and then put in its place. `--kill-at 7` lets a rank die once, to see it: torchrun starts
all ranks again, and the weights come out the same. (The variable lets ranks that are started again
find each other; without it, torchrun keeps the addresses of those that died.)
"""

import argparse
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from autopar import auto_engine

BATCH = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", help="default: one axis of all ranks")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("elastic_out"), help="for checkpoints")
    parser.add_argument("--kill-at", type=int, help="step at which the last rank dies, once")
    return parser.parse_args()


def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch on every rank; the step is the position in the data."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 32, generator=generator, dtype=torch.float64)
    return x, x[:, :8].sin()


class Training:
    """A model and all that goes on with it."""

    def __init__(self, mesh: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 8))
        model = model.double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        x, _ = batch_at(0)
        self.model, self.optimizer = auto_engine(model, optimizer, mesh, example_inputs=x)
        self.step = 0

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "dropout": self.model.get_random_state(),
            "step": self.step,
        }

    def save(self, folder: Path) -> None:
        """Write a checkpoint. A crash meanwhile leaves the last one as it was."""
        new = folder / "new"
        dcp.save(self._state(), checkpoint_id=new)
        if dist.get_rank() == 0:
            new.rename(folder / f"step-{self.step}")
            for old in checkpoints(folder)[:-1]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint of any mesh."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])  # fmt: skip
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        self.model.set_random_state(state["dropout"])
        self.step = state["step"]

    def train_step(self) -> float:
        x, y = batch_at(self.step)
        loss = nn.functional.mse_loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        return loss.item()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest last."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def main() -> None:
    options = parse_arguments()
    training = Training(options.mesh or os.environ["WORLD_SIZE"])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    options.out.mkdir(parents=True, exist_ok=True)
    if known := checkpoints(options.out):
        training.load(known[-1])
        if rank == 0:
            print(f"resumed at step {training.step}", flush=True)
    first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    loss = float("nan")
    while training.step < options.steps:
        if first_attempt and training.step == options.kill_at and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = training.train_step()
        if training.step % options.save_every == 0 or training.step == options.steps:
            training.save(options.out)
    weights = training.model.full_state_dict()
    if rank == 0:
        torch.save(weights, options.out / "weights.pt")
        print(f"loss {loss:.6f} after {training.step} steps", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
