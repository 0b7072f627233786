"""Train on a Ray cluster: Ray starts the workers and joins them, autopar plans and runs the step.

    pip install "autopar[ray]"
    python examples/ray_train.py --workers 2 --steps 12
    python examples/ray_train.py --workers 4 --mesh 2x2 --steps 24

The second command goes on from the last checkpoint, on another mesh.

On several hosts, `ray start --head` on one and `ray start --address HOST:6379` on the others come
first, and `--out` is a folder that all of them see. A run that loses a worker is started again
(`--max-failures`) from the last checkpoint.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from autopar import auto_engine

BATCH = 16


def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch on every worker."""
    x = torch.randn(BATCH, 32, generator=torch.Generator().manual_seed(step))
    return x, x[:, :8].sin()


def train_worker(options: dict[str, Any]) -> None:
    """What every worker runs; Ray has started the process group."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mesh = options["mesh"] or str(dist.get_world_size())
    model, optimizer = auto_engine(model, optimizer, mesh, example_inputs=batch_at(0)[0])
    folder, step = Path(options["out"]).absolute(), 0

    def state() -> dict[str, Any]:
        parameters, moments = get_state_dict(model, optimizer)
        return {"model": parameters, "optimizer": moments, "step": step}

    if (folder / "last").exists():
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder / "last")
        set_state_dict(model, optimizer, model_state_dict=loaded["model"],
                       optim_state_dict=loaded["optimizer"])  # fmt: skip
        step = loaded["step"]
    while step < options["steps"]:
        x, y = batch_at(step)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % options["save_every"] == 0:
            dcp.save(state(), checkpoint_id=folder / "new")
            if dist.get_rank() == 0:
                shutil.rmtree(folder / "last", ignore_errors=True)
                (folder / "new").rename(folder / "last")
            dist.barrier()
        ray.train.report({"loss": loss.item(), "step": step})
    if dist.get_rank() == 0:
        result = f"loss {loss.item():.9f} after {step} steps on {dist.get_world_size()} workers"
        (folder / "result.txt").write_text(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mesh", help="default: one axis of all workers")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("ray_out"), help="for checkpoints")
    parser.add_argument("--max-failures", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.is_available()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={**vars(options), "out": str(options.out.absolute())},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=options.workers, use_gpu=gpus),
        run_config=ray.train.RunConfig(
            storage_path=str(options.out.absolute()),
            failure_config=ray.train.FailureConfig(max_failures=options.max_failures),
        ),
    )
    trainer.fit()
    print((options.out / "result.txt").read_text())


if __name__ == "__main__":
    main()
