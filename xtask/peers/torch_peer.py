"""PyTorch with PEFT on the work that `planish bench` measures. Prints one JSON object.

    torch_peer.py MODEL_CONFIG BATCH LENGTH STEPS DTYPE CHECKPOINTING COMPILE
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

WARM_UP = 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(config, dtype, device):
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    return model


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def main():
    path, batch, length, steps, dtype, checkpointing, compiled = sys.argv[1:]
    config = json.loads(Path(path).read_text())
    config.pop("model_type")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = get_peft_model(base(config, dtype, device), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    if checkpointing == "1":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-5, fused=device == "cuda")
    if compiled == "1":
        model = torch.compile(model)
    model.train()
    seconds = []
    for _ in range(int(steps)):
        tokens = torch.randint(0, config["vocab_size"], (int(batch), int(length)), device=device)
        wait(device)
        started = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[WARM_UP:])
    fields = {
        "tokens_per_second": int(batch) * int(length) / median,
        "median_seconds": median,
        "dtype": dtype,
        "device": device,
        "loss": loss.item(),
        # ru_maxrss is in kibibytes on Linux.
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if device == "cuda":
        fields["array_peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(fields), flush=True)


main()
