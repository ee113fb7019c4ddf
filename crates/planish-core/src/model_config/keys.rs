//! One JSON object of a `config.json`, read key by key; every error says which key, what it held, what was expected.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// An object of the file, and how errors name what is in it.
#[derive(Debug)]
pub(crate) struct Keys<'a> {
    pub(super) path: &'a Path,
    prefix: String,
    pub(super) map: &'a Map<String, Value>,
    /// Keys that were asked for.
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub(super) fn root(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self::new(path, String::new(), map)
    }

    fn new(path: &'a Path, prefix: String, map: &'a Map<String, Value>) -> Self {
        Keys {
            path,
            prefix,
            map,
            read: RefCell::default(),
        }
    }

    /// The value, unless absent or null. From here on the key counts as read.
    pub(crate) fn present(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether somebody asked for the key.
    pub(crate) fn was_read(&self, key: &str) -> bool {
        self.read.borrow().contains(key)
    }

    /// Whether the key is there, be it null.
    pub(crate) fn contains(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Refuses an object in which something stands that nobody asked for.
    pub(crate) fn refuse_unread(&self) -> Result<()> {
        let unread = |(key, value): &(&String, &Value)| !value.is_null() && !self.was_read(key);
        match self.map.iter().find(unread) {
            Some((key, _)) => Err(self.unsupported(
                key,
                "planish does not use this key here, and it may change the computation",
            )),
            None => Ok(()),
        }
    }

    pub(crate) fn size(&self, key: &str, max: usize) -> Result<usize> {
        self.optional_size(key, max)?
            .ok_or_else(|| self.missing(key, "a positive integer"))
    }

    pub(crate) fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.integer(key, 1, max)
    }

    pub(crate) fn optional_count(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.integer(key, 0, max)
    }

    pub(crate) fn integer(&self, key: &str, min: usize, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(key, &describe(value), &format!("an integer from {min} to {max}"))),
        }
    }

    /// A number above 0 and at most `max`.
    pub(crate) fn positive(&self, key: &str, max: f64) -> Result<Option<f64>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            // As f32 it must not vanish either.
            Some(x) if x <= max && x as f32 > 0.0 => Ok(Some(x)),
            _ => Err(self.wrong(key, &describe(value), &format!("a number above 0, at most {max:e}"))),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(key, &describe(value), "true or false"))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(key, &describe(value), "a text"))
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<Keys<'a>>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        let map = value
            .as_object()
            .ok_or_else(|| self.wrong(key, &describe(value), "an object"))?;
        Ok(Some(Keys::new(self.path, self.dotted(key) + ".", map)))
    }

    /// A list of numbers above 0.
    pub(crate) fn positives(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        let one = |value: &Value| value.as_f64().map(|x| x as f32).filter(|x| *x > 0.0 && x.is_finite());
        let all = value
            .as_array()
            .and_then(|list| list.iter().map(one).collect::<Option<Vec<f32>>>());
        all.map(Some)
            .ok_or_else(|| self.wrong(key, &describe(value), "a list of numbers above 0"))
    }

    /// One id or a list of ids.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
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

    pub(crate) fn dotted(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(crate) fn missing(&self, key: &str, expected: &str) -> Error {
        self.wrong(key, "nothing", expected)
    }

    pub(crate) fn wrong(&self, key: &str, found: &str, expected: &str) -> Error {
        Error::ModelKey {
            path: self.path.to_path_buf(),
            key: self.dotted(key),
            found: found.into(),
            expected: expected.into(),
        }
    }

    pub(crate) fn unsupported(&self, key: &str, reason: &str) -> Error {
        Error::UnsupportedModel {
            path: self.path.to_path_buf(),
            key: self.dotted(key),
            found: self.present(key).map_or_else(|| "nothing".into(), describe),
            reason: reason.into(),
        }
    }
}

/// The value as JSON, cut to a length that fits a message.
pub(crate) fn describe(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
