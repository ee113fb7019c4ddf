use std::path::Path;

use planish_core::fs::AtomicDir;
use serde_json::Value;

use super::{Adapter, AdapterReport, BaseModel, CONFIG_FILE, Format, Method, ReadOptions, Refusal, read_json_object};
use crate::error::{Error, Result};

/// Reads an adapter folder and writes it in the other layout; `out` appears whole or not at all.
///
/// Converting back gives the same tensors to the bit, unless a scale that is no power of two had to be folded, which
/// the report says.
///
/// # Errors
/// All of [`Adapter::read`]; [`Error::AdapterRefused`] for what the target cannot hold; [`Error::Write`] also when
/// `out` exists and is not empty.
///
/// # Example
/// ```
/// use planish_checkpoint::adapter::{Adapter, Format, Method, ReadOptions, convert};
/// use planish_tensors::HostTensor;
///
/// let dir = tempfile::tempdir()?;
/// let mut adapter = Adapter::new(Method::Lora, 1, 0.1, 0.0);
/// for (leaf, shape) in [("lora_a", [3, 1]), ("lora_b", [1, 2])] {
///     let tensor = HostTensor::from_f32(&shape, &vec![0.5; shape[0] * shape[1]]);
///     adapter.tensors.insert(format!("model.layers.0.mlp.up_proj.{leaf}"), tensor);
/// }
/// adapter.fill_keys();
/// adapter.write_mlx_lm(&dir.path().join("mlx"))?;
/// let options = ReadOptions::default();
/// convert(&dir.path().join("mlx"), &dir.path().join("peft"), Format::Peft, &options)?;
/// convert(&dir.path().join("peft"), &dir.path().join("back"), Format::MlxLm, &options)?;
/// let (back, _) = Adapter::read(&dir.path().join("back"), &options)?;
/// assert_eq!((back.scale, &back.tensors), (0.1, &adapter.tensors));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn convert(input: &Path, out: &Path, to: Format, options: &ReadOptions<'_>) -> Result<AdapterReport> {
    let (mut adapter, mut report) = Adapter::read(input, options)?;
    keep_source_config(&mut adapter, input)?;
    if let (None, Some(base)) = (&adapter.sidecar.base.path_or_repo, options.base) {
        adapter.sidecar.base = base.identity.clone();
    }
    let building = AtomicDir::create(out).map_err(|e| Error::write(out, e))?;
    match to {
        Format::MlxLm => {
            refuse_dora_bits(&adapter, options.base).map_err(|refusal| Error::refused(input, refusal))?;
            adapter.write_mlx_lm(building.path())?;
        }
        Format::Peft => {
            let written = adapter
                .write_peft(building.path(), options.base)
                .map_err(|e| e.about(input))?;
            report = merge(report, written);
        }
    }
    building.commit().map_err(|e| Error::write(out, e))?;
    Ok(report)
}

/// Keeps an mlx-lm configuration for the way back, as reading a PEFT one does.
fn keep_source_config(adapter: &mut Adapter, input: &Path) -> Result<()> {
    let sidecar = &mut adapter.sidecar;
    if sidecar.source_format.as_deref() == Some("mlx-lm") && sidecar.source_config.is_none() {
        let dir = if input.is_dir() {
            input
        } else {
            input.parent().unwrap_or(Path::new(""))
        };
        sidecar.source_config = Some(Value::Object(read_json_object(&dir.join(CONFIG_FILE))?));
    }
    Ok(())
}

/// mlx-lm 0.32 takes the input size of a quantised DoRA layer for `packed · (32 / bits)`, which is wrong for 3, 5 and 6
/// bits.
fn refuse_dora_bits(adapter: &Adapter, base: Option<&BaseModel>) -> Result<(), Refusal> {
    let (Method::Dora, Some(base)) = (adapter.method, base) else {
        return Ok(());
    };
    for module in adapter.modules() {
        let bits = base.modules.get(module).and_then(|module| module.bits);
        if let Some(bits) = bits.filter(|bits| 32 % bits != 0) {
            return Err(Refusal::DoraBits {
                module: module.to_string(),
                bits,
            });
        }
    }
    Ok(())
}

fn merge(mut first: AdapterReport, second: AdapterReport) -> AdapterReport {
    first.padded.extend(second.padded);
    first.folded.extend(second.folded);
    first.holes.extend(second.holes);
    first.notes.extend(second.notes);
    first
}
