"""Makes and loads adapters with mlx-lm, in f32 on the CPU, for `cargo xtask parity`.

    python mlx_lm_adapters.py JOBS.json

JOBS is a list of
  {"make": "lora" | "dora", "model", "out", "seed"}     random adapter, saved as mlx-lm's trainer saves it
  {"load": ADAPTER, "model", "tokens": [...], "out"}    logits [T, v] under "logits", in a safetensors file
"""
import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config

RANK, SCALE = 4, 3.0


def base(folder):
    model, _ = load_model(Path(folder), strict=True)
    model.set_dtype(mx.float32)
    return model


def make(job):
    """An adapter with random `lora_b`, and magnitudes a little off, as training would leave them."""
    mx.random.seed(job["seed"])
    model = base(job["model"])
    model.freeze()
    method = job["make"]
    parameters = dict(rank=RANK, scale=SCALE, dropout=0.0)
    n_layers = len(model.layers)
    parameters["keys"] = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]
    linear_to_lora_layers(model, n_layers, parameters, use_dora=method == "dora")
    trained = []
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith(".lora_b"):
            value = 0.05 * mx.random.normal(value.shape)
        elif name.endswith(".m"):
            value = value * (1 + 0.05 * mx.random.normal(value.shape))
        trained.append((name, value))
    model.update(tree_unflatten(trained))
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = dict(fine_tune_type=method, num_layers=n_layers, lora_parameters=parameters, model=job["model"])
    save_config(config, out / "adapter_config.json")


def load(job):
    model = load_adapters(base(job["model"]), job["load"])
    model.eval()
    logits = model(mx.array(job["tokens"])[None])[0].astype(mx.float32)
    mx.save_safetensors(job["out"], dict(logits=logits))


def main():
    mx.set_default_device(mx.cpu)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        make(job) if "make" in job else load(job)


if __name__ == "__main__":
    main()
