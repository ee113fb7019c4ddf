use rayon::prelude::*;

use planish_tensors::HostTensor;

use crate::adapter::{Adapter, Method};
use crate::error::Result;

/// The fused weight of one module, in f32.
///
/// `W` is row-major `[rows, columns]`: outputs by inputs for a linear layer, tokens by dims for an embedding.
pub(super) fn fuse_module(adapter: &Adapter, module: &str, weight: &[f32], is_embedding: bool) -> Result<Vec<f32>> {
    let part = |leaf: &str| {
        let name = format!("{module}.{leaf}");
        let absent = || planish_tensors::Error::NoTensor {
            path: "the adapter".into(),
            name: name.clone(),
            nearest: None,
        };
        adapter.tensors.get(&name).ok_or_else(absent)
    };
    let (a, b) = (part("lora_a")?, part("lora_b")?);
    // ΔW = scale · left · right, with left [rows, rank] and right [rank, columns].
    let (left, right) = if is_embedding {
        (a.to_f32()?, b.to_f32()?)
    } else {
        (transposed(b)?, transposed(a)?)
    };
    let columns = right.len() / adapter.rank;
    let magnitudes = if adapter.method == Method::Dora {
        Some(part("m")?.to_f32()?)
    } else {
        None
    };
    let mut fused = weight.to_vec();
    fused
        .par_chunks_mut(columns)
        .zip(left.par_chunks(adapter.rank))
        .enumerate()
        .for_each(|(row, (fused, left))| {
            add_delta(fused, left, &right, adapter.scale as f32);
            if let Some(magnitudes) = &magnitudes {
                scale_to(fused, magnitudes[row]);
            }
        });
    Ok(fused)
}

/// Adds `scale · left · right` to one row.
fn add_delta(row: &mut [f32], left: &[f32], right: &[f32], scale: f32) {
    let mut delta = vec![0.0f32; row.len()];
    for (factor, basis) in left.iter().zip(right.chunks_exact(row.len())) {
        for (sum, value) in delta.iter_mut().zip(basis) {
            *sum += factor * value;
        }
    }
    for (weight, delta) in row.iter_mut().zip(delta) {
        *weight += scale * delta;
    }
}

/// Gives a row the length `magnitude`; a row of zeros stays.
fn scale_to(row: &mut [f32], magnitude: f32) {
    let norm = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32;
    if norm > 0.0 {
        row.iter_mut().for_each(|value| *value *= magnitude / norm);
    }
}

fn transposed(matrix: &HostTensor) -> Result<Vec<f32>> {
    let (values, columns) = (matrix.to_f32()?, matrix.shape[1]);
    let rows = matrix.shape[0];
    Ok((0..columns)
        .flat_map(|c| (0..rows).map(move |r| (r, c)))
        .map(|(r, c)| values[r * columns + c])
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(method: Method) -> Adapter {
        let mut adapter = Adapter::new(method, 2, 0.5, 0.0);
        // a [3, 2], b [2, 2].
        adapter.tensors.insert(
            "x.lora_a".into(),
            HostTensor::from_f32(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        );
        adapter.tensors.insert(
            "x.lora_b".into(),
            HostTensor::from_f32(&[2, 2], &[1.0, 10.0, 2.0, 20.0]),
        );
        adapter
    }

    #[test]
    fn linear_update_is_b_transposed_times_a_transposed() {
        // Row 0: 0.5·(1·[1,3,5] + 2·[2,4,6]); row 1 is ten times that.
        let fused = fuse_module(&adapter(Method::Lora), "x", &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0], false).unwrap();
        assert_eq!(fused, [3.5, 5.5, 8.5, 25.0, 55.0, 85.0]);
    }

    #[test]
    fn embedding_update_is_a_times_b() {
        let fused = fuse_module(&adapter(Method::Lora), "x", &[0.0; 6], true).unwrap();
        assert_eq!(fused, [2.5, 25.0, 5.5, 55.0, 8.5, 85.0]);
    }

    #[test]
    fn dora_rows_have_their_magnitudes_as_norms() {
        let mut dora = adapter(Method::Dora);
        dora.tensors
            .insert("x.m".into(), HostTensor::from_f32(&[2], &[2.0, 0.5]));
        let fused = fuse_module(&dora, "x", &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0], false).unwrap();
        for (row, magnitude) in fused.chunks(3).zip([2.0, 0.5]) {
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            assert!((norm - magnitude).abs() < 1e-6, "{norm}");
        }
        assert!((fused[1] / fused[0] - 5.5 / 3.5).abs() < 1e-6);
    }
}
