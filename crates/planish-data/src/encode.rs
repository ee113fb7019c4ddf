//! Rendered text to token ids, so that no token crosses the start of trained text.

use std::ops::Range;

use crate::error::{Error, Fault, RowErrorKind};
use crate::mask::Straddling;
use crate::tokenizer::{Encoded, Tokenizer};

/// Encodes a text so that no token lies across the start of a span: there, both sides are encoded apart, which is what
/// the model sees when it continues the prompt. Control tokens in `as_text` are encoded as the characters they are.
pub(crate) fn encode_apart(
    tokenizer: &Tokenizer,
    text: &str,
    spans: &[Range<usize>],
    as_text: &[Range<usize>],
) -> Result<(Encoded, Straddling), Fault> {
    let whole = encode_parts(tokenizer, text, &[], as_text)?;
    let mut cuts: Vec<usize> = crossed_starts(&whole.ranges, spans).collect();
    let mut straddling = Straddling::default();
    if cuts.is_empty() {
        return Ok((whole, straddling));
    }
    loop {
        let parts = encode_parts(tokenizer, text, &cuts, as_text)?;
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

/// Encodes the pieces between cuts one by one, those of `as_text` without control tokens.
fn encode_parts(tokenizer: &Tokenizer, text: &str, cuts: &[usize], as_text: &[Range<usize>]) -> Result<Encoded, Fault> {
    let mut all = Encoded::default();
    let borders = as_text.iter().flat_map(|range| [range.start, range.end]);
    let mut ends: Vec<usize> = cuts.iter().copied().chain(borders).chain([text.len()]).collect();
    ends.sort_unstable();
    ends.dedup();
    let mut start = 0;
    for end in ends {
        let is_plain = as_text.iter().any(|range| range.start <= start && end <= range.end);
        let piece = &text[start..end];
        let part = if is_plain {
            tokenizer.encode_plain(piece)
        } else {
            tokenizer.encode(piece)
        };
        let part = part.map_err(tokenizer_fault)?;
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
pub(crate) fn inside(range: &Range<usize>, spans: &[Range<usize>]) -> bool {
    let holds = |span: &Range<usize>| {
        let starts = span.start <= range.start && range.start < span.end;
        starts && range.end <= span.end
    };
    spans.iter().any(holds)
}

pub(crate) fn crosses_end(range: &Range<usize>, spans: &[Range<usize>]) -> bool {
    spans
        .iter()
        .any(|span| span.start <= range.start && range.start < span.end && span.end < range.end)
}

pub(crate) fn tokenizer_fault(error: Error) -> Fault {
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
