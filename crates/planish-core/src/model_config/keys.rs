//! One JSON object of a `config.json`, read key by key; every error says which key, what it held, what was expected.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// An object of the file, and how errors name what is in it.
pub(super) struct Keys<'a> {
    pub(super) path: &'a Path,
    pub(super) prefix: String,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// The value, unless absent or null.
    pub(super) fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn size(&self, key: &str, max: usize) -> Result<usize> {
        self.optional_size(key, max)?
            .ok_or_else(|| self.missing(key, "a positive integer"))
    }

    pub(super) fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.integer(key, 1, max)
    }

    pub(super) fn optional_count(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.integer(key, 0, max)
    }

    pub(super) fn integer(&self, key: &str, min: usize, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(key, &describe(value), &format!("an integer from {min} to {max}"))),
        }
    }

    /// A number above 0 and at most `max`.
    pub(super) fn positive(&self, key: &str, max: f64) -> Result<Option<f64>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            // As f32 it must not vanish either.
            Some(x) if x <= max && x as f32 > 0.0 => Ok(Some(x)),
            _ => Err(self.wrong(key, &describe(value), &format!("a number above 0, at most {max:e}"))),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(key, &describe(value), "true or false"))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(key, &describe(value), "a text"))
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<Keys<'a>>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        let map = value
            .as_object()
            .ok_or_else(|| self.wrong(key, &describe(value), "an object"))?;
        Ok(Some(Keys {
            path: self.path,
            prefix: self.dotted(key) + ".",
            map,
        }))
    }

    /// One id or a list of ids.
    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.present(key) else {
            return Ok(Vec::new());
        };
        let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match value {
            Value::Array(ids) => ids.iter().map(one).collect(),
            single => one(single).map(|id| vec![id]),
        }
        .ok_or_else(|| self.wrong(key, &describe(value), "a token id or a list of token ids"))
    }

    /// The kind of rotary scaling with the key that says it: `rope_type`, formerly `type`.
    pub(super) fn rope_type(&self) -> Result<Option<(&'static str, &'a str)>> {
        match self.text("rope_type")? {
            Some(name) => Ok(Some(("rope_type", name))),
            None => Ok(self.text("type")?.map(|name| ("type", name))),
        }
    }

    pub(super) fn dotted(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(super) fn missing(&self, key: &str, expected: &str) -> Error {
        self.wrong(key, "nothing", expected)
    }

    pub(super) fn wrong(&self, key: &str, found: &str, expected: &str) -> Error {
        Error::ModelKey {
            path: self.path.to_path_buf(),
            key: self.dotted(key),
            found: found.into(),
            expected: expected.into(),
        }
    }

    pub(super) fn unsupported(&self, key: &str, reason: &str) -> Error {
        Error::UnsupportedModel {
            path: self.path.to_path_buf(),
            key: self.dotted(key),
            found: self.present(key).map_or_else(|| "nothing".into(), describe),
            reason: reason.into(),
        }
    }
}

/// The value as JSON, cut to a length that fits a message.
pub(super) fn describe(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
