//! Python's two ways to fill a text: `'%s' % value` and `'{}'.format(value)`.

use super::meter;
use super::python::{number, repr, text};
use super::value::{Result, SeqKind, Value};

/// What stands between `%` or `:` and the letter.
#[derive(Default)]
struct Spec {
    fill: Option<char>,
    /// `<`, `>`, `^` or `=`
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    thousands: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// `format % arguments`
pub(super) fn percent(format: &str, arguments: &Value) -> Result<String> {
    let tuple = match arguments {
        Value::Seq(seq) if seq.kind == SeqKind::Tuple => Some(seq.items()),
        _ => None,
    };
    let mut used = 0;
    let mut next = || -> Result<Value> {
        used += 1;
        match tuple {
            Some(items) => items.get(used - 1).cloned(),
            None => Some(arguments.clone()).filter(|_| used == 1),
        }
        .ok_or_else(|| "not enough arguments for format string".into())
    };
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let named = rest.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let mut named_value = None;
        if let Some((name, after)) = named {
            let Value::Dict(dict) = arguments else {
                return Err("format requires a mapping".into());
            };
            named_value = Some(dict.get(name).cloned().ok_or_else(|| format!("KeyError: '{name}'"))?);
            rest = after;
        }
        let mut spec = Spec::default();
        rest = percent_spec(rest, &mut spec, &mut next)?;
        let Some(kind) = rest.chars().next() else {
            return Err("incomplete format".into());
        };
        rest = &rest[kind.len_utf8()..];
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match named_value {
            Some(value) => value,
            None => next()?,
        };
        let more = spec.width.saturating_add(spec.precision.unwrap_or(0));
        meter::grown(out.len().saturating_add(more), more)?;
        out.push_str(&percent_one(kind, &value, spec)?);
    }
    out.push_str(rest);
    let unused = match (tuple, arguments) {
        (Some(items), _) => used < items.len(),
        (None, Value::Dict(_)) => false,
        (None, _) => used == 0,
    };
    if unused {
        return Err("not all arguments converted during string formatting".into());
    }
    Ok(out)
}

fn percent_spec<'a>(text: &'a str, spec: &mut Spec, next: &mut dyn FnMut() -> Result<Value>) -> Result<&'a str> {
    let mut rest = text;
    while let Some(flag) = rest.chars().next().filter(|flag| "-+ #0".contains(*flag)) {
        match flag {
            '-' => spec.align = Some('<'),
            '0' => spec.zero = true,
            '#' => spec.alternate = true,
            _ if spec.sign != Some('+') => spec.sign = Some(flag),
            _ => {}
        }
        rest = &rest[1..];
    }
    let mut size = |rest: &mut &'a str| -> Result<usize> {
        if let Some(after) = rest.strip_prefix('*') {
            *rest = after;
            let number = next()?.as_int().ok_or("* wants int")?;
            return usize::try_from(number).map_err(|_| "a width is out of range".to_string());
        }
        size_of_digits(rest)
    };
    spec.width = size(&mut rest)?;
    if let Some(after) = rest.strip_prefix('.') {
        rest = after;
        spec.precision = Some(size(&mut rest)?);
    }
    Ok(rest.trim_start_matches(['h', 'l', 'L']))
}

/// A number at the start of a text, which is taken.
fn size_of_digits(rest: &mut &str) -> Result<usize> {
    let length = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, after) = rest.split_at(length);
    *rest = after;
    if digits.is_empty() {
        return Ok(0);
    }
    digits.parse().map_err(|_| "a width is out of range".into())
}

fn percent_one(kind: char, value: &Value, mut spec: Spec) -> Result<String> {
    let integer = |value: &Value| match value {
        Value::Float(number) => Some(Value::Int(number.trunc() as i128)),
        Value::BigInt(_) => Some(value.clone()),
        other => other.as_int().map(Value::Int),
    };
    let body = match kind {
        's' | 'r' | 'a' => {
            let text = if kind == 's' { text(value)? } else { repr(value)? };
            spec.zero = false;
            spec.kind = Some('s');
            return pad(truncated(text, spec.precision), &spec, '>');
        }
        'd' | 'i' | 'u' => integer(value).map(|value| number(&value)),
        'x' | 'X' | 'o' => value.as_int().map(|number| in_base(number, kind, spec.alternate)),
        'c' => match value {
            Value::Text(text) if text.chars().count() == 1 => Some(text.to_string()),
            other => other
                .as_int()
                .and_then(|code| u32::try_from(code).ok())
                .and_then(char::from_u32)
                .map(String::from),
        },
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => value
            .as_float()
            .map(|number| float(number, kind, spec.precision.unwrap_or(6))),
        other => return Err(format!("unsupported format character '{other}'")),
    };
    let Some(body) = body else {
        return Err(format!(
            "%{kind} format: a real number is required, not {}",
            value.type_name()
        ));
    };
    if kind == 'c' {
        return pad(body, &spec, '>');
    }
    pad(signed(body, spec.sign), &spec, '>')
}

/// `format.format(*positional, **keywords)`
pub(super) fn braces(format: &str, positional: &[Value], keywords: &[(super::ast::Name, Value)]) -> Result<String> {
    let mut out = String::new();
    let mut rest = format;
    let mut automatic = 0;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let (brace, after) = rest[at..].split_at(1);
        if after.starts_with(brace) {
            out.push_str(brace);
            rest = &after[1..];
            continue;
        }
        if brace == "}" {
            return Err("Single '}' encountered in format string".into());
        }
        let end = matching_brace(after).ok_or("expected '}' before end of string")?;
        let field = &after[..end];
        rest = &after[end + 1..];
        let (name, spec) = field.split_once(':').unwrap_or((field, ""));
        let (name, conversion) = name
            .split_once('!')
            .map_or((name, None), |(name, kind)| (name, Some(kind)));
        let value = named_value(name, positional, keywords, &mut automatic)?;
        let value = match conversion {
            None => value,
            Some("r" | "a") => Value::text(repr(&value)?),
            Some("s") => Value::text(text(&value)?),
            Some(other) => return Err(format!("unknown conversion specifier '{other}'")),
        };
        let spec = if spec.contains('{') {
            braces(spec, positional, keywords)?
        } else {
            spec.into()
        };
        let filled = formatted(&value, &spec)?;
        meter::grown(out.len() + filled.len(), filled.len())?;
        out.push_str(&filled);
    }
    out.push_str(rest);
    Ok(out)
}

fn matching_brace(text: &str) -> Option<usize> {
    let mut depth = 0;
    text.char_indices().find_map(|(at, character)| match character {
        '{' => {
            depth += 1;
            None
        }
        '}' if depth == 0 => Some(at),
        '}' => {
            depth -= 1;
            None
        }
        _ => None,
    })
}

fn named_value(
    name: &str,
    positional: &[Value],
    keywords: &[(super::ast::Name, Value)],
    automatic: &mut usize,
) -> Result<Value> {
    let head_length = name.find(['.', '[']).unwrap_or(name.len());
    let (head, mut path) = name.split_at(head_length);
    let index = if head.is_empty() {
        *automatic += 1;
        Some(*automatic - 1)
    } else {
        head.parse::<usize>().ok()
    };
    let mut value = match index {
        Some(index) => positional
            .get(index)
            .cloned()
            .ok_or_else(|| format!("Replacement index {index} out of range for positional args tuple"))?,
        None => keywords
            .iter()
            .find(|(keyword, _)| **keyword == *head)
            .map(|(_, value)| value.clone())
            .ok_or_else(|| format!("KeyError: '{head}'"))?,
    };
    while !path.is_empty() {
        if let Some(after) = path.strip_prefix('.') {
            let length = after.find(['.', '[']).unwrap_or(after.len());
            value = super::ops::attribute(&value, &after[..length].into())?;
            path = &after[length..];
        } else {
            let (key, after) = path[1..].split_once(']').ok_or("expected ']' before end of string")?;
            let key = key.parse::<i128>().map_or_else(|_| Value::text(key), Value::Int);
            value = super::ops::item(&value, &key)?;
            path = after;
        }
    }
    Ok(value)
}

/// `format(value, spec)`
fn formatted(value: &Value, spec: &str) -> Result<String> {
    if spec.is_empty() {
        return text(value);
    }
    let spec = brace_spec(spec)?;
    meter::room(spec.width + spec.precision.unwrap_or(0))?;
    if let Value::Text(text) = value {
        return pad(truncated(text.to_string(), spec.precision), &spec, '<');
    }
    let body = match (spec.kind, value) {
        (None, Value::Float(_)) if spec.precision.is_none() => number(value),
        (None | Some('d' | 'n'), Value::Int(_) | Value::Bool(_) | Value::BigInt(_)) => match value {
            Value::Bool(flag) => u8::from(*flag).to_string(),
            other => number(other),
        },
        (Some(kind @ ('x' | 'X' | 'o' | 'b')), _) => match value.as_int() {
            Some(number) => in_base(number, kind, spec.alternate),
            None => {
                return Err(format!(
                    "Unknown format code '{kind}' for object of type '{}'",
                    value.type_name()
                ));
            }
        },
        (Some('%'), _) if value.as_float().is_some() => {
            let share = value.as_float().unwrap_or_default() * 100.0;
            format!("{}%", float(share, 'f', spec.precision.unwrap_or(6)))
        }
        (kind, _) => match value.as_float() {
            Some(number) if kind.is_none_or(|kind| "eEfFgG".contains(kind)) => {
                float(number, kind.unwrap_or('g'), spec.precision.unwrap_or(6))
            }
            _ => {
                return Err(format!(
                    "unsupported format string passed to {}.__format__",
                    value.type_name()
                ));
            }
        },
    };
    let body = match spec.thousands {
        Some(separator) => grouped(&body, separator),
        None => body,
    };
    pad(signed(body, spec.sign), &spec, '>')
}

fn brace_spec(text: &str) -> Result<Spec> {
    let mut spec = Spec::default();
    let mut characters = text.chars();
    let (first, second) = (characters.next(), characters.next());
    let is_align = |character: Option<char>| character.filter(|character| "<>^=".contains(*character));
    let mut rest = text;
    if let (Some(fill), Some(align)) = (first, is_align(second)) {
        (spec.fill, spec.align) = (Some(fill), Some(align));
        rest = &rest[fill.len_utf8() + 1..];
    } else if let Some(align) = is_align(first) {
        spec.align = Some(align);
        rest = &rest[1..];
    }
    if let Some(sign) = rest.chars().next().filter(|sign| "+- ".contains(*sign)) {
        spec.sign = Some(sign).filter(|sign| *sign != '-');
        rest = &rest[1..];
    }
    if let Some(after) = rest.strip_prefix('#') {
        spec.alternate = true;
        rest = after;
    }
    if let Some(after) = rest.strip_prefix('0') {
        spec.zero = spec.align.is_none();
        rest = after;
    }
    spec.width = size_of_digits(&mut rest)?;
    if let Some(separator) = rest.chars().next().filter(|separator| ",_".contains(*separator)) {
        spec.thousands = Some(separator);
        rest = &rest[1..];
    }
    if let Some(after) = rest.strip_prefix('.') {
        rest = after;
        spec.precision = Some(size_of_digits(&mut rest)?);
    }
    let mut kinds = rest.chars();
    spec.kind = kinds.next();
    if kinds.next().is_some() {
        return Err("Invalid format specifier".into());
    }
    Ok(spec)
}

fn truncated(text: String, precision: Option<usize>) -> String {
    match precision {
        Some(length) => text.chars().take(length).collect(),
        None => text,
    }
}

fn signed(body: String, sign: Option<char>) -> String {
    match sign {
        Some(sign) if !body.starts_with('-') => format!("{sign}{body}"),
        _ => body,
    }
}

fn pad(body: String, spec: &Spec, default_align: char) -> Result<String> {
    let missing = spec.width.saturating_sub(body.chars().count());
    meter::room(missing * 4)?;
    if spec.zero && spec.align != Some('<') {
        let (sign, digits) = body.split_at(body.len() - body.trim_start_matches(['+', '-', ' ']).len());
        return Ok(format!("{sign}{}{digits}", "0".repeat(missing)));
    }
    let fill = |count: usize| spec.fill.unwrap_or(' ').to_string().repeat(count);
    Ok(match spec.align.unwrap_or(default_align) {
        '<' => body + &fill(missing),
        '^' => format!("{}{body}{}", fill(missing / 2), fill(missing - missing / 2)),
        '=' => {
            let (sign, digits) = body.split_at(body.len() - body.trim_start_matches(['+', '-', ' ']).len());
            format!("{sign}{}{digits}", fill(missing))
        }
        _ => fill(missing) + &body,
    })
}

fn in_base(number: i128, kind: char, alternate: bool) -> String {
    let size = number.unsigned_abs();
    let (digits, prefix) = match kind {
        'x' => (format!("{size:x}"), "0x"),
        'X' => (format!("{size:X}"), "0X"),
        'o' => (format!("{size:o}"), "0o"),
        _ => (format!("{size:b}"), "0b"),
    };
    let sign = if number < 0 { "-" } else { "" };
    format!("{sign}{}{digits}", if alternate { prefix } else { "" })
}

fn grouped(number: &str, separator: char) -> String {
    let start = number.find(|c: char| c.is_ascii_digit()).unwrap_or(0);
    let end = number[start..]
        .find(|c: char| !c.is_ascii_digit())
        .map_or(number.len(), |at| start + at);
    let digits = &number[start..end];
    let mut out = number[..start].to_string();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(separator);
        }
        out.push(digit);
    }
    out + &number[end..]
}

/// A float as C writes it.
pub(super) fn float(number: f64, kind: char, precision: usize) -> String {
    // Digits beyond these say nothing of a 64-bit float.
    let precision = precision.min(400);
    if !number.is_finite() {
        return self::number(&Value::Float(number));
    }
    let text = match kind {
        'f' | 'F' => format!("{number:.precision$}"),
        'e' | 'E' => exponent(&format!("{number:.precision$e}")),
        _ => general(number, precision.max(1)),
    };
    if kind.is_uppercase() { text.to_uppercase() } else { text }
}

fn general(number: f64, precision: usize) -> String {
    if number == 0.0 {
        return if number.is_sign_negative() { "-0" } else { "0" }.into();
    }
    let scientific = format!("{number:.*e}", precision - 1);
    let size: i32 = scientific
        .rsplit('e')
        .next()
        .and_then(|size| size.parse().ok())
        .unwrap_or(0);
    let strip = |text: &str| -> String {
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').into()
        } else {
            text.into()
        }
    };
    if size < -4 || size >= precision as i32 {
        let (digits, size) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        return exponent(&format!("{}e{size}", strip(digits)));
    }
    strip(&format!("{number:.*}", (precision as i32 - 1 - size).max(0) as usize))
}

/// Two digits at least, with a sign.
fn exponent(text: &str) -> String {
    let (digits, size) = text.split_once('e').unwrap_or((text, "0"));
    let (sign, size) = size.strip_prefix('-').map_or(('+', size), |size| ('-', size));
    format!("{digits}e{sign}{size:0>2}")
}
