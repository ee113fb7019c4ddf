//! Jinja2's filters, and `tojson` as transformers has it.

use std::cmp::Ordering;

use super::arguments::{Args, int_or, is_set, size_or, text_or};
use super::ast::Name;
use super::eval::Interpreter;
use super::format::{float, percent};
use super::lexer::is_space;
use super::methods::{self, capitalized, centered, replace, strip};
use super::python::{self, JsonStyle, dumps};
use super::value::{Result, SeqKind, Value};
use super::{meter, ops, predicates};

/// Applies a filter.
pub(super) fn apply(interpreter: &mut Interpreter, name: &str, value: Value, args: Args) -> Result<Value> {
    match name {
        "map" => map(interpreter, value, args),
        "select" | "reject" | "selectattr" | "rejectattr" => select(name, value, args),
        "sort" | "unique" | "min" | "max" | "groupby" | "sum" | "dictsort" => of_order(name, value, args),
        "abs" | "int" | "float" | "round" | "filesizeformat" => of_number(name, value, args),
        "batch" | "slice" | "first" | "last" | "list" | "length" | "count" | "join" | "items" | "reverse"
        | "random" => of_list(interpreter, name, value, args),
        "default" | "d" => {
            let [default, boolean] = args.bind(name, ["default_value", "boolean"])?;
            let is_missing = value.is_undefined() || (is_set(&boolean, false) && !value.is_true());
            Ok(if is_missing {
                default.unwrap_or_else(|| Value::text(""))
            } else {
                value
            })
        }
        "attr" => {
            let [attribute] = args.bind(name, ["name"])?;
            let attribute = Value::text(text_or(&attribute, "")?);
            match &value {
                Value::Dict(_) => Ok(Value::undefined("a dictionary has no such attribute")),
                _ => ops::item(&value, &attribute),
            }
        }
        "tojson" => tojson(&value, args),
        _ => of_text(name, &value, args),
    }
}

/// Whether a filter of that name is known.
pub(super) fn exists(name: &str) -> bool {
    const KNOWN: &str = " abs attr batch capitalize center count d default dictsort e escape filesizeformat first float \
        forceescape format groupby indent int items join last length list lower map max min pprint random reject \
        rejectattr replace reverse round safe select selectattr slice sort string striptags sum title tojson trim \
        truncate unique upper urlencode wordcount wordwrap xmlattr ";
    KNOWN.contains(&format!(" {name} "))
}

fn unknown(name: &str) -> String {
    format!("planish has no filter {name:?}")
}

fn map(interpreter: &mut Interpreter, value: Value, mut args: Args) -> Result<Value> {
    let keyword = |args: &mut Args, name: &str| {
        let at = args.keywords.iter().position(|(keyword, _)| **keyword == *name);
        at.map(|at| args.keywords.remove(at).1)
    };
    let items = value.iterate()?;
    let mut mapped = Vec::with_capacity(items.len());
    if let Some(attribute) = keyword(&mut args, "attribute") {
        let default = keyword(&mut args, "default");
        for item in items {
            let found = path(&item, &attribute)?;
            mapped.push(match (&default, found.is_undefined()) {
                (Some(default), true) => default.clone(),
                _ => found,
            });
        }
    } else {
        if args.positional.is_empty() {
            return Err("map requires a filter argument".into());
        }
        let name = args.positional.remove(0);
        let name = name.as_str().ok_or("map wants the name of a filter")?.to_string();
        for item in items {
            meter::steps(1)?;
            mapped.push(apply(interpreter, &name, item, args.clone())?);
        }
    }
    Value::seq(SeqKind::Generator, mapped)
}

/// `a.b.0` of a value.
fn path(value: &Value, attribute: &Value) -> Result<Value> {
    let Value::Text(names) = attribute else {
        return ops::item(value, attribute);
    };
    let mut value = value.clone();
    for name in names.split('.') {
        let key = match name.parse::<i128>() {
            Ok(index) if name.bytes().all(|byte| byte.is_ascii_digit()) => Value::Int(index),
            _ => Value::text(name),
        };
        value = ops::item(&value, &key)?;
    }
    Ok(value)
}

fn select(name: &str, value: Value, mut args: Args) -> Result<Value> {
    let attribute = match name.ends_with("attr") {
        true if args.positional.is_empty() => return Err("Missing parameter for attribute name".into()),
        true => Some(args.positional.remove(0)),
        false => None,
    };
    let test = if args.positional.is_empty() {
        None
    } else {
        Some(args.positional.remove(0))
    };
    let test = match &test {
        None => None,
        Some(test) => Some(test.as_str().ok_or("the name of a test is wanted")?),
    };
    let mut kept = Vec::new();
    for item in value.iterate()? {
        let judged = match &attribute {
            Some(attribute) => path(&item, attribute)?,
            None => item.clone(),
        };
        let passes = match test {
            None => judged.is_true(),
            Some(test) => predicates::check(test, &judged, args.clone())?,
        };
        if passes == name.starts_with("select") {
            kept.push(item);
        }
    }
    Value::seq(SeqKind::Generator, kept)
}

/// What to sort by: an attribute or several, and texts without their case.
fn sort_key(item: &Value, attribute: &Option<Value>, case_sensitive: bool) -> Result<Value> {
    let plain = |value: Value| match &value {
        Value::Text(text) if !case_sensitive => Value::text(text.to_lowercase()),
        _ => value,
    };
    match attribute {
        None | Some(Value::None) => Ok(plain(item.clone())),
        Some(Value::Text(names)) if names.contains(',') => {
            let values = names
                .split(',')
                .map(|name| Ok(plain(path(item, &Value::text(name.trim()))?)));
            Value::seq(SeqKind::Tuple, values.collect::<Result<_>>()?)
        }
        Some(attribute) => Ok(plain(path(item, attribute)?)),
    }
}

fn sorted(mut keyed: Vec<(Value, Value)>, reverse: bool) -> Result<Vec<(Value, Value)>> {
    let mut failure = None;
    keyed.sort_by(|(a, _), (b, _)| {
        let order = a.compare(b).unwrap_or_else(|error| {
            failure.get_or_insert(error);
            Ordering::Equal
        });
        if reverse { order.reverse() } else { order }
    });
    match failure {
        Some(error) => Err(error),
        None => Ok(keyed),
    }
}

fn of_order(name: &str, value: Value, args: Args) -> Result<Value> {
    if name == "dictsort" {
        return dictsort(&value, args);
    }
    if name == "sum" {
        let [attribute, start] = args.bind(name, ["attribute", "start"])?;
        let mut sum = start.unwrap_or(Value::Int(0));
        for item in value.iterate()? {
            let item = match &attribute {
                None | Some(Value::None) => item,
                Some(attribute) => path(&item, attribute)?,
            };
            sum = ops::binary(super::ast::Operator::Add, &sum, &item)?;
        }
        return Ok(sum);
    }
    let [reverse, case_sensitive, attribute, default] = match name {
        "sort" => args.bind(name, ["reverse", "case_sensitive", "attribute", "default"])?,
        "groupby" => {
            let [attribute, default, case_sensitive] = args.bind(name, ["attribute", "default", "case_sensitive"])?;
            [None, case_sensitive, attribute, default]
        }
        _ => {
            let [case_sensitive, attribute] = args.bind(name, ["case_sensitive", "attribute"])?;
            [None, case_sensitive, attribute, None]
        }
    };
    let case_sensitive = is_set(&case_sensitive, false);
    let mut keyed = Vec::new();
    for item in value.iterate()? {
        let key = sort_key(&item, &attribute, case_sensitive)?;
        let key = if key.is_undefined() {
            default.clone().unwrap_or(key)
        } else {
            key
        };
        keyed.push((key, item));
    }
    match name {
        "unique" => {
            let mut kept: Vec<(Value, Value)> = Vec::new();
            for (key, item) in keyed {
                let mut is_known = false;
                for (known, _) in &kept {
                    is_known = is_known || known.equals(&key)?;
                }
                if !is_known {
                    kept.push((key, item));
                }
            }
            Value::seq(SeqKind::Generator, kept.into_iter().map(|(_, item)| item).collect())
        }
        "min" | "max" => {
            let mut best: Option<(Value, Value)> = None;
            for (key, item) in keyed {
                let is_better = match &best {
                    None => true,
                    Some((known, _)) if name == "min" => key.compare(known)? == Ordering::Less,
                    Some((known, _)) => key.compare(known)? == Ordering::Greater,
                };
                if is_better {
                    best = Some((key, item));
                }
            }
            Ok(best.map_or_else(
                || Value::undefined("No aggregated item, sequence was empty."),
                |(_, item)| item,
            ))
        }
        "groupby" => groups(sorted(keyed, false)?, &attribute),
        _ => {
            let items = sorted(keyed, is_set(&reverse, false))?
                .into_iter()
                .map(|(_, item)| item);
            Value::list(items.collect())
        }
    }
}

fn groups(keyed: Vec<(Value, Value)>, attribute: &Option<Value>) -> Result<Value> {
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, item) in keyed {
        let joins = match groups.last() {
            Some((known, _)) => known.equals(&key)?,
            None => false,
        };
        match groups.last_mut() {
            Some((_, items)) if joins => items.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let pair = |(key, items): (Value, Vec<Value>)| {
        // The name of a group is spelt as in its first item.
        let name = match items.first() {
            Some(first) => sort_key(first, attribute, true)?,
            None => key.clone(),
        };
        let name = if name.is_undefined() { key } else { name };
        Value::seq(SeqKind::Tuple, vec![name, Value::list(items)?])
    };
    Value::list(groups.into_iter().map(pair).collect::<Result<_>>()?)
}

fn dictsort(value: &Value, args: Args) -> Result<Value> {
    let [case_sensitive, by, reverse] = args.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let at = match text_or(&by, "key")? {
        "key" => 0,
        "value" => 1,
        _ => return Err("You can only sort by either \"key\" or \"value\"".into()),
    };
    let mut keyed = Vec::new();
    for pair in methods::items(value)?.iterate()? {
        let key = ops::item(&pair, &Value::Int(at))?;
        keyed.push((sort_key(&key, &None, is_set(&case_sensitive, false))?, pair));
    }
    let sorted = sorted(keyed, is_set(&reverse, false))?;
    Value::list(sorted.into_iter().map(|(_, pair)| pair).collect())
}

fn of_number(name: &str, value: Value, args: Args) -> Result<Value> {
    match name {
        "abs" => match &value {
            Value::Float(number) => Ok(Value::Float(number.abs())),
            Value::BigInt(digits) => Ok(Value::BigInt(digits.trim_start_matches('-').into())),
            other => match other.as_int().and_then(i128::checked_abs) {
                Some(number) => Ok(Value::Int(number)),
                None => Err(format!("bad operand type for abs(): '{}'", other.type_name())),
            },
        },
        "int" => {
            let [default, base] = args.bind(name, ["default", "base"])?;
            let base = u32::try_from(int_or(&base, 10)?).unwrap_or(10);
            Ok(integer(&value, base).or(default).unwrap_or(Value::Int(0)))
        }
        "float" => {
            let [default] = args.bind(name, ["default"])?;
            let number = match &value {
                Value::Text(text) => text.trim_matches(is_space).replace('_', "").parse().ok(),
                other => other.as_float(),
            };
            Ok(number.map(Value::Float).or(default).unwrap_or(Value::Float(0.0)))
        }
        "filesizeformat" => {
            let [binary] = args.bind(name, ["binary"])?;
            file_size(&value, is_set(&binary, false))
        }
        _ => round(&value, args),
    }
}

fn integer(value: &Value, base: u32) -> Option<Value> {
    match value {
        Value::Text(text) => {
            let digits = text.trim_matches(is_space).replace('_', "");
            let prefix = match base {
                16 => "0x",
                8 => "0o",
                2 => "0b",
                _ => "",
            };
            let digits = digits.strip_prefix(prefix).unwrap_or(&digits);
            let parsed = (2..=36)
                .contains(&base)
                .then(|| i128::from_str_radix(digits, base).ok())
                .flatten();
            parsed
                .or_else(|| {
                    digits
                        .parse::<f64>()
                        .ok()
                        .filter(|number| number.is_finite())
                        .map(|number| number.trunc() as i128)
                })
                .map(Value::Int)
        }
        Value::Float(number) if number.is_finite() => Some(Value::Int(number.trunc() as i128)),
        Value::BigInt(_) => Some(value.clone()),
        other => other.as_int().map(Value::Int),
    }
}

fn round(value: &Value, args: Args) -> Result<Value> {
    let [precision, method] = args.bind("round", ["precision", "method"])?;
    let precision = int_or(&precision, 0)?.clamp(-300, 300) as i32;
    let method = text_or(&method, "common")?;
    if let (Some(number), "common") = (value.as_int(), method)
        && precision >= 0
    {
        return Ok(Value::Int(number));
    }
    let Some(number) = value.as_float() else {
        return Err(format!("type {} doesn't define __round__ method", value.type_name()));
    };
    let scale = 10f64.powi(precision);
    Ok(Value::Float(match method {
        // The decimal writing rounds halves to even, as Python's round does on the exact value.
        "common" if precision >= 0 => float(number, 'f', precision as usize).parse().unwrap_or(number),
        "common" => (number * scale).round_ties_even() / scale,
        "ceil" => (number * scale).ceil() / scale,
        "floor" => (number * scale).floor() / scale,
        _ => return Err("method must be common, ceil or floor".into()),
    }))
}

fn file_size(value: &Value, binary: bool) -> Result<Value> {
    let bytes = match value {
        Value::Text(text) => text.parse().ok(),
        other => other.as_float(),
    };
    let bytes: f64 = bytes.ok_or("could not convert string to float")?;
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    let names = ["kMGTPEZY", "KMGTPEZY"][usize::from(binary)];
    if bytes == 1.0 {
        return Ok(Value::text("1 Byte"));
    }
    if bytes < base {
        return Ok(Value::text(format!("{} Bytes", bytes.trunc())));
    }
    let mut unit = base;
    let mut last = String::new();
    for name in names.chars() {
        unit *= base;
        last = format!(
            "{} {name}{}",
            float(base * bytes / unit, 'f', 1),
            if binary { "iB" } else { "B" }
        );
        if bytes < unit {
            break;
        }
    }
    Ok(Value::text(last))
}

fn of_list(interpreter: &mut Interpreter, name: &str, value: Value, args: Args) -> Result<Value> {
    match name {
        "length" | "count" => value.length().map(|length| Value::Int(length as i128)),
        "list" => Value::list(value.iterate()?),
        "first" => Ok(value
            .take_first()?
            .unwrap_or_else(|| Value::undefined("No first item, sequence was empty."))),
        "last" => match &value {
            Value::Seq(seq) if seq.kind == SeqKind::Generator => Err("'generator' object is not reversible".into()),
            other => {
                let last = other.iterate()?.pop();
                Ok(last.unwrap_or_else(|| Value::undefined("No last item, sequence was empty.")))
            }
        },
        "items" => {
            if value.is_undefined() {
                return Value::seq(SeqKind::Generator, Vec::new());
            }
            Value::seq(SeqKind::Generator, methods::items(&value)?.iterate()?)
        }
        "reverse" => match &value {
            Value::Text(text) => Value::new_text(text.chars().rev().collect()),
            other => {
                let mut items = other.iterate()?;
                items.reverse();
                Value::seq(SeqKind::Generator, items)
            }
        },
        "random" => {
            let items = value.iterate()?;
            let at = interpreter.random(items.len());
            Ok(items
                .get(at)
                .cloned()
                .unwrap_or_else(|| Value::undefined("No random item, sequence was empty.")))
        }
        "join" => {
            let [separator, attribute] = args.bind(name, ["d", "attribute"])?;
            join(&value, text_or(&separator, "")?, &attribute)
        }
        _ => {
            let [size, fill] = args.bind(
                name,
                [if name == "batch" { "linecount" } else { "slices" }, "fill_with"],
            )?;
            let size = size_or(&size, 0)?;
            if size == 0 {
                return Err(format!("{name} wants a number of 1 or more"));
            }
            let fill = fill.filter(|fill| !matches!(fill, Value::None));
            let parts = if name == "batch" {
                batches(value.iterate()?, size, fill)
            } else {
                slices(value.iterate()?, size, fill)
            };
            Value::seq(
                SeqKind::Generator,
                parts.into_iter().map(Value::list).collect::<Result<_>>()?,
            )
        }
    }
}

fn join(value: &Value, separator: &str, attribute: &Option<Value>) -> Result<Value> {
    let mut parts = Vec::new();
    let mut length = 0usize;
    for item in value.iterate()? {
        let item = match attribute {
            None | Some(Value::None) => item,
            Some(attribute) => path(&item, attribute)?,
        };
        let text = python::text(&item)?;
        let more = text.len() + separator.len();
        length = length.saturating_add(more);
        meter::grown(length, more)?;
        parts.push(text);
    }
    Value::new_text(parts.join(separator))
}

fn batches(items: Vec<Value>, size: usize, fill: Option<Value>) -> Vec<Vec<Value>> {
    let mut batches: Vec<Vec<Value>> = items.chunks(size).map(<[Value]>::to_vec).collect();
    if let (Some(fill), Some(last)) = (fill, batches.last_mut()) {
        last.resize(size, fill);
    }
    batches
}

fn slices(items: Vec<Value>, count: usize, fill: Option<Value>) -> Vec<Vec<Value>> {
    let (each, longer) = (items.len() / count, items.len() % count);
    let mut at = 0;
    (0..count)
        .map(|index| {
            let length = each + usize::from(index < longer);
            let mut slice = items[at..at + length].to_vec();
            at += length;
            if let (Some(fill), true) = (&fill, index >= longer && longer > 0) {
                slice.push(fill.clone());
            }
            slice
        })
        .collect()
}

fn tojson(value: &Value, args: Args) -> Result<Value> {
    let [ensure_ascii, indent, separators, sort_keys] =
        args.bind("tojson", ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let separators = match separators {
        None | Some(Value::None) => None,
        Some(pair) => match &pair.iterate()?[..] {
            [comma, colon] => Some((python::text(comma)?, python::text(colon)?)),
            _ => return Err("separators wants two texts".into()),
        },
    };
    let style = JsonStyle {
        indent: match &indent {
            None | Some(Value::None) => None,
            Some(Value::Text(text)) => Some(text.to_string()),
            Some(_) => Some(" ".repeat(size_or(&indent, 0)?)),
        },
        separators,
        sort_keys: is_set(&sort_keys, false),
        ensure_ascii: is_set(&ensure_ascii, false),
    };
    Value::new_text(dumps(value, &style)?)
}

/// Filters that make a text of a text; other values are written first.
fn of_text(name: &str, value: &Value, args: Args) -> Result<Value> {
    if !exists(name) {
        return Err(unknown(name));
    }
    let text = python::text(value)?;
    meter::room(text.len())?;
    let new = match name {
        "upper" => text.to_uppercase(),
        "lower" => text.to_lowercase(),
        "capitalize" => capitalized(&text),
        "title" => titled(&text),
        "string" | "safe" => text,
        "pprint" => python::repr(value)?,
        "trim" => {
            let [characters] = args.bind(name, ["chars"])?;
            strip(&text, "strip", &characters)?.into()
        }
        "escape" | "e" | "forceescape" => escape(&text),
        "format" => {
            if !args.keywords.is_empty() && !args.positional.is_empty() {
                return Err("can't handle positional and keyword arguments at the same time".into());
            }
            let values = if args.keywords.is_empty() {
                Value::seq(SeqKind::Tuple, args.positional)?
            } else {
                Value::dict(
                    args.keywords
                        .into_iter()
                        .map(|(name, value)| (Value::text(&*name), value))
                        .collect(),
                )?
            };
            percent(&text, &values)?
        }
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let [old, new] = [old, new].map(|it| it.ok_or("replace wants what to replace, and by what"));
            let count = match &count {
                None | Some(Value::None) => -1,
                Some(_) => int_or(&count, -1)?,
            };
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            return replace(&text, &python::text(&old?)?, &python::text(&new?)?, count);
        }
        "center" => {
            let [width] = args.bind(name, ["width"])?;
            centered(&text, size_or(&width, 80)?, " ")
        }
        "indent" => {
            let [width, first, blank] = args.bind(name, ["width", "first", "blank"])?;
            let unit = match &width {
                Some(Value::Text(text)) => text.to_string(),
                _ => " ".repeat(size_or(&width, 4)?),
            };
            indent(&text, &unit, is_set(&first, false), is_set(&blank, false))?
        }
        "truncate" => truncate(text, args)?,
        "wordwrap" => wordwrap(&text, args)?,
        "wordcount" => {
            let is_word = |c: char| c == '_' || c.is_alphanumeric();
            return Ok(Value::Int(
                text.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count() as i128,
            ));
        }
        "striptags" => striptags(&text),
        "urlencode" => urlencode(value, &text)?,
        "xmlattr" => {
            let [autospace] = args.bind(name, ["autospace"])?;
            xmlattr(value, is_set(&autospace, true))?
        }
        other => return Err(unknown(other)),
    };
    Value::new_text(new)
}

fn titled(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut starts = true;
    for character in text.chars() {
        if starts {
            out.extend(character.to_uppercase());
        } else {
            out.extend(character.to_lowercase());
        }
        starts = is_space(character) || "-({[<".contains(character);
    }
    out
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            other => out.push(other),
        }
    }
    out
}

fn indent(text: &str, unit: &str, first: bool, blank: bool) -> Result<String> {
    meter::room(text.matches('\n').count().saturating_mul(unit.len()))?;
    let mut out = String::new();
    if first {
        out.push_str(unit);
    }
    // A line end is added and taken away by turns in Jinja2, so that a text that ends with one keeps it.
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(unit);
            }
        }
        out.push_str(line);
    }
    Ok(out)
}

fn truncate(text: String, args: Args) -> Result<String> {
    let [length, killwords, end, leeway] = args.bind("truncate", ["length", "killwords", "end", "leeway"])?;
    let length = size_or(&length, 255)?;
    let end = text_or(&end, "...")?;
    let leeway = match &leeway {
        None | Some(Value::None) => 5,
        Some(_) => size_or(&leeway, 5)?,
    };
    let end_length = end.chars().count();
    if length < end_length {
        return Err(format!("expected length >= {end_length}, got {length}"));
    }
    if text.chars().count() <= length + leeway {
        return Ok(text);
    }
    let cut: String = text.chars().take(length - end_length).collect();
    let kept = if is_set(&killwords, false) {
        &cut
    } else {
        cut.rsplit_once(' ').map_or(&*cut, |(before, _)| before)
    };
    Ok(format!("{kept}{end}"))
}

fn wordwrap(text: &str, args: Args) -> Result<String> {
    let names = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let [width, break_long, end, on_hyphens] = args.bind("wordwrap", names)?;
    let width = size_or(&width, 79)?.max(1);
    let (break_long, on_hyphens) = (is_set(&break_long, true), is_set(&on_hyphens, true));
    let end = text_or(&end, "\n")?.to_string();
    let mut out = Vec::new();
    for line in text.lines() {
        out.push(wrap_line(line, width, break_long, on_hyphens).join(&end));
    }
    Ok(out.join(&end))
}

/// One line as Python's `textwrap` cuts it: chunks of words and white space, as many as fit.
fn wrap_line(line: &str, width: usize, break_long: bool, on_hyphens: bool) -> Vec<String> {
    let mut chunks: Vec<String> = Vec::new();
    for character in line.chars() {
        let is_same = chunks.last().is_some_and(|chunk| {
            let last_is_space = chunk.ends_with(is_space);
            let breaks =
                on_hyphens && chunk.ends_with('-') && chunk.chars().rev().nth(1).is_some_and(char::is_alphabetic);
            last_is_space == is_space(character) && !(breaks && character.is_alphabetic())
        });
        match chunks.last_mut() {
            Some(chunk) if is_same => chunk.push(character),
            _ => chunks.push(character.into()),
        }
    }
    let mut lines: Vec<String> = Vec::new();
    let mut current = String::new();
    let mut room = width;
    for mut chunk in chunks {
        while chunk.chars().count() > room {
            if break_long && chunk.chars().count() > width {
                let head: String = chunk.chars().take(room).collect();
                current.push_str(&head);
                chunk = chunk.chars().skip(room).collect();
            } else if current.is_empty() {
                break;
            }
            lines.push(std::mem::take(&mut current).trim_end_matches(is_space).into());
            room = width;
            if chunk.chars().all(is_space) {
                chunk.clear();
            }
        }
        room = room.saturating_sub(chunk.chars().count());
        current.push_str(&chunk);
    }
    let last = current.trim_end_matches(is_space);
    if !last.is_empty() {
        lines.push(last.into());
    }
    lines
}

fn striptags(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('<') {
        let (end, skip) = if rest[at..].starts_with("<!--") {
            ("-->", 3)
        } else {
            (">", 1)
        };
        let Some(close) = rest[at..].find(end) else { break };
        out.push_str(&rest[..at]);
        rest = &rest[at + close + skip..];
    }
    out.push_str(rest);
    let words: Vec<&str> = out.split(is_space).filter(|word| !word.is_empty()).collect();
    let named = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#34;", "\""),
        ("&#39;", "'"),
        ("&amp;", "&"),
    ];
    named
        .iter()
        .fold(words.join(" "), |text, (name, character)| text.replace(name, character))
}

fn urlencode(value: &Value, text: &str) -> Result<String> {
    let pairs = match value {
        Value::Text(_) => return Ok(quote_url(text, "/")),
        Value::Dict(_) => methods::items(value)?.iterate()?,
        Value::Seq(_) => value.iterate()?,
        _ => return Ok(quote_url(text, "/")),
    };
    let mut parts = Vec::new();
    for pair in pairs {
        let [key, value] = [0, 1].map(|at| ops::item(&pair, &Value::Int(at)).and_then(|it| python::text(&it)));
        let plus = |text: String| quote_url(&text, "").replace("%20", "+");
        parts.push(format!("{}={}", plus(key?), plus(value?)));
    }
    Ok(parts.join("&"))
}

fn quote_url(text: &str, safe: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        let character = char::from(byte);
        if character.is_ascii_alphanumeric() || "_.-~".contains(character) || safe.contains(character) {
            out.push(character);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn xmlattr(value: &Value, autospace: bool) -> Result<String> {
    let mut parts: Vec<String> = Vec::new();
    for pair in methods::items(value)?.iterate()? {
        let (key, value) = (ops::item(&pair, &Value::Int(0))?, ops::item(&pair, &Value::Int(1))?);
        if matches!(value, Value::None | Value::Undefined(_)) {
            continue;
        }
        let key: Name = python::text(&key)?.into();
        if key.contains(|c: char| is_space(c) || "/>=".contains(c)) {
            return Err(format!("Invalid character in attribute name: '{key}'"));
        }
        parts.push(format!("{}=\"{}\"", escape(&key), escape(&python::text(&value)?)));
    }
    let joined = parts.join(" ");
    Ok(if autospace && !joined.is_empty() {
        format!(" {joined}")
    } else {
        joined
    })
}
