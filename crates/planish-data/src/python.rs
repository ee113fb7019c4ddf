//! Values as Python writes them, since chat templates are written against Python.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// How `json.dumps` lays a value out.
#[derive(Debug, Clone, Default)]
pub(crate) struct JsonStyle {
    /// Spaces a level, or everything on one line.
    pub(crate) indent: Option<usize>,
    /// Between items, and between key and value.
    pub(crate) separators: Option<(String, String)>,
    /// Keys in order instead of as they came.
    pub(crate) sort_keys: bool,
    /// Write `\u` escapes for everything outside ASCII.
    pub(crate) ensure_ascii: bool,
}

/// A value as `json.dumps(value, ensure_ascii=False, …)` writes it.
pub(crate) fn dumps(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    write_json(&mut out, value, style, 0)?;
    Ok(out)
}

/// A value as `str(value)` gives it: text as it is, everything else as `repr`.
pub(crate) fn text(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_string()),
        None => repr(value, 0),
    }
}

/// Levels of lists and maps that are written; templates can nest without end, and the stack cannot.
const MAX_DEPTH: usize = 200;

/// A value as `repr(value)` gives it.
fn repr(value: &Value, depth: usize) -> Result<String, Error> {
    check_depth(depth)?;
    let inner = |value: &Value| repr(value, depth + 1);
    Ok(match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number => number(value),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let items = value
                .try_iter()?
                .map(|item| inner(&item))
                .collect::<Result<Vec<_>, _>>()?;
            match (value.is_tuple(), items.len()) {
                (true, 1) => format!("({},)", items[0]),
                (true, _) => format!("({})", items.join(", ")),
                (false, _) => format!("[{}]", items.join(", ")),
            }
        }
        ValueKind::Map => {
            let items = pairs(value)
                .map(|(key, item)| Ok(format!("{}: {}", inner(&key)?, inner(&item)?)))
                .collect::<Result<Vec<_>, Error>>()?;
            format!("{{{}}}", items.join(", "))
        }
        _ => value.to_string(),
    })
}

fn check_depth(depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        let message = format!("a value is nested more than {MAX_DEPTH} deep");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(())
}

fn write_json(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => out.push_str(&json_string(value.as_str().unwrap_or_default(), style)),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_items(out, items.len(), ('[', ']'), style, depth, |out, index| {
                write_json(out, &items[index], style, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut items: Vec<_> = pairs(value).collect();
            if style.sort_keys {
                items.sort_by(|(a, _), (b, _)| a.cmp(b));
            }
            let colon = style.separators.as_ref().map_or(": ", |(_, colon)| colon);
            write_items(out, items.len(), ('{', '}'), style, depth, |out, index| {
                let (key, item) = &items[index];
                out.push_str(&json_string(&text(key)?, style));
                out.push_str(colon);
                write_json(out, item, style, depth + 1)
            })?;
        }
        kind => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("a value of type {kind} cannot be written as JSON"),
            ));
        }
    }
    Ok(())
}

fn write_items(
    out: &mut String,
    count: usize,
    (open, close): (char, char),
    style: &JsonStyle,
    depth: usize,
    mut write: impl FnMut(&mut String, usize) -> Result<(), Error>,
) -> Result<(), Error> {
    let default_comma = if style.indent.is_some() { "," } else { ", " };
    let comma = style.separators.as_ref().map_or(default_comma, |(comma, _)| comma);
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    for index in 0..count {
        if index > 0 {
            out.push_str(comma);
        }
        new_line(out, depth + 1);
        write(out, index)?;
    }
    if count > 0 {
        new_line(out, depth);
    }
    out.push(close);
    Ok(())
}

fn pairs(map: &Value) -> impl Iterator<Item = (Value, Value)> {
    map.try_iter().into_iter().flatten().map(|key| {
        let item = map.get_item(&key).unwrap_or(Value::UNDEFINED);
        (key, item)
    })
}

fn json_string(text: &str, style: &JsonStyle) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    if !style.ensure_ascii {
        return quoted;
    }
    let mut out = String::with_capacity(quoted.len());
    for character in quoted.chars() {
        if character.is_ascii() {
            out.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

/// Rust's shortest round-trip form has Python's thresholds, and differs in how an exponent is written.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else {
        return value.to_string();
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
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::from(quote);
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
            c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use minijinja::value::Serde;
    use serde_json::json;

    use super::*;

    fn value(json: serde_json::Value) -> Value {
        Value::from(Serde(json))
    }

    // Expected texts come from CPython 3.11: json.dumps(..., ensure_ascii=False) and str().
    #[test]
    fn json_is_laid_out_as_python_does() {
        let nested = value(json!({"b": [1, 2.5, {"x": null}], "a": "é\"\n/<", "e": [], "f": {}}));
        let check = |style: JsonStyle, expect: &str| assert_eq!(dumps(&nested, &style).unwrap(), expect);
        check(
            JsonStyle::default(),
            r#"{"b": [1, 2.5, {"x": null}], "a": "é\"\n/<", "e": [], "f": {}}"#,
        );
        check(
            JsonStyle {
                indent: Some(2),
                sort_keys: true,
                ..JsonStyle::default()
            },
            "{\n  \"a\": \"é\\\"\\n/<\",\n  \"b\": [\n    1,\n    2.5,\n    {\n      \"x\": null\n    }\n  ],\n  \"e\": [],\n  \"f\": {}\n}",
        );
        check(
            JsonStyle {
                separators: Some((",".into(), ":".into())),
                ensure_ascii: true,
                ..JsonStyle::default()
            },
            r#"{"b":[1,2.5,{"x":null}],"a":"\u00e9\"\n/<","e":[],"f":{}}"#,
        );
    }

    #[test]
    fn numbers_and_containers_print_as_python_does() {
        for (json, expect) in [
            (json!(1.0), "1.0"),
            (json!(1e16), "1e+16"),
            (json!(1.5e300), "1.5e+300"),
            (json!(0.00001), "1e-05"),
            (json!(0.0001), "0.0001"),
            (json!(123456789012345.0), "123456789012345.0"),
            (json!(-7), "-7"),
            (json!(true), "True"),
            (json!(null), "None"),
            (json!(["a", "it's", "q\"'", "\n"]), r#"['a', "it's", 'q"\'', '\n']"#),
            (json!({"k": [true, null]}), "{'k': [True, None]}"),
            (json!("plain"), "plain"),
        ] {
            assert_eq!(text(&value(json)).unwrap(), expect);
        }
    }
}
