//! Strict JSON: one object per line, no key twice, integers of any size, and the column of any field.
//!
//! A parser of our own, because serde_json rounds integers beyond 64 bits, and its `arbitrary_precision` changes numbers
//! for every crate that is built with it.

use std::collections::HashMap;
use std::fmt;

use indexmap::IndexMap;
use serde_json::value::RawValue;

use crate::error::{Fault, RowErrorKind, Step};

/// A JSON value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    Array(Vec<Value>),
    Object(Map),
}

/// A JSON object, in the order of its keys.
pub(crate) type Map = IndexMap<String, Value>;

/// A number with every digit that was written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Number {
    Int(i128),
    /// Decimal digits of an integer beyond 128 bits.
    BigInt(String),
    Float(f64),
}

impl Value {
    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn as_array(&self) -> Option<&Vec<Value>> {
        match self {
            Self::Array(list) => Some(list),
            _ => None,
        }
    }

    pub(crate) fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Number(Number::Int(number)) => Some(*number as f64),
            Self::Number(Number::Float(number)) => Some(*number),
            Self::Number(Number::BigInt(digits)) => digits.parse().ok(),
            _ => None,
        }
    }

    pub(crate) fn is_null(&self) -> bool {
        *self == Self::Null
    }

    /// A field of an object.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        match self {
            Self::Object(map) => map.get(key),
            _ => None,
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::String(text)
    }
}

impl From<&serde_json::Value> for Value {
    fn from(value: &serde_json::Value) -> Self {
        use serde_json::Value as Serde;
        match value {
            Serde::Null => Self::Null,
            Serde::Bool(value) => Self::Bool(*value),
            Serde::Number(number) => Self::Number(match number.as_i128() {
                Some(number) => Number::Int(number),
                None => Number::Float(number.as_f64().unwrap_or_default()),
            }),
            Serde::String(text) => Self::String(text.clone()),
            Serde::Array(list) => Self::Array(list.iter().map(Self::from).collect()),
            Serde::Object(map) => Self::Object(from_serde_map(map)),
        }
    }
}

/// An object of serde_json as ours.
pub(crate) fn from_serde_map(map: &serde_json::Map<String, serde_json::Value>) -> Map {
    map.iter().map(|(key, value)| (key.clone(), value.into())).collect()
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Number(Number::Int(number)) => write!(f, "{number}"),
            Self::Number(Number::BigInt(digits)) => f.write_str(digits),
            Self::Number(Number::Float(number)) => write!(f, "{}", serde_json::Value::from(*number)),
            Self::String(text) => write!(f, "{}", serde_json::Value::from(text.as_str())),
            Self::Array(list) => {
                f.write_str("[")?;
                for (index, value) in list.iter().enumerate() {
                    write!(f, "{}{value}", if index > 0 { "," } else { "" })?;
                }
                f.write_str("]")
            }
            Self::Object(map) => write_object(f, map),
        }
    }
}

fn write_object(f: &mut fmt::Formatter<'_>, map: &Map) -> fmt::Result {
    f.write_str("{")?;
    for (index, (key, value)) in map.iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        write!(f, "{comma}{}:{value}", serde_json::Value::from(key.as_str()))?;
    }
    f.write_str("}")
}

/// Parses one line into an object.
///
/// `terminated` says whether the line ended with a line break: without one, a row that stops in the middle is reported
/// as a file that was cut off.
pub(crate) fn parse_object(line: &str, terminated: bool) -> Result<Map, Fault> {
    let mut parser = Parser::new(line, terminated);
    match parser.whole()? {
        Value::Object(object) => Ok(object),
        other => Err(Fault::new(
            RowErrorKind::NotAnObject,
            format!("expected object, found {}", describe(&other)),
            "write one JSON object a line, such as {\"text\": \"…\"}",
        )),
    }
}

/// Parses a text that holds one JSON value, such as the arguments of a call.
pub(crate) fn parse(text: &str) -> Option<Value> {
    Parser::new(text, true).whole().ok()
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

/// Values inside one another.
const MAX_DEPTH: usize = 127;
const NOT_JSON: &str = "write one JSON object a line, with \"double-quoted\" keys and no trailing comma";

struct Parser<'a> {
    text: &'a str,
    at: usize,
    terminated: bool,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str, terminated: bool) -> Self {
        Self {
            text,
            at: 0,
            terminated,
            depth: 0,
        }
    }

    fn whole(&mut self) -> Result<Value, Fault> {
        let value = self.value()?;
        self.skip_space();
        if self.at < self.text.len() {
            return Err(self.not_json("something follows the object"));
        }
        Ok(value)
    }

    fn value(&mut self) -> Result<Value, Fault> {
        self.skip_space();
        match self.peek() {
            Some(b'{') => self.nested(Self::object),
            Some(b'[') => self.nested(Self::array),
            Some(b'"') => self.string().map(Value::String),
            Some(b'-' | b'0'..=b'9') => self.number(),
            None => Err(self.not_json("the line ends where a value is expected")),
            _ => {
                for (word, value) in [
                    ("true", Value::Bool(true)),
                    ("false", Value::Bool(false)),
                    ("null", Value::Null),
                ] {
                    if self.text[self.at..].starts_with(word) {
                        self.at += word.len();
                        return Ok(value);
                    }
                }
                let rest = &self.text[self.at..];
                if ["NaN", "Infinity", "Inf", "nan", "inf"]
                    .iter()
                    .any(|word| rest.starts_with(word))
                {
                    return Err(self.non_finite());
                }
                Err(self.not_json("expected a JSON value"))
            }
        }
    }

    fn nested(&mut self, read: fn(&mut Self) -> Result<Value, Fault>) -> Result<Value, Fault> {
        self.at += 1;
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            let message = format!("values are nested more than {MAX_DEPTH} deep");
            return Err(self.fault(RowErrorKind::TooDeep, message, "flatten the row"));
        }
        let value = read(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn object(&mut self) -> Result<Value, Fault> {
        let mut map = Map::new();
        loop {
            self.skip_space();
            match self.peek() {
                Some(b'}') if map.is_empty() => break,
                Some(b'"') => {}
                Some(b'}') => return Err(self.not_json("trailing comma")),
                None => return Err(self.not_json("the line ends inside an object")),
                _ => return Err(self.not_json("key must be a string")),
            }
            let key_at = self.at;
            let key = self.string()?;
            if map.contains_key(&key) {
                self.at = key_at;
                let message = format!("the key {key:?} comes twice in one object");
                return Err(self.fault(RowErrorKind::DuplicateKey, message, "keep one of the two values"));
            }
            self.skip_space();
            self.expect(b':', "the line ends inside an object", "expected `:`")?;
            let value = self.value()?;
            map.insert(key, value);
            if !self.comma(b'}', "the line ends inside an object", "expected `,` or `}`")? {
                break;
            }
        }
        self.at += 1;
        Ok(Value::Object(map))
    }

    fn array(&mut self) -> Result<Value, Fault> {
        let mut list = Vec::new();
        loop {
            self.skip_space();
            match self.peek() {
                Some(b']') if list.is_empty() => break,
                Some(b']') => return Err(self.not_json("trailing comma")),
                None => return Err(self.not_json("the line ends inside a list")),
                _ => list.push(self.value()?),
            }
            if !self.comma(b']', "the line ends inside a list", "expected `,` or `]`")? {
                break;
            }
        }
        self.at += 1;
        Ok(Value::Array(list))
    }

    /// Takes a comma; false where `end` comes instead, which is left.
    fn comma(&mut self, end: u8, at_end: &str, otherwise: &str) -> Result<bool, Fault> {
        self.skip_space();
        if self.peek() == Some(end) {
            return Ok(false);
        }
        self.expect(b',', at_end, otherwise)?;
        Ok(true)
    }

    fn expect(&mut self, byte: u8, at_end: &str, otherwise: &str) -> Result<(), Fault> {
        match self.peek() {
            Some(found) if found == byte => {
                self.at += 1;
                Ok(())
            }
            None => Err(self.not_json(at_end)),
            Some(_) => Err(self.not_json(otherwise)),
        }
    }

    fn string(&mut self) -> Result<String, Fault> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let rest = &self.text.as_bytes()[self.at..];
            let length = rest
                .iter()
                .position(|byte| matches!(byte, b'"' | b'\\' | ..0x20))
                .unwrap_or(rest.len());
            out.push_str(&self.text[self.at..self.at + length]);
            self.at += length;
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => out.push(self.escape()?),
                Some(_) => return Err(self.not_json("a control character stands in a string; write it as \\u00XX")),
                None => return Err(self.not_json("the line ends inside a string")),
            }
        }
    }

    fn escape(&mut self) -> Result<char, Fault> {
        self.at += 1;
        let Some(kind) = self.peek() else {
            return Err(self.not_json("the line ends inside a string"));
        };
        self.at += 1;
        Ok(match kind {
            b'"' | b'\\' | b'/' => char::from(kind),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => return self.unicode(),
            _ => {
                self.at -= 1;
                return Err(self.not_json("invalid escape"));
            }
        })
    }

    fn unicode(&mut self) -> Result<char, Fault> {
        let first = self.code_unit()?;
        if let Some(character) = char::from_u32(first) {
            return Ok(character);
        }
        if first < 0xdc00 && self.text[self.at..].starts_with("\\u") {
            self.at += 2;
            let second = self.code_unit()?;
            if let Some(Ok(character)) = char::decode_utf16([first as u16, second as u16]).next() {
                return Ok(character);
            }
        }
        self.at -= 1;
        let fix = "write the character itself, or both halves of the pair";
        Err(self.fault(
            RowErrorKind::LoneSurrogate,
            "a \\u escape is half of a surrogate pair",
            fix,
        ))
    }

    fn code_unit(&mut self) -> Result<u32, Fault> {
        let digits = self
            .text
            .get(self.at..self.at + 4)
            .filter(|it| it.bytes().all(|byte| byte.is_ascii_hexdigit()));
        match digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()) {
            Some(code) => {
                self.at += 4;
                Ok(code)
            }
            None => Err(self.not_json("invalid escape")),
        }
    }

    fn number(&mut self) -> Result<Value, Fault> {
        let start = self.at;
        let rest = &self.text[start..];
        let length = rest
            .find(|c: char| !matches!(c, '0'..='9' | '-' | '+' | '.' | 'e' | 'E'))
            .unwrap_or(rest.len());
        let text = &rest[..length];
        if text == "-" && rest[1..].starts_with(['I', 'i', 'N', 'n']) {
            return Err(self.non_finite());
        }
        self.at += length;
        let (whole, is_float) = match number_shape(text) {
            Some(shape) => shape,
            None => return Err(self.not_json("invalid number")),
        };
        if !is_float {
            return Ok(Value::Number(match whole.parse() {
                Ok(number) => Number::Int(number),
                Err(_) => Number::BigInt(whole.into()),
            }));
        }
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Value::Number(Number::Float(number))),
            _ => {
                self.at = start;
                Err(self.non_finite())
            }
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn non_finite(&self) -> Fault {
        let fix = "give a finite number, or null where the field may be absent";
        self.fault(RowErrorKind::NonFinite, "expected a finite number", fix)
    }

    fn not_json(&self, message: &str) -> Fault {
        if self.at >= self.text.len() && !self.terminated {
            let fix = "copy or download the file again, or delete the row";
            return self.fault(RowErrorKind::CutOff, "the file ends inside this row", fix);
        }
        self.fault(RowErrorKind::Json, message, NOT_JSON)
    }

    fn fault(&self, kind: RowErrorKind, message: impl Into<String>, fix: &str) -> Fault {
        Fault {
            column: Some(column_at(self.text, self.at.min(self.text.len()))),
            ..Fault::new(kind, message, fix)
        }
    }
}

/// The text of a number by JSON's grammar, and whether it has a fraction or an exponent.
fn number_shape(text: &str) -> Option<(&str, bool)> {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    let whole = digits(unsigned);
    if whole == 0 || (whole > 1 && unsigned.starts_with('0')) {
        return None;
    }
    let mut rest = &unsigned[whole..];
    let mut is_float = false;
    if let Some(fraction) = rest.strip_prefix('.') {
        let length = digits(fraction);
        if length == 0 {
            return None;
        }
        rest = &fraction[length..];
        is_float = true;
    }
    if let Some(exponent) = rest.strip_prefix(['e', 'E']) {
        let size = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        let length = digits(size);
        if length == 0 {
            return None;
        }
        rest = &size[length..];
        is_float = true;
    }
    rest.is_empty().then_some((text, is_float))
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
        assert_eq!(object["i"], Value::Number(Number::Int(u64::MAX.into())));
        let line = format!("{{\"wei\":1{},\"low\":-{}7}}", "0".repeat(21), "9".repeat(80));
        assert_eq!(Value::Object(parse_object(&line, true).unwrap()).to_string(), line);
    }
}
