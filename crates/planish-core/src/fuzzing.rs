//! Entry points for the fuzz targets.

use std::path::Path;

use crate::model_config::ModelConfig;
use crate::run_config::RunConfig;

/// Any bytes as a `run.toml`, and each line as an argument of `--set`. What is accepted must read back as itself.
pub fn run_toml(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let file = RunConfig::builder().text(text, "run.toml");
    check_reads_back(file.and_then(|builder| builder.build()));
    for line in text.lines() {
        check_reads_back(RunConfig::builder().set(line).and_then(|builder| builder.build()));
    }
}

/// Any bytes as a model's `config.json`. What is accepted must have modules and tensors to speak of.
pub fn model_config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(config) = ModelConfig::from_json_str(text, Path::new("config.json")) else {
        return;
    };
    // The file may claim more layers than memory could list; a loader compares with the tensors that are there first.
    if config.arch.layers.len() <= 64 {
        assert!(config.expected_tensors().len() > config.block_linear_layers().len());
    }
}

fn check_reads_back(config: crate::Result<RunConfig>) {
    let Ok(config) = config else { return };
    let written = config.to_toml();
    let again = RunConfig::builder()
        .text(&written, "run.toml")
        .and_then(|builder| builder.build());
    assert!(again.is_ok_and(|again| again.to_toml() == written), "{written}");
}
