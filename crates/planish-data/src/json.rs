//! Strict JSON: one object a line, no key twice, and the column of any field.

use std::collections::HashMap;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Number, Value};

use crate::error::{Fault, RowErrorKind, Step};

/// Parses one line into an object.
///
/// `terminated` says whether the line ended with a line break: without one, a row that stops in the middle is reported
/// as a file that was cut off.
pub(crate) fn parse_object(line: &str, terminated: bool) -> Result<Map<String, Value>, Fault> {
    let mut deserializer = serde_json::Deserializer::from_str(line);
    let parsed = Strict
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value));
    match parsed {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(Fault::new(
            RowErrorKind::NotAnObject,
            format!("expected object, found {}", describe(&other)),
            "write one JSON object a line, such as {\"text\": \"…\"}",
        )),
        Err(error) => Err(syntax_fault(line, &error, terminated)),
    }
}

/// The column of a field, in characters from 1. Where a step leads nowhere, that of the last value reached.
pub(crate) fn column_of(line: &str, steps: &[Step]) -> usize {
    let Ok(mut raw) = serde_json::from_str::<&RawValue>(line) else {
        return 1;
    };
    for step in steps {
        let next = match step {
            Step::Key(key) => serde_json::from_str::<HashMap<String, &RawValue>>(raw.get())
                .ok()
                .and_then(|map| map.get(key).copied()),
            Step::Index(index) => serde_json::from_str::<Vec<&RawValue>>(raw.get())
                .ok()
                .and_then(|list| list.get(*index).copied()),
        };
        match next {
            Some(value) => raw = value,
            None => break,
        }
    }
    // Borrowed raw values are slices of the line, so their distance is the byte offset.
    let byte = (raw.get().as_ptr() as usize).saturating_sub(line.as_ptr() as usize);
    column_at(line, byte)
}

/// The column of a byte, in characters from 1.
pub(crate) fn column_at(line: &str, byte: usize) -> usize {
    line.char_indices().take_while(|(at, _)| *at < byte).count() + 1
}

/// What a value is, in the words of an error message.
pub(crate) fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    }
}

fn syntax_fault(line: &str, error: &serde_json::Error, terminated: bool) -> Fault {
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or(&text).to_string();
    let rest = line.get(error.column().saturating_sub(1)..).unwrap_or_default();
    let (kind, message, fix) = classify(&reason, error.is_eof(), terminated, rest);
    Fault {
        column: Some(column_at(line, error.column().saturating_sub(1))),
        ..Fault::new(kind, message, fix)
    }
}

/// serde_json keeps its error codes to itself, so its messages decide; the tests pin each of them.
fn classify<'a>(reason: &'a str, eof: bool, terminated: bool, rest: &str) -> (RowErrorKind, &'a str, &'static str) {
    const NOT_JSON: &str = "write one JSON object a line, with \"double-quoted\" keys and no trailing comma";
    if reason.contains("surrogate") || reason.contains("unexpected end of hex escape") {
        let fix = "write the character itself, or both halves of the pair";
        (
            RowErrorKind::LoneSurrogate,
            "a \\u escape is half of a surrogate pair",
            fix,
        )
    } else if reason.contains("recursion limit") {
        (
            RowErrorKind::TooDeep,
            "values are nested more than 127 deep",
            "flatten the row",
        )
    } else if reason.contains("number out of range") || non_finite_word(rest) {
        let fix = "give a finite number, or null where the field may be absent";
        (RowErrorKind::NonFinite, "expected a finite number", fix)
    } else if reason.starts_with("the key ") {
        (RowErrorKind::DuplicateKey, reason, "keep one of the two values")
    } else if eof && !terminated {
        let fix = "copy or download the file again, or delete the row";
        (RowErrorKind::CutOff, "the file ends inside this row", fix)
    } else {
        let message = match reason {
            "EOF while parsing a string" => "the line ends inside a string",
            "EOF while parsing a list" => "the line ends inside a list",
            "EOF while parsing an object" => "the line ends inside an object",
            "trailing characters" => "something follows the object",
            "expected value" | "expected ident" => "expected a JSON value",
            other => other,
        };
        (RowErrorKind::Json, message, NOT_JSON)
    }
}

fn non_finite_word(rest: &str) -> bool {
    ["NaN", "Infinity", "-Infinity", "Inf", "nan", "inf"]
        .iter()
        .any(|word| rest.starts_with(word))
        || rest
            .trim_start_matches(|c: char| c.is_alphabetic())
            .starts_with("Infinity")
}

/// Builds a [`Value`] like serde_json's own, except that a key may not come twice.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_string()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = access.next_element_seed(Strict)? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format_args!(
                    "the key {key:?} comes twice in one object"
                )));
            }
            let value = access.next_value_seed(Strict)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(line: &str) -> RowErrorKind {
        parse_object(line, true).unwrap_err().kind
    }

    #[test]
    fn err_each_kind_of_broken_json_is_named() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
        for (line, expect) in [
            (r#"{"text": "#, RowErrorKind::Json),
            (r#"{"text": "a",}"#, RowErrorKind::Json),
            (r#"{text: "a"}"#, RowErrorKind::Json),
            (r#"{"text": "a"} x"#, RowErrorKind::Json),
            (r#"{"text": "\ud800"}"#, RowErrorKind::LoneSurrogate),
            (r#"{"text": "\ud800x"}"#, RowErrorKind::LoneSurrogate),
            (r#"{"text": "\udc00"}"#, RowErrorKind::LoneSurrogate),
            (r#"{"w": 1e999}"#, RowErrorKind::NonFinite),
            (r#"{"w": NaN}"#, RowErrorKind::NonFinite),
            (r#"{"w": -Infinity}"#, RowErrorKind::NonFinite),
            (r#"{"w": Infinity}"#, RowErrorKind::NonFinite),
            (r#"{"a": 1, "a": 1}"#, RowErrorKind::DuplicateKey),
            (r#"{"a": {"b": 1, "b": 2}}"#, RowErrorKind::DuplicateKey),
            (r#"[1]"#, RowErrorKind::NotAnObject),
            (deep.as_str(), RowErrorKind::TooDeep),
        ] {
            assert_eq!(kind(line), expect, "{line:.60}");
        }
        assert_eq!(
            parse_object(r#"{"text": "ab"#, false).unwrap_err().kind,
            RowErrorKind::CutOff
        );
    }

    #[test]
    fn column_counts_characters_and_follows_the_path() {
        let line = r#"{"é": [10, {"k": null}], "z": 1}"#;
        let key = |k: &str| Step::Key(k.into());
        assert_eq!(column_of(line, &[]), 1);
        assert_eq!(column_of(line, &[key("é")]), 7);
        assert_eq!(column_of(line, &[key("é"), Step::Index(1), key("k")]), 18);
        assert_eq!(
            column_of(line, &[key("é"), Step::Index(9)]),
            7,
            "stops at the last value that exists"
        );
    }

    #[test]
    fn numbers_keep_every_digit() {
        let object = parse_object(r#"{"w": 0.99, "i": 18446744073709551615}"#, true).unwrap();
        assert_eq!(object["w"].as_f64(), Some(0.99));
        assert_eq!(object["i"].as_u64(), Some(u64::MAX));
    }
}
