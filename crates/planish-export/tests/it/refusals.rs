//! What is refused, how, and that nothing is left behind.

use std::{collections::BTreeMap, fs, path::Path};

use planish_export::{Error, ExportOptions, Layout, export};
use planish_tensors::{Error as TensorError, HostTensor, Update};

use crate::support::{LLAMA, random_tensors, write_model, write_tensors};

/// Exports into an otherwise empty folder, which must be empty afterwards.
fn refused(model: &Path, options: &ExportOptions) -> Error {
    let folder = tempfile::tempdir().unwrap();
    let name = if options.layout == Layout::Monolith {
        "out.mlpackage"
    } else {
        "out"
    };
    let error = export(model, Update::default(), &folder.path().join(name), options).unwrap_err();
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
            matches!(&error, Error::Tensors(TensorError::NonFinite { name, index: 100, .. }) if name.contains("layers.2.mlp.down")),
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
    assert!(export(folder.path(), Update::default(), &out, &ExportOptions::default()).is_ok());
}

/// Norm gains make activations grow while every weight stays small.
fn with_gain(gain: f32) -> tempfile::TempDir {
    with_tensor("model.layers.1.post_attention_layernorm.weight", |v| {
        v.iter_mut().for_each(|g| *g *= gain)
    })
}

#[test]
fn activations_near_the_end_of_fp16_are_a_warning_and_beyond_it_a_refusal() {
    let options = ExportOptions {
        calibration: (0..60).map(|i| i * 7 % 96).collect(),
        ..ExportOptions::default()
    };
    let (mut quiet, mut warned, mut gain) = (0, 0, 1.0f32);
    loop {
        let (model, out) = (with_gain(gain), tempfile::tempdir().unwrap());
        let path = out.path().join("out.mlpackage");
        match export(model.path(), Update::default(), &path, &options) {
            Ok(report)
                if report
                    .warnings
                    .iter()
                    .any(|w| w.contains("layers.1") && w.contains("--text")) =>
            {
                warned += 1
            }
            Ok(_) => quiet += 1,
            Err(Error::ActivationRange { place, peak }) => {
                assert!(place.contains("layers.1") && peak > 65_504.0, "{place} {peak}");
                break;
            }
            Err(other) => panic!("{other}"),
        }
        gain *= 1.25;
        assert!(gain < 10_000.0, "nothing was refused");
    }
    assert!(quiet > 0 && warned > 0, "{quiet} {warned}");
    assert!(matches!(
        refused(with_gain(gain).path(), &options),
        Error::ActivationRange { .. }
    ));
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
fn err_what_a_package_cannot_have_is_named() {
    for (extra, capability) in [
        (r#""hidden_act": "gelu_pytorch_tanh""#, "GELU"),
        (
            r#""model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention", "full_attention", "sliding_attention"]"#,
            "layers with different windows",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path(), LLAMA, 1);
        let config = LLAMA.trim_end().trim_end_matches('}');
        fs::write(folder.path().join("config.json"), format!("{config}, {extra}}}")).unwrap();
        let error = refused(folder.path(), &ExportOptions::default());
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(capability), "{error}");
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

/// Set in the processes that the tests of a full disk start: the folder to export into.
const FULL_DISK: &str = "PLANISH_TEST_FULL_DISK";
/// Likewise: the model folder.
const MODEL: &str = "PLANISH_TEST_MODEL";

/// Not a test of its own: what the processes with too little room run.
#[test]
fn child_exports_into_too_little_room() {
    let (Some(folder), Some(model)) = (std::env::var_os(FULL_DISK), std::env::var_os(MODEL)) else {
        return;
    };
    let out = Path::new(&folder).join("out");
    let options = ExportOptions {
        layout: Layout::Anemll,
        ..ExportOptions::default()
    };
    let error = export(Path::new(&model), Update::default(), &out, &options).unwrap_err();
    let left = fs::read_dir(&folder).unwrap().count();
    println!("left {left}; {error:?}");
}

/// Runs the child after a line of shell; what it printed, or `None` where the system does not allow the preparation.
fn child_after(preparation: &str, folder: &Path, unshare: bool) -> Option<String> {
    let (test, model) = (std::env::current_exe().unwrap(), tempfile::tempdir().unwrap());
    write_model(model.path(), LLAMA, 1);
    let script = format!(
        "{preparation} && echo prepared && exec \"$1\" --exact refusals::child_exports_into_too_little_room --nocapture"
    );
    let mut command = if unshare {
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "--map-root-user", "sh"]);
        command
    } else {
        std::process::Command::new("sh")
    };
    command
        .args(["-c", &script, "sh"])
        .arg(test)
        .env(FULL_DISK, folder)
        .env(MODEL, model.path());
    let output = command.output().ok()?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    printed.contains("prepared").then_some(printed)
}

#[cfg(target_os = "linux")]
#[test]
fn err_disk_without_room_is_refused_before_the_first_byte() {
    let folder = tempfile::tempdir().unwrap();
    let mount = format!("mount -t tmpfs -o size=64k none {}", folder.path().display());
    match child_after(&mount, folder.path(), true) {
        Some(printed) => assert!(printed.contains("left 0; NoSpace"), "{printed}"),
        None => println!("skipped: this system lets nobody mount"),
    }
}

/// There is room for the bytes but for five files only: the disk is full midway.
#[cfg(target_os = "linux")]
#[test]
fn err_disk_that_fills_up_midway_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mount = format!(
        "mount -t tmpfs -o size=64m,nr_inodes=8 none {}",
        folder.path().display()
    );
    match child_after(&mount, folder.path(), true) {
        Some(printed) => assert!(
            printed.contains("left 0; Io") && printed.contains("StorageFull"),
            "{printed}"
        ),
        None => println!("skipped: this system lets nobody mount"),
    }
}

/// The system refuses a write in the middle of a weight file.
#[test]
fn err_failing_write_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let printed = child_after("trap '' XFSZ; ulimit -f 32", folder.path(), false).unwrap();
    assert!(
        printed.contains("left 0; Package(Io") && printed.contains("FileTooLarge"),
        "{printed}"
    );
}

#[test]
fn err_existing_output_is_not_touched() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), LLAMA, 1);
    let out = folder.path().join("out.mlpackage");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "x").unwrap();
    let error = export(folder.path(), Update::default(), &out, &ExportOptions::default()).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }));
    assert_eq!(fs::read_to_string(out.join("precious")).unwrap(), "x");
}
