"""The known answers of a model with the weights that a package holds: what a compressed package has to compute.

python stored_reference.py TOOLS MODEL PACKAGE OUT

MODEL is a folder of make_golden.py, PACKAGE an export of it in the monolith layout. The convolutions' weights are read from
the package by the interpreter of the shared tools and take the place of the model's in its numpy forward pass. OUT gets
golden.json and reference.npz, for `make_golden.py check`.
"""

import json
import os
import shutil
import sys

import numpy as np


def stored_weights(oracle, package, context):
    """The convolutions' weights of `infer`, [out, in] in f32, in the order of the graph."""
    model = oracle.Model(package, "f32")
    inputs = {
        "input_ids": np.zeros((1, 1), np.int32),
        "position_ids": np.zeros(1, np.int32),
        "current_pos": np.zeros(1, np.int32),
        "causal_mask": np.zeros((1, 1, 1, context), np.float32),
    }
    trace = {}
    model.predict(inputs, "infer", model.make_state("infer"), trace=trace)
    convolutions = [op for op in model.funcs["infer"].ops if op.type == "conv"]
    return [np.asarray(trace[op.inputs["weight"][0][1]], np.float32)[:, :, 0, 0] for op in convolutions]


def main():
    tools, folder, package, out = sys.argv[1:]
    sys.path.insert(0, tools)
    import make_golden
    import oracle

    with open(os.path.join(folder, "golden.json")) as file:
        golden = json.load(file)
    with open(os.path.join(folder, "config.json")) as file:
        # A compressed head is no longer the embedding.
        config = make_golden.Config({**json.load(file), "tie_word_embeddings": False})
    weights = make_golden.read_safetensors(os.path.join(folder, "model.safetensors"))
    found = iter(stored_weights(oracle, package, golden["context_length"]))
    for layer in range(config.layers):
        for module in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
            name = f"model.layers.{layer}.{module}_proj.weight"
            stored = next(found)
            if stored.shape != weights[name].shape:
                raise ValueError(f"{name}: {stored.shape} for {weights[name].shape}")
            weights[name] = stored
    weights["lm_head.weight"] = np.concatenate(list(found))
    ids = np.load(os.path.join(folder, "reference.npz"))["ids"]
    logits, kv = make_golden.reference_forward(config, weights, ids)
    os.makedirs(out, exist_ok=True)
    shutil.copy(os.path.join(folder, "golden.json"), out)
    np.savez(os.path.join(out, "reference.npz"), ids=ids, logits=logits, kv=kv)


main()
