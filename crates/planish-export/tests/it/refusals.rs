//! What is refused, how, and that nothing is left behind.

use std::{collections::BTreeMap, fs, path::Path};

use planish_checkpoint::tensors::HostTensor;
use planish_export::{Error, ExportOptions, Layout, export, weights::AdapterDelta};

use crate::support::{LLAMA, random_tensors, write_model, write_tensors};

/// Exports into an otherwise empty folder, which must be empty afterwards.
fn refused(model: &Path, options: &ExportOptions) -> Error {
    let folder = tempfile::tempdir().unwrap();
    let name = if options.layout == Layout::Monolith {
        "out.mlpackage"
    } else {
        "out"
    };
    let error = export(model, AdapterDelta::default(), &folder.path().join(name), options).unwrap_err();
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        0,
        "something was left: {error}"
    );
    error
}

fn with_tensor(name: &str, change: impl Fn(&mut Vec<f32>)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors: BTreeMap<String, HostTensor> = random_tensors(LLAMA, 1);
    let mut values = tensors[name].to_f32().unwrap();
    change(&mut values);
    let shape = tensors[name].shape.clone();
    tensors.insert(name.into(), HostTensor::from_f32(&shape, &values));
    write_tensors(folder.path(), LLAMA, &tensors);
    folder
}

#[test]
fn err_nan_names_tensor_and_place() {
    let folder = with_tensor("model.layers.2.mlp.down_proj.weight", |v| v[100] = f32::NAN);
    for layout in [Layout::Monolith, Layout::Anemll] {
        let error = refused(
            folder.path(),
            &ExportOptions {
                layout,
                ..ExportOptions::default()
            },
        );
        assert!(
            matches!(&error, Error::NotFinite { tensor, index: 100, .. } if tensor.contains("layers.2.mlp.down")),
            "{error}"
        );
    }
}

#[test]
fn err_weight_beyond_fp16() {
    let folder = with_tensor("model.norm.weight", |v| v[3] = 65_600.0);
    assert!(matches!(
        refused(folder.path(), &ExportOptions::default()),
        Error::Fp16Range { index: 3, .. }
    ));
    let folder = with_tensor("model.norm.weight", |v| v[3] = 65_504.0);
    let out = folder.path().join("ok.mlpackage");
    assert!(export(folder.path(), AdapterDelta::default(), &out, &ExportOptions::default()).is_ok());
}

#[test]
fn err_mixture_of_experts_and_other_architectures() {
    for kind in ["mixtral", "qwen3_moe", "gpt2"] {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path(), LLAMA, 1);
        fs::write(folder.path().join("config.json"), LLAMA.replace("llama", kind)).unwrap();
        let error = refused(folder.path(), &ExportOptions::default());
        assert!(matches!(error, Error::Config(_)), "{error}");
        assert!(error.to_string().contains(kind), "{error}");
    }
}

#[test]
fn err_context_beyond_the_model() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), LLAMA, 1);
    let error = refused(
        folder.path(),
        &ExportOptions {
            context: Some(129),
            ..ExportOptions::default()
        },
    );
    assert!(
        matches!(
            error,
            Error::Option {
                option: "--context",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn err_missing_tensor_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = random_tensors(LLAMA, 1);
    tensors.remove("model.layers.0.mlp.up_proj.weight");
    write_tensors(folder.path(), LLAMA, &tensors);
    let error = refused(folder.path(), &ExportOptions::default());
    assert!(
        error.to_string().contains("model.layers.0.mlp.up_proj.weight"),
        "{error}"
    );
}

#[test]
fn err_existing_output_is_not_touched() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), LLAMA, 1);
    let out = folder.path().join("out.mlpackage");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "x").unwrap();
    let error = export(folder.path(), AdapterDelta::default(), &out, &ExportOptions::default()).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }));
    assert_eq!(fs::read_to_string(out.join("precious")).unwrap(), "x");
}
