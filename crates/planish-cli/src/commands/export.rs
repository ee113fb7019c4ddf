use std::path::Path;

use anyhow::{Context, Result};
use planish_data::Tokenizer;

use super::{export_coreai, export_coreml, export_gguf, export_safetensors};

/// Tokens of the text that are used; more would take long and tell little.
const MAX_TEXT_TOKENS: usize = 2048;
/// Something ordinary to start from where no text is given.
const PROMPT: &str = "The sea was calm that morning, and the fishermen had gone out before sunrise. By noon the wind had \
    turned, and the first of the boats came back with torn sails and empty nets. The old man on the pier had seen it all \
    before. He lit his pipe, looked at the clouds over the headland, and said that the weather would hold until evening.";

/// Write a model for other runtimes
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    target: Target,
}

#[derive(clap::Subcommand)]
enum Target {
    Safetensors(export_safetensors::Args),
    Gguf(export_gguf::Args),
    Coreml(Box<export_coreml::Args>),
    Coreai(export_coreai::Args),
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.target {
        Target::Safetensors(args) => export_safetensors::run(args),
        Target::Gguf(args) => export_gguf::run(args),
        Target::Coreml(args) => export_coreml::run(args),
        Target::Coreai(args) => export_coreai::run(args),
    }
}

/// Token ids of the user's text.
pub(super) fn read_text(model: &Path, path: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut ids = Tokenizer::from_dir(model)?.encode_text(&text)?.ids;
    ids.truncate(MAX_TEXT_TOKENS);
    Ok(ids)
}

/// Token ids of an ordinary text. A model folder may lack a tokenizer: then the check starts from arbitrary tokens.
pub(super) fn prompt(model: &Path) -> Vec<u32> {
    let encode = || Some(Tokenizer::from_dir(model).ok()?.encode_text(PROMPT).ok()?.ids);
    encode().unwrap_or_default()
}
