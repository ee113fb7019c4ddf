"""Makes and loads adapters with PEFT on transformers, in f32 on the CPU, for `cargo xtask parity`.

    python peft_adapters.py JOBS.json

JOBS is a list of
  {"make": "lora" | "rslora" | "dora", "model", "out", "seed"}   random adapter, saved by PEFT
  {"load": ADAPTER, "model", "tokens": [...], "out"}              logits [T, v] under "logits", in a safetensors file
Any warning about the adapter is an error: nothing may be missing, unexpected or unknown.
"""
import json
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

RANK, ALPHA = 4, 6


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def make(job):
    """An adapter with random B, and magnitudes a little off, as training would leave them."""
    torch.manual_seed(job["seed"])
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        use_rslora=job["make"] == "rslora",
        use_dora=job["make"] == "dora",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base(job["model"]), config)
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            value.copy_(0.05 * torch.randn_like(value))
        elif "lora_magnitude_vector" in name:
            value.mul_(1 + 0.05 * torch.randn_like(value))
    model.save_pretrained(job["out"])


@torch.no_grad()
def load(job):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"(?is).*(adapter|missing|unexpected|peft)")
        model = PeftModel.from_pretrained(base(job["model"]), job["load"]).eval()
    adapted = sum(".lora_A." in name for name, _ in model.named_parameters())
    stored = job["modules"]
    assert adapted == stored, f"{adapted} adapted modules, the adapter has {stored}"
    logits = model(torch.tensor([job["tokens"]])).logits[0].float().contiguous()
    save_file(dict(logits=logits), job["out"])


def main():
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        make(job) if "make" in job else load(job)


if __name__ == "__main__":
    main()
