"""Generate text with a model that is read from safetensors, slice by slice.

    torchrun --nproc-per-node 2 examples/generate.py --model FOLDER --prompt "Once upon a time"

FOLDER is a causal language model as transformers saves it. Without --model, a small Llama with
random weights is saved and read; its tokens are bytes.
"""

import argparse
import os
import tempfile
import time

import torch
import torch.distributed as dist
import transformers as hf

from autopar import auto_engine, deferred_init, quantize


def save_small_model(folder: str) -> None:
    """On rank 0: a byte-level Llama."""
    config = hf.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder with config.json and safetensors")
    parser.add_argument("--mesh", default=os.environ.get("WORLD_SIZE", "1"))
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--memory", help="per device, such as 16GiB")
    parser.add_argument("--quantize", help="round weights: int8, float8 or int4")
    parser.add_argument("--sample", action="store_true", help="instead of the likeliest tokens")
    options = parser.parse_args()
    prompts = options.prompt or ["Once upon a time", "The"]
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    folder = [options.model or tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    if options.model is None:
        if rank == 0:
            save_small_model(folder[0])
        if dist.is_initialized():
            dist.barrier()
        # padded at the left
        width = max(map(len, prompts))
        ids = torch.tensor([list(p.encode("ascii").rjust(width, b"\0")) for p in prompts])
        batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    else:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder[0], padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        batch = dict(tokenizer(prompts, return_tensors="pt", padding=True))

    config = hf.AutoConfig.from_pretrained(folder[0])
    with deferred_init():  # no rank holds the whole model
        model = hf.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    if os.path.exists(os.path.join(folder[0], "generation_config.json")):
        model.generation_config = hf.GenerationConfig.from_pretrained(folder[0])
    engine, _ = auto_engine(
        model.eval(), None, options.mesh, weights=folder[0], memory=options.memory
    )
    how = {"do_sample": options.sample, "max_new_tokens": options.tokens}
    engine.generate(**batch, **how)  # plans, reads weights, compiles
    if options.quantize:
        quantize(engine, options.quantize)
        engine.generate(**batch, **how)
    begin = time.perf_counter()
    tokens = engine.generate(**batch, **how)
    seconds = time.perf_counter() - begin
    if rank == 0:
        if options.model is None:
            texts = [bytes(row.tolist()).lstrip(b"\0").decode("latin-1") for row in tokens]
        else:
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for text in texts:
            print(repr(text))
        new = tokens.shape[1] - batch["input_ids"].shape[1]
        print(f"{len(prompts) * new / seconds:.1f} tokens per second")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
