"""GPT-2 as Hugging Face has it, for the command line:

autopar plan examples/gpt2.py --mesh 2x4
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

BATCH, LENGTH = 16, 128


def build_model() -> torch.nn.Module:
    config = GPT2Config(
        n_layer=12,
        vocab_size=50257,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def example_inputs() -> dict[str, torch.Tensor]:
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}
