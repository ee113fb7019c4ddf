//! One conversation with its template: its text, and where in it the trained turns are.
//!
//! The prefix-difference rule: let `R` be the whole conversation rendered, `P` the conversation before an assistant turn
//! with the generation prompt, and `F` the conversation up to and with that turn. Where `P` begins `F` and `F` begins
//! `R`, the bytes of `R` from `|P|` to `|F|` are exactly what the model would have to write. Nothing is assumed about
//! the template.
//!
//! Where `P` does not begin `F`, the two are aligned (`Rendering::aligned`); where `F` does not begin `R`, each turn
//! becomes an example of its own.

use std::ops::Range;

use crate::control::{self, ControlTokens};
use crate::encode::{crosses_end, encode_apart, inside, tokenizer_fault};
use crate::error::{Error, Fault, RowErrorKind};
use crate::jinja::{self, Value};
use crate::json::{Map, Value as Json};
use crate::mask::{EndOfTurn, Sample};
use crate::notes::Note;
use crate::record::{Chat, Role, content_text, opened_arguments};
use crate::template::{Bound, ChatTemplate, THOUGHTS, message_value};
use crate::tokenizer::Tokenizer;

/// Everything that is rendered from one conversation.
pub(crate) struct Rendering<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    chat: &'a Chat,
    bound: Bound,
    forms: Forms,
    messages: Vec<Value>,
    control: Control,
    /// `R`.
    pub(crate) whole: String,
}

/// How the parts of a message that can be written in two ways reach the template.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Forms {
    /// The arguments of calls as objects, else as text.
    objects: bool,
    /// Contents in parts as they are, else joined.
    parts: bool,
}

/// Control tokens inside the messages.
struct Control {
    setting: ControlTokens,
    /// There are some.
    found: bool,
}

/// A turn that is trained.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    index: usize,
    /// `F`, or a text of its own that begins with `P`.
    pub(crate) text: String,
    pub(crate) span: Span,
    /// Why the text is one of its own.
    violation: Option<Fault>,
    /// What `P` has beyond `F`.
    pub(crate) differs: Option<String>,
}

/// Bytes of a text to train, and how the turn ends there.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) bytes: Range<usize>,
    pub(crate) end_of_turn: EndOfTurn,
}

impl<'a> Rendering<'a> {
    pub(crate) fn new(
        tokenizer: &'a Tokenizer,
        template: &'a ChatTemplate,
        chat: &'a Chat,
        setting: ControlTokens,
    ) -> Result<Self, Fault> {
        let found = chat
            .messages
            .iter()
            .any(|message| control::is_in(&message.fields, tokenizer));
        if found && setting == ControlTokens::Refuse {
            return Err(control::refusal());
        }
        let mut rendering = Self {
            tokenizer,
            template,
            chat,
            bound: template.bind(chat.tools.as_ref(), &chat.template_kwargs),
            forms: Forms {
                objects: true,
                parts: true,
            },
            messages: Vec::new(),
            control: Control { setting, found },
            whole: String::new(),
        };
        rendering.choose_forms()?;
        Ok(rendering)
    }

    /// Takes the first way to write parts and arguments that the template renders without printing Python's form of them:
    /// templates that go through parts get parts and those that join texts get texts, as servers would hand them over.
    fn choose_forms(&mut self) -> Result<(), Fault> {
        let fields = || self.chat.messages.iter().map(|message| &message.fields);
        let has_parts = fields().any(|fields| matches!(fields.get("content"), Some(Json::Array(_))));
        let has_arguments = fields().any(|fields| !arguments(fields).is_empty());
        let mut refusal = None;
        let mut first = None;
        for (objects, parts) in [(true, true), (false, true), (true, false), (false, false)] {
            if (!objects && !has_arguments) || (!parts && !has_parts) {
                continue;
            }
            self.forms = Forms { objects, parts };
            self.messages = self.values(|_, _| {});
            match self.render(self.messages.len(), false) {
                Ok(text) if self.prints_python(&text) => {
                    first.get_or_insert((self.forms, text));
                }
                Ok(text) => {
                    self.whole = text;
                    return Ok(());
                }
                Err(fault) => {
                    refusal.get_or_insert(fault);
                }
            }
        }
        match (first, refusal) {
            (Some((forms, text)), _) => {
                self.forms = forms;
                self.messages = self.values(|_, _| {});
                self.whole = text;
                Ok(())
            }
            (None, Some(fault)) => Err(fault),
            (None, None) => Ok(()),
        }
    }

    /// Whether a text has Python's form of parts, or of arguments that the row has as text.
    fn prints_python(&self, text: &str) -> bool {
        let printed = |value: &Json| jinja::repr(&Value::from_json(value)).is_some_and(|repr| text.contains(&repr));
        self.chat.messages.iter().any(|message| {
            let parts = match message.fields.get("content") {
                Some(parts @ Json::Array(list)) if self.forms.parts && !list.is_empty() => {
                    printed(parts) || list.iter().any(printed)
                }
                _ => false,
            };
            let opened = |arguments: &Json| {
                let opened = arguments.as_str().and_then(opened_arguments);
                opened.is_some_and(|opened| opened != Json::Object(Map::new()) && printed(&opened))
            };
            parts || (self.forms.objects && arguments(&message.fields).into_iter().any(opened))
        })
    }

    /// The messages as the template gets them, after a change to some.
    fn values(&self, change: impl Fn(usize, &mut Map)) -> Vec<Value> {
        let message = |(index, message): (usize, &crate::record::Message)| {
            let mut fields = message.fields.clone();
            change(index, &mut fields);
            self.forms.apply(&mut fields);
            if self.control.found && self.control.setting == ControlTokens::Text {
                control::mark(&mut fields, self.tokenizer);
            }
            message_value(&fields)
        };
        self.chat.messages.iter().enumerate().map(message).collect()
    }

    fn render(&self, n_messages: usize, generation_prompt: bool) -> Result<String, Fault> {
        self.render_of(self.messages[..n_messages].to_vec(), generation_prompt)
    }

    fn render_of(&self, messages: Vec<Value>, generation_prompt: bool) -> Result<String, Fault> {
        self.template
            .render_values(messages, &self.bound, generation_prompt)
            .map_err(template_fault)
    }

    /// A trained turn; nothing where the template refuses the conversation before the first user turn.
    pub(crate) fn turn(&self, index: usize) -> Result<Option<Turn>, Fault> {
        let full = self.render(index + 1, false)?;
        let prompt = match self.render(index, self.role(index) == Role::Assistant) {
            Ok(prompt) => prompt,
            Err(_) if (0..index).all(|before| self.role(before) != Role::User) => return Ok(None),
            Err(fault) => return Err(fault),
        };
        if full.starts_with(&prompt) {
            let span = self.span(&full, prompt.len());
            return Ok(Some(Turn {
                index,
                text: full,
                span,
                violation: None,
                differs: None,
            }));
        }
        self.aligned(index, &prompt, full).map(Some)
    }

    /// The turns as spans of the whole conversation, where all of them are in it.
    pub(crate) fn in_whole(&self, turns: &[Turn]) -> Result<Vec<Span>, Fault> {
        let span = |turn: &Turn| {
            if let Some(violation) = &turn.violation {
                return Err(violation.clone());
            }
            if self.whole.starts_with(&turn.text) {
                return Ok(turn.span.clone());
            }
            let short = ("the conversation up to this turn", turn.text.as_str());
            let message = parting(turn.index, short, ("the whole conversation", &self.whole));
            Err(Fault::new(RowErrorKind::PrefixViolation, message, UNROLL))
        };
        turns.iter().map(span).collect()
    }

    /// A turn whose prompt does not begin the text with it. Where in `F` the turn's own words begin is found by rendering
    /// it with other words. Then, in this order:
    ///
    /// 1. The prompt opens something (`<think>`) and the row's content begins with it: the text is the prompt, the rest
    ///    of the content, and the end of the finished turn.
    /// 2. The two texts part inside the turn: what `F` has beyond the shared beginning is trained.
    /// 3. They part before the turn and meet again: the text is the prompt and what `F` has after the meeting point,
    ///    which must not change with the message before it.
    fn aligned(&self, index: usize, prompt: &str, full: String) -> Result<Turn, Fault> {
        let start = self.own_words_start(index, &full);
        let shared = common_prefix(prompt, &full).min(start);
        let more = &prompt[shared..];
        let message = parting(
            index,
            ("the prompt before this turn", prompt),
            ("the text with it", &full),
        );
        let violation = Fault::new(RowErrorKind::PrefixViolation, message, UNROLL);
        let own = |answer: String| {
            let text = format!("{prompt}{answer}");
            let span = self.span(&text, prompt.len());
            Turn {
                index,
                text,
                span,
                violation: Some(violation.clone()),
                differs: None,
            }
        };
        if let Some(answer) = self.continued(index, more, &full[start..]) {
            return Ok(own(answer));
        }
        let history = self.render(index, false).unwrap_or_default();
        if full.starts_with(&history) && shared > history.len() {
            let span = self.span(&full, shared);
            return Ok(Turn {
                index,
                text: full,
                span,
                violation: None,
                differs: Some(more.into()),
            });
        }
        if let Some(answer) = self.after_meeting(index, prompt, &full, start) {
            return Ok(own(answer));
        }
        Err(Fault {
            fix: "name a file in data.chat_template whose generation prompt begins its assistant turns".into(),
            ..violation
        })
    }

    /// Where the words of a turn begin in `F`: the first byte that changes with them.
    fn own_words_start(&self, index: usize, full: &str) -> usize {
        match self.probed(index, index + 1, false) {
            Some(probe) => common_prefix(&probe, full),
            None => full.len(),
        }
    }

    /// The conversation with other words in one of its messages.
    fn probed(&self, changed: usize, n_messages: usize, generation_prompt: bool) -> Option<String> {
        let values = self.values(|index, fields| {
            if index == changed {
                let old = fields.get("content").and_then(content_text).unwrap_or_default();
                let probe = if old.starts_with('\u{e000}') {
                    "\u{e001}"
                } else {
                    "\u{e000}"
                };
                fields.insert("content".into(), probe.into());
                for name in THOUGHTS {
                    if fields.contains_key(name) {
                        fields.insert(name.into(), probe.into());
                    }
                }
            }
        });
        self.render_of(values[..n_messages].to_vec(), generation_prompt).ok()
    }

    /// What the model writes after a prompt that opened the content: the rest of it, and the end of the finished turn.
    fn continued(&self, index: usize, opened: &str, finished: &str) -> Option<String> {
        if opened.trim().is_empty() {
            return None;
        }
        let whole = content_text(self.chat.messages[index].fields.get("content")?)?;
        [whole.as_str(), whole.trim_end()].into_iter().find_map(|content| {
            let rest = content.strip_prefix(opened).or_else(|| {
                let rest = content.trim_start().strip_prefix(opened.trim_end())?;
                Some(rest.trim_start_matches('\n'))
            })?;
            // The finished turn shows the end of the content, and then its own end.
            let shown = content
                .char_indices()
                .map(|(at, _)| &content[at..])
                .find(|end| finished.starts_with(end))?;
            Some(format!("{rest}{}", &finished[shown.len()..]))
        })
    }

    /// What the finished text has after the place where it meets the prompt's end, at or before the turn's own words.
    fn after_meeting(&self, index: usize, prompt: &str, full: &str, start: usize) -> Option<String> {
        const LONGEST_MARKUP: usize = 256;
        let ends = (start.saturating_sub(LONGEST_MARKUP)..=start).filter(|end| full.is_char_boundary(*end));
        let (length, end) = ends
            .map(|end| (common_suffix(prompt, &full[..end]), end))
            .max()
            .filter(|(length, _)| *length > 0)?;
        let answer = &full[end..];
        // The message before it has other words: its text may change, and what follows must not.
        let before = index.checked_sub(1)?;
        let (other_full, other_prompt) = (
            self.probed(before, index + 1, false)?,
            self.probed(before, index, self.role(index) == Role::Assistant)?,
        );
        let other_head = other_full.strip_suffix(answer)?;
        let met = common_suffix(&other_prompt, other_head);
        let markup = length.min(met);
        (markup > 0 && self.words_stay_out(index, answer)).then(|| answer.to_string())
    }

    /// Whether an answer has nothing of the messages before it.
    fn words_stay_out(&self, index: usize, answer: &str) -> bool {
        let own = self.chat.messages[index]
            .fields
            .get("content")
            .and_then(content_text)
            .unwrap_or_default();
        self.chat.messages[..index].iter().all(|message| {
            let words = message.fields.get("content").and_then(content_text).unwrap_or_default();
            let words = words.trim();
            words.is_empty() || own.contains(words) || !answer.contains(words)
        })
    }

    fn role(&self, index: usize) -> Role {
        self.chat.messages[index].role
    }

    /// From a byte of a text to the end of the turn. White space after the end-of-turn token is markup of the next turn;
    /// without such a token it is the only end.
    fn span(&self, text: &str, from: usize) -> Span {
        let body = text[from..].trim_end();
        match self.tokenizer.special_suffix(body) {
            Some((id, _)) => Span {
                bytes: from..from + body.len(),
                end_of_turn: EndOfTurn::Token(id),
            },
            None => Span {
                bytes: from..text.len(),
                end_of_turn: EndOfTurn::None,
            },
        }
    }

    /// A text with its tokens, of which those inside the spans are trained.
    pub(crate) fn sample(&self, text: String, spans: &[Span]) -> Result<Sample, Fault> {
        let end_of_turn = spans.last().map_or(EndOfTurn::NotRendered, |span| span.end_of_turn);
        let mut bytes: Vec<Range<usize>> = spans.iter().map(|span| span.bytes.clone()).collect();
        let (text, foreign) = self.foreign(text, &mut bytes);
        let as_text: &[Range<usize>] = if self.control.setting == ControlTokens::Text {
            &foreign
        } else {
            &[]
        };
        let (encoded, mut straddling) = encode_apart(self.tokenizer, &text, &bytes, as_text)?;
        let mut trained: Vec<bool> = encoded.ranges.iter().map(|range| inside(range, &bytes)).collect();
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        straddling.end = encoded.ranges.iter().filter(|range| crosses_end(range, &bytes)).count();
        Ok(Sample {
            text,
            ids: encoded.ids,
            ranges: encoded.ranges,
            trained,
            straddling,
            end_of_turn,
            foreign,
            prompt_tokens: 0,
        })
    }

    /// The text without marks, and where its messages have control tokens; spans move with the bytes.
    fn foreign(&self, text: String, spans: &mut [Range<usize>]) -> (String, Vec<Range<usize>>) {
        if !self.control.found {
            return (text, Vec::new());
        }
        if self.control.setting == ControlTokens::Text {
            return control::unmark(&text, spans);
        }
        // Marks may change what a template does, so they only tell where the tokens are in a text without them.
        let marked = self.values(|_, fields| control::mark(fields, self.tokenizer));
        let found = self
            .render_of(marked, false)
            .map(|marked| control::unmark(&marked, &mut []));
        match found {
            Ok((plain, ranges)) if plain.starts_with(&text) => {
                let inside = ranges.into_iter().filter(|range| range.end <= text.len()).collect();
                (text, inside)
            }
            _ => (text, Vec::new()),
        }
    }

    pub(crate) fn everything(&self) -> Result<Sample, Fault> {
        let everything = Span {
            bytes: 0..self.whole.len(),
            end_of_turn: EndOfTurn::NotRendered,
        };
        let mut sample = self.sample(self.whole.clone(), &[everything])?;
        sample.trained.iter_mut().skip(1).for_each(|trained| *trained = true);
        Ok(sample)
    }

    /// mlx-lm's mask: the tokens of everything before the last message are counted, not looked for in the whole.
    pub(crate) fn last_message_on(&self, mask_prompt: bool) -> Result<Sample, Fault> {
        let mut sample = self.everything()?;
        if mask_prompt {
            let before = self.messages.len() - 1;
            let prompt = self.render(before, self.role(before) == Role::Assistant)?;
            let offset = self.tokenizer.encode(&prompt).map_err(tokenizer_fault)?.ids.len();
            sample
                .trained
                .iter_mut()
                .take(offset)
                .for_each(|trained| *trained = false);
        }
        Ok(sample)
    }

    /// Refuses a trained turn that calls tools and says nothing else, where the template writes no calls: it would teach
    /// to answer nothing.
    pub(crate) fn check_calls_are_written(&self, turns: &[usize]) -> Result<(), Fault> {
        for index in turns {
            let fields = &self.chat.messages[*index].fields;
            let is_silent = fields
                .get("content")
                .and_then(content_text)
                .is_none_or(|text| text.trim().is_empty());
            let calls = fields
                .get("tool_calls")
                .and_then(Json::as_array)
                .is_some_and(|calls| !calls.is_empty());
            if calls && is_silent && self.is_lost(|at, _| at == *index, "tool_calls") {
                let message =
                    "the chat template does not write calls, so that this turn would be trained to say nothing";
                let fix = "name a template that writes them in data.chat_template, or remove the turn";
                return Err(Fault::new(RowErrorKind::Value, message, fix)
                    .under("tool_calls")
                    .under_index(*index));
            }
        }
        Ok(())
    }

    /// What a reader of the row should know.
    pub(crate) fn notes(&self) -> Vec<Note> {
        let renamed = |message: &crate::record::Message| {
            let written = message.written_role.as_deref()?;
            Some(Note::role(written, message.role.name()))
        };
        let mut notes: Vec<Note> = self.chat.messages.iter().filter_map(renamed).collect();
        if self.control.found {
            notes.push(match self.control.setting {
                ControlTokens::Text => Note::control_tokens_as_text(),
                _ => Note::control_tokens(),
            });
        }
        notes.extend(self.lost_around());
        notes.extend(self.lost_fields());
        notes.extend(self.lost_words());
        notes.sort();
        notes.dedup();
        notes
    }

    /// The tool list and the keywords of the row, where leaving them out changes nothing.
    fn lost_around(&self) -> Vec<Note> {
        let mut notes = Vec::new();
        let mut check = |field: String, bound: &Bound| {
            let without = self.template.render_values(self.messages.clone(), bound, false);
            if without.is_ok_and(|text| text == self.whole) {
                notes.push(Note::lost(&field));
            }
        };
        let Chat {
            tools, template_kwargs, ..
        } = self.chat;
        if tools.is_some() {
            check("tools".into(), &self.template.bind(None, template_kwargs));
        }
        for name in template_kwargs.keys() {
            let mut fewer = template_kwargs.clone();
            fewer.shift_remove(name);
            check(
                format!("template_kwargs.{name}"),
                &self.template.bind(tools.as_ref(), &fewer),
            );
        }
        notes
    }

    /// Fields of messages other than role and content that change nothing, in any message or in one.
    fn lost_fields(&self) -> Vec<Note> {
        let mut names: Vec<&String> = Vec::new();
        for message in &self.chat.messages {
            for (name, value) in &message.fields {
                let is_more = !matches!(name.as_str(), "role" | "content") && !is_empty(value);
                if is_more && !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        let mut notes = Vec::new();
        for name in names {
            let field = format!("messages[].{name}");
            if self.is_lost(|_, _| true, name) {
                notes.push(Note::lost(&field));
                continue;
            }
            // The template knows the field, and may leave it out in some turns, as many do with earlier thoughts.
            let is_hidden = |(index, message): (usize, &crate::record::Message)| {
                let text = match message.fields.get(name) {
                    Some(Json::String(text)) if !text.trim().is_empty() => self.marked(text.trim()),
                    _ => return false,
                };
                !self.whole.contains(&text) && self.is_lost(|at, _| at == index, name)
            };
            if self.chat.messages.iter().enumerate().any(is_hidden) {
                notes.push(Note::lost(&format!("{field} of every turn")));
            }
        }
        notes
    }

    /// Contents that are not in the text, or only some of their words.
    fn lost_words(&self) -> Vec<Note> {
        let mut notes = Vec::new();
        for (index, message) in self.chat.messages.iter().enumerate() {
            let is_written = |text: &str| text.trim().is_empty() || self.whole.contains(&self.marked(text.trim()));
            let written = match message.fields.get("content") {
                Some(Json::String(text)) => is_written(text),
                Some(Json::Array(parts)) => parts
                    .iter()
                    .filter_map(|part| part.get("text")?.as_str())
                    .all(is_written),
                _ => true,
            };
            if !written {
                let field = format!("the content of {} messages", message.role.name());
                let lost = self.is_emptied_lost(index);
                notes.push(if lost {
                    Note::lost(&field)
                } else {
                    Note::partial(&field)
                });
            }
        }
        notes
    }

    fn marked(&self, text: &str) -> String {
        if self.control.found && self.control.setting == ControlTokens::Text {
            control::marked(text, self.tokenizer)
        } else {
            text.into()
        }
    }

    /// Whether the text stays the same when chosen messages lose a field.
    fn is_lost(&self, chosen: impl Fn(usize, &Map) -> bool, name: &str) -> bool {
        let values = self.values(|index, fields| {
            if chosen(index, fields) {
                fields.shift_remove(name);
            }
        });
        self.render_of(values, false).is_ok_and(|text| text == self.whole)
    }

    fn is_emptied_lost(&self, changed: usize) -> bool {
        let values = self.values(|index, fields| {
            if index == changed {
                fields.insert("content".into(), "".into());
            }
        });
        self.render_of(values, false).is_ok_and(|text| text == self.whole)
    }
}

const UNROLL: &str = "set data.on_prefix_violation = \"unroll\", or train the last turn only";

impl Forms {
    fn apply(self, fields: &mut Map) {
        if let Some(content @ Json::Array(_)) = fields.get_mut("content").filter(|_| !self.parts) {
            *content = content_text(content).unwrap_or_default().into();
        }
        let Some(Json::Array(calls)) = fields.get_mut("tool_calls") else {
            return;
        };
        for call in calls {
            let function = match call {
                Json::Object(call) if call.contains_key("function") => call.get_mut("function"),
                other => Some(other),
            };
            let Some(Json::Object(function)) = function else {
                continue;
            };
            let Some(arguments) = function.get_mut("arguments") else {
                continue;
            };
            let other = match arguments {
                Json::String(text) if self.objects => opened_arguments(text),
                Json::Object(_) if !self.objects => jinja::dumps(&Value::from_json(arguments)).map(Json::from),
                _ => None,
            };
            if let Some(other) = other {
                *arguments = other;
            }
        }
    }
}

/// The arguments of a message's calls.
fn arguments(fields: &Map) -> Vec<&Json> {
    let calls = fields.get("tool_calls").and_then(Json::as_array);
    let of_call = |call| Json::get(Json::get(call, "function").unwrap_or(call), "arguments");
    calls.into_iter().flatten().filter_map(of_call).collect()
}

fn is_empty(value: &Json) -> bool {
    match value {
        Json::Null => true,
        Json::String(text) => text.is_empty(),
        Json::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// Bytes that two texts share at their start, up to a whole character.
fn common_prefix(left: &str, right: &str) -> usize {
    let pairs = left.chars().zip(right.chars());
    pairs
        .take_while(|(a, b)| a == b)
        .map(|(character, _)| character.len_utf8())
        .sum()
}

/// Bytes that two texts share at their end.
fn common_suffix(left: &str, right: &str) -> usize {
    let pairs = left.chars().rev().zip(right.chars().rev());
    pairs
        .take_while(|(a, b)| a == b)
        .map(|(character, _)| character.len_utf8())
        .sum()
}

/// Says where two texts part of which the first should begin the second.
fn parting(turn: usize, (short, short_text): (&str, &str), (long, long_text): (&str, &str)) -> String {
    let same = common_prefix(short_text, long_text);
    format!(
        "turn {turn}: {short} is not how {long} begins; at byte {same} the one has {:?}, the other {:?}",
        around(short_text, same),
        around(long_text, same)
    )
}

/// A few characters before and after a byte.
fn around(text: &str, byte: usize) -> &str {
    let floor = |mut at: usize| {
        at = at.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    &text[floor(byte.saturating_sub(20))..floor(byte + 20)]
}

fn template_fault(error: Error) -> Fault {
    Fault::new(
        RowErrorKind::Template,
        format!("the chat template refused the row: {error}"),
        "change the row to what the template expects, or name another file in data.chat_template",
    )
}
