#!/usr/bin/env python3
"""Seeds of the fuzz target gguf: small valid files that between them use every value type and tensor type.

    python make_seeds.py         # writes into fuzz/corpus/gguf at the root of the repository
"""
import os
import shutil
import struct

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T, GGUFValueType as V, GGUFWriter

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "..", "..", "..", "..", "fuzz", "corpus", "gguf")
READ = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K]


def main():
    os.makedirs(OUT, exist_ok=True)
    shutil.copy(os.path.join(HERE, "llama_q4_0.gguf"), os.path.join(OUT, "seed_llama"))
    values = GGUFWriter(os.path.join(OUT, "seed_values"), "llama")
    for kind, value in [(V.UINT8, 1), (V.INT8, -1), (V.UINT16, 2), (V.INT16, -2), (V.UINT32, 3), (V.INT32, -3),
                        (V.FLOAT32, 0.5), (V.BOOL, True), (V.STRING, "é"), (V.UINT64, 4), (V.INT64, -4), (V.FLOAT64, 0.25)]:
        values.add_key_value(f"k.{kind.name}", value, kind)
        if kind != V.STRING:
            values.add_key_value(f"a.{kind.name}", [value, value], V.ARRAY, sub_type=kind)
    values.add_array("a.STRING", ["a", "b"])
    finish(values)
    tensors = GGUFWriter(os.path.join(OUT, "seed_tensors"), "qwen2")
    for kind in READ:
        block_len, block_bytes = GGML_QUANT_SIZES[kind]
        if kind in (T.F32, T.F16):
            tensors.add_tensor(kind.name, np.zeros((1, 2), {T.F32: np.float32, T.F16: np.float16}[kind]))
        else:
            tensors.add_tensor(kind.name, np.ones((1, max(1, 2 // block_len) * block_bytes), np.uint8), raw_dtype=kind)
    finish(tensors)
    # Arrays of arrays, which the package does not write: ((1, 2), ()).
    key = b"nested"
    inner = struct.pack("<IQBB", 0, 2, 1, 2) + struct.pack("<IQ", 0, 0)
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 9, 2) + inner
    with open(os.path.join(OUT, "seed_nested"), "wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
