//! Control tokens that stand inside messages: found, marked, and told from those that the template writes.

use std::ops::Range;

use crate::error::{Fault, RowErrorKind};
use crate::json::{Map, Value};
use crate::tokenizer::Tokenizer;

/// What becomes of control tokens inside messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ControlTokens {
    /// They act as control tokens, as in transformers, and their rows are counted.
    #[default]
    Keep,
    /// They are encoded as the text they are.
    Text,
    /// The row is refused.
    Refuse,
}

/// Around a token of a message while it is rendered; the same private characters as in transformers.
const START: char = '\u{f0000}';
const END: char = '\u{f0001}';

pub(crate) fn refusal() -> Fault {
    Fault::new(
        RowErrorKind::Value,
        "a message holds a control token",
        "remove it, or set data.control_tokens = \"text\"",
    )
}

/// Whether any text of a message holds a control token.
pub(crate) fn is_in(fields: &Map, tokenizer: &Tokenizer) -> bool {
    fields
        .iter()
        .any(|(name, value)| name != "role" && value_holds(value, tokenizer))
}

fn value_holds(value: &Value, tokenizer: &Tokenizer) -> bool {
    match value {
        Value::String(text) => tokenizer.next_control(text).is_some(),
        Value::Array(list) => list.iter().any(|value| value_holds(value, tokenizer)),
        Value::Object(map) => map.values().any(|value| value_holds(value, tokenizer)),
        _ => false,
    }
}

/// Puts marks around the control tokens of a message.
pub(crate) fn mark(fields: &mut Map, tokenizer: &Tokenizer) {
    for (name, value) in fields {
        if name != "role" {
            mark_value(value, tokenizer);
        }
    }
}

fn mark_value(value: &mut Value, tokenizer: &Tokenizer) {
    match value {
        Value::String(text) => *text = marked(text, tokenizer),
        Value::Array(list) => list.iter_mut().for_each(|value| mark_value(value, tokenizer)),
        Value::Object(map) => map.values_mut().for_each(|value| mark_value(value, tokenizer)),
        _ => {}
    }
}

/// A text with marks around its control tokens; marks that it has already could forge one, and go.
pub(crate) fn marked(text: &str, tokenizer: &Tokenizer) -> String {
    let clean = text.replace([START, END], "");
    let mut out = String::with_capacity(clean.len());
    let mut rest = clean.as_str();
    while let Some(token) = tokenizer.next_control(rest) {
        out.push_str(&rest[..token.start]);
        out.push(START);
        out.push_str(&rest[token.clone()]);
        out.push(END);
        rest = &rest[token.end..];
    }
    out.push_str(rest);
    out
}

/// The text without marks, and the bytes that were marked; spans move with their bytes.
pub(crate) fn unmark(text: &str, spans: &mut [Range<usize>]) -> (String, Vec<Range<usize>>) {
    let mut out = String::with_capacity(text.len());
    let mut ranges = Vec::new();
    let mut open = None;
    let mut moved: Vec<(usize, usize)> = Vec::new();
    for (at, character) in text.char_indices() {
        match character {
            START => open = Some(out.len()),
            END => ranges.extend(open.take().map(|start| start..out.len())),
            other => {
                out.push(other);
                continue;
            }
        }
        moved.push((at + character.len_utf8(), at + character.len_utf8() - out.len()));
    }
    let new = |byte: usize| {
        byte - moved
            .iter()
            .take_while(|(at, _)| *at <= byte)
            .last()
            .map_or(0, |(_, by)| *by)
    };
    for span in spans {
        *span = new(span.start)..new(span.end);
    }
    (out, ranges)
}
