//! Operators, attributes, items and slices, with Python's meaning.

use super::ast::{Name, Operator};
use super::format::percent;
use super::meter;
use super::value::{Result, SeqKind, Value};

pub(super) fn binary(operator: Operator, left: &Value, right: &Value) -> Result<Value> {
    for side in [left, right] {
        if let Value::Undefined(message) = side {
            return Err(message.to_string());
        }
    }
    match (operator, left, right) {
        (Operator::Add, Value::Text(a), Value::Text(b)) => {
            meter::room(a.len() + b.len())?;
            Ok(Value::text(format!("{}{}", &**a, &**b)))
        }
        (Operator::Add, Value::Seq(a), Value::Seq(b)) if a.kind == b.kind && is_plain(a.kind) => {
            meter::room((a.items().len() + b.items().len()) * size_of::<Value>())?;
            Value::seq(a.kind, [a.items(), b.items()].concat())
        }
        (Operator::Multiply, Value::Text(_) | Value::Seq(_), times) => repeat(left, times),
        (Operator::Multiply, times, Value::Text(_) | Value::Seq(_)) => repeat(right, times),
        (Operator::Remainder, Value::Text(format), arguments) => Value::new_text(percent(format, arguments)?),
        _ => arithmetic(operator, left, right),
    }
}

fn is_plain(kind: SeqKind) -> bool {
    matches!(kind, SeqKind::List | SeqKind::Tuple)
}

fn unsupported(operator: Operator, left: &Value, right: &Value) -> String {
    let (left, right) = (left.type_name(), right.type_name());
    format!(
        "unsupported operand type(s) for {}: '{left}' and '{right}'",
        operator.symbol()
    )
}

fn repeat(value: &Value, times: &Value) -> Result<Value> {
    let Some(times) = times.as_int() else {
        return Err(unsupported(Operator::Multiply, value, times));
    };
    let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
    match value {
        Value::Text(text) => {
            meter::room(text.len().saturating_mul(times))?;
            Ok(Value::text(text.repeat(times)))
        }
        Value::Seq(seq) if is_plain(seq.kind) => {
            meter::room(
                seq.items()
                    .len()
                    .saturating_mul(times)
                    .saturating_mul(size_of::<Value>()),
            )?;
            let items = std::iter::repeat_n(seq.items(), times).flatten().cloned().collect();
            Value::seq(seq.kind, items)
        }
        other => Err(unsupported(Operator::Multiply, other, &Value::Int(1))),
    }
}

fn arithmetic(operator: Operator, left: &Value, right: &Value) -> Result<Value> {
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        if operator != Operator::Divide && !(operator == Operator::Power && b < 0) {
            return integers(operator, a, b);
        }
    } else if matches!(left, Value::BigInt(_)) || matches!(right, Value::BigInt(_)) {
        return Err("integers beyond 128 bits are written and compared, not computed with".into());
    }
    let (Some(a), Some(b)) = (left.as_float(), right.as_float()) else {
        return Err(unsupported(operator, left, right));
    };
    let divides = matches!(operator, Operator::Divide | Operator::FloorDivide | Operator::Remainder);
    if divides && b == 0.0 {
        return Err("division by zero".into());
    }
    Ok(Value::Float(match operator {
        Operator::Add => a + b,
        Operator::Subtract => a - b,
        Operator::Multiply => a * b,
        Operator::Divide => a / b,
        Operator::FloorDivide => (a / b).floor(),
        Operator::Remainder => a - b * (a / b).floor(),
        Operator::Power => a.powf(b),
    }))
}

fn integers(operator: Operator, a: i128, b: i128) -> Result<Value> {
    if matches!(operator, Operator::FloorDivide | Operator::Remainder) && b == 0 {
        return Err("integer division or modulo by zero".into());
    }
    let result = match operator {
        Operator::Add => a.checked_add(b),
        Operator::Subtract => a.checked_sub(b),
        Operator::Multiply => a.checked_mul(b),
        Operator::FloorDivide => a.checked_div_euclid(b).map(|_| floor_divide(a, b)),
        Operator::Remainder => a.checked_rem_euclid(b).map(|_| a - floor_divide(a, b) * b),
        Operator::Power => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
        Operator::Divide => None,
    };
    result
        .map(Value::Int)
        .ok_or_else(|| "integers beyond 128 bits are not computed with".into())
}

fn floor_divide(a: i128, b: i128) -> i128 {
    let quotient = a / b;
    if a % b != 0 && (a < 0) != (b < 0) {
        quotient - 1
    } else {
        quotient
    }
}

pub(super) fn negate(value: &Value) -> Result<Value> {
    match value {
        Value::Undefined(message) => Err(message.to_string()),
        Value::Float(number) => Ok(Value::Float(-number)),
        Value::BigInt(digits) => Ok(Value::BigInt(match digits.strip_prefix('-') {
            Some(digits) => digits.into(),
            None => format!("-{digits}").into(),
        })),
        other => match other.as_int().and_then(i128::checked_neg) {
            Some(number) => Ok(Value::Int(number)),
            None => Err(format!("bad operand type for unary -: '{}'", other.type_name())),
        },
    }
}

/// `value.name`: what Python's object has by that name goes before an item.
pub(super) fn attribute(value: &Value, name: &Name) -> Result<Value> {
    if let Some(found) = own_attribute(value, name)? {
        return Ok(found);
    }
    match value {
        Value::Undefined(message) => Err(message.to_string()),
        Value::Dict(dict) => Ok(dict.get(name).cloned().unwrap_or_else(|| no_attribute(value, name))),
        _ => Ok(no_attribute(value, name)),
    }
}

fn own_attribute(value: &Value, name: &Name) -> Result<Option<Value>> {
    Ok(match value {
        Value::Namespace(fields) => fields
            .borrow()
            .iter()
            .find(|(field, _)| field == name)
            .map(|(_, value)| value.clone()),
        Value::Loop(state) => super::eval::loop_attribute(state, name)?,
        Value::Macro(callable) => match &**name {
            "name" => Some(Value::text(&*callable.code.name)),
            "arguments" => {
                let names = callable
                    .code
                    .parameters
                    .iter()
                    .map(|(name, _)| Value::text(&**name))
                    .collect();
                Some(Value::seq(SeqKind::Tuple, names)?)
            }
            _ => None,
        },
        _ if super::methods::exists(value, name) => {
            Some(Value::Method(std::rc::Rc::new((value.clone(), name.clone()))))
        }
        _ => None,
    })
}

fn no_attribute(value: &Value, name: &str) -> Value {
    Value::undefined(match value {
        Value::None => format!("'None' has no attribute '{name}'"),
        other => format!("'{} object' has no attribute '{name}'", other.type_name()),
    })
}

/// `value[key]`
pub(super) fn item(value: &Value, key: &Value) -> Result<Value> {
    if let Value::Undefined(message) = value {
        return Err(message.to_string());
    }
    let found = match (value, key.as_int()) {
        (Value::Dict(dict), _) => dict.get_value(key)?.cloned(),
        (Value::Seq(seq), Some(index)) if is_plain(seq.kind) || seq.kind == SeqKind::Range => {
            position(index, seq.items().len()).map(|at| seq.items()[at].clone())
        }
        (Value::Text(text), Some(index)) => {
            meter::steps(text.len() / 64)?;
            let at = position(index, if index < 0 { text.chars().count() } else { usize::MAX });
            at.and_then(|at| text.chars().nth(at))
                .map(|character| Value::text(character.to_string()))
        }
        _ => None,
    };
    if let Some(found) = found {
        return Ok(found);
    }
    if let Value::Text(name) = key {
        let name: Name = (**name).into();
        return Ok(own_attribute(value, &name)?.unwrap_or_else(|| no_attribute(value, &name)));
    }
    Ok(Value::undefined(format!(
        "{} object has no element {}",
        value.type_name(),
        super::python::repr(key)?
    )))
}

fn position(index: i128, length: usize) -> Option<usize> {
    let index = if index < 0 {
        index.checked_add(length as i128)?
    } else {
        index
    };
    usize::try_from(index).ok().filter(|at| *at < length)
}

/// `value[start:stop:step]`
pub(super) fn slice(value: &Value, parts: [Value; 3]) -> Result<Value> {
    let [start, stop, step] = parts;
    let number = |value: &Value| match value {
        Value::None => Ok(None),
        other => other
            .as_int()
            .map(|number| Some(number.clamp(i64::MIN.into(), i64::MAX.into()) as i64))
            .ok_or("slice indices must be integers or None"),
    };
    let (start, stop, step) = (number(&start)?, number(&stop)?, number(&step)?.unwrap_or(1));
    if step == 0 {
        return Err("slice step cannot be zero".into());
    }
    match value {
        Value::Text(text) => {
            meter::room(text.len() * size_of::<char>())?;
            let characters: Vec<char> = text.chars().collect();
            let chosen = positions(characters.len(), start, stop, step).map(|at| characters[at]);
            Ok(Value::text(chosen.collect::<String>()))
        }
        Value::Seq(seq) if is_plain(seq.kind) || seq.kind == SeqKind::Range => {
            let chosen = positions(seq.items().len(), start, stop, step).map(|at| seq.items()[at].clone());
            Value::seq(
                if seq.kind == SeqKind::Tuple {
                    SeqKind::Tuple
                } else {
                    SeqKind::List
                },
                chosen.collect(),
            )
        }
        Value::Undefined(message) => Err(message.to_string()),
        other => Ok(Value::undefined(format!(
            "'{}' object cannot be sliced",
            other.type_name()
        ))),
    }
}

fn positions(length: usize, start: Option<i64>, stop: Option<i64>, step: i64) -> impl Iterator<Item = usize> {
    let length = length as i64;
    let (lowest, highest) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let bound = |at: Option<i64>, default: i64| match at {
        None => default,
        Some(at) if at < 0 => at.saturating_add(length).max(lowest),
        Some(at) => at.min(highest),
    };
    let (from, to) = if step > 0 {
        (bound(start, 0), bound(stop, length))
    } else {
        (bound(start, length - 1), bound(stop, -1))
    };
    let mut at = from;
    std::iter::from_fn(move || {
        let inside = if step > 0 { at < to } else { at > to };
        let found = inside.then_some(at as usize);
        at = at.saturating_add(step);
        found
    })
}
