"""Makes blob.bin and blob.json with coremltools' own weight-file writer (pip install coremltools==9.0).

Lengths are chosen so that padding bits and unaligned sizes occur. Values: seed 0.
"""

import json
import os
import sys

import numpy as np
from coremltools.libmilstoragepython import _BlobStorageWriter

WIDTHS = {"uint1": 1, "uint2": 2, "uint4": 4, "uint3": 3, "uint6": 6}


def values():
    rng = np.random.default_rng(0)
    yield "fp16", rng.standard_normal(37).astype(np.float16)
    yield "fp32", rng.standard_normal(5).astype(np.float32)
    yield "int8", rng.integers(-128, 128, 70).astype(np.int8)
    yield "int4", rng.integers(-8, 8, 13).astype(np.int8)
    for name, bits in WIDTHS.items():
        yield name, rng.integers(0, 1 << bits, 13).astype(np.uint8)


def main(folder):
    path = os.path.join(folder, "blob.bin")
    if os.path.exists(path):
        os.remove(path)  # the writer appends
    writer, blobs = _BlobStorageWriter(path), []
    for dtype, array in values():
        if dtype == "fp16":
            offset = writer.write_fp16_data(array.view(np.uint16))
        elif dtype == "fp32":
            offset = writer.write_float_data(array)
        else:
            offset = getattr(writer, f"write_{dtype}_data")(array)
        blobs.append({"dtype": dtype, "offset": offset, "values": array.astype(float).tolist()})
    del writer  # closes the file
    with open(os.path.join(folder, "blob.json"), "w") as file:
        json.dump({"bytes": os.path.getsize(path), "blobs": blobs}, file, indent=1)


main(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)))
