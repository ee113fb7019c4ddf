//! From a checked row to token ids, and which of them are trained.
//!
//! The prefix-difference rule: let `R` be the whole conversation rendered, `P` the conversation before an assistant turn
//! with the generation prompt, and `F` the conversation up to and with that turn. Where `P` begins `F` and `F` begins
//! `R`, the bytes of `R` from `|P|` to `|F|` are exactly what the model would have to write. Nothing is assumed about
//! the template: where the prefixes do not hold, the row is refused or unrolled.

use std::ops::Range;

use minijinja::value::{Serde, Value};

use crate::error::{Error, Fault, RowErrorKind};
use crate::options::{DataOptions, OnPrefixViolation, Train};
use crate::record::{Answer, Chat, Preference, Record, Role, no_assistant_turn};
use crate::template::{Bound, ChatTemplate};
use crate::tokenizer::{Encoded, Tokenizer};

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
    pub(crate) fn samples(&self, record: &Record) -> Result<Samples, Fault> {
        let samples = match record {
            Record::Text(text) => Samples::One(self.text(text)?),
            Record::Chat(chat) => self.chat(chat)?,
            Record::Preference(pair) => self.pair(pair)?,
        };
        samples
            .as_slice()
            .iter()
            .try_for_each(|sample| self.check_ids(&sample.ids))?;
        Ok(samples)
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
        if let Some(eos) = self.tokenizer.eos().filter(|eos| encoded.ids.last() != Some(eos)) {
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

    fn chat(&self, chat: &Chat) -> Result<Samples, Fault> {
        let rendering = self.rendering(chat)?;
        if let Train::MlxLm { mask_prompt } = self.options.train {
            return rendering.last_message_on(mask_prompt).map(Samples::One);
        }
        if self.options.train == Train::Everything {
            return rendering.everything().map(Samples::One);
        }
        let turns = self.trained_turns(chat)?;
        match rendering.spans(&turns) {
            Ok(spans) => rendering.sample(rendering.whole.clone(), &spans).map(Samples::One),
            Err(_) if self.options.on_prefix_violation == OnPrefixViolation::Unroll => turns
                .iter()
                .map(|turn| rendering.up_to(*turn))
                .collect::<Result<_, _>>()
                .map(Samples::Unrolled),
            Err(fault) => Err(fault),
        }
    }

    fn pair(&self, pair: &Preference) -> Result<Samples, Fault> {
        let side = |answer: &Answer, name: &str| -> Result<Sample, Fault> {
            match answer {
                Answer::Text(text) => self.text(text),
                Answer::Chat { chat, first_trained } => {
                    let rendering = self.rendering(chat)?;
                    let is_answer = |index: &usize| chat.messages[*index].role == Role::Assistant;
                    let turns: Vec<usize> = (*first_trained..chat.messages.len()).filter(is_answer).collect();
                    rendering.sample(rendering.whole.clone(), &rendering.spans(&turns)?)
                }
            }
            .map_err(|fault| fault.under(name))
        };
        let names = &self.options.fields;
        Ok(Samples::Pair(Box::new([
            side(&pair.chosen, &names.chosen)?,
            side(&pair.rejected, &names.rejected)?,
        ])))
    }

    fn rendering<'a>(&'a self, chat: &Chat) -> Result<Rendering<'a>, Fault> {
        let Some(template) = self.template else {
            return Err(Fault::new(
                RowErrorKind::NoTemplate,
                "this row needs a chat template, and the model has none",
                "name a template file in data.chat_template, or use rows with \"text\"",
            ));
        };
        let messages: Vec<Value> = chat
            .messages
            .iter()
            .map(|message| Value::from(Serde(&message.fields)))
            .collect();
        let mut rendering = Rendering {
            tokenizer: self.tokenizer,
            template,
            bound: template.bind(chat.tools.as_ref(), &chat.template_kwargs),
            roles: chat.messages.iter().map(|message| message.role).collect(),
            messages,
            whole: String::new(),
        };
        rendering.whole = rendering.render(rendering.messages.len(), false)?;
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

/// One conversation with its template: everything that is rendered from it.
struct Rendering<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    bound: Bound,
    messages: Vec<Value>,
    roles: Vec<Role>,
    /// `R`.
    whole: String,
}

/// Bytes of a text to train, and how the turn ends there.
struct Span {
    bytes: Range<usize>,
    end_of_turn: EndOfTurn,
}

impl Rendering<'_> {
    fn render(&self, n_messages: usize, generation_prompt: bool) -> Result<String, Fault> {
        let messages = Value::from(self.messages[..n_messages].to_vec());
        self.template
            .render_values(messages, &self.bound, generation_prompt)
            .map_err(template_fault)
    }

    fn spans(&self, turns: &[usize]) -> Result<Vec<Span>, Fault> {
        turns
            .iter()
            .map(|turn| self.span(*turn, &self.render(turn + 1, false)?, Some(&self.whole)))
            .collect()
    }

    /// The bytes of one turn in `full` (`F`), which must begin `whole` (`R`) when that is given.
    fn span(&self, turn: usize, full: &str, whole: Option<&str>) -> Result<Span, Fault> {
        let prompt = self.render(turn, self.roles[turn] == Role::Assistant)?;
        if !full.starts_with(&prompt) {
            let message = parting(
                turn,
                ("the prompt before this turn", &prompt),
                ("the text with it", full),
            );
            let fix = "name a file in data.chat_template whose generation prompt begins its assistant turns";
            return Err(Fault::new(RowErrorKind::PrefixViolation, message, fix));
        }
        if let Some(whole) = whole.filter(|whole| !whole.starts_with(full)) {
            let short = ("the conversation up to this turn", full);
            let message = parting(turn, short, ("the whole conversation", whole));
            let fix = "set data.on_prefix_violation = \"unroll\", or train the last turn only";
            return Err(Fault::new(RowErrorKind::PrefixViolation, message, fix));
        }
        let body = full[prompt.len()..].trim_end();
        let special = self.tokenizer.special_suffix(body);
        // White space after the end-of-turn token is markup of the next turn; without such a token it is the only end.
        Ok(match special {
            Some((id, _)) => Span {
                bytes: prompt.len()..prompt.len() + body.len(),
                end_of_turn: EndOfTurn::Token(id),
            },
            None => Span {
                bytes: prompt.len()..full.len(),
                end_of_turn: EndOfTurn::None,
            },
        })
    }

    /// The conversation up to one turn, with only that turn trained.
    fn up_to(&self, turn: usize) -> Result<Sample, Fault> {
        let full = self.render(turn + 1, false)?;
        let span = self.span(turn, &full, None)?;
        self.sample(full, &[span])
    }

    fn sample(&self, text: String, spans: &[Span]) -> Result<Sample, Fault> {
        let bytes: Vec<Range<usize>> = spans.iter().map(|span| span.bytes.clone()).collect();
        let (encoded, mut straddling) = encode_apart(self.tokenizer, &text, &bytes)?;
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
            end_of_turn: spans.last().map_or(EndOfTurn::NotRendered, |span| span.end_of_turn),
            prompt_tokens: 0,
        })
    }

    fn everything(&self) -> Result<Sample, Fault> {
        let encoded = self.tokenizer.encode(&self.whole).map_err(tokenizer_fault)?;
        let trained = (0..encoded.ids.len()).map(|index| index > 0).collect();
        Ok(Sample {
            text: self.whole.clone(),
            ids: encoded.ids,
            ranges: encoded.ranges,
            trained,
            ..Sample::default()
        })
    }

    /// mlx-lm's mask: the tokens of everything before the last message are counted, not looked for in the whole.
    fn last_message_on(&self, mask_prompt: bool) -> Result<Sample, Fault> {
        let mut sample = self.everything()?;
        if mask_prompt {
            let before = self.messages.len() - 1;
            let prompt = self.render(before, self.roles[before] == Role::Assistant)?;
            let offset = self.tokenizer.encode(&prompt).map_err(tokenizer_fault)?.ids.len();
            sample
                .trained
                .iter_mut()
                .take(offset)
                .for_each(|trained| *trained = false);
        }
        Ok(sample)
    }
}

/// Encodes a text so that no token lies across the start of a span: there, both sides are encoded apart, which is what
/// the model sees when it continues the prompt.
fn encode_apart(tokenizer: &Tokenizer, text: &str, spans: &[Range<usize>]) -> Result<(Encoded, Straddling), Fault> {
    let whole = tokenizer.encode(text).map_err(tokenizer_fault)?;
    let mut cuts: Vec<usize> = crossed_starts(&whole.ranges, spans).collect();
    let mut straddling = Straddling::default();
    if cuts.is_empty() {
        return Ok((whole, straddling));
    }
    loop {
        let parts = encode_parts(tokenizer, text, &cuts)?;
        let more: Vec<usize> = crossed_starts(&parts.ranges, spans).collect();
        if more.is_empty() {
            // A tokenizer that treats the start of a text apart would put something between the parts.
            let same = tokenizer.decode_all(&parts.ids).map_err(tokenizer_fault)?
                == tokenizer.decode_all(&whole.ids).map_err(tokenizer_fault)?;
            if same {
                straddling.start_split = cuts.len();
                return Ok((parts, straddling));
            }
            straddling.start_kept = crossed_starts(&whole.ranges, spans).count();
            return Ok((whole, straddling));
        }
        cuts.extend(more);
        cuts.sort_unstable();
    }
}

fn encode_parts(tokenizer: &Tokenizer, text: &str, cuts: &[usize]) -> Result<Encoded, Fault> {
    let mut all = Encoded::default();
    let ends = cuts.iter().copied().chain([text.len()]);
    let mut start = 0;
    for end in ends {
        let part = tokenizer.encode(&text[start..end]).map_err(tokenizer_fault)?;
        all.ids.extend(part.ids);
        all.ranges.extend(
            part.ranges
                .into_iter()
                .map(|range| range.start + start..range.end + start),
        );
        start = end;
    }
    Ok(all)
}

/// Starts of spans that lie inside a token.
fn crossed_starts<'a>(ranges: &'a [Range<usize>], spans: &'a [Range<usize>]) -> impl Iterator<Item = usize> + 'a {
    spans
        .iter()
        .map(|span| span.start)
        .filter(|start| ranges.iter().any(|range| range.start < *start && *start < range.end))
}

/// Whether a token belongs to a span. One without text, such as a word mark that a tokenizer puts at the start of a
/// piece, belongs where the text after it does.
fn inside(range: &Range<usize>, spans: &[Range<usize>]) -> bool {
    let holds = |span: &Range<usize>| {
        let starts = span.start <= range.start && range.start < span.end;
        starts && range.end <= span.end
    };
    spans.iter().any(holds)
}

fn crosses_end(range: &Range<usize>, spans: &[Range<usize>]) -> bool {
    spans
        .iter()
        .any(|span| span.start <= range.start && range.start < span.end && span.end < range.end)
}

/// Says where two texts part of which the first should begin the second.
fn parting(turn: usize, (short, short_text): (&str, &str), (long, long_text): (&str, &str)) -> String {
    let same = short_text
        .bytes()
        .zip(long_text.bytes())
        .take_while(|(a, b)| a == b)
        .count();
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

fn tokenizer_fault(error: Error) -> Fault {
    Fault::new(
        RowErrorKind::Tokenizer,
        error.to_string(),
        "check that the tokenizer belongs to the model",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_belongs_to_a_span_that_holds_all_of_it() {
        let spans = [5..9, 12..14];
        let check = |range: Range<usize>, expect| assert_eq!(inside(&range, &spans), expect, "{range:?}");
        check(5..9, true);
        check(5..6, true);
        check(4..6, false);
        check(8..10, false);
        check(9..12, false);
        check(12..14, true);
        check(5..5, true);
        check(9..9, false);
        check(0..0, false);
        assert!(crosses_end(&(8..10), &spans) && !crosses_end(&(9..10), &spans) && !crosses_end(&(4..10), &spans));
    }
}
