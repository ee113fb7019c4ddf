"""Decodes with Core ML packages in the interpreter of the shared tools, as a host would.

python decode.py TOOLS REQUEST.json

REQUEST: {"package", "layout": "monolith" | "host" | "anemll", "context_length", "prompt": [ids], "steps", "out"}. The
prompt goes through prefill in one call of its own length; its last token is decoded again, as hosts of the ANEMLL layout
do; then `steps` tokens follow greedily with every result rounded to fp16, and once more the same tokens with f32
arithmetic. OUT, a safetensors file: ids [prompt + steps], f16 and f32 [steps, v]: row i predicts token prompt + i.
"""

import json
import sys

import numpy as np


def decode(make_golden, request, precision, known=None):
    """(tokens, logits [steps, v]); follows `known` tokens where they are given, its own choice otherwise."""
    golden = {"context_length": request["context_length"]}
    if request["layout"] == "anemll":
        step, _ = make_golden.drive_anemll(request["package"], golden, precision)
    else:
        step, _ = make_golden.drive_monolith(request["package"], golden, precision, request["layout"] == "host")
    tokens = list(request["prompt"])
    prompt, rows = len(tokens), []
    step(tokens, 0)
    for _ in range(request["steps"]):
        logits = step(tokens[-1:], len(tokens) - 1)[0]
        rows.append(logits)
        tokens.append(int(known[len(tokens)]) if known is not None else int(np.argmax(logits)))
    return tokens, np.array(rows, np.float32)


def main():
    tools, request_path = sys.argv[1:]
    sys.path.insert(0, tools)
    import make_golden

    with open(request_path) as file:
        request = json.load(file)
    tokens, halves = decode(make_golden, request, "f16")
    _, singles = decode(make_golden, request, "f32", tokens)
    arrays = {"ids": np.array(tokens, np.float32), "f16": halves, "f32": singles}
    make_golden.write_safetensors(
        request["out"], {name: array.shape for name, array in arrays.items()}, lambda name, _: arrays[name]
    )


main()
