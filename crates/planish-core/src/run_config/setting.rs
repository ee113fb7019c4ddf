//! The types a setting can have: read from TOML or from the text of `--set` and flags, written back as TOML.

use std::path::PathBuf;

use toml::Value;

use crate::units::{format_bytes, parse_bytes};

/// A type that a key of the run configuration can have.
pub trait Setting: Sized {
    /// What is accepted, for messages and documentation.
    fn expected() -> String;
    /// From a configuration file; `None` when it is not acceptable.
    fn from_toml(value: &Value) -> Option<Self>;
    /// From the right-hand side of `--set key=…` or the value of a flag.
    fn from_text(text: &str) -> Option<Self>;
    /// For the written configuration; `None` = unset.
    fn to_toml(&self) -> Option<Value>;
    /// The only words accepted, where there are only words.
    fn words() -> Vec<&'static str> {
        Vec::new()
    }
}

impl Setting for bool {
    fn expected() -> String {
        "true or false".into()
    }

    fn from_toml(value: &Value) -> Option<Self> {
        value.as_bool()
    }

    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::Boolean(*self))
    }
}

macro_rules! whole_number {
    ($type:ty, $expected:literal) => {
        impl Setting for $type {
            fn expected() -> String {
                $expected.into()
            }

            fn from_toml(value: &Value) -> Option<Self> {
                value.as_integer()?.try_into().ok()
            }

            fn from_text(text: &str) -> Option<Self> {
                // TOML's separators are accepted here too; its integers end at i64.
                let n: i64 = text.replace('_', "").parse().ok()?;
                n.try_into().ok()
            }

            fn to_toml(&self) -> Option<Value> {
                i64::try_from(*self).ok().map(Value::Integer)
            }
        }
    };
}

whole_number!(usize, "a whole number");
whole_number!(u64, "a whole number");
whole_number!(i64, "a whole number, possibly negative");

impl Setting for f64 {
    fn expected() -> String {
        "a number".into()
    }

    fn from_toml(value: &Value) -> Option<Self> {
        value
            .as_float()
            .or_else(|| value.as_integer().map(|n| n as f64))
            .filter(|x| x.is_finite())
    }

    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok().filter(|x: &f64| x.is_finite())
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::Float(*self))
    }
}

impl Setting for [f64; 2] {
    fn expected() -> String {
        "two numbers, such as [0.9, 0.999]".into()
    }

    fn from_toml(value: &Value) -> Option<Self> {
        let [a, b] = value.as_array()?.as_slice() else {
            return None;
        };
        Some([f64::from_toml(a)?, f64::from_toml(b)?])
    }

    fn from_text(text: &str) -> Option<Self> {
        let items = list_items(text);
        let [a, b] = items.as_slice() else { return None };
        Some([f64::from_text(a)?, f64::from_text(b)?])
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::Array(self.iter().copied().map(Value::Float).collect()))
    }
}

impl Setting for String {
    fn expected() -> String {
        "a text".into()
    }

    fn from_toml(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_string)
    }

    fn from_text(text: &str) -> Option<Self> {
        Some(unquoted(text).to_string())
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::String(self.clone()))
    }
}

impl Setting for PathBuf {
    fn expected() -> String {
        "a path".into()
    }

    fn from_toml(value: &Value) -> Option<Self> {
        value.as_str().filter(|text| !text.is_empty()).map(PathBuf::from)
    }

    fn from_text(text: &str) -> Option<Self> {
        Some(unquoted(text)).filter(|text| !text.is_empty()).map(PathBuf::from)
    }

    /// A path that is not Unicode cannot stand in TOML; its nearest spelling does.
    fn to_toml(&self) -> Option<Value> {
        Some(Value::String(self.to_string_lossy().into_owned()))
    }
}

impl Setting for Vec<String> {
    fn expected() -> String {
        "a list of texts, such as [\"q_proj\", \"v_proj\"], or one text with commas".into()
    }

    fn from_toml(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) => Self::from_text(text),
            Value::Array(items) => items.iter().map(String::from_toml).collect(),
            _ => None,
        }
    }

    fn from_text(text: &str) -> Option<Self> {
        Some(
            list_items(text)
                .into_iter()
                .map(|item| unquoted(item).to_string())
                .collect(),
        )
    }

    fn to_toml(&self) -> Option<Value> {
        Some(Value::Array(self.iter().cloned().map(Value::String).collect()))
    }
}

/// A size in memory; in files a whole number of bytes or a text such as `"8GB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl Setting for ByteSize {
    fn expected() -> String {
        "a size, such as \"8GB\" or \"512 MiB\"".into()
    }

    fn from_toml(value: &Value) -> Option<Self> {
        match value {
            Value::Integer(n) => u64::try_from(*n).ok().map(Self),
            Value::String(text) => Self::from_text(text),
            _ => None,
        }
    }

    fn from_text(text: &str) -> Option<Self> {
        parse_bytes(unquoted(text)).map(Self)
    }

    /// Readable where that loses nothing.
    fn to_toml(&self) -> Option<Value> {
        let readable = format_bytes(self.0);
        match parse_bytes(&readable) {
            Some(bytes) if bytes == self.0 => Some(Value::String(readable)),
            _ => i64::try_from(self.0).ok().map(Value::Integer),
        }
    }
}

/// A setting that may be left to a rule; the key's documentation says which.
impl<T: Setting> Setting for Option<T> {
    fn expected() -> String {
        T::expected()
    }

    fn from_toml(value: &Value) -> Option<Self> {
        T::from_toml(value).map(Some)
    }

    fn from_text(text: &str) -> Option<Self> {
        T::from_text(text).map(Some)
    }

    fn to_toml(&self) -> Option<Value> {
        self.as_ref().and_then(T::to_toml)
    }

    fn words() -> Vec<&'static str> {
        T::words()
    }
}

/// Declares an enum whose variants are words of the configuration.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $word:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_meta])* $variant),* }

        impl $name {
            /// Every choice.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The word in the configuration.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.word())
            }
        }

        impl Setting for $name {
            fn expected() -> String {
                match Self::words().as_slice() {
                    [only] => format!("{only} (the only choice so far)"),
                    words => format!("one of {}", words.join(", ")),
                }
            }

            fn from_toml(value: &toml::Value) -> Option<Self> {
                // For choices of which two are `true` and `false`.
                let flag = value.as_bool().map(|flag| if flag { "true" } else { "false" });
                Self::from_text(flag.or(value.as_str())?)
            }

            fn from_text(text: &str) -> Option<Self> {
                let text = text.trim_matches('"');
                Self::ALL.iter().copied().find(|choice| choice.word() == text)
            }

            fn to_toml(&self) -> Option<toml::Value> {
                Some(toml::Value::String(self.word().into()))
            }

            fn words() -> Vec<&'static str> {
                Self::ALL.iter().map(|choice| choice.word()).collect()
            }
        }
    };
}
pub(super) use words;

/// `[a, b]` and `a, b` alike.
fn list_items(text: &str) -> Vec<&str> {
    let text = text.trim();
    let inner = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(text);
    inner
        .split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .collect()
}

fn unquoted(text: &str) -> &str {
    let text = text.trim();
    ['"', '\'']
        .into_iter()
        .find_map(|quote| text.strip_prefix(quote)?.strip_suffix(quote))
        .unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Setting + PartialEq + std::fmt::Debug>(text: &str, expect: Option<T>) {
        let value = T::from_text(text);
        assert_eq!(value, expect, "{text}");
        if let Some(value) = value {
            assert_eq!(
                T::from_toml(&value.to_toml().unwrap()),
                Some(value),
                "round trip of {text}"
            );
        }
    }

    #[test]
    fn texts_of_every_type() {
        check("4_096", Some(4096_usize));
        check::<usize>("-1", None);
        check("-1", Some(-1_i64));
        check("1e-4", Some(1e-4));
        check("3", Some(3.0));
        check::<f64>("nan", None);
        check("[0.9, 0.95]", Some([0.9, 0.95]));
        check("0.9,0.95", Some([0.9, 0.95]));
        check::<[f64; 2]>("0.9", None);
        check("\"a b\"", Some("a b".to_string()));
        check(
            "q_proj, 'v_proj'",
            Some(vec!["q_proj".to_string(), "v_proj".to_string()]),
        );
        check("8GB", Some(ByteSize(8_000_000_000)));
        check("8589934592", Some(ByteSize(1 << 33)));
        check("true", Some(true));
        check::<bool>("yes", None);
    }
}
