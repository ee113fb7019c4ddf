"""Makes the goldens of this folder: tiny random models and what mlx-lm computes with them, in f32 on the CPU.

    pip install 'mlx[cpu]==0.32.2' 'mlx-lm==0.32.2'
    python make_goldens.py            # writes one folder a model beside this script

Each folder: config.json, model.safetensors (seeded, the same numbers on every run), golden/golden.safetensors with
`tokens` i32 [2, 24], `logits` f32 [2, 24, v], `greedy` i32 [32] (continuation of the first row, with cache).
Two models also get a `lora` and a `dora` folder: an adapter of random numbers in mlx-lm's layout, and golden/ with it;
there `grad.<name>` is the gradient of the mean cross-entropy of the first row's next tokens.
Weights are large enough that logits span several units, so that a wrong rotation, norm or mask shows.
"""
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from mlx.utils import tree_flatten

HERE = Path(__file__).parent
BASE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=80, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
QUANTISED = BASE | dict(model_type="llama", intermediate_size=64, tie_word_embeddings=True)
MODELS = {
    "llama3-rope": BASE | dict(model_type="llama", rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "llama-linear-bias": BASE | dict(model_type="llama", rope_scaling=dict(type="linear", factor=4.0), attention_bias=True,
                                     mlp_bias=True, head_dim=16),
    "mistral-window": BASE | dict(model_type="mistral", sliding_window=8),
    "llama-affine-4bit": QUANTISED | dict(quantization=dict(group_size=32, bits=4)),
    "llama-affine-8bit": QUANTISED | dict(quantization=dict(group_size=32, bits=8)),
    "qwen2": BASE | dict(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True),
    "qwen3": BASE | dict(model_type="qwen3", rms_norm_eps=1e-6, head_dim=16, rope_theta=1000000.0),
    # The root of its hidden size is exact in bf16, to which mlx-lm rounds the factor of the embedding whatever the dtype.
    "gemma3": BASE | dict(model_type="gemma3_text", hidden_size=64, head_dim=16, rms_norm_eps=0.01, rope_theta=20000.0,
                          rope_local_base_freq=500.0, rope_scaling=dict(rope_type="linear", factor=4.0),
                          query_pre_attn_scalar=24, sliding_window=8, sliding_window_pattern=2,
                          hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True),
}
del MODELS["gemma3"]["hidden_act"]


def shapes(config):
    d, ff, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", d // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    family, bias, mlp_bias = config["model_type"], config.get("attention_bias", False), config.get("mlp_bias", False)
    yield "model.embed_tokens.weight", (v, d)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, out, inn in [("q_proj", q, d), ("k_proj", kv, d), ("v_proj", kv, d), ("o_proj", d, q)]:
            yield f"{block}.self_attn.{name}.weight", (out, inn)
            if bias or (family == "qwen2" and name != "o_proj"):
                yield f"{block}.self_attn.{name}.bias", (out,)
        if family in ("qwen3", "gemma3_text"):
            yield f"{block}.self_attn.q_norm.weight", (head_dim,)
            yield f"{block}.self_attn.k_norm.weight", (head_dim,)
        for name, out, inn in [("gate_proj", ff, d), ("up_proj", ff, d), ("down_proj", d, ff)]:
            yield f"{block}.mlp.{name}.weight", (out, inn)
            if mlp_bias:
                yield f"{block}.mlp.{name}.bias", (out,)
        yield f"{block}.input_layernorm.weight", (d,)
        yield f"{block}.post_attention_layernorm.weight", (d,)
        if family == "gemma3_text":
            yield f"{block}.pre_feedforward_layernorm.weight", (d,)
            yield f"{block}.post_feedforward_layernorm.weight", (d,)
    yield "model.norm.weight", (d,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (v, d)


def weight(random, name, shape):
    if "norm" in name:
        return random.uniform(0.5, 1.5, shape)
    if name.endswith("bias"):
        return random.normal(0, 0.5, shape)
    return random.normal(0, 1.5 / np.sqrt(shape[-1]), shape)


def quantised(weights, group_size, bits):
    """Packs every matrix as MLX's affine quantisation does."""
    packed = {}
    for name, array in weights.items():
        if array.ndim == 1:
            packed[name] = array
            continue
        parts = mx.quantize(array, group_size=group_size, bits=bits)
        for suffix, part in zip(("weight", "scales", "biases"), parts):
            packed[name.removesuffix("weight") + suffix] = part
    return packed


def adapted(folder, kind, seed, tokens):
    """Writes an adapter in mlx-lm's layout under FOLDER/KIND, and the logits that mlx-lm has with it."""
    out = folder / kind
    out.mkdir(exist_ok=True)
    settings = dict(rank=4, scale=3.0, dropout=0.0, keys=["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
    model, _ = load_model(folder, strict=True)
    linear_to_lora_layers(model, 2, settings, use_dora=kind == "dora")
    random = np.random.default_rng(seed)
    adapter = {name: mx.array(random.normal(0, 0.3, array.shape).astype(np.float32)) + (name.endswith(".m") * array)
               for name, array in tree_flatten(model.trainable_parameters()) if name.split(".")[-1] in ("lora_a", "lora_b", "m")}
    model.load_weights(list(adapter.items()), strict=False)
    mx.save_safetensors(str(out / "adapters.safetensors"), adapter)
    config = dict(fine_tune_type=kind, num_layers=2, lora_parameters=settings)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=4, sort_keys=True) + "\n")
    (out / "golden").mkdir(exist_ok=True)
    logits = model(tokens).astype(mx.float32)

    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:1, :-1]), tokens[:1, 1:], reduction="mean")

    _, grads = nn.value_and_grad(model, loss)(model)
    grads = {f"grad.{name}": array for name, array in tree_flatten(grads) if name in adapter}
    mx.save_safetensors(str(out / "golden" / "golden.safetensors"), dict(tokens=tokens, logits=logits) | grads)


def main():
    mx.set_default_device(mx.cpu)
    for seed, (name, config) in enumerate(MODELS.items()):
        folder = HERE / name
        (folder / "golden").mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(seed)
        weights = {key: mx.array(weight(random, key, shape).astype(np.float32)) for key, shape in shapes(config)}
        if "quantization" in config:
            weights = quantised(weights, **config["quantization"])
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        model, _ = load_model(folder, strict=True)
        if config["model_type"] == "mistral":  # mlx-lm has the window, but takes it for models that mix block kinds only
            model.model.swa_idx = 0
            for layer in model.layers:
                layer.use_sliding = True
        tokens = mx.array(random.integers(3, config["vocab_size"], (2, 24)).astype(np.int32))
        logits = model(tokens).astype(mx.float32)
        greedy = [int(token) for token, _ in generate_step(tokens[0], model, max_tokens=32)]
        mx.save_safetensors(str(folder / "golden" / "golden.safetensors"),
                            dict(tokens=tokens, logits=logits, greedy=mx.array(np.array(greedy, np.int32))))
        if name in ("qwen2", "llama-affine-4bit", "gemma3"):
            for kind in ("lora",) if name == "gemma3" else ("lora", "dora"):
                adapted(folder, kind, seed, tokens)
        print(name, "logits", float(logits.min()), "to", float(logits.max()), "greedy", greedy[:8])


if __name__ == "__main__":
    main()
