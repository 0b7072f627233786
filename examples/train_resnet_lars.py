"""Train a ResNet with a large batch by LARS, distributed by one added line.

    torchrun --nproc-per-node 2 examples/train_resnet_lars.py --mesh 2 --steps 4

The images are random, and small, so that it runs on CPUs. Weights of one dim (biases, norms) have
no decay and no trust ratio, as is usual with LARS.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

from autopar import auto_engine
from autopar.optim import LARS, large_batch_schedule, scaled_lr


class ResNet(torch.nn.Module):
    """A ResNet of four blocks for small images, with its loss."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        block = torchvision.models.resnet.BasicBlock
        self.body = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=classes)
        self.body.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.body.maxpool = torch.nn.Identity()

    def forward(self, images, labels):
        return F.cross_entropy(self.body(images), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", default="2", help="device mesh, such as 4 or 2x2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="images per step, over all ranks")
    parser.add_argument("--size", type=int, default=16, help="pixels of a side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResNet(classes=10)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 1e-4}, {"params": vectors, "weight_decay": 0.0}]
    lr = scaled_lr(0.5, options.batch)
    optimizer = LARS(groups, lr=lr, momentum=0.9, trust_coeff=0.02)
    schedule = large_batch_schedule(optimizer, options.steps // 4, options.steps)

    # the one added line
    model, optimizer = auto_engine(model, optimizer, options.mesh)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, generator=generator)
    labels = torch.randint(0, 10, (options.batch,), generator=generator)
    for step in range(options.steps):
        optimizer.zero_grad()
        loss = model(images, labels)
        loss.backward()
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}, learning rate {rate:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
