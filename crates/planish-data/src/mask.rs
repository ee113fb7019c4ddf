//! From a checked row to token ids, and which of them are trained.

use std::ops::Range;

use crate::encode::tokenizer_fault;
use crate::error::{Fault, RowErrorKind};
use crate::notes::Note;
use crate::options::{DataOptions, OnPrefixViolation, Train};
use crate::record::{Answer, Chat, Preference, Record, Role, no_assistant_turn};
use crate::rendering::{Rendering, Turn};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// One example before the length limit: its text, its tokens, and which of them are trained.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Sample {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    /// The bytes of `text` behind each token; empty for tokens that are not in the text.
    pub(crate) ranges: Vec<Range<usize>>,
    /// One flag a token; the first is never trained, since nothing predicts it.
    pub(crate) trained: Vec<bool>,
    pub(crate) straddling: Straddling,
    /// The token that ends the trained turns; `None` where the template writes none, or nothing was rendered.
    pub(crate) end_of_turn: EndOfTurn,
    /// Tokens that mlx-lm's mask passes over; 0 for our own masks.
    pub(crate) prompt_tokens: usize,
    /// Bytes of `text` that are control tokens inside a message.
    pub(crate) foreign: Vec<Range<usize>>,
}

/// Tokens across the border of a trained span, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Straddling {
    /// Across the start, replaced by encoding both sides apart.
    pub start_split: usize,
    /// Across the start of a text that cannot be encoded in parts; not trained.
    pub start_kept: usize,
    /// Across the end; not trained.
    pub end: usize,
}

/// How a template ends a trained turn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum EndOfTurn {
    /// Not looked for: plain text.
    #[default]
    NotRendered,
    /// No special token stands there.
    None,
    /// This special token does.
    Token(u32),
}

/// The samples of a row: one; several where a chat is unrolled; chosen and rejected of a pair.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Samples {
    One(Sample),
    Unrolled(Vec<Sample>),
    Pair(Box<[Sample; 2]>),
}

/// What is needed to turn records into samples.
#[derive(Clone, Copy)]
pub(crate) struct Masker<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) template: Option<&'a ChatTemplate>,
    pub(crate) options: &'a DataOptions,
}

impl Masker<'_> {
    /// The samples of a record, and what its author should know.
    pub(crate) fn samples(&self, record: &Record) -> Result<(Samples, Vec<Note>), Fault> {
        let mut notes = Vec::new();
        let samples = match record {
            Record::Text(text) => Samples::One(self.text(text)?),
            Record::Chat(chat) => self.chat(chat, &mut notes)?,
            Record::Preference(pair) => self.pair(pair, &mut notes)?,
        };
        samples
            .as_slice()
            .iter()
            .try_for_each(|sample| self.check_ids(&sample.ids))?;
        Ok((samples, notes))
    }

    /// Plain text: the tokenizer's own beginning, and an end of text.
    fn text(&self, text: &str) -> Result<Sample, Fault> {
        if (self.options.train == Train::MlxLm { mask_prompt: true }) {
            return Err(Fault::new(
                RowErrorKind::Value,
                "mlx-lm masks no prompt in plain text",
                "leave out mask_prompt, or use chat or completions rows",
            ));
        }
        let mut encoded = self.tokenizer.encode_text(text).map_err(tokenizer_fault)?;
        let end = self.end_of_text()?;
        if let Some(eos) = end.filter(|eos| encoded.ids.last() != Some(eos)) {
            encoded.ids.push(eos);
            encoded.ranges.push(text.len()..text.len());
        }
        let trained = (0..encoded.ids.len()).map(|index| index > 0).collect();
        Ok(Sample {
            text: text.to_string(),
            ids: encoded.ids,
            ranges: encoded.ranges,
            trained,
            ..Sample::default()
        })
    }

    /// The token that ends a text row: the one that is named, else the tokenizer's own.
    fn end_of_text(&self) -> Result<Option<u32>, Fault> {
        let Some(name) = &self.options.append_eos else {
            return Ok(self.tokenizer.eos());
        };
        self.tokenizer.token_to_id(name).map(Some).ok_or_else(|| {
            Fault::new(
                RowErrorKind::Value,
                format!("data.append_eos is {name:?}, which the tokenizer does not have"),
                "name a token of its vocabulary, such as \"<|endoftext|>\"",
            )
        })
    }

    fn chat(&self, chat: &Chat, notes: &mut Vec<Note>) -> Result<Samples, Fault> {
        let rendering = self.rendering(chat, notes)?;
        if let Train::MlxLm { mask_prompt } = self.options.train {
            return rendering.last_message_on(mask_prompt).map(Samples::One);
        }
        if self.options.train == Train::Everything {
            return rendering.everything().map(Samples::One);
        }
        let chosen = self.trained_turns(chat)?;
        rendering
            .check_calls_are_written(&chosen)
            .map_err(|fault| self.in_messages(fault))?;
        let turns = self.found(&rendering, &chosen, notes)?;
        if turns.is_empty() && !chosen.is_empty() {
            return Err(self.in_messages(no_assistant_turn()));
        }
        match rendering.in_whole(&turns) {
            Ok(spans) => rendering.sample(rendering.whole.clone(), &spans).map(Samples::One),
            Err(_) if self.options.on_prefix_violation == OnPrefixViolation::Unroll => turns
                .into_iter()
                .map(|turn| rendering.sample(turn.text, &[turn.span]))
                .collect::<Result<_, _>>()
                .map(Samples::Unrolled),
            Err(fault) => Err(fault),
        }
    }

    fn in_messages(&self, fault: Fault) -> Fault {
        fault.under(&self.options.fields.messages)
    }

    /// The turns that have a prompt; those without one are named.
    fn found(&self, rendering: &Rendering, chosen: &[usize], notes: &mut Vec<Note>) -> Result<Vec<Turn>, Fault> {
        let mut turns = Vec::new();
        for index in chosen {
            match rendering.turn(*index)? {
                Some(turn) => {
                    notes.extend(turn.differs.as_ref().map(|more| Note::prompt_differs(more)));
                    turns.push(turn);
                }
                None => notes.push(Note::no_prompt(*index)),
            }
        }
        Ok(turns)
    }

    fn pair(&self, pair: &Preference, notes: &mut Vec<Note>) -> Result<Samples, Fault> {
        let names = &self.options.fields;
        if let (Answer::Text(chosen), Answer::Text(rejected)) = (&pair.chosen, &pair.rejected) {
            let mut sides = [self.text(chosen)?, self.text(rejected)?];
            mask_shared_beginning(&mut sides);
            return Ok(Samples::Pair(Box::new(sides)));
        }
        let mut side = |answer: &Answer, name: &str| -> Result<Sample, Fault> {
            match answer {
                Answer::Text(text) => self.text(text),
                Answer::Chat { chat, first_trained } => {
                    let rendering = self.rendering(chat, notes)?;
                    let is_answer = |index: &usize| chat.messages[*index].role == Role::Assistant;
                    let chosen: Vec<usize> = (*first_trained..chat.messages.len()).filter(is_answer).collect();
                    let turns = self.found(&rendering, &chosen, notes)?;
                    match (rendering.in_whole(&turns), &turns[..]) {
                        (Ok(spans), _) => rendering.sample(rendering.whole.clone(), &spans),
                        // One answer needs nothing of the whole but its prompt.
                        (Err(_), [only]) if chosen.len() == 1 => {
                            rendering.sample(only.text.clone(), std::slice::from_ref(&only.span))
                        }
                        (Err(fault), _) => Err(fault),
                    }
                }
            }
            .map_err(|fault| fault.under(name))
        };
        Ok(Samples::Pair(Box::new([
            side(&pair.chosen, &names.chosen)?,
            side(&pair.rejected, &names.rejected)?,
        ])))
    }

    fn rendering<'a>(&'a self, chat: &'a Chat, notes: &mut Vec<Note>) -> Result<Rendering<'a>, Fault> {
        let Some(template) = self.template else {
            return Err(Fault::new(
                RowErrorKind::NoTemplate,
                "this row needs a chat template, and the model has none",
                "name a template file in data.chat_template, or use rows with \"text\"",
            ));
        };
        let rendering = Rendering::new(self.tokenizer, template, chat, self.options.control_tokens)?;
        notes.extend(rendering.notes());
        Ok(rendering)
    }

    /// The turns that the options and the row itself select.
    fn trained_turns(&self, chat: &Chat) -> Result<Vec<usize>, Fault> {
        let assistant = [Role::Assistant];
        let roles: &[Role] = match &self.options.train {
            Train::Turns(roles) => roles,
            _ => &assistant,
        };
        let mut turns = Vec::new();
        for (index, message) in chat.messages.iter().enumerate() {
            let allowed = roles.contains(&message.role);
            if message.train == Some(true) && !allowed {
                return Err(Fault::new(
                    RowErrorKind::Value,
                    format!("a turn of role {} is not trained", message.role.name()),
                    format!("add {:?} to data.train_roles, or remove \"train\"", message.role.name()),
                )
                .under("train")
                .under_index(index)
                .under(&self.options.fields.messages));
            }
            if allowed && message.train != Some(false) {
                turns.push(index);
            }
        }
        if self.options.train == Train::LastTurn {
            turns = turns.pop().into_iter().collect();
        }
        let masked_by_row = chat.messages.iter().any(|message| message.train == Some(false));
        if turns.is_empty() && !masked_by_row {
            return Err(no_assistant_turn().under(&self.options.fields.messages));
        }
        Ok(turns)
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), Fault> {
        if let Some((_, id)) = self.tokenizer.outside_model(ids) {
            return Err(Fault::new(
                RowErrorKind::OutsideVocabulary,
                format!(
                    "the token {:?} has id {id}, and the model has only {} embeddings",
                    self.tokenizer.id_to_token(id).unwrap_or_default(),
                    self.tokenizer.model_vocab_size().unwrap_or_default(),
                ),
                "remove the token from the row, or use the tokenizer that belongs to the model",
            ));
        }
        match (self.tokenizer.bos(), ids) {
            (Some(bos), [first, second, ..]) if *first == bos && *second == bos => Err(Fault::new(
                RowErrorKind::DoubleBos,
                format!(
                    "the row begins with two beginning-of-text tokens; {} writes one",
                    self.template.map_or("the tokenizer", ChatTemplate::origin)
                ),
                "remove the token from the text",
            )),
            _ => Ok(()),
        }
    }
}

impl Samples {
    pub(crate) fn as_slice(&self) -> &[Sample] {
        match self {
            Self::One(sample) => std::slice::from_ref(sample),
            Self::Unrolled(samples) => samples,
            Self::Pair(pair) => pair.as_slice(),
        }
    }
}

/// Two texts that begin alike: what they share is context, up to the last word border before they part.
fn mask_shared_beginning(sides: &mut [Sample; 2]) {
    let [left, right] = &*sides;
    let mut shared = left.ids.iter().zip(&right.ids).take_while(|(a, b)| a == b).count();
    let starts_inside_word = |sample: &Sample, at: usize| {
        let Some(byte) = sample.ranges.get(at).map(|range| range.start) else {
            return false;
        };
        let before = sample.text.get(..byte).and_then(|text| text.chars().next_back());
        let after = sample.text.get(byte..).and_then(|text| text.chars().next());
        before
            .zip(after)
            .is_some_and(|(a, b)| a.is_alphanumeric() && b.is_alphanumeric())
    };
    while shared > 1 && (starts_inside_word(left, shared) || starts_inside_word(right, shared)) {
        shared -= 1;
    }
    for sample in sides {
        sample
            .trained
            .iter_mut()
            .take(shared)
            .for_each(|trained| *trained = false);
    }
}
