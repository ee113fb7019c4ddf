//! One row, checked: from a JSON object to a [`Record`].

use crate::error::{Fault, RowErrorKind};
use crate::format::{FieldNames, Format};
use crate::json::{self, Map, Value, describe};
use crate::layout::calls;

/// What a row holds, after every field has been checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Record {
    Text(String),
    Chat(Chat),
    Preference(Box<Preference>),
}

/// A conversation as the chat template will see it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chat {
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Option<Value>,
    pub(crate) template_kwargs: Map,
}

/// One turn: its role, and the whole object for the template.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Message {
    pub(crate) role: Role,
    /// What the row says about training this turn, if it does.
    pub(crate) train: Option<bool>,
    /// The fields that the template sees: all but `train` and `weight`.
    pub(crate) fields: Map,
    /// The role as the row writes it, where that is not its name.
    pub(crate) written_role: Option<String>,
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

/// Roles as other programs call them.
fn role_of(name: &str) -> Result<Role, String> {
    match name.to_lowercase().as_str() {
        "human" => Ok(Role::User),
        "gpt" | "chatgpt" | "model" | "bot" | "ai" => Ok(Role::Assistant),
        "function" | "ipython" | "observation" => Ok(Role::Tool),
        known => known
            .parse()
            .map_err(|_| name.parse::<Role>().err().unwrap_or_default()),
    }
}

impl Record {
    /// Checks a row of a known format.
    pub(crate) fn from_row(row: &Map, format: Format, names: &FieldNames) -> Result<Self, Fault> {
        match format {
            Format::Text => Ok(Self::Text(non_empty_string(row, &names.text)?)),
            Format::Completions => completion(row, names).map(Self::Chat),
            Format::Chat | Format::Tools => chat(row, format, names).map(Self::Chat),
            Format::Preference => preference(row, names).map(|pair| Self::Preference(Box::new(pair))),
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
            written_role: None,
        }
    }
}

/// Prompt and completion, each a text or a list of messages; only the completion is trained.
fn completion(row: &Map, names: &FieldNames) -> Result<Chat, Fault> {
    let mut messages = Vec::new();
    if let Some(system) = optional_string(row, "system")? {
        messages.push(Message::text(Role::System, &system));
    }
    messages.extend(turns(row, &names.prompt, Role::User)?);
    for message in &mut messages {
        message.train = Some(false);
    }
    let answer = turns(row, &names.completion, Role::Assistant)?;
    if answer.iter().all(|message| message.role != Role::Assistant) {
        return Err(no_assistant_turn().under(&names.completion));
    }
    messages.extend(answer);
    Ok(Chat {
        messages,
        tools: tools(row)?,
        template_kwargs: template_kwargs(row)?,
    })
}

/// A field with a list of messages, or with the text of one.
fn turns(row: &Map, name: &str, role: Role) -> Result<Vec<Message>, Fault> {
    match require(row, name)? {
        Value::String(text) if text.is_empty() && role == Role::Assistant => {
            Err(empty("the text is empty").under(name))
        }
        Value::String(text) => Ok(vec![Message::text(role, text)]),
        list @ Value::Array(_) => messages(list).map_err(|fault| fault.under(name)),
        other => Err(wrong_type("string or list of messages", other).under(name)),
    }
}

fn chat(row: &Map, format: Format, names: &FieldNames) -> Result<Chat, Fault> {
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

fn preference(row: &Map, names: &FieldNames) -> Result<Preference, Fault> {
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
fn prompt_turns(row: &Map, names: &FieldNames) -> Result<Option<Vec<Message>>, Fault> {
    let mut turns = Vec::new();
    if let Some(system) = optional_string(row, "system")? {
        turns.push(Message::text(Role::System, &system));
    }
    if row.get(&names.prompt).is_some_and(|prompt| !prompt.is_null()) {
        turns.extend(self::turns(row, &names.prompt, Role::User)?);
    }
    Ok(Some(turns).filter(|turns| !turns.is_empty()))
}

fn side(value: &Value, prompt: Option<&[Message]>, row: &Map) -> Result<Answer, Fault> {
    let answer = match value {
        Value::String(text) if text.is_empty() => return Err(empty("the answer is empty")),
        Value::String(text) => match prompt {
            None => return Ok(Answer::Text(text.clone())),
            Some(_) => vec![Message::text(Role::Assistant, text)],
        },
        Value::Array(_) => messages(value)?,
        // One answer as a message of its own, as LLaMA-Factory writes pairs.
        Value::Object(_) => messages(&Value::Array(vec![value.clone()]))?,
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
    let written = string(object, "role")?;
    let role = role_of(&written).map_err(|message| {
        let fix = "rename the role, or remove the turn";
        Fault::new(RowErrorKind::UnknownRole, message, fix).under("role")
    })?;
    let mut fields = object.clone();
    fields.insert("role".into(), role.name().into());
    fields.shift_remove("train");
    fields.shift_remove("weight");
    content(&fields, role)?;
    function_call(&mut fields);
    tool_calls(&fields).map_err(|fault| fault.under("tool_calls"))?;
    Ok(Message {
        role,
        train: train(object)?,
        fields,
        written_role: Some(written).filter(|written| written != role.name()),
    })
}

/// What a message says about its training: `train`, or a `weight` of 0 or 1.
fn train(message: &Map) -> Result<Option<bool>, Fault> {
    let train = match message.get("train") {
        None | Some(Value::Null) => None,
        Some(Value::Bool(train)) => Some(*train),
        Some(other) => return Err(wrong_type("boolean", other).under("train")),
    };
    let weight = match message.get("weight") {
        None | Some(Value::Null) => None,
        // A weight of 1 is what every message has, so it asks for nothing.
        Some(weight) if weight.as_f64() == Some(1.0) => None,
        Some(weight) if weight.as_f64() == Some(0.0) => Some(false),
        Some(weight) => {
            let fix = "write 0 for a message that is not trained, or 1";
            let message = format!("a message has the weight 0 or 1, found {weight}");
            return Err(Fault::new(RowErrorKind::Value, message, fix).under("weight"));
        }
    };
    match (train, weight) {
        (Some(true), Some(false)) => {
            let message = "the message has train = true and weight = 0";
            Err(Fault::new(RowErrorKind::Value, message, "keep one of the two").under("weight"))
        }
        _ => Ok(train.or(weight)),
    }
}

/// A content is a string or a list of text parts; only a turn with tool calls may have none.
fn content(fields: &Map, role: Role) -> Result<(), Fault> {
    let has_calls = role == Role::Assistant
        && (fields
            .get("tool_calls")
            .and_then(Value::as_array)
            .is_some_and(|calls| !calls.is_empty())
            || matches!(fields.get("function_call"), Some(Value::Object(_))));
    match fields.get("content") {
        Some(Value::String(_)) => Ok(()),
        None | Some(Value::Null) if has_calls => Ok(()),
        None => Err(missing("content")),
        Some(Value::Array(parts)) => {
            for (index, part) in parts.iter().enumerate() {
                text_part(part).map_err(|fault| fault.under_index(index).under("content"))?;
            }
            Ok(())
        }
        Some(found) => Err(Fault {
            fix: match found {
                Value::Null => "remove the turn or give \"\"".into(),
                other => format!("write the {} as a string of JSON", describe(other)),
            },
            ..wrong_type("string", found)
        }
        .under("content")),
    }
}

/// The older spelling of a call, as a list of one.
fn function_call(fields: &mut Map) {
    if let (Some(call @ Value::Object(_)), None) = (fields.get("function_call").cloned(), fields.get("tool_calls")) {
        fields.shift_remove("function_call");
        fields.insert("tool_calls".into(), calls(call));
    }
}

/// The text of a content: all of it, or its parts joined.
pub(crate) fn content_text(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => Some(parts.iter().filter_map(|part| part.get("text")?.as_str()).collect()),
        _ => None,
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

/// Checks the calls of a message; how their arguments reach the template is decided when it renders.
fn tool_calls(fields: &Map) -> Result<(), Fault> {
    let calls = match fields.get("tool_calls") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(wrong_type("list", other)),
    };
    for (index, call) in calls.iter().enumerate() {
        tool_call(call).map_err(|fault| fault.under_index(index))?;
    }
    Ok(())
}

/// One call, `{function: {name, arguments}}` or `{name, arguments}`.
fn tool_call(call: &Value) -> Result<(), Fault> {
    let Value::Object(object) = call else {
        return Err(wrong_type("object", call));
    };
    match object.get("function") {
        Some(Value::Object(function)) => check_call(function).map_err(|fault| fault.under("function")),
        Some(other) => Err(wrong_type("object", other).under("function")),
        None => check_call(object),
    }
}

fn check_call(function: &Map) -> Result<(), Fault> {
    string(function, "name")?;
    let Some(Value::String(text)) = function.get("arguments") else {
        return Ok(());
    };
    match opened_arguments(text) {
        Some(_) => Ok(()),
        None => Err(Fault::new(
            RowErrorKind::WrongType,
            format!(
                "expected object, or string that holds one, found {:?}",
                text.chars().take(40).collect::<String>()
            ),
            "write the arguments as a JSON object",
        )
        .under("arguments")),
    }
}

/// The object that a string of arguments holds; no text is no arguments.
pub(crate) fn opened_arguments(text: &str) -> Option<Value> {
    if text.trim().is_empty() {
        return Some(Value::Object(Map::new()));
    }
    json::parse(text).filter(|value| matches!(value, Value::Object(_)))
}

/// The tools of a row: a list, or a string that holds one, since a table has one type per column.
fn tools(row: &Map) -> Result<Option<Value>, Fault> {
    let opened;
    let value = match row.get("tools") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => {
            opened = json::parse(text);
            opened.as_ref().unwrap_or(&Value::Null)
        }
        Some(value) => value,
    };
    match value {
        Value::Array(list) => match list.iter().position(|tool| !matches!(tool, Value::Object(_))) {
            None => Ok(Some(value.clone())),
            Some(index) => Err(wrong_type("JSON schema", &list[index])
                .under_index(index)
                .under("tools")),
        },
        Value::Null => {
            Err(wrong_type("list of JSON schemas, or a string that holds one", &row["tools"]).under("tools"))
        }
        other => Err(wrong_type("list of JSON schemas", other).under("tools")),
    }
}

fn template_kwargs(row: &Map) -> Result<Map, Fault> {
    match row.get("template_kwargs") {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map.clone()),
        Some(other) => Err(wrong_type("object", other).under("template_kwargs")),
    }
}

fn require<'a>(row: &'a Map, name: &str) -> Result<&'a Value, Fault> {
    row.get(name).ok_or_else(|| missing(name))
}

fn string(row: &Map, name: &str) -> Result<String, Fault> {
    match require(row, name)? {
        Value::String(text) => Ok(text.clone()),
        other => Err(wrong_type("string", other).under(name)),
    }
}

fn non_empty_string(row: &Map, name: &str) -> Result<String, Fault> {
    let text = string(row, name)?;
    if text.is_empty() {
        return Err(empty("the text is empty").under(name));
    }
    Ok(text)
}

fn optional_string(row: &Map, name: &str) -> Result<Option<String>, Fault> {
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

pub(crate) fn empty(what: &str) -> Fault {
    Fault::new(RowErrorKind::Empty, what, "remove the row or fill it")
}
