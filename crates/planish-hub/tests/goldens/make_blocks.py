#!/usr/bin/env python3
"""Quantised blocks and what the PyPI package gguf reads from and writes to them.

    python make_blocks.py        # writes blocks.safetensors beside itself

For each type `T`: `T.bytes` (random blocks with finite scales) and `T.values`, their numbers as gguf dequantises them.
For Q8_0 and Q4_0 also `T.quantized`: what gguf makes of `quantize.values`.
"""
import json
import os
import struct

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

# Byte offsets of the f16 scales and minima of a block.
SCALES = {T.F16: [0], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82],
          T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}


def main():
    rng = np.random.default_rng(20240)
    tensors = {}
    for kind in [*SCALES, T.BF16]:
        raw = random_blocks(rng, kind)
        tensors[f"{kind.name}.bytes"] = raw.reshape(-1)
        tensors[f"{kind.name}.values"] = dequantize(raw, kind).astype(np.float32).reshape(-1)
    values = rng.normal(0, 0.02, 512).astype(np.float32)
    values[32:64] = 0                                             # a block of zeros
    values[64:96] = np.arange(32) / 4                             # many halves, where rounding shows
    values[96] = -3.0                                             # the largest is negative, and far off
    tensors["quantize.values"] = values
    for kind in [T.Q8_0, T.Q4_0]:
        tensors[f"{kind.name}.quantized"] = quantize(values.reshape(1, -1), kind).reshape(-1)
    write_safetensors(os.path.join(os.path.dirname(os.path.abspath(__file__)), "blocks.safetensors"), tensors)


def random_blocks(rng, kind):
    block_len, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = 128 // block_len if block_len < 256 else 2
    raw = rng.integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
    if kind == T.BF16:
        raw[:, 1] = (raw[:, 1] & 0x80) | (raw[:, 1] % 0x40) + 0x10     # an exponent that is finite
    for offset in SCALES.get(kind, []):
        scale = rng.normal(0, 0.1, n_blocks).astype(np.float16)
        scale[0] = np.float16(6e-8)                                    # subnormal
        raw[:, offset:offset + 2] = scale.view(np.uint8).reshape(n_blocks, 2)
    return raw


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.nbytes
        header[name] = {"dtype": {"uint8": "U8", "float32": "F32"}[str(tensor.dtype)], "shape": list(tensor.shape),
                        "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, tensor in sorted(tensors.items()):
            f.write(tensor.tobytes())


if __name__ == "__main__":
    main()
