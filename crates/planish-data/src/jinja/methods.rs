//! Python's methods of strings, lists, tuples, dictionaries and numbers.

use super::arguments::{Args, int_or, is_set, size_or, text_or};
use super::format::braces;
use super::lexer::is_space;
use super::meter;
use super::python::is_printable;
use super::value::{Result, SeqKind, Text, Value};

const OF_STRINGS: [&str; 44] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];
const OF_DICTIONARIES: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
/// Methods that would change a value, which the sandbox of transformers refuses.
const CHANGING: [&str; 12] = [
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "reverse",
    "setdefault",
    "sort",
    "update",
    "encode",
];

/// Whether Python's object has a method of that name.
pub(super) fn exists(value: &Value, name: &str) -> bool {
    match value {
        Value::Text(_) => OF_STRINGS.contains(&name) || name == "encode",
        Value::Dict(_) => {
            OF_DICTIONARIES.contains(&name) || matches!(name, "clear" | "pop" | "popitem" | "setdefault" | "update")
        }
        Value::Seq(seq) => match seq.kind {
            SeqKind::List => {
                matches!(
                    name,
                    "count"
                        | "index"
                        | "copy"
                        | "append"
                        | "clear"
                        | "extend"
                        | "insert"
                        | "pop"
                        | "remove"
                        | "reverse"
                        | "sort"
                )
            }
            SeqKind::Tuple | SeqKind::Range => matches!(name, "count" | "index"),
            _ => false,
        },
        Value::Float(_) => name == "is_integer",
        Value::Int(_) => name == "bit_length",
        Value::Cycler(_) => matches!(name, "next" | "reset" | "current"),
        Value::Function("dict") => name == "fromkeys",
        _ => false,
    }
}

/// Calls a method that [`exists`].
pub(super) fn call(value: &Value, name: &str, args: Args) -> Result<Value> {
    if CHANGING.contains(&name) {
        let kind = value.type_name();
        return Err(format!(
            "access to attribute '{name}' of '{kind}' object is unsafe: templates change no values"
        ));
    }
    match value {
        Value::Text(text) => of_string(text, name, args),
        Value::Dict(dict) => {
            let pairs = dict.items().iter();
            match name {
                "get" => {
                    let [key, default] = args.bind(name, ["key", "default"])?;
                    let key = key.ok_or("get expected at least 1 argument, got 0")?;
                    Ok(dict.get_value(&key)?.cloned().or(default).unwrap_or(Value::None))
                }
                "keys" => Value::seq(SeqKind::Keys, pairs.map(|(key, _)| key.clone()).collect()),
                "values" => Value::seq(SeqKind::Values, pairs.map(|(_, value)| value.clone()).collect()),
                "items" => items(value),
                _ => Ok(value.clone()),
            }
        }
        Value::Seq(seq) => match name {
            "copy" => Ok(value.clone()),
            "count" => {
                let [wanted] = args.bind(name, ["value"])?;
                let wanted = wanted.ok_or("count() takes exactly one argument (0 given)")?;
                let mut count = 0;
                for item in seq.items() {
                    count += i128::from(item.equals(&wanted)?);
                }
                Ok(Value::Int(count))
            }
            _ => {
                let [wanted, start, stop] = args.bind(name, ["value", "start", "stop"])?;
                let wanted = wanted.ok_or("index expected at least 1 argument, got 0")?;
                let [from, to] = window(&start, &stop, seq.items().len())?;
                for (at, item) in seq.items().iter().enumerate().take(to).skip(from) {
                    if item.equals(&wanted)? {
                        return Ok(Value::Int(at as i128));
                    }
                }
                Err(format!(
                    "{} is not in {}",
                    super::python::repr(&wanted)?,
                    value.type_name()
                ))
            }
        },
        Value::Float(number) => Ok(Value::Bool(number.fract() == 0.0)),
        Value::Int(number) => Ok(Value::Int(i128::from(128 - number.unsigned_abs().leading_zeros()))),
        Value::Loop(state) => super::eval::loop_method(state, name, args),
        Value::Cycler(state) => {
            let at = state.1.get();
            match name {
                "reset" => state.1.set(0),
                "next" => state.1.set((at + 1) % state.0.len().max(1)),
                _ => {}
            }
            Ok(state.0.get(at).cloned().unwrap_or(Value::None))
        }
        _ => {
            let [keys, default] = args.bind(name, ["iterable", "value"])?;
            let keys = keys.ok_or("fromkeys expected at least 1 argument, got 0")?.iterate()?;
            let default = default.unwrap_or(Value::None);
            Value::dict(keys.into_iter().map(|key| (key, default.clone())).collect())
        }
    }
}

/// Pairs of a dictionary, as `dict.items()` gives them.
pub(super) fn items(value: &Value) -> Result<Value> {
    let Value::Dict(dict) = value else {
        return Err("Can only get item pairs from a mapping.".into());
    };
    let pair = |(key, value): &(Value, Value)| Value::seq(SeqKind::Tuple, vec![key.clone(), value.clone()]);
    Value::seq(SeqKind::Items, dict.items().iter().map(pair).collect::<Result<_>>()?)
}

/// Positions from `start` to `stop`, negative ones from the end.
fn window(start: &Option<Value>, stop: &Option<Value>, length: usize) -> Result<[usize; 2]> {
    let at = |value: &Option<Value>, default: usize| -> Result<usize> {
        let value = value.as_ref().filter(|value| !matches!(value, Value::None));
        let index = int_or(&value.cloned(), default as i128)?;
        let index = if index < 0 {
            (index + length as i128).max(0)
        } else {
            index
        };
        Ok(usize::try_from(index).unwrap_or(length).min(length))
    };
    Ok([at(start, 0)?, at(stop, length)?])
}

fn of_string(text: &Text, name: &str, args: Args) -> Result<Value> {
    // Most of them go through the text once, and write about as much.
    meter::room(text.len())?;
    if let Some(answer) = is_kind(text, name) {
        args.bind::<0>(name, [])?;
        return Ok(Value::Bool(answer));
    }
    match name {
        "capitalize" | "casefold" | "lower" | "swapcase" | "title" | "upper" => {
            args.bind::<0>(name, [])?;
            Value::new_text(cased(text, name))
        }
        "strip" | "lstrip" | "rstrip" => {
            let [characters] = args.bind(name, ["chars"])?;
            Value::new_text(strip(text, name, &characters)?.into())
        }
        "startswith" | "endswith" => ends(text, name, args),
        "removeprefix" | "removesuffix" => {
            let [part] = args.bind(name, ["part"])?;
            let part = text_or(&part, "")?;
            let rest = if name == "removeprefix" {
                text.strip_prefix(part)
            } else {
                text.strip_suffix(part)
            };
            Value::new_text(rest.unwrap_or(text).into())
        }
        "find" | "rfind" | "index" | "rindex" | "count" => find(text, name, args),
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let count = usize::try_from(int_or(&count, -1)?).unwrap_or(usize::MAX);
            replace(text, text_or(&old, "")?, text_or(&new, "")?, count)
        }
        "split" | "rsplit" => {
            let [separator, most] = args.bind(name, ["sep", "maxsplit"])?;
            let separator = separator.filter(|separator| !matches!(separator, Value::None));
            let most = usize::try_from(int_or(&most, -1)?).unwrap_or(usize::MAX);
            split(text, separator, most, name == "rsplit")
        }
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"])?;
            texts(lines(text, is_set(&keep, false)))
        }
        "partition" | "rpartition" => {
            let [separator] = args.bind(name, ["sep"])?;
            partition(text, text_or(&separator, "")?, name == "rpartition")
        }
        "join" => {
            let [values] = args.bind(name, ["iterable"])?;
            join(
                text,
                &values.ok_or("join() takes exactly one argument (0 given)")?.iterate()?,
            )
        }
        "format" => Value::new_text(braces(text, &args.positional, &args.keywords)?),
        "format_map" => {
            let [map] = args.bind(name, ["mapping"])?;
            let Some(Value::Dict(dict)) = map else {
                return Err("format_map() wants a dictionary".into());
            };
            let named = |(key, value): &(Value, Value)| Some((key.as_str()?.into(), value.clone()));
            let keywords: Vec<_> = dict.items().iter().filter_map(named).collect();
            Value::new_text(braces(text, &[], &keywords)?)
        }
        "center" | "ljust" | "rjust" | "zfill" => padded(text, name, args),
        "expandtabs" => {
            let [size] = args.bind(name, ["tabsize"])?;
            expand_tabs(text, size_or(&size, 8)?)
        }
        other => Err(format!("planish has no method {other:?} of strings")),
    }
}

fn is_kind(text: &str, name: &str) -> Option<bool> {
    let all = |test: fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    let cased = text.chars().any(|c| c.is_lowercase() || c.is_uppercase());
    Some(match name {
        "isalnum" => all(char::is_alphanumeric),
        "isalpha" => all(|c| c.is_alphabetic() && !c.is_numeric()),
        "isascii" => text.is_ascii(),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(|c| is_decimal(c) || matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨')),
        "isnumeric" => all(char::is_numeric),
        "isidentifier" => {
            text.starts_with(|c: char| c == '_' || c.is_alphabetic())
                && text.chars().all(|c| c == '_' || c.is_alphanumeric())
        }
        "islower" => cased && !text.chars().any(char::is_uppercase),
        "isupper" => cased && !text.chars().any(char::is_lowercase),
        "isprintable" => text.chars().all(is_printable),
        "isspace" => all(is_space),
        "istitle" => cased && cased_as_title(text) == *text,
        _ => return None,
    })
}

/// Digits of the scripts that count in tens: the general category `Nd`.
fn is_decimal(character: char) -> bool {
    static DECIMAL: std::sync::LazyLock<Option<regex::Regex>> =
        std::sync::LazyLock::new(|| regex::Regex::new(r"\p{Nd}").ok());
    character.is_ascii_digit()
        || (!character.is_ascii()
            && DECIMAL
                .as_ref()
                .is_some_and(|it| it.is_match(character.encode_utf8(&mut [0; 4]))))
}

fn cased(text: &str, name: &str) -> String {
    match name {
        "lower" => text.to_lowercase(),
        "casefold" => text.to_lowercase().replace('ß', "ss").replace('ς', "σ"),
        "upper" => text.to_uppercase(),
        "capitalize" => capitalized(text),
        "swapcase" => text
            .chars()
            .flat_map(|c| {
                let swapped: Vec<char> = if c.is_uppercase() {
                    c.to_lowercase().collect()
                } else {
                    c.to_uppercase().collect()
                };
                swapped
            })
            .collect(),
        _ => cased_as_title(text),
    }
}

/// The first character in capitals, the others small.
pub(super) fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    let Some(first) = characters.next() else {
        return String::new();
    };
    first.to_uppercase().collect::<String>() + &characters.as_str().to_lowercase()
}

/// A capital after everything that has no case.
fn cased_as_title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for character in text.chars() {
        if inside {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
        inside = character.is_lowercase() || character.is_uppercase();
    }
    out
}

/// `strip`, `lstrip` and `rstrip`.
pub(super) fn strip<'a>(text: &'a str, name: &str, characters: &Option<Value>) -> Result<&'a str> {
    let set = match characters {
        None | Some(Value::None) => None,
        Some(_) => Some(text_or(characters, "")?),
    };
    let is_stripped = |c: char| set.map_or_else(|| is_space(c), |set| set.contains(c));
    Ok(match name {
        "lstrip" => text.trim_start_matches(is_stripped),
        "rstrip" => text.trim_end_matches(is_stripped),
        _ => text.trim_matches(is_stripped),
    })
}

fn ends(text: &str, name: &str, args: Args) -> Result<Value> {
    let [part, start, stop] = args.bind(name, ["part", "start", "end"])?;
    let part = part.ok_or_else(|| format!("{name}() takes at least 1 argument (0 given)"))?;
    let text = &text[char_window(text, &start, &stop)?];
    let parts = match &part {
        Value::Text(_) => vec![part],
        Value::Seq(seq) if seq.kind == SeqKind::Tuple => seq.items().to_vec(),
        other => {
            let found = other.type_name();
            return Err(format!("{name} first arg must be str or a tuple of str, not {found}"));
        }
    };
    let fits = |part: &Value| {
        part.as_str().is_some_and(|part| {
            if name == "startswith" {
                text.starts_with(part)
            } else {
                text.ends_with(part)
            }
        })
    };
    Ok(Value::Bool(parts.iter().any(fits)))
}

/// Bytes from character `start` to character `stop`.
fn char_window(text: &str, start: &Option<Value>, stop: &Option<Value>) -> Result<std::ops::Range<usize>> {
    if start.is_none() && stop.is_none() {
        return Ok(0..text.len());
    }
    let [from, to] = window(start, stop, text.chars().count())?;
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    Ok(byte(from)..byte(to).max(byte(from)))
}

fn find(text: &str, name: &str, args: Args) -> Result<Value> {
    let [part, start, stop] = args.bind(name, ["sub", "start", "end"])?;
    let part = part.ok_or_else(|| format!("{name}() takes at least 1 argument (0 given)"))?;
    let part = part
        .as_str()
        .ok_or_else(|| format!("must be str, not {}", part.type_name()))?;
    let window = char_window(text, &start, &stop)?;
    let inside = &text[window.clone()];
    if name == "count" {
        let count = if part.is_empty() {
            inside.chars().count() + 1
        } else {
            inside.matches(part).count()
        };
        return Ok(Value::Int(count as i128));
    }
    let found = if name.starts_with('r') {
        inside.rfind(part)
    } else {
        inside.find(part)
    };
    match found {
        Some(at) => Ok(Value::Int(text[..window.start + at].chars().count() as i128)),
        None if name.ends_with("index") => Err("substring not found".into()),
        None => Ok(Value::Int(-1)),
    }
}

/// `text.replace(old, new, count)`
pub(super) fn replace(text: &str, old: &str, new: &str, count: usize) -> Result<Value> {
    let matches = if old.is_empty() {
        text.chars().count() + 1
    } else {
        text.matches(old).count()
    };
    meter::room(text.len().saturating_add(matches.min(count).saturating_mul(new.len())))?;
    Ok(Value::text(text.replacen(old, new, count)))
}

fn split(text: &str, separator: Option<Value>, most: usize, from_end: bool) -> Result<Value> {
    let Some(separator) = separator else {
        return texts(split_at_space(text, most, from_end));
    };
    let separator = separator
        .as_str()
        .ok_or_else(|| format!("must be str or None, not {}", separator.type_name()))?;
    if separator.is_empty() {
        return Err("empty separator".into());
    }
    let pieces = most.saturating_add(1);
    if !from_end {
        return texts(text.splitn(pieces, separator).collect());
    }
    let mut parts: Vec<&str> = text.rsplitn(pieces, separator).collect();
    parts.reverse();
    texts(parts)
}

/// Runs of white space separate; the last piece keeps what is inside it and loses what is around it on the cut side only.
fn split_at_space(text: &str, most: usize, from_end: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = if from_end {
            rest.trim_end_matches(is_space)
        } else {
            rest.trim_start_matches(is_space)
        };
        if rest.is_empty() {
            break;
        }
        let at = if parts.len() == most {
            None
        } else if from_end {
            rest.char_indices()
                .rfind(|(_, c)| is_space(*c))
                .map(|(at, c)| (at, at + c.len_utf8()))
        } else {
            rest.find(is_space).map(|at| (at, at))
        };
        match at {
            None => {
                parts.push(rest);
                break;
            }
            Some((before, after)) if from_end => {
                parts.push(&rest[after..]);
                rest = &rest[..before];
            }
            Some((before, _)) => {
                parts.push(&rest[..before]);
                rest = &rest[before..];
            }
        }
    }
    if from_end {
        parts.reverse();
    }
    parts
}

/// A list of texts.
fn texts(parts: Vec<&str>) -> Result<Value> {
    Value::list(parts.into_iter().map(Value::text).collect())
}

fn lines(text: &str, keep: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(is_end).unwrap_or(rest.len());
        let mark = if rest[end..].starts_with("\r\n") {
            2
        } else {
            rest[end..].chars().next().map_or(0, char::len_utf8)
        };
        parts.push(&rest[..if keep { end + mark } else { end }]);
        rest = &rest[end + mark..];
    }
    parts
}

fn partition(text: &str, separator: &str, from_end: bool) -> Result<Value> {
    if separator.is_empty() {
        return Err("empty separator".into());
    }
    let found = if from_end {
        text.rsplit_once(separator)
    } else {
        text.split_once(separator)
    };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if from_end => ["", "", text],
        None => [text, "", ""],
    };
    Value::seq(SeqKind::Tuple, parts.map(Value::text).to_vec())
}

fn join(separator: &str, values: &[Value]) -> Result<Value> {
    let mut parts = Vec::with_capacity(values.len());
    for (index, value) in values.iter().enumerate() {
        let text = value.as_str().ok_or_else(|| {
            format!(
                "sequence item {index}: expected str instance, {} found",
                value.type_name()
            )
        })?;
        parts.push(text);
    }
    let length = parts.iter().map(|part| part.len()).sum::<usize>();
    meter::room(length.saturating_add(separator.len().saturating_mul(parts.len())))?;
    Ok(Value::text(parts.join(separator)))
}

fn padded(text: &str, name: &str, args: Args) -> Result<Value> {
    let [width, fill] = args.bind(name, ["width", "fillchar"])?;
    let width = size_or(&width, 0)?;
    let fill = text_or(&fill, if name == "zfill" { "0" } else { " " })?;
    if fill.chars().count() != 1 {
        return Err("The fill character must be exactly one character long".into());
    }
    let missing = width.saturating_sub(text.chars().count());
    let fill = |count: usize| fill.repeat(count);
    Value::new_text(match name {
        "ljust" => format!("{text}{}", fill(missing)),
        "rjust" => format!("{}{text}", fill(missing)),
        "zfill" => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", fill(missing))
        }
        _ => centered(text, width, &fill(1)),
    })
}

/// `text.center(width)`: where the space is odd, Python puts the larger half by the parity of both.
pub(super) fn centered(text: &str, width: usize, fill: &str) -> String {
    let missing = width.saturating_sub(text.chars().count());
    let left = missing / 2 + (missing & width & 1);
    format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left))
}

fn expand_tabs(text: &str, size: usize) -> Result<Value> {
    meter::room(text.matches('\t').count().saturating_mul(size))?;
    let mut out = String::new();
    let mut column = 0;
    for character in text.chars() {
        match character {
            '\t' if size > 0 => {
                let blanks = size - column % size;
                out.push_str(&" ".repeat(blanks));
                column += blanks;
            }
            '\t' => {}
            other => {
                out.push(other);
                column = if matches!(other, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Value::new_text(out)
}
