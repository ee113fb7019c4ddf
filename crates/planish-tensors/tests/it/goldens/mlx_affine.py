"""Makes mlx_affine.safetensors: weights quantised and dequantised by MLX itself.

pip install "mlx[cpu]==0.32.2" numpy safetensors; python mlx_affine.py
"""

import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

mx.set_default_device(mx.cpu)
rng = np.random.default_rng(7)
weights = {
    "normal": rng.normal(0, 0.02, (3, 128)),
    "positive": rng.uniform(0.5, 1.0, (3, 128)),
    "outlier": np.where(rng.uniform(size=(3, 128)) < 0.02, 1.0, 0.01) * rng.normal(size=(3, 128)),
    "constant": np.full((3, 128), -0.25),
    "zero": np.zeros((3, 128)),
}
tensors = {}
for name, values in weights.items():
    weight = mx.array(values.astype(np.float32))
    tensors[f"{name}.weight"] = np.array(weight)
    for bits in (2, 3, 4, 5, 6, 8):
        for group_size in (32, 64, 128):
            packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
            key = f"{name}.{bits}.{group_size}"
            tensors[f"{key}.packed"] = np.array(packed)
            tensors[f"{key}.scales"] = np.array(scales)
            tensors[f"{key}.biases"] = np.array(biases)
            back = mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits)
            tensors[f"{key}.back"] = np.array(back)
save_file(tensors, "mlx_affine.safetensors")
