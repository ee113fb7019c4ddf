//! One row, checked: from a JSON object to a [`Record`].

use serde_json::{Map, Value};

use crate::error::{Fault, RowErrorKind};
use crate::format::{FieldNames, Format};
use crate::json::describe;

/// What a row holds, after every field has been checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Record {
    Text(String),
    Chat(Chat),
    Preference(Preference),
}

/// A conversation as the chat template will see it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chat {
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Option<Value>,
    pub(crate) template_kwargs: Map<String, Value>,
}

/// One turn: its role, and the whole object for the template.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Message {
    pub(crate) role: Role,
    /// What the row says about training this turn, if it does.
    pub(crate) train: Option<bool>,
    /// The fields that the template sees: all but `train`.
    pub(crate) fields: Map<String, Value>,
}

/// Two answers of which the first is preferred.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Preference {
    pub(crate) chosen: Answer,
    pub(crate) rejected: Answer,
    pub(crate) margin: Option<f64>,
}

/// One side of a preference pair.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    /// Plain text without a prompt: every token after the first counts.
    Text(String),
    /// A conversation, of which the turns from `first_trained` on are the answer.
    Chat { chat: Chat, first_trained: usize },
}

/// Who speaks in a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Instructions that hold for the whole conversation.
    System,
    /// The same under its newer name.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    const ALL: [Self; 5] = [Self::System, Self::Developer, Self::User, Self::Assistant, Self::Tool];

    /// The name as rows and templates write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|role| role.name() == name)
            .ok_or_else(|| format!("expected one of {known}, found {name:?}"))
    }
}

impl Record {
    /// Checks a row of a known format.
    pub(crate) fn from_row(row: &Map<String, Value>, format: Format, names: &FieldNames) -> Result<Self, Fault> {
        match format {
            Format::Text => Ok(Self::Text(non_empty_string(row, &names.text)?)),
            Format::Completions => completion(row, names).map(Self::Chat),
            Format::Chat | Format::Tools => chat(row, format, names).map(Self::Chat),
            Format::Preference => preference(row, names).map(Self::Preference),
        }
    }
}

impl Message {
    /// A turn with a text and nothing else.
    pub(crate) fn text(role: Role, content: &str) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), role.name().into());
        fields.insert("content".into(), content.into());
        Self {
            role,
            train: None,
            fields,
        }
    }
}

fn completion(row: &Map<String, Value>, names: &FieldNames) -> Result<Chat, Fault> {
    let mut messages = Vec::new();
    if let Some(system) = optional_string(row, "system")? {
        messages.push(Message::text(Role::System, &system));
    }
    messages.push(Message::text(Role::User, &string(row, &names.prompt)?));
    messages.push(Message::text(
        Role::Assistant,
        &non_empty_string(row, &names.completion)?,
    ));
    Ok(Chat {
        messages,
        tools: tools(row)?,
        template_kwargs: template_kwargs(row)?,
    })
}

fn chat(row: &Map<String, Value>, format: Format, names: &FieldNames) -> Result<Chat, Fault> {
    let tools = tools(row)?;
    if format == Format::Tools && tools.is_none() {
        return Err(missing("tools"));
    }
    Ok(Chat {
        messages: messages(require(row, &names.messages)?).map_err(|fault| fault.under(&names.messages))?,
        tools,
        template_kwargs: template_kwargs(row)?,
    })
}

fn preference(row: &Map<String, Value>, names: &FieldNames) -> Result<Preference, Fault> {
    let margin = match row.get("margin") {
        None | Some(Value::Null) => None,
        Some(value) => Some(
            value
                .as_f64()
                .ok_or_else(|| wrong_type("number", value).under("margin"))?,
        ),
    };
    let (chosen, rejected) = (require(row, &names.chosen)?, require(row, &names.rejected)?);
    if chosen == rejected {
        return Err(Fault::new(
            RowErrorKind::Value,
            "the chosen and the rejected answer are the same",
            "remove the row: a pair must differ",
        )
        .under(&names.rejected));
    }
    let prompt = prompt_turns(row, names)?;
    let answer = |name: &str, value: &Value| side(value, prompt.as_deref(), row).map_err(|fault| fault.under(name));
    let (mut chosen, mut rejected) = (answer(&names.chosen, chosen)?, answer(&names.rejected, rejected)?);
    start_at_the_difference(&mut chosen, &mut rejected, names)?;
    Ok(Preference {
        chosen,
        rejected,
        margin,
    })
}

/// The turns before the two answers: none, one user turn, or a conversation.
fn prompt_turns(row: &Map<String, Value>, names: &FieldNames) -> Result<Option<Vec<Message>>, Fault> {
    let mut turns = Vec::new();
    if let Some(system) = optional_string(row, "system")? {
        turns.push(Message::text(Role::System, &system));
    }
    match row.get(&names.prompt) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => turns.push(Message::text(Role::User, text)),
        Some(list @ Value::Array(_)) => {
            turns.extend(messages(list).map_err(|fault| fault.under(&names.prompt))?);
        }
        Some(other) => return Err(wrong_type("string or list of messages", other).under(&names.prompt)),
    }
    Ok(Some(turns))
}

fn side(value: &Value, prompt: Option<&[Message]>, row: &Map<String, Value>) -> Result<Answer, Fault> {
    let answer = match value {
        Value::String(text) if text.is_empty() => return Err(empty("the answer is empty")),
        Value::String(text) => match prompt {
            None => return Ok(Answer::Text(text.clone())),
            Some(_) => vec![Message::text(Role::Assistant, text)],
        },
        Value::Array(_) => messages(value)?,
        other => return Err(wrong_type("string or list of messages", other)),
    };
    let mut turns = prompt.unwrap_or_default().to_vec();
    // Some data sets repeat the prompt at the head of each answer.
    let repeated = !turns.is_empty() && answer.len() > turns.len() && answer.starts_with(&turns);
    let first_trained = turns.len();
    turns.extend(answer.into_iter().skip(if repeated { first_trained } else { 0 }));
    Ok(Answer::Chat {
        chat: Chat {
            messages: turns,
            tools: tools(row)?,
            template_kwargs: template_kwargs(row)?,
        },
        first_trained,
    })
}

/// Turns that both conversations share are context, whatever their role: the answer begins where they part.
fn start_at_the_difference(chosen: &mut Answer, rejected: &mut Answer, names: &FieldNames) -> Result<(), Fault> {
    match (chosen, rejected) {
        (Answer::Text(_), Answer::Text(_)) => Ok(()),
        (
            Answer::Chat {
                chat: left,
                first_trained: left_first,
            },
            Answer::Chat {
                chat: right,
                first_trained: right_first,
            },
        ) => {
            let shared = left
                .messages
                .iter()
                .zip(&right.messages)
                .take_while(|(a, b)| a == b)
                .count();
            (*left_first, *right_first) = (shared.max(*left_first), shared.max(*right_first));
            for (name, chat, first) in [
                (&names.chosen, left, *left_first),
                (&names.rejected, right, *right_first),
            ] {
                let answered = chat
                    .messages
                    .iter()
                    .skip(first)
                    .any(|message| message.role == Role::Assistant);
                if !answered {
                    return Err(no_assistant_turn().under(name));
                }
            }
            Ok(())
        }
        _ => Err(Fault::new(
            RowErrorKind::WrongType,
            "one answer is a string, the other a list of messages",
            "write both in the same way",
        )
        .under(&names.rejected)),
    }
}

/// Checks a list of messages; paths in faults are relative to the list.
fn messages(value: &Value) -> Result<Vec<Message>, Fault> {
    let Value::Array(list) = value else {
        return Err(wrong_type("list of messages", value));
    };
    if list.is_empty() {
        return Err(empty("the list of messages is empty"));
    }
    list.iter()
        .enumerate()
        .map(|(index, value)| message(value).map_err(|fault| fault.under_index(index)))
        .collect()
}

fn message(value: &Value) -> Result<Message, Fault> {
    let Value::Object(object) = value else {
        return Err(wrong_type("object with \"role\" and \"content\"", value));
    };
    let role = string(object, "role")?.parse::<Role>().map_err(|message| {
        Fault::new(
            RowErrorKind::UnknownRole,
            message,
            "rename the role (\"human\" is user, \"gpt\" is assistant)",
        )
        .under("role")
    })?;
    let train = match object.get("train") {
        None | Some(Value::Null) => None,
        Some(Value::Bool(train)) => Some(*train),
        Some(other) => return Err(wrong_type("boolean", other).under("train")),
    };
    let mut fields = object.clone();
    fields.shift_remove("train");
    content(&mut fields, role)?;
    tool_calls(&mut fields).map_err(|fault| fault.under("tool_calls"))?;
    Ok(Message { role, train, fields })
}

/// A content is a string, or a list of text parts, which is joined; only a turn with tool calls may have none.
fn content(fields: &mut Map<String, Value>, role: Role) -> Result<(), Fault> {
    let has_calls = role == Role::Assistant
        && fields
            .get("tool_calls")
            .and_then(Value::as_array)
            .is_some_and(|calls| !calls.is_empty());
    match fields.get("content") {
        Some(Value::String(_)) => Ok(()),
        None | Some(Value::Null) if has_calls => Ok(()),
        None => Err(missing("content")),
        Some(Value::Array(parts)) => {
            let text = parts
                .iter()
                .enumerate()
                .map(|(index, part)| text_part(part).map_err(|fault| fault.under_index(index)))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|fault| fault.under("content"))?
                .concat();
            fields.insert("content".into(), text.into());
            Ok(())
        }
        Some(other) => Err(Fault {
            fix: "remove the turn or give \"\"".into(),
            ..wrong_type("string", other)
        }
        .under("content")),
    }
}

fn text_part(part: &Value) -> Result<&str, Fault> {
    match (part.get("type").and_then(Value::as_str), part.get("text")) {
        (Some("text"), Some(Value::String(text))) => Ok(text),
        (Some("text"), _) => Err(missing("text")),
        (Some(other), _) => Err(Fault::new(
            RowErrorKind::WrongType,
            format!("expected a part of type \"text\", found {other:?}"),
            "remove the row: images, sound and other parts are not trained on",
        )
        .under("type")),
        (None, _) => Err(wrong_type("part {\"type\": \"text\", \"text\": …}", part)),
    }
}

/// Templates want the arguments of a call as an object; a string that holds one, as some services write it, is opened.
/// Servers do the same before they render, so training and use see one text.
fn tool_calls(fields: &mut Map<String, Value>) -> Result<(), Fault> {
    let Some(value) = fields.get_mut("tool_calls") else {
        return Ok(());
    };
    let calls = match value {
        Value::Null => return Ok(()),
        Value::Array(calls) => calls,
        other => return Err(wrong_type("list", other)),
    };
    for (index, call) in calls.iter_mut().enumerate() {
        tool_call(call).map_err(|fault| fault.under_index(index))?;
    }
    Ok(())
}

/// One call, `{function: {name, arguments}}` or `{name, arguments}`.
fn tool_call(call: &mut Value) -> Result<(), Fault> {
    let Value::Object(object) = call else {
        return Err(wrong_type("object", call));
    };
    match object.get_mut("function") {
        Some(Value::Object(function)) => open_arguments(function).map_err(|fault| fault.under("function")),
        Some(other) => Err(wrong_type("object", other).under("function")),
        None => open_arguments(object),
    }
}

fn open_arguments(function: &mut Map<String, Value>) -> Result<(), Fault> {
    string(function, "name")?;
    let Some(Value::String(text)) = function.get("arguments") else {
        return Ok(());
    };
    let opened = serde_json::from_str::<Map<String, Value>>(text).map_err(|_| {
        Fault::new(
            RowErrorKind::WrongType,
            format!(
                "expected object, or string that holds one, found {:?}",
                text.chars().take(40).collect::<String>()
            ),
            "write the arguments as a JSON object",
        )
        .under("arguments")
    })?;
    function.insert("arguments".into(), Value::Object(opened));
    Ok(())
}

fn tools(row: &Map<String, Value>) -> Result<Option<Value>, Fault> {
    match row.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(list)) => match list.iter().position(|tool| !tool.is_object()) {
            None => Ok(Some(Value::Array(list.clone()))),
            Some(index) => Err(wrong_type("JSON schema", &list[index])
                .under_index(index)
                .under("tools")),
        },
        Some(other) => Err(wrong_type("list of JSON schemas", other).under("tools")),
    }
}

fn template_kwargs(row: &Map<String, Value>) -> Result<Map<String, Value>, Fault> {
    match row.get("template_kwargs") {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map.clone()),
        Some(other) => Err(wrong_type("object", other).under("template_kwargs")),
    }
}

fn require<'a>(row: &'a Map<String, Value>, name: &str) -> Result<&'a Value, Fault> {
    row.get(name).ok_or_else(|| missing(name))
}

fn string(row: &Map<String, Value>, name: &str) -> Result<String, Fault> {
    match require(row, name)? {
        Value::String(text) => Ok(text.clone()),
        other => Err(wrong_type("string", other).under(name)),
    }
}

fn non_empty_string(row: &Map<String, Value>, name: &str) -> Result<String, Fault> {
    let text = string(row, name)?;
    if text.is_empty() {
        return Err(empty("the text is empty").under(name));
    }
    Ok(text)
}

fn optional_string(row: &Map<String, Value>, name: &str) -> Result<Option<String>, Fault> {
    match row.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => string(row, name).map(Some),
    }
}

pub(crate) fn no_assistant_turn() -> Fault {
    Fault::new(
        RowErrorKind::NoAssistantTurn,
        "no turn of this conversation is trained",
        "add an assistant turn, or name the roles to train in data.train_roles",
    )
}

fn missing(name: &str) -> Fault {
    Fault::new(
        RowErrorKind::MissingField,
        format!("the field {name:?} is missing"),
        format!("add {name:?} to the row"),
    )
}

pub(crate) fn wrong_type(expected: &str, found: &Value) -> Fault {
    let article = if expected.starts_with(['a', 'e', 'i', 'o', 'u']) {
        "an"
    } else {
        "a"
    };
    Fault::new(
        RowErrorKind::WrongType,
        format!("expected {expected}, found {}", describe(found)),
        format!("write {article} {expected} there"),
    )
}

fn empty(what: &str) -> Fault {
    Fault::new(RowErrorKind::Empty, what, "remove the row or fill it")
}
