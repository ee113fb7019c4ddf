//! The length limit: what becomes of an example that is too long.

use crate::error::{Fault, RowErrorKind};
use crate::mask::Sample;
use crate::options::Overlong;

/// Tokens and flags of one example, within the limit.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Piece {
    pub(crate) ids: Vec<u32>,
    pub(crate) trained: Vec<bool>,
}

/// What the limit did to one sample.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Limited {
    Whole(Piece),
    Truncated {
        piece: Piece,
        tokens_lost: usize,
        targets_lost: usize,
    },
    Split(Vec<Piece>),
    Dropped,
}

/// Applies the limit of `max` tokens to one sample.
pub(crate) fn limit(sample: &Sample, max: usize, rule: Overlong) -> Result<Limited, Fault> {
    let n = sample.ids.len();
    let piece = |range: std::ops::Range<usize>| Piece {
        ids: sample.ids[range.clone()].to_vec(),
        trained: sample.trained[range].to_vec(),
    };
    if n <= max {
        return Ok(Limited::Whole(piece(0..n)));
    }
    match rule {
        Overlong::Truncate => Ok(Limited::Truncated {
            piece: piece(0..max),
            tokens_lost: n - max,
            targets_lost: count_targets(&sample.trained[max - 1..]),
        }),
        Overlong::Split => Ok(Limited::Split(
            cuts(n, max)
                .into_iter()
                .map(|range| first_untrained(piece(range)))
                .collect(),
        )),
        Overlong::Drop => Ok(Limited::Dropped),
        Overlong::Error => Err(Fault::new(
            RowErrorKind::OverLong,
            format!("the row has {n} tokens, and the limit is {max}"),
            "raise train.max_seq_length, shorten the row, or set data.overlong = \"truncate\"",
        )),
    }
}

/// Trained tokens that something predicts: all but the first.
pub(crate) fn count_targets(trained: &[bool]) -> usize {
    trained.iter().skip(1).filter(|trained| **trained).count()
}

/// Consecutive pieces of at most `max` tokens. A last piece of one token could not train it, so it takes one more from
/// the piece before.
fn cuts(n: usize, max: usize) -> Vec<std::ops::Range<usize>> {
    let mut ranges: Vec<_> = (0..n).step_by(max).map(|start| start..(start + max).min(n)).collect();
    if let [.., before, last] = &mut ranges[..]
        && last.len() == 1
        && before.len() > 2
    {
        before.end -= 1;
        last.start -= 1;
    }
    ranges
}

fn first_untrained(mut piece: Piece) -> Piece {
    if let Some(first) = piece.trained.first_mut() {
        *first = false;
    }
    piece
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(n: usize) -> Sample {
        Sample {
            ids: (0..n as u32).collect(),
            trained: (0..n).map(|index| index > 0).collect(),
            ..Sample::default()
        }
    }

    proptest! {
        #[test]
        fn prop_pieces_are_the_whole_in_order_and_each_can_be_trained(n in 2usize..400, max in 3usize..50) {
            let sample = sample(n);
            let pieces = match limit(&sample, max, Overlong::Split).unwrap() {
                Limited::Whole(piece) => vec![piece],
                Limited::Split(pieces) => pieces,
                other => panic!("{other:?}"),
            };
            let joined: Vec<u32> = pieces.iter().flat_map(|piece| piece.ids.clone()).collect();
            prop_assert_eq!(joined, sample.ids);
            for piece in &pieces {
                prop_assert!(piece.ids.len() <= max && count_targets(&piece.trained) == piece.ids.len() - 1);
                prop_assert!(piece.ids.len() >= 2);
            }
        }

        #[test]
        fn prop_truncation_accounts_for_every_target(n in 2usize..400, max in 2usize..50) {
            let sample = sample(n);
            if let Limited::Truncated { piece, tokens_lost, targets_lost } = limit(&sample, max, Overlong::Truncate).unwrap() {
                prop_assert_eq!(piece.ids.len() + tokens_lost, n);
                prop_assert_eq!(count_targets(&piece.trained) + targets_lost, n - 1);
            } else {
                prop_assert!(n <= max);
            }
        }
    }
}
