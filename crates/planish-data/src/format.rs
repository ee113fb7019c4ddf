//! The five row formats and the names of their fields.

use std::fmt;
use std::str::FromStr;

use crate::error::{Fault, RowErrorKind};
use crate::json::{Map, Value};

/// What the rows of a file are; one format for the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// `text`: every token after the first is trained.
    Text,
    /// `prompt` and `completion`: the completion and its end of turn are trained.
    Completions,
    /// `messages`: every assistant turn is trained.
    Chat,
    /// `messages` and `tools` in every row; tool calls are trained, tool results never.
    Tools,
    /// `chosen` and `rejected`: the two answers are trained, in pairs.
    Preference,
}

impl Format {
    const ALL: [Self; 5] = [Self::Text, Self::Completions, Self::Chat, Self::Tools, Self::Preference];

    /// The name as it is written in `data.format`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Completions => "completions",
            Self::Chat => "chat",
            Self::Tools => "tools",
            Self::Preference => "preference",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| format!("{name:?} is no data format; there are: {known}"))
    }
}

/// The names of the fields that hold a row's content; a file with other names is remapped here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldNames {
    /// `text`.
    pub text: String,
    /// `prompt`, of completions and preference pairs.
    pub prompt: String,
    /// `completion`.
    pub completion: String,
    /// `messages`.
    pub messages: String,
    /// `chosen`.
    pub chosen: String,
    /// `rejected`.
    pub rejected: String,
}

impl Default for FieldNames {
    fn default() -> Self {
        Self {
            text: "text".into(),
            prompt: "prompt".into(),
            completion: "completion".into(),
            messages: "messages".into(),
            chosen: "chosen".into(),
            rejected: "rejected".into(),
        }
    }
}

impl FieldNames {
    /// The format that the fields of a row belong to.
    ///
    /// A row with the fields of two formats is refused rather than guessed at.
    pub(crate) fn infer(&self, row: &Map) -> Result<Format, Fault> {
        let has = |name: &String| row.contains_key(name);
        let mut found = Vec::new();
        if has(&self.chosen) && has(&self.rejected) {
            found.push(Format::Preference);
        }
        if has(&self.messages) {
            let has_tools =
                |tools: &Value| !tools.is_null() && tools.as_str().is_none_or(|text| !text.trim().is_empty());
            found.push(if row.get("tools").is_some_and(has_tools) {
                Format::Tools
            } else {
                Format::Chat
            });
        }
        if has(&self.prompt) && has(&self.completion) {
            found.push(Format::Completions);
        }
        if has(&self.text) {
            found.push(Format::Text);
        }
        match found[..] {
            [format] => Ok(format),
            [] => Err(self.no_format(row)),
            _ => Err(Fault::new(
                RowErrorKind::UnknownFormat,
                format!(
                    "the row has the fields of several formats: {}",
                    found.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ")
                ),
                "say which with data.format",
            )),
        }
    }

    fn no_format(&self, row: &Map) -> Fault {
        let keys = row.keys().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
        let found = if keys.is_empty() { "none".into() } else { keys };
        Fault::new(
            RowErrorKind::UnknownFormat,
            format!(
                "expected {:?}, or {:?} and {:?}, or {:?}, or {:?} and {:?}, or \"conversations\", or \"instruction\" and \"output\"; the fields are: {found}",
                self.text, self.prompt, self.completion, self.messages, self.chosen, self.rejected
            ),
            "name the fields with data.text_feature, prompt_feature, completion_feature or chat_feature",
        )
    }
}
