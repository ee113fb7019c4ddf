//! The bundle for a Mac: a script, and the values that the model's f32 pass expects.

use std::{fs, path::Path};

use planish_core::model_config::ModelConfig;
use serde::Serialize;

use crate::{Error, Result, package::PackageReport, reference::forward, settings::Settings, weights::Rows};

const FILES: [(&str, &str); 2] = [
    ("verify.sh", include_str!("../assets/verify.sh")),
    ("verify.swift", include_str!("../assets/verify.swift")),
];
/// Tokens decoded one by one after the prompt.
const STEPS: usize = 4;
/// Logits kept of each step: the largest, in falling order.
const LOGITS: usize = 32;

#[derive(Serialize)]
struct Expected {
    layout: &'static str,
    context: usize,
    prefill: usize,
    head_rows: usize,
    packages: Vec<String>,
    prompt: Vec<u32>,
    steps: Vec<Step>,
}

/// One decoded token and what must come out.
#[derive(Serialize)]
struct Step {
    position: usize,
    token: u32,
    ids: Vec<usize>,
    logits: Vec<f32>,
}

/// Writes the bundle into `folder`: the script and `expected.json`, a prompt and four steps of the f32 pass over the
/// original weights.
pub(crate) fn write(
    folder: &Path,
    config: &ModelConfig,
    weights: &dyn Rows,
    settings: &Settings,
    packages: &[PackageReport],
    tokens: &[u32],
) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let steps = STEPS.min(settings.context.saturating_sub(1)).max(1);
    let length = settings
        .prefill
        .min(settings.context - steps.min(settings.context - 1))
        .max(1);
    let all: Vec<u32> = (0..length + steps)
        .map(|i| {
            tokens
                .get(i)
                .copied()
                .unwrap_or((i as u32).wrapping_mul(2_654_435_761) % config.arch.vocab_size as u32)
        })
        .collect();
    let logits = forward(config, weights, &[&all], None)?;
    let expect = |position: usize| {
        let row = logits.row(position);
        let mut ids: Vec<usize> = (0..row.len()).collect();
        ids.sort_by(|a, b| row[*b].total_cmp(&row[*a]).then(a.cmp(b)));
        ids.truncate(LOGITS);
        let logits = ids.iter().map(|&id| row[id]).collect();
        Step {
            position,
            token: all[position],
            ids,
            logits,
        }
    };
    let expected = Expected {
        layout: settings.layout_name(),
        context: settings.context,
        prefill: settings.prefill,
        head_rows: config.arch.vocab_size / settings.head_parts,
        packages: packages.iter().map(|p| p.file_name.clone()).collect(),
        prompt: all[..length].to_vec(),
        steps: (length..length + steps).map(expect).collect(),
    };
    let json = serde_json::to_string_pretty(&expected).map_err(|e| Error::internal(e.to_string()))?;
    for (name, text) in FILES.into_iter().chain([("expected.json", json.as_str())]) {
        let path = folder.join(name);
        fs::write(&path, text).map_err(Error::io(&path))?;
    }
    make_executable(&folder.join(FILES[0].0))
}

fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(Error::io(path))
}
