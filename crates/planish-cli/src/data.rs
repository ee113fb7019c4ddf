//! Reading data sets as a run configuration says.

use std::path::Path;

use anyhow::{Result, bail};
use planish_core::run_config::{self, RunConfig};
use planish_data::{ChatTemplate, DataOptions, Format, Overlong, Role, TemplateOptions, Tokenizer, Train};

use crate::failure::usage;

/// Longest example where the configuration does not say, unless the model's context is shorter.
const DEFAULT_MAX_SEQ_LENGTH: usize = 2048;

/// A model folder's tokenizer and chat template.
pub(crate) struct Text {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
}

impl Text {
    pub(crate) fn of_model(dir: &Path) -> Result<Self> {
        let tokenizer = Tokenizer::from_dir(dir)?;
        let template = ChatTemplate::from_dir(dir, &tokenizer, &TemplateOptions::default())?;
        Ok(Self { tokenizer, template })
    }
}

/// The longest example in tokens: as asked, or the default, never beyond the model's context.
pub(crate) fn max_seq_length(wanted: Option<usize>, context: usize) -> Result<usize> {
    match wanted {
        Some(wanted) if wanted > context => {
            bail!("train.max_seq_length is {wanted}, but the model's context ends at {context} tokens\nlower it")
        }
        Some(wanted) => Ok(wanted),
        None => Ok(context.min(DEFAULT_MAX_SEQ_LENGTH)),
    }
}

/// The `[data]` section and the length limit, as the data crate takes them.
pub(crate) fn options(config: &RunConfig, max_seq_length: usize) -> Result<DataOptions> {
    // Named one by one, so that a new key cannot be forgotten here. Packing belongs to the plan of batches.
    let run_config::DataSettings {
        path: _,
        format,
        packing: _,
        overlong,
        train_roles,
    } = &config.data;
    let roles: Result<Vec<Role>, String> = train_roles.iter().map(|role| role.parse()).collect();
    Ok(DataOptions {
        format: format.map(data_format),
        max_seq_length,
        overlong: overlong.map(long_rows),
        train: Train::Turns(roles.map_err(|message| usage(format!("data.train_roles: {message}")))?),
        ..DataOptions::default()
    })
}

fn data_format(format: run_config::DataFormat) -> Format {
    match format {
        run_config::DataFormat::Text => Format::Text,
        run_config::DataFormat::Completions => Format::Completions,
        run_config::DataFormat::Chat => Format::Chat,
        run_config::DataFormat::Tools => Format::Tools,
        run_config::DataFormat::Preference => Format::Preference,
    }
}

fn long_rows(overlong: run_config::Overlong) -> Overlong {
    match overlong {
        run_config::Overlong::Truncate => Overlong::Truncate,
        run_config::Overlong::Split => Overlong::Split,
        run_config::Overlong::Drop => Overlong::Drop,
        run_config::Overlong::Error => Overlong::Error,
    }
}
