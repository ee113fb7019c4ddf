#!/usr/bin/env python3
"""Tiny random models as GGUF files written by the PyPI package gguf, and the tensors they must become.

    python make_models.py        # writes <name>.gguf and models.json beside itself

The names and the permutation are those of llama.cpp's convert_hf_to_gguf. models.json holds, for each file, the SHA-256
of every Hugging Face tensor as f32 (for the quantised file after gguf's own dequantisation), and the config.json keys to
expect.
"""
import hashlib
import json
import os

import numpy as np
from gguf import GGMLQuantizationType as T, GGUFWriter, RopeScalingType, TokenType
from gguf.quants import dequantize, quantize

HERE = os.path.dirname(os.path.abspath(__file__))
HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCAB = 32, 64, 4, 2, 16
MODELS = {
    # name: architecture, storage of matrices, tied head, head size, biases, what is special
    "llama_q4_0": ("llama", T.Q4_0, True, 8, "", {}),
    "llama_bias_f32": ("llama", T.F32, False, 8, "qkvo+mlp", {"rope": "llama3"}),
    "qwen2_f16": ("qwen2", T.F16, True, 8, "qkv", {"rope": "linear"}),
    "qwen3_bf16": ("qwen3", T.BF16, False, 16, "", {}),
}
PRE = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}


def main():
    expected = {}
    for seed, (name, model) in enumerate(MODELS.items()):
        expected[name] = build(name, np.random.default_rng(seed), *model)
    with open(os.path.join(HERE, "models.json"), "w") as f:
        json.dump(expected, f, indent=1, sort_keys=True)
        f.write("\n")


def build(name, rng, architecture, kind, tied, head_dim, biases, special):
    writer = GGUFWriter(os.path.join(HERE, f"{name}.gguf"), architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    config = {"model_type": architecture, "rope_theta": 500000.0, "rms_norm_eps": 1e-6, "head_dim": head_dim,
              "tie_word_embeddings": tied, "attention_bias": bool(biases), "mlp_bias": "mlp" in biases,
              "rope_scaling": None, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "bos_token_id": 12,
              "eos_token_id": [13, 14]}
    if head_dim != HIDDEN // HEADS:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if special.get("rope") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
        config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    if special.get("rope") == "llama3":
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192}
        writer.add_tensor("rope_freqs.weight", llama3_factors(head_dim, 500000.0, **scaling))
        config["rope_scaling"] = {"rope_type": "llama3", **scaling}
    add_tokenizer(writer, PRE[architecture])
    shas = {}
    for hf_name, gguf_name, shape in tensors(tied, head_dim, biases, architecture):
        weight = rng.normal(0, 0.1, shape).astype(np.float32)
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(hf_name.split(".")[-2])
        stored = permute(weight, heads) if heads and architecture == "llama" else weight
        as_kind = kind if len(shape) == 2 else T.F32
        data = quantize(stored, as_kind)
        writer.add_tensor(gguf_name, data, raw_dtype=None if as_kind in (T.F32, T.F16) else as_kind)
        back = dequantize(data, as_kind).astype(np.float32)
        # Undone by indexing, not by the inverse formula.
        if heads and architecture == "llama":
            rows = permute(np.arange(shape[0]).reshape(-1, 1), heads).reshape(-1)
            back = back[np.argsort(rows)]
        if kind in (T.F32,):
            assert (back == weight).all()
        shas[hf_name] = hashlib.sha256(back.reshape(shape).tobytes()).hexdigest()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"config": config, "tensors": shas}


def permute(w, n_heads):
    return w.reshape(n_heads, 2, w.shape[0] // n_heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def llama3_factors(head_dim, theta, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < original_max_position_embeddings / high_freq_factor:
            factors.append(1.0)
        elif wavelength > original_max_position_embeddings / low_freq_factor:
            factors.append(factor)
        else:
            smooth = (original_max_position_embeddings / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def add_tokenizer(writer, pre):
    tokens = ["a", "b", "c", "d", "Ġ", "ab", "abc", "Ġa", "Ċ", "1", "2", "<tool>", "<s>", "</s>", "<end>", "[PAD15]"]
    kinds = [TokenType.NORMAL] * 11 + [TokenType.USER_DEFINED] + [TokenType.CONTROL] * 3 + [TokenType.UNUSED]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b", "ab c", "Ġ a"])
    writer.add_bos_token_id(12)
    writer.add_eos_token_id(13)
    writer.add_eot_token_id(14)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def tensors(tied, head_dim, biases, architecture):
    q, kv = HEADS * head_dim, KV_HEADS * head_dim
    block, layer = "blk.0", "model.layers.0"
    yield "model.embed_tokens.weight", "token_embd.weight", (VOCAB, HIDDEN)
    yield f"{layer}.input_layernorm.weight", f"{block}.attn_norm.weight", (HIDDEN,)
    for ours, theirs, shape, letter in [("q_proj", "attn_q", (q, HIDDEN), "q"), ("k_proj", "attn_k", (kv, HIDDEN), "k"),
                                        ("v_proj", "attn_v", (kv, HIDDEN), "v"), ("o_proj", "attn_output", (HIDDEN, q), "o")]:
        yield f"{layer}.self_attn.{ours}.weight", f"{block}.{theirs}.weight", shape
        if letter in biases.split("+")[0]:
            yield f"{layer}.self_attn.{ours}.bias", f"{block}.{theirs}.bias", shape[:1]
    if architecture == "qwen3":
        yield f"{layer}.self_attn.q_norm.weight", f"{block}.attn_q_norm.weight", (head_dim,)
        yield f"{layer}.self_attn.k_norm.weight", f"{block}.attn_k_norm.weight", (head_dim,)
    yield f"{layer}.post_attention_layernorm.weight", f"{block}.ffn_norm.weight", (HIDDEN,)
    for ours, theirs, shape in [("gate_proj", "ffn_gate", (FEED_FORWARD, HIDDEN)), ("up_proj", "ffn_up", (FEED_FORWARD, HIDDEN)),
                                ("down_proj", "ffn_down", (HIDDEN, FEED_FORWARD))]:
        yield f"{layer}.mlp.{ours}.weight", f"{block}.{theirs}.weight", shape
        if "mlp" in biases:
            yield f"{layer}.mlp.{ours}.bias", f"{block}.{theirs}.bias", shape[:1]
    yield "model.norm.weight", "output_norm.weight", (HIDDEN,)
    if not tied:
        yield "lm_head.weight", "output.weight", (VOCAB, HIDDEN)


if __name__ == "__main__":
    main()
