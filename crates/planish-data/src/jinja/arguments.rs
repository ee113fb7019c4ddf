//! Arguments of filters, functions and methods, by place or by name.

use super::ast::Name;
use super::meter;
use super::value::{Result, Value};

/// Evaluated arguments.
#[derive(Debug, Default, Clone)]
pub(super) struct Args {
    pub(super) positional: Vec<Value>,
    pub(super) keywords: Vec<(Name, Value)>,
}

impl Args {
    /// Puts the arguments to the names of the parameters; those not given are absent.
    pub(super) fn bind<const N: usize>(self, function: &str, parameters: [&str; N]) -> Result<[Option<Value>; N]> {
        if self.positional.len() > N {
            let found = self.positional.len();
            return Err(format!("{function}() takes at most {N} arguments, {found} given"));
        }
        let mut bound: [Option<Value>; N] = std::array::from_fn(|_| None);
        for (slot, value) in bound.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.keywords {
            let Some(at) = parameters.iter().position(|parameter| **parameter == *name) else {
                return Err(format!("{function}() got an unexpected keyword argument '{name}'"));
            };
            if bound[at].is_some() {
                return Err(format!("{function}() got multiple values for argument '{name}'"));
            }
            bound[at] = Some(value);
        }
        Ok(bound)
    }
}

/// The text of an argument; anything else is refused.
pub(super) fn text_or<'a>(value: &'a Option<Value>, default: &'a str) -> Result<&'a str> {
    match value {
        None => Ok(default),
        Some(Value::Text(text)) => Ok(text),
        Some(other) => Err(format!("expected str, found {}", other.type_name())),
    }
}

pub(super) fn int_or(value: &Option<Value>, default: i128) -> Result<i128> {
    match value {
        None => Ok(default),
        Some(value) => value
            .as_int()
            .ok_or_else(|| format!("'{}' object cannot be interpreted as an integer", value.type_name())),
    }
}

/// A width, within what a rendering may hold.
pub(super) fn size_or(value: &Option<Value>, default: usize) -> Result<usize> {
    let size = int_or(value, default as i128)?.max(0);
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    meter::room(size)?;
    Ok(size)
}

pub(super) fn is_set(value: &Option<Value>, default: bool) -> bool {
    value.as_ref().map_or(default, Value::is_true)
}
