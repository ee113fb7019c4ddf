//! Jinja2's tests: what stands after `is`.

use std::cmp::Ordering;

use super::arguments::Args;
use super::ops;
use super::value::{Result, SeqKind, Value};
use super::{ast::Operator, filters, python};

const UNKNOWN: &str = "planish has no test";

/// Whether a value passes a test.
pub(super) fn check(name: &str, value: &Value, args: Args) -> Result<bool> {
    if let Some(passes) = alone(name, value)? {
        args.bind::<0>(name, [])?;
        return Ok(passes);
    }
    const OF_TWO: &str = " divisibleby eq equalto == ne != lt lessthan < le <= gt greaterthan > ge >= in sameas ";
    if !OF_TWO.contains(&format!(" {name} ")) {
        return Err(format!("{UNKNOWN} {name:?}"));
    }
    let [other] = args.bind(name, ["other"])?;
    let other = other.ok_or_else(|| format!("the test {name:?} wants an argument"))?;
    Ok(match name {
        "divisibleby" => !ops::binary(Operator::Remainder, value, &other)?.is_true(),
        "eq" | "equalto" | "==" => value.equals(&other)?,
        "ne" | "!=" => !value.equals(&other)?,
        "lt" | "lessthan" | "<" => value.compare(&other)? == Ordering::Less,
        "le" | "<=" => value.compare(&other)? != Ordering::Greater,
        "gt" | "greaterthan" | ">" => value.compare(&other)? == Ordering::Greater,
        "ge" | ">=" => value.compare(&other)? != Ordering::Less,
        "in" => other.contains(value)?,
        _ => same(value, &other)?,
    })
}

fn alone(name: &str, value: &Value) -> Result<Option<bool>> {
    let parity = |value: &Value| {
        value
            .as_int()
            .map(|number| number.rem_euclid(2))
            .ok_or_else(|| format!("odd and even want an integer, found {}", value.type_name()))
    };
    Ok(Some(match name {
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_) | Value::BigInt(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(
            value,
            Value::Int(_) | Value::BigInt(_) | Value::Float(_) | Value::Bool(_)
        ),
        "string" => matches!(value, Value::Text(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => match value {
            Value::Text(_) | Value::Dict(_) | Value::Undefined(_) => true,
            Value::Seq(seq) => matches!(seq.kind, SeqKind::List | SeqKind::Tuple | SeqKind::Range),
            _ => false,
        },
        "iterable" => matches!(
            value,
            Value::Text(_) | Value::Dict(_) | Value::Seq(_) | Value::Undefined(_) | Value::Loop(_)
        ),
        "callable" => {
            matches!(
                value,
                Value::Macro(_) | Value::Function(_) | Value::Method(_) | Value::Loop(_) | Value::Joiner(_)
            )
        }
        "odd" => parity(value)? == 1,
        "even" => parity(value)? == 0,
        "lower" | "upper" => {
            let text = python::text(value)?;
            let (has_lower, has_upper) = (
                text.chars().any(char::is_lowercase),
                text.chars().any(char::is_uppercase),
            );
            if name == "lower" {
                has_lower && !has_upper
            } else {
                has_upper && !has_lower
            }
        }
        "escaped" => false,
        "filter" => value.as_str().is_some_and(filters::exists),
        "test" => value.as_str().is_some_and(exists),
        _ => return Ok(None),
    }))
}

fn exists(name: &str) -> bool {
    !matches!(check(name, &Value::None, Args::default()), Err(message) if message.starts_with(UNKNOWN))
}

/// Python's `is`, of values that are one in Python too.
fn same(value: &Value, other: &Value) -> Result<bool> {
    Ok(value.type_name() == other.type_name() && value.equals(other)?)
}
