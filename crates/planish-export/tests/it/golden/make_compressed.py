"""Makes compressed.json and compressed_FORMAT.bin: weight files of programs with one compressed convolution, as coremltools
writes them (pip install coremltools==9.0).

The weights are exact in their format (integers times a scale, or entries of a table), so a right compressor finds the
same integers and the same scales or tables, and a right writer the same bytes. Values: seed 0.
"""

import json
import logging
import os
import shutil
import sys
import tempfile

import numpy as np

logging.getLogger("coremltools").setLevel(logging.ERROR)
import coremltools as ct
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

ROWS, COLUMNS, BLOCK, TABLE_ROWS = 24, 64, 32, 8


def scaled(rng, levels, block):
    """Integers with the largest one in each block, and a scale a block that is a power of two times an odd number."""
    data = rng.integers(-levels, levels + 1, (ROWS, COLUMNS))
    data[:, ::block] = levels
    scale = (rng.integers(64, 128, (ROWS, COLUMNS // block)) / 1024).astype(np.float16)
    weights = data * np.repeat(scale.astype(np.float32), block, 1)
    return data, scale, weights


def tabled(rng, bits, table_rows):
    """Indices of which every one occurs in each group of rows, and ascending tables."""
    groups, entries = ROWS // table_rows, 1 << bits
    steps = rng.integers(1, 9, (groups, entries))
    tables = ((np.cumsum(steps, 1) - 200) / 256).astype(np.float16)
    indices = rng.integers(0, entries, (groups, table_rows * COLUMNS))
    indices[:, :entries] = np.arange(entries)
    weights = np.take_along_axis(tables.astype(np.float32), indices, 1).reshape(ROWS, COLUMNS)
    return indices.reshape(ROWS, COLUMNS), tables, weights


def weight_file(weight):
    """weight.bin of a program whose convolution has this weight (a function that makes it inside the builder)."""

    @mb.program(
        input_specs=[mb.TensorSpec((1, COLUMNS, 1, 4), dtype=types.fp16)], opset_version=ct.target.iOS18
    )
    def program(x):
        return mb.conv(x=x, weight=weight())

    passes = ct.PassPipeline.EMPTY
    model = ct.convert(
        program, minimum_deployment_target=ct.target.iOS18, pass_pipeline=passes, skip_model_load=True
    )
    folder = tempfile.mkdtemp()
    path = os.path.join(folder, "m.mlpackage")
    model.save(path)
    with open(os.path.join(path, "Data/com.apple.CoreML/weights/weight.bin"), "rb") as file:
        data = file.read()
    shutil.rmtree(folder)
    return data


def main(folder):
    rng, cases = np.random.default_rng(0), {}
    for name, levels, block in (("int8", 127, COLUMNS), ("int4", 7, BLOCK)):
        data, scale, weights = scaled(rng, levels, block)
        numpy_type = np.int8 if name == "int8" else types.type_mapping.string_to_nptype("int4")
        shaped = data.astype(np.int8).astype(numpy_type).reshape(ROWS, COLUMNS, 1, 1)
        sides = scale.reshape(ROWS, -1, 1, 1)
        cases[name] = weights, weight_file(lambda: mb.constexpr_blockwise_shift_scale(data=shaped, scale=sides))
    for name, bits, rows in (("lut6", 6, TABLE_ROWS), ("lut4", 4, TABLE_ROWS)):
        indices, tables, weights = tabled(rng, bits, rows)
        numpy_type = types.type_mapping.string_to_nptype(f"uint{bits}")
        shaped = indices.astype(np.uint8).astype(numpy_type).reshape(ROWS, COLUMNS, 1, 1)
        lut = tables.reshape(ROWS // rows, 1, 1, 1, 1 << bits, 1)
        cases[name] = weights, weight_file(lambda: mb.constexpr_lut_to_dense(indices=shaped, lut=lut))
    out = {"rows": ROWS, "columns": COLUMNS, "weights": {}}
    for name, (weights, data) in cases.items():
        with open(os.path.join(folder, f"compressed_{name}.bin"), "wb") as file:
            file.write(data)
        out["weights"][name] = weights.astype(float).ravel().tolist()
        print(name, len(data), "bytes")
    with open(os.path.join(folder, "compressed.json"), "w") as file:
        json.dump(out, file)


main(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)))
