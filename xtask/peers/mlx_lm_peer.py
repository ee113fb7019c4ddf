"""mlx-lm on the work that `planish bench` measures. Prints one JSON object.

    mlx_lm_peer.py step MODEL_CONFIG BATCH LENGTH STEPS DTYPE CHECKPOINTING
    mlx_lm_peer.py generate MODEL_DIR TOKENS ROUNDS
    mlx_lm_peer.py data MODEL_DIR DATA_DIR BATCH STEPS
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

WARM_UP = 2
PROMPT_TOKENS = 32
TARGETS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
TARGETS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def adapt(model, n_layers):
    model.freeze()
    linear_to_lora_layers(model, n_layers, {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": TARGETS})


def report(**fields):
    # ru_maxrss is in kibibytes on Linux.
    fields["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fields["array_peak_bytes"] = mx.get_peak_memory()
    fields["device"] = "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"
    print(json.dumps(fields), flush=True)


def step(config_path, batch, length, steps, dtype, checkpointing):
    config = json.loads(Path(config_path).read_text())
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    adapt(model, config["num_hidden_layers"])
    if checkpointing:
        trainer.grad_checkpoint(model.layers[0])
    optimizer = optimizers.Adam(learning_rate=1e-5)
    gradient = nn.value_and_grad(model, trainer.default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(tokens, lengths):
        (loss, count), grads = gradient(model, tokens, lengths)
        optimizer.update(model, grads)
        return loss, count

    model.train()
    seconds = []
    for _ in range(steps):
        tokens = mx.random.randint(0, config["vocab_size"], (batch, length + 1))
        lengths = mx.array([[0, length + 1]] * batch)
        mx.eval(tokens, lengths)
        started = time.perf_counter()
        loss, count = update(tokens, lengths)
        mx.eval(state, loss, count)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[WARM_UP:])
    report(tokens_per_second=batch * length / median, median_seconds=median, dtype=dtype, loss=loss.item())


def generate(model_dir, tokens, rounds):
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, config = load_model(Path(model_dir))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    vocabulary = config["vocab_size"]
    prompt = mx.array([(i * 7919 + 13) % vocabulary for i in range(PROMPT_TOKENS)])
    speeds = []
    for _ in range(rounds):
        stream = generate_step(prompt, model, max_tokens=tokens)
        next(stream)
        started = time.perf_counter()
        count = sum(1 for _ in stream)
        speeds.append(count / (time.perf_counter() - started))
    median = statistics.median(speeds[1:])
    report(tokens_per_second=median, median_seconds=1 / median, dtype="float32")


def data(model_dir, data_dir, batch, steps):
    """The training loop of mlx_lm.lora on a folder, with its own report of trained tokens."""
    from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
    from mlx_lm.utils import load

    model, tokenizer = load(model_dir)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    adapt(model, len(model.layers))

    class Options:
        mask_prompt = True
        prompt_feature, text_feature, completion_feature, chat_feature = "prompt", "text", "completion", "messages"

    train, _, _ = load_local_dataset(Path(data_dir), tokenizer, Options())
    seconds = []

    class Callback(trainer.TrainingCallback):
        def on_train_loss_report(self, info):
            seconds.append((info["trained_tokens"], info["tokens_per_second"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer.TrainingArgs(
            batch_size=batch, iters=steps, steps_per_report=1, steps_per_save=10**9, max_seq_length=512,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        trainer.train(
            model, optimizers.Adam(learning_rate=1e-5), CacheDataset(train), args=arguments, training_callback=Callback()
        )
    # The first steps compile; a rate is the tokens after them over the seconds they took.
    counted, time_taken = 0.0, 0.0
    for (before, _), (after, rate) in zip(seconds[WARM_UP - 1 :], seconds[WARM_UP:]):
        counted += after - before
        time_taken += (after - before) / rate
    report(tokens_per_second=counted / time_taken, median_seconds=time_taken / max(len(seconds) - WARM_UP, 1), dtype="float32")


def main():
    mode, *rest = sys.argv[1:]
    if mode == "step":
        config, batch, length, steps, dtype, checkpointing = rest
        step(config, int(batch), int(length), int(steps), dtype, checkpointing == "1")
    elif mode == "generate":
        generate(rest[0], int(rest[1]), int(rest[2]))
    else:
        data(rest[0], rest[1], int(rest[2]), int(rest[3]))


main()
