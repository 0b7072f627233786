"""A small GPT-2 and its data, for the libraries to train."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

SEQUENCES, HELD_OUT, LENGTH = 64, 16, 16


def language_model(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> GPT2LMHeadModel:
    """With random weights. Dropout draws otherwise on several ranks than on one."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=96, n_positions=32, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


class Sequences(torch.utils.data.Dataset):
    """Random tokens, the first labels of which are left out."""

    def __init__(self, count: int = SEQUENCES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 95, (LENGTH,), generator=torch.Generator().manual_seed(k))
        labels = ids.clone()
        labels[: k % 5] = -100
        return {"input_ids": ids, "labels": labels}


def padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of samples cut to lengths of their own, padded to the longest."""
    lengths = [4 + int(sample["input_ids"][0]) % (LENGTH - 4) for sample in samples]
    batch: dict[str, torch.Tensor] = {}
    for name, fill in (("input_ids", 0), ("labels", -100)):
        rows = [sample[name][:n] for sample, n in zip(samples, lengths, strict=True)]
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, True, fill)
    ends = torch.tensor(lengths)[:, None]
    batch["attention_mask"] = (torch.arange(max(lengths)) < ends).long()
    return batch


def parameters(model: torch.nn.Module) -> torch.Tensor:
    """All values of a model in one tensor; on all ranks."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return torch.cat([p.detach().double().flatten() for p in whole])


def generated(model: torch.nn.Module) -> torch.Tensor:
    """Tokens that a model chooses after a prompt."""
    model.eval()
    prompt = torch.arange(1, 7).reshape(2, 3)
    return model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0).double()
