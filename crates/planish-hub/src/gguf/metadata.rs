//! The typed key–value pairs at the head of a GGUF file.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// One value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // each variant is the Rust type of its name
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// A list of values of one type.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
}

impl Value {
    /// The type's name, for messages.
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F32(_) => "f32",
            Self::F64(_) => "f64",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
        }
    }

    /// A number that is whole and not negative, of whatever integer type: writers differ in what they choose.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            Self::I8(v) => v.try_into().ok(),
            Self::I16(v) => v.try_into().ok(),
            Self::I32(v) => v.try_into().ok(),
            Self::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// A floating-point number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            _ => None,
        }
    }

    /// A text, number or truth value as it reads; of an array only that it is one.
    pub(crate) fn shown(&self) -> String {
        match self {
            Self::String(v) => {
                let short: String = v.chars().take(60).collect();
                format!("{short:?}")
            }
            Self::Bool(v) => v.to_string(),
            Self::Array(_) => "an array".to_owned(),
            Self::F32(v) => v.to_string(),
            Self::F64(v) => v.to_string(),
            Self::I8(_) | Self::I16(_) | Self::I32(_) | Self::I64(_) | Self::U8(_) | Self::U16(_) | Self::U32(_) => {
                self.as_u64()
                    .map_or_else(|| "a negative number".to_owned(), |v| v.to_string())
            }
            Self::U64(v) => v.to_string(),
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

/// All pairs of a file, in the file's order, keys unique.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Metadata {
    pub(crate) path: PathBuf,
    pub(crate) pairs: Vec<(String, Value)>,
}

impl Metadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// Keys and values in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.pairs.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// A text.
    ///
    /// # Errors
    /// [`Error::MetadataType`] when the value has another type; likewise for the other readers of this type.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A whole number, not negative, that fits `u32`.
    pub fn whole(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "a whole number below 2³²", |value| {
            value.as_u64()?.try_into().ok()
        })
    }

    /// A finite floating-point number.
    pub fn real(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", |value| value.as_f64().filter(|v| v.is_finite()))
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Array(Array::String(texts)) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// The file these came from, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `value`, or the error that the key is missing.
    pub(crate) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::MissingMetadata {
            path: self.path.clone(),
            key: key.to_owned(),
        })
    }

    /// The error that the value of `key` asks for something we do not have.
    pub(crate) fn unsupported(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::UnsupportedMetadata {
            path: self.path.clone(),
            key: key.to_owned(),
            found: self.get(key).map_or_else(|| "absent".to_owned(), Value::shown),
            reason: reason.into(),
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| Error::MetadataType {
            path: self.path.clone(),
            key: key.to_owned(),
            found: format!("{} ({})", value.shown(), value.type_name()),
            expected,
        })
    }
}
