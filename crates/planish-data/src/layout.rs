//! Layouts of other programs, turned into our own before a row is checked.
//!
//! | layout | fields |
//! |---|---|
//! | ShareGPT | `conversations` of `{"from", "value"}`, perhaps `system` and `tools` |
//! | Alpaca | `instruction`, `input`, `output`, perhaps `system` and `history` |

use crate::error::{Fault, RowErrorKind, Step};
use crate::format::{FieldNames, Format};
use crate::json::{self, Map, Value};
use crate::record::{empty, wrong_type};

/// Which layout the fields of a row have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layout {
    /// Fields as docs/data.md names them for each format.
    Own,
    /// `prompt` and `completion`, or the two answers of a pair, as lists of messages.
    Trl,
    /// `conversations` of `from` and `value`.
    ShareGpt,
    /// `instruction`, `input` and `output`.
    Alpaca,
}

impl Layout {
    /// What a report calls it, beside the format.
    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Trl => "TRL",
            Self::ShareGpt => "ShareGPT",
            Self::Alpaca => "Alpaca",
        }
    }

    /// The layout of a row, unless its fields are our own or were named.
    pub(crate) fn of(row: &Map, names: &FieldNames, format: Option<Format>) -> Self {
        let has = |name: &str| row.contains_key(name);
        let own = [&names.text, &names.messages, &names.chosen]
            .iter()
            .any(|name| has(name));
        let is_asked = format.is_none_or(|format| !matches!(format, Format::Text | Format::Preference));
        let has_list = |name: &str| matches!(row.get(name), Some(Value::Array(_)));
        if conversation(row, names).is_some() && is_asked {
            Self::ShareGpt
        } else if has("instruction") && has("output") && is_asked && (!own || format.is_some()) {
            Self::Alpaca
        } else if has_list(&names.completion) || (has_list(&names.chosen) && has_list(&names.rejected)) {
            Self::Trl
        } else {
            Self::Own
        }
    }

    /// The row with our own fields.
    pub(crate) fn read(self, row: &Map, names: &FieldNames) -> Result<Map, Fault> {
        match self {
            Self::Own | Self::Trl => Ok(row.clone()),
            Self::ShareGpt => share_gpt(row, names),
            Self::Alpaca => alpaca(row, names),
        }
    }

    /// Fields of a row that this layout reads beside those of all rows.
    pub(crate) fn reads(self, field: &str) -> bool {
        match self {
            Self::Own | Self::Trl => false,
            Self::ShareGpt => CONVERSATIONS.contains(&field),
            Self::Alpaca => matches!(field, "instruction" | "input" | "output" | "history"),
        }
    }

    /// Names the fields of a fault as the row names them.
    pub(crate) fn fault(self, mut fault: Fault, row: &Map, names: &FieldNames) -> Fault {
        let Some(field) = conversation(row, names).filter(|_| self == Self::ShareGpt) else {
            return fault;
        };
        // A system text of its own is a message before the turns.
        let mut before = usize::from(
            row.get("system")
                .and_then(Value::as_str)
                .is_some_and(|text| !text.is_empty()),
        );
        for step in &mut fault.at {
            match step {
                Step::Key(key) => {
                    *key = match key.as_str() {
                        "role" => "from".into(),
                        "content" => "value".into(),
                        messages if *messages == *names.messages => field.into(),
                        _ => continue,
                    };
                }
                Step::Index(index) => *index = index.saturating_sub(std::mem::take(&mut before)),
            }
        }
        fault
    }
}

const CONVERSATIONS: [&str; 2] = ["conversations", "conversation"];

/// The field with the turns, which is the one that was named where its turns are of `from` and `value`.
fn conversation<'a>(row: &Map, names: &'a FieldNames) -> Option<&'a str> {
    let is_list = |name: &str| matches!(row.get(name), Some(Value::Array(_)));
    let turns = row.get(&names.messages).and_then(Value::as_array);
    if let Some(first) = turns.and_then(|turns| turns.first()) {
        let is_other = first.get("from").is_some() && first.get("role").is_none();
        return Some(names.messages.as_str()).filter(|_| is_other);
    }
    CONVERSATIONS
        .into_iter()
        .find(|name| is_list(name) && !row.contains_key(&names.messages))
}

fn share_gpt(row: &Map, names: &FieldNames) -> Result<Map, Fault> {
    let field = conversation(row, names).unwrap_or(CONVERSATIONS[0]);
    let mut own = row.clone();
    let mut messages = Vec::new();
    let system = own.shift_remove("system");
    if let Some(system) = system.filter(|system| !system.is_null() && system.as_str() != Some("")) {
        messages.push(turn("system", system));
    }
    let Some(Value::Array(turns)) = own.shift_remove(field) else {
        return Ok(own);
    };
    for (index, value) in turns.iter().enumerate() {
        messages.push(share_gpt_turn(value).map_err(|fault| fault.under_index(index).under(field))?);
    }
    own.insert(names.messages.clone(), Value::Array(messages));
    Ok(own)
}

/// `from` and `value` as `role` and `content`; a turn that has those already is left.
fn share_gpt_turn(value: &Value) -> Result<Value, Fault> {
    let Value::Object(turn) = value else {
        return Err(wrong_type("object with \"from\" and \"value\"", value));
    };
    let mut message = Map::new();
    for (key, value) in turn {
        let key = match key.as_str() {
            "from" if !turn.contains_key("role") => "role",
            "value" if !turn.contains_key("content") => "content",
            other => other,
        };
        message.insert(key.into(), value.clone());
    }
    if message.get("role").and_then(Value::as_str) == Some("function_call") {
        let call = message.get("content").and_then(Value::as_str).and_then(json::parse);
        let Some(call) = call.filter(|call| matches!(call, Value::Object(_) | Value::Array(_))) else {
            let found = message.get("content").cloned().unwrap_or(Value::Null);
            return Err(wrong_type("JSON of {\"name\", \"arguments\"}", &found).under("value"));
        };
        message.insert("role".into(), "assistant".into());
        message.insert("content".into(), "".into());
        message.insert("tool_calls".into(), calls(call));
    }
    Ok(Value::Object(message))
}

/// One call or several, each under `function`.
pub(crate) fn calls(call: Value) -> Value {
    let list = match call {
        Value::Array(list) => list,
        one => vec![one],
    };
    let wrapped = |call: Value| {
        let pairs = [("type".to_string(), "function".into()), ("function".to_string(), call)];
        Value::Object(pairs.into_iter().collect())
    };
    Value::Array(list.into_iter().map(wrapped).collect())
}

fn alpaca(row: &Map, names: &FieldNames) -> Result<Map, Fault> {
    let mut own = row.clone();
    let mut take = |name: &str| match own.shift_remove(name) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong_type("string", &other).under(name)),
    };
    let [system, instruction, input, output] = ["system", "instruction", "input", "output"].map(&mut take);
    let (instruction, input, output) = (instruction?, input?, output?);
    if output.is_empty() {
        return Err(empty("the text is empty").under("output"));
    }
    let mut messages = Vec::new();
    let system = system?;
    if !system.is_empty() {
        messages.push(turn("system", system.into()));
    }
    messages.extend(history(own.shift_remove("history"))?);
    let prompt = [instruction, input]
        .into_iter()
        .filter(|text| !text.is_empty())
        .collect::<Vec<_>>()
        .join("\n");
    messages.push(turn("user", prompt.into()));
    messages.push(turn("assistant", output.into()));
    own.insert(names.messages.clone(), Value::Array(messages));
    Ok(own)
}

/// Pairs of a question and its answer.
fn history(value: Option<Value>) -> Result<Vec<Value>, Fault> {
    let pairs = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(pairs)) => pairs,
        Some(other) => return Err(wrong_type("list of [question, answer]", &other).under("history")),
    };
    let mut turns = Vec::new();
    for (index, pair) in pairs.into_iter().enumerate() {
        match pair.as_array().map(Vec::as_slice) {
            Some([question, answer]) => {
                turns.extend([turn("user", question.clone()), turn("assistant", answer.clone())])
            }
            _ => {
                return Err(Fault::new(
                    RowErrorKind::WrongType,
                    "expected a question and its answer",
                    "write [\"question\", \"answer\"] there",
                )
                .under_index(index)
                .under("history"));
            }
        }
    }
    Ok(turns)
}

fn turn(role: &str, content: Value) -> Value {
    let pairs = [("role".to_string(), role.into()), ("content".to_string(), content)];
    Value::Object(pairs.into_iter().collect())
}
