use std::path::Path;

use planish_tensors::{Affine, Dtype, TensorStore, dequantize, quantize};

#[test]
fn golden_mlx_affine_quantisation() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/goldens/mlx_affine.safetensors");
    let store = TensorStore::open(&golden).unwrap();
    let mut compared = 0;
    for name in ["normal", "positive", "outlier", "constant", "zero"] {
        let weight = store.require(&format!("{name}.weight")).unwrap().to_f32().unwrap();
        for (bits, group_size) in [2, 3, 4, 5, 6, 8]
            .into_iter()
            .flat_map(|bits| [32, 64, 128].map(|group| (bits, group)))
        {
            let part = |leaf: &str| {
                store
                    .require(&format!("{name}.{bits}.{group_size}.{leaf}"))
                    .unwrap()
                    .to_host()
            };
            let theirs = Affine {
                weight: part("packed"),
                scales: part("scales"),
                biases: part("biases"),
            };
            let ours = quantize(&weight, 3, bits, group_size, Dtype::F32).unwrap();
            assert_eq!(ours, theirs, "{name}, {bits} bits, groups of {group_size}");
            // MLX may fuse product and sum; the difference is below one rounding of the larger of the two.
            let (back, expect) = (dequantize(&theirs, bits).unwrap(), part("back").to_f32().unwrap());
            for (ours, mlx) in back.iter().zip(&expect) {
                assert!(
                    (ours - mlx).abs() <= 1e-6 * mlx.abs().max(0.1),
                    "{name}, {bits} bits: {ours} {mlx}"
                );
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 90);
}
