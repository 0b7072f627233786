"""Train a small GPT-2 by transformers' Trainer on a mesh, and resume on another one.

    torchrun --nproc-per-node 4 examples/trainer_gpt2.py --mesh 2x2 --steps 20
    torchrun --nproc-per-node 2 examples/trainer_gpt2.py --mesh 2 --steps 30 --resume

The text ships with Python (the documentation topics of `pydoc`), byte by byte.
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from autopar.integrations.transformers import AutoparPlugin, Trainer

LENGTH = 64


class Text(torch.utils.data.Dataset):
    """Pieces of the text: input ids, which are the labels, too."""

    def __init__(self) -> None:
        text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
        self.pieces = text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[k], "labels": self.pieces[k]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", default="2x2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="trainer_out", help="for checkpoints")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    options = parser.parse_args()
    torch.manual_seed(0)  # all ranks start from the same weights
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=256, n_positions=LENGTH,
                   bos_token_id=0, eos_token_id=0)
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=options.out, max_steps=options.steps, per_device_train_batch_size=4,
        learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=5, save_steps=10,
        report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Text(), autopar_plugin=AutoparPlugin(options.mesh)
    )
    trainer.train(resume_from_checkpoint=options.resume)
    if dist.get_rank() == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {trainer.state.global_step} steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
