"""Trains an adapter with mlx-lm's own trainer, in f32 on the CPU, for `cargo xtask parity`.

    python mlx_lm_training.py MODEL ROWS OUT --layers N [--iters 50] [--accumulation 1] [--mask-prompt] [--optimizer adam]

MODEL is a Hugging Face folder with tokenizer and chat template, ROWS a JSONL file of conversations. Writes
OUT/start/ (the adapter before the first step, mlx-lm's layout), OUT/final/adapters.safetensors, OUT/order.json (the
indices of the batches in the order of training, which mlx-lm draws with numpy) and OUT/training.json:
{"losses": [one an iteration], "tokens": [trained tokens, one an iteration]}.
"""
import argparse
import json
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
OPTIMIZERS = {"adam": optimizers.Adam, "adamw": optimizers.AdamW}


class Recorder(TrainingCallback):
    """Keeps what the trainer reports."""

    def __init__(self):
        self.losses, self.trained = [], []

    def on_train_loss_report(self, info):
        self.losses.append(info["train_loss"])
        self.trained.append(info["trained_tokens"])


def recorded_permutations():
    """Lets numpy draw as always, and keeps what it drew."""
    drawn, draw = [], np.random.permutation

    def recording(n):
        order = draw(n)
        drawn.extend(int(i) for i in order)
        return order

    np.random.permutation = recording
    return drawn


def save_start(model, folder, layers):
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": LORA}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model"), parser.add_argument("rows"), parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-seq-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--mask-prompt", action="store_true")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    args = parser.parse_args()

    mx.set_default_device(mx.cpu)
    mx.random.seed(1)
    np.random.seed(1)
    model, tokenizer = load(args.model)
    model.set_dtype(mx.float32)
    model.freeze()
    linear_to_lora_layers(model, args.layers, LORA)
    save_start(model, args.out / "start", args.layers)

    rows = [json.loads(line) for line in Path(args.rows).read_text(encoding="utf-8").splitlines()]
    data = CacheDataset(ChatDataset(rows, tokenizer, mask_prompt=args.mask_prompt))
    (args.out / "final").mkdir(exist_ok=True)
    settings = TrainingArgs(
        batch_size=args.batch_size,
        iters=args.iters,
        steps_per_report=1,
        steps_per_eval=10**9,
        steps_per_save=10**9,
        max_seq_length=args.max_seq_length,
        adapter_file=str(args.out / "final" / "adapters.safetensors"),
        grad_accumulation_steps=args.accumulation,
    )
    recorder, order = Recorder(), recorded_permutations()
    optimizer = OPTIMIZERS[args.optimizer](learning_rate=args.learning_rate)
    train(model, optimizer, data, None, settings, training_callback=recorder)
    (args.out / "order.json").write_text(json.dumps(order[: args.iters]))
    tokens = [after - before for before, after in zip([0] + recorder.trained, recorder.trained)]
    (args.out / "training.json").write_text(json.dumps({"losses": recorder.losses, "tokens": tokens}))


main()
