//! Adapters: merged before rounding, or kept beside the base weights.

use std::collections::BTreeMap;

use coreml_mil::interpreter::{Package, Precision, Value};
use ndarray::Array2;
use planish_export::{ExportOptions, export};
use planish_tensors::{HostTensor, LowRank, Update};

use crate::support::{LLAMA, Noise, contents, random_tensors, write_tensors};

/// Not q or k: with one token in the cache they do not show.
const MODULE: &str = "model.layers.1.self_attn.o_proj";

fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut noise = Noise::new(seed);
    Array2::from_shape_fn((rows, columns), |_| 0.3 * noise.next())
}

fn adapter() -> Update {
    let tensor = |m: Array2<f32>| HostTensor::from_f32(m.shape(), m.as_slice().unwrap());
    let low_rank = LowRank::linear(&tensor(matrix(48, 4, 1)), &tensor(matrix(4, 48, 2)), 2.0, None).unwrap();
    Update {
        low_rank: BTreeMap::from([(format!("{MODULE}.weight"), low_rank)]),
        whole: None,
    }
}

#[test]
fn merged_adapter_equals_an_export_of_merged_weights() {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = random_tensors(LLAMA, 5);
    write_tensors(&folder.path().join("base"), LLAMA, &tensors);
    let name = format!("{MODULE}.weight");
    let weight = Array2::from_shape_vec((48, 48), tensors[&name].to_f32().unwrap()).unwrap();
    let merged = weight + (matrix(48, 4, 1).dot(&matrix(4, 48, 2)).t().to_owned() * 2.0);
    let merged: Vec<f32> = merged.iter().copied().collect();
    tensors.insert(name, HostTensor::from_f32(&[48, 48], &merged));
    write_tensors(&folder.path().join("fused"), LLAMA, &tensors);
    let write = |model: &str, delta: Update| {
        let out = folder.path().join(format!("{model}.mlpackage"));
        export(&folder.path().join(model), delta, &out, &ExportOptions::default()).unwrap();
        contents(&out)
            .into_iter()
            .find(|(path, _)| path.ends_with("weight.bin"))
            .unwrap()
            .1
    };
    let (ours, theirs) = (write("base", adapter()), write("fused", Update::default()));
    // A sum taken in another order may round to the neighbouring fp16 number here and there.
    let halves = |bytes: &[u8]| {
        bytes
            .chunks_exact(2)
            .map(|b| i32::from(u16::from_le_bytes([b[0], b[1]])))
            .collect::<Vec<_>>()
    };
    let (ours, theirs) = (halves(&ours), halves(&theirs));
    assert_eq!(ours.len(), theirs.len());
    assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() <= 1));
    assert!(ours.iter().zip(&theirs).filter(|(a, b)| a != b).count() < 50);
}

#[test]
fn kept_adapter_shares_the_base_and_computes_the_merged_model() {
    let folder = tempfile::tempdir().unwrap();
    write_tensors(&folder.path().join("base"), LLAMA, &random_tensors(LLAMA, 5));
    let run = |keep: Option<&str>, function: &str| {
        let out = folder.path().join(format!("{function}{}.mlpackage", keep.is_some()));
        let options = ExportOptions {
            keep_adapter: keep.map(Into::into),
            ..ExportOptions::default()
        };
        let report = export(&folder.path().join("base"), adapter(), &out, &options).unwrap();
        let package = Package::open(&out).unwrap();
        let mut state = package.new_state(function).unwrap();
        let inputs = BTreeMap::from([
            ("input_ids".to_owned(), Value::ints(&[1, 1], vec![7]).unwrap()),
            ("position_ids".to_owned(), Value::ints(&[1], vec![0]).unwrap()),
            ("current_pos".to_owned(), Value::ints(&[1], vec![0]).unwrap()),
            (
                "causal_mask".to_owned(),
                Value::floats(
                    &[1, 1, 1, 128],
                    (0..128).map(|c| if c == 0 { 0.0 } else { -1e4 }).collect(),
                )
                .unwrap(),
            ),
        ]);
        let outputs = package.run(function, &inputs, &mut state, Precision::F32).unwrap();
        (outputs["logits1"].to_floats().unwrap(), report.packages[0].weight_bytes)
    };
    let (merged, merged_bytes) = run(None, "infer");
    let (kept, kept_bytes) = run(Some("tuned"), "infer_tuned");
    let (base, _) = run(Some("tuned"), "infer");
    let difference =
        |a: &ndarray::ArrayD<f32>| a.iter().zip(merged.iter()).fold(0f32, |m, (x, y)| m.max((x - y).abs()));
    assert!(difference(&kept) < 0.01, "{}", difference(&kept));
    assert!(difference(&base) > 0.05, "the base must differ: {}", difference(&base));
    // Two small matrices more, not a second model.
    assert!(kept_bytes < merged_bytes + 4096);
}
