//! Values as Python writes them, since chat templates are written against Python.

use std::sync::LazyLock;

use regex::Regex;

use super::meter;
use super::value::{Result, SeqKind, Value};

/// How `json.dumps` lays a value out.
#[derive(Debug, Clone, Default)]
pub(super) struct JsonStyle {
    /// What one level is indented by, or everything on one line.
    pub(super) indent: Option<String>,
    /// Between items, and between key and value.
    pub(super) separators: Option<(String, String)>,
    /// Keys in order instead of as they came.
    pub(super) sort_keys: bool,
    /// Write `\u` escapes for everything outside ASCII.
    pub(super) ensure_ascii: bool,
}

/// A value as `json.dumps(value, ensure_ascii=False, …)` writes it.
pub(super) fn dumps(value: &Value, style: &JsonStyle) -> Result<String> {
    let mut out = String::new();
    write_json(&mut out, value, style, 0)?;
    Ok(out)
}

/// A value as `str(value)` gives it: text as it is, everything else as `repr`.
pub(super) fn text(value: &Value) -> Result<String> {
    match value {
        Value::Text(text) => Ok(text.to_string()),
        Value::Undefined(_) => Ok(String::new()),
        other => repr(other),
    }
}

/// A value as `repr(value)` gives it.
pub(super) fn repr(value: &Value) -> Result<String> {
    let mut out = String::new();
    write_repr(&mut out, value, 0)?;
    Ok(out)
}

/// Levels that are written; a namespace may hold itself.
const MAX_DEPTH: usize = 220;

fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(format!("a value is nested more than {MAX_DEPTH} deep"));
    }
    meter::grown(out.len(), 0)?;
    match value {
        Value::Undefined(_) => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Text(text) => {
            meter::grown(out.len() + text.len(), text.len())?;
            quote(out, text);
        }
        Value::Seq(seq) => {
            let (open, close) = match seq.kind {
                SeqKind::List => ("[", "]"),
                SeqKind::Tuple => ("(", ")"),
                SeqKind::Keys => ("dict_keys([", "])"),
                SeqKind::Values => ("dict_values([", "])"),
                SeqKind::Items => ("dict_items([", "])"),
                SeqKind::Range => return write_range(out, seq.items()),
                SeqKind::Generator => return Err("a generator is printed: put \"|list\" after the filter".into()),
            };
            out.push_str(open);
            for (index, item) in seq.items().iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(out, item, depth + 1)?;
            }
            if seq.kind == SeqKind::Tuple && seq.items().len() == 1 {
                out.push(',');
            }
            out.push_str(close);
        }
        Value::Dict(dict) => write_pairs(out, dict.items().iter().map(|(key, value)| (key, value)), depth)?,
        Value::Namespace(fields) => {
            out.push_str("<Namespace ");
            let fields = fields.borrow();
            let named: Vec<(Value, &Value)> = fields
                .iter()
                .map(|(name, value)| (Value::text(&**name), value))
                .collect();
            write_pairs(out, named.iter().map(|(name, value)| (name, *value)), depth)?;
            out.push('>');
        }
        Value::Macro(callable) => out.push_str(&format!("<Macro '{}'>", callable.code.name)),
        Value::Loop(state) => out.push_str(&format!(
            "<LoopContext {}/{}>",
            state.index.get() + 1,
            state.items.len()
        )),
        Value::Int(_) | Value::BigInt(_) | Value::Float(_) => out.push_str(&number(value)),
        other => return Err(format!("a value of type {} cannot be written", other.type_name())),
    }
    Ok(())
}

fn write_range(out: &mut String, items: &[Value]) -> Result<()> {
    let ends = items
        .first()
        .zip(items.last())
        .and_then(|(first, last)| first.as_int().zip(last.as_int()));
    let (first, last) = ends.unwrap_or((0, -1));
    out.push_str(&format!("range({first}, {})", last + 1));
    Ok(())
}

fn write_pairs<'a>(out: &mut String, pairs: impl Iterator<Item = (&'a Value, &'a Value)>, depth: usize) -> Result<()> {
    out.push('{');
    for (index, (key, value)) in pairs.enumerate() {
        out.push_str(if index > 0 { ", " } else { "" });
        write_repr(out, key, depth + 1)?;
        out.push_str(": ");
        write_repr(out, value, depth + 1)?;
    }
    out.push('}');
    Ok(())
}

fn write_json(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) -> Result<()> {
    meter::grown(out.len(), 0)?;
    match value {
        Value::None => out.push_str("null"),
        Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Value::Int(_) | Value::BigInt(_) => out.push_str(&number(value)),
        Value::Float(float) if float.is_nan() => out.push_str("NaN"),
        Value::Float(float) if float.is_infinite() => out.push_str(if *float > 0.0 { "Infinity" } else { "-Infinity" }),
        Value::Float(_) => out.push_str(&number(value)),
        Value::Text(text) => {
            meter::grown(out.len() + text.len(), text.len())?;
            json_string(out, text, style);
        }
        Value::Seq(seq) if matches!(seq.kind, SeqKind::List | SeqKind::Tuple) => {
            write_items(out, seq.items().len(), ('[', ']'), style, depth, |out, index| {
                write_json(out, &seq.items()[index], style, depth + 1)
            })?;
        }
        Value::Dict(dict) => {
            let mut items: Vec<(String, &Value)> = Vec::new();
            for (key, value) in dict.items() {
                items.push((json_key(key)?, value));
            }
            if style.sort_keys {
                items.sort_by(|(a, _), (b, _)| a.cmp(b));
            }
            let colon = style.separators.as_ref().map_or(": ", |(_, colon)| colon);
            write_items(out, items.len(), ('{', '}'), style, depth, |out, index| {
                let (key, item) = &items[index];
                json_string(out, key, style);
                out.push_str(colon);
                write_json(out, item, style, depth + 1)
            })?;
        }
        other => return Err(format!("Object of type {} is not JSON serializable", other.type_name())),
    }
    Ok(())
}

fn json_key(key: &Value) -> Result<String> {
    match key {
        Value::Text(text) => Ok(text.to_string()),
        Value::None => Ok("null".into()),
        Value::Bool(value) => Ok(value.to_string()),
        Value::Int(_) | Value::BigInt(_) | Value::Float(_) => Ok(number(key)),
        other => Err(format!(
            "keys must be str, int, float, bool or None, not {}",
            other.type_name()
        )),
    }
}

fn write_items(
    out: &mut String,
    count: usize,
    (open, close): (char, char),
    style: &JsonStyle,
    depth: usize,
    mut write: impl FnMut(&mut String, usize) -> Result<()>,
) -> Result<()> {
    let default_comma = if style.indent.is_some() { "," } else { ", " };
    let comma = style.separators.as_ref().map_or(default_comma, |(comma, _)| comma);
    let new_line = |out: &mut String, depth: usize| -> Result<()> {
        if let Some(indent) = &style.indent {
            meter::room(indent.len().saturating_mul(depth))?;
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
        Ok(())
    };
    out.push(open);
    for index in 0..count {
        if index > 0 {
            out.push_str(comma);
        }
        new_line(out, depth + 1)?;
        write(out, index)?;
    }
    if count > 0 {
        new_line(out, depth)?;
    }
    out.push(close);
    Ok(())
}

fn json_string(out: &mut String, text: &str, style: &JsonStyle) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 => out.push_str(&format!("\\u{:04x}", c as u32)),
            // Python escapes DEL where it escapes what is not ASCII.
            c if style.ensure_ascii && !(' '..='~').contains(&c) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Rust's shortest round-trip form has Python's thresholds, and differs in how an exponent is written.
pub(super) fn number(value: &Value) -> String {
    let float = match value {
        Value::Int(number) => return number.to_string(),
        Value::BigInt(digits) => return digits.to_string(),
        Value::Float(float) => *float,
        _ => return String::new(),
    };
    if !float.is_finite() {
        return if float.is_nan() {
            "nan"
        } else if float > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .into();
    }
    let text = format!("{float:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let (sign, size) = exponent.strip_prefix('-').map_or(('+', exponent), |size| ('-', size));
            format!("{}e{sign}{size:0>2}", digits.strip_suffix(".0").unwrap_or(digits))
        }
    }
}

/// Python prefers single quotes, and takes double ones where that saves escapes.
fn quote(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            c => out.push_str(&match c as u32 {
                code @ ..=0xff => format!("\\x{code:02x}"),
                code @ 0x100..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}

/// `str.isprintable`: neither a separator other than the blank, nor a control, format, private or unassigned character.
pub(super) fn is_printable(character: char) -> bool {
    static OTHER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"[\p{C}\p{Z}]").ok());
    if character.is_ascii() {
        return (' '..='~').contains(&character);
    }
    let mut bytes = [0; 4];
    let text = character.encode_utf8(&mut bytes);
    !OTHER.as_ref().is_some_and(|other| other.is_match(text))
}
