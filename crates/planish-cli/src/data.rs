//! Reading data sets as a run configuration says.

use std::path::Path;

use anyhow::{Result, bail};
use planish_core::run_config::{self, RunConfig};
use planish_data::{
    ChatTemplate, ControlTokens, DataOptions, DataReport, FieldNames, Format, Layout, MissingProvenance,
    OnPrefixViolation, OnRowError, Overlong, Role, TemplateOptions, Tokenizer, Train,
};
use serde_json::{Map, Value};

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
        Self::load(dir, TemplateOptions::default())
    }

    /// With the template and its keywords as configured; `now` is what the template takes for the time.
    pub(crate) fn configured(dir: &Path, config: &RunConfig, now: Option<i64>) -> Result<Self> {
        let options = TemplateOptions {
            file: config.data.chat_template.clone(),
            kwargs: template_kwargs(&config.data.template_kwargs)?,
            now,
            ..TemplateOptions::default()
        };
        Self::load(dir, options)
    }

    fn load(dir: &Path, options: TemplateOptions) -> Result<Self> {
        let mut tokenizer = Tokenizer::from_dir(dir)?;
        let template = ChatTemplate::from_dir(dir, &tokenizer, &options)?;
        // A model that was trained on conversations ends its turns where the template does, whatever its files name.
        if let Some(end) = template.as_ref().and_then(|template| template.turn_end(&tokenizer)) {
            tokenizer.also_end_at(end);
        }
        Ok(Self { tokenizer, template })
    }
}

/// `name=value` each; a value that is JSON is taken as such, any other as a text.
fn template_kwargs(pairs: &[String]) -> Result<Map<String, Value>> {
    let pair = |text: &String| {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| usage(format!("data.template_kwargs: found {text:?}, expected name=value")))?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        Ok((name.trim().to_owned(), value))
    };
    pairs.iter().map(pair).collect()
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
    // Named one by one, so that a new key cannot be forgotten here. Packing belongs to the plan of batches, the template
    // to `Text`.
    let run_config::DataSettings {
        path: _,
        format,
        packing: _,
        overlong,
        train_roles,
        last_turn_only,
        train_prompt,
        mask_prompt,
        on_prefix_violation,
        errors,
        missing,
        allow_mixed_scoring,
        strict,
        append_eos,
        control_tokens,
        chat_template: _,
        template_kwargs: _,
        text_feature,
        prompt_feature,
        completion_feature,
        chat_feature,
    } = &config.data;
    let roles: Result<Vec<Role>, String> = train_roles.iter().map(|role| role.parse()).collect();
    let roles = roles.map_err(|message| usage(format!("data.train_roles: {message}")))?;
    Ok(DataOptions {
        format: format.map(data_format),
        fields: FieldNames {
            text: text_feature.clone(),
            prompt: prompt_feature.clone(),
            completion: completion_feature.clone(),
            messages: chat_feature.clone(),
            ..FieldNames::default()
        },
        max_seq_length,
        overlong: overlong.map(long_rows),
        train: match (config.train.compat, last_turn_only, train_prompt) {
            (run_config::Compat::MlxLm, ..) => Train::MlxLm {
                mask_prompt: *mask_prompt,
            },
            (_, true, _) => Train::LastTurn,
            (_, _, true) => Train::Everything,
            _ => Train::Turns(roles),
        },
        on_prefix_violation: match on_prefix_violation {
            run_config::OnPrefixViolation::Error => OnPrefixViolation::Error,
            run_config::OnPrefixViolation::Unroll => OnPrefixViolation::Unroll,
        },
        errors: match errors {
            run_config::OnRowError::Stop => OnRowError::Stop,
            run_config::OnRowError::Skip => OnRowError::Skip,
        },
        missing_provenance: match missing {
            run_config::MissingProvenance::Error => MissingProvenance::Error,
            run_config::MissingProvenance::Neutral => MissingProvenance::Neutral,
        },
        allow_mixed_scoring: *allow_mixed_scoring,
        strict: *strict,
        append_eos: append_eos.clone(),
        control_tokens: match control_tokens {
            run_config::ControlTokens::Keep => ControlTokens::Keep,
            run_config::ControlTokens::Text => ControlTokens::Text,
            run_config::ControlTokens::Refuse => ControlTokens::Refuse,
        },
        ..DataOptions::default()
    })
}

/// What a file of rows holds, in a line: rows, format, layouts of other programs.
pub(crate) fn describe(report: &DataReport) -> String {
    let layouts: Vec<&str> = report
        .layouts
        .keys()
        .filter(|layout| **layout != Layout::Own)
        .map(|layout| layout.name())
        .collect();
    let layouts = if layouts.is_empty() {
        String::new()
    } else {
        format!(" in the layout of {}", layouts.join(", "))
    };
    format!("{} rows of format {}{layouts}", report.rows, report.format)
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
