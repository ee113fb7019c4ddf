use mlx_rs::ops::indexing::{NewAxis, TryIndexOp};
use planish_mlx::Array;

use crate::{Error, Result};

/// Which earlier tokens a token attends to.
#[derive(Debug, Clone)]
pub enum AttentionMask {
    /// All tokens of its row up to itself (within the model's window). Right padding needs nothing more: no real token
    /// comes after it.
    Causal,
    /// The same within its own segment only: `segment_ids` i32 `[b, s]`. Padding carries an id of its own.
    Packed {
        /// One id a token.
        segment_ids: Array,
    },
}

/// One call's masks: one for each window that blocks have.
#[derive(Debug, Clone)]
pub(crate) struct Masks {
    by_window: Vec<(Option<i32>, ReadyMask)>,
}

/// A mask made ready for one call, shared by all blocks of one window.
#[derive(Debug, Clone)]
pub(crate) enum ReadyMask {
    /// A single new token: it attends to everything that is kept.
    Full,
    /// The fused causal form.
    Causal,
    /// Anything else.
    Array {
        /// true = attend, `[1 or b, 1, s, t]`.
        allowed: Array,
        /// The same as a rule.
        rule: MaskRule,
    },
}

/// Which keys a causal query sees, as a rule instead of a table.
#[derive(Debug, Clone, Default)]
pub(crate) struct MaskRule {
    /// Only so many latest ones.
    pub(crate) window: Option<i32>,
    /// Only those of its own segment: i32 `[b, s]`.
    pub(crate) segment_ids: Option<Array>,
    /// Each token's distance from the first one of its segment, i32 `[b · s]`: where the rotation counts from.
    pub(crate) positions: Option<Array>,
}

impl AttentionMask {
    /// The masks for `length` new tokens after `offset` earlier ones, for blocks of these windows.
    pub(crate) fn ready(&self, offset: i32, length: i32, windows: impl Iterator<Item = Option<i32>>) -> Result<Masks> {
        let mut by_window: Vec<(Option<i32>, ReadyMask)> = Vec::new();
        for window in windows {
            if by_window.iter().all(|(known, _)| *known != window) {
                by_window.push((window, self.of_window(offset, length, window)?));
            }
        }
        Ok(Masks { by_window })
    }

    /// Whether rows hold several sequences.
    pub(crate) fn is_packed(&self) -> bool {
        matches!(self, AttentionMask::Packed { .. })
    }

    fn of_window(&self, offset: i32, length: i32, window: Option<i32>) -> Result<ReadyMask> {
        let window = window.filter(|&window| offset + length > window);
        match self {
            AttentionMask::Causal if length == 1 => Ok(ReadyMask::Full),
            AttentionMask::Causal if window.is_none() => Ok(ReadyMask::Causal),
            AttentionMask::Causal => Ok(ReadyMask::Array {
                allowed: positions_allowed(offset, length, window)?,
                rule: MaskRule {
                    window,
                    ..MaskRule::default()
                },
            }),
            AttentionMask::Packed { .. } if offset > 0 => Err(Error::PackedWithCache),
            AttentionMask::Packed { segment_ids } => {
                let query = segment_ids.try_index((.., NewAxis, .., NewAxis))?; // [b, 1, s, 1]
                let key = segment_ids.try_index((.., NewAxis, NewAxis, ..))?; // [b, 1, 1, s]
                let same = query.eq(key)?;
                let allowed = positions_allowed(offset, length, window)?.logical_and(&same)?;
                Ok(ReadyMask::Array {
                    allowed,
                    rule: MaskRule {
                        window,
                        segment_ids: Some(segment_ids.clone()),
                        positions: Some(from_own_beginning(&same, length)?),
                    },
                })
            }
        }
    }
}

impl Masks {
    /// The mask of a block with this window.
    pub(crate) fn of(&self, window: Option<i32>) -> &ReadyMask {
        let own = self.by_window.iter().find(|(known, _)| *known == window);
        own.map_or(&ReadyMask::Causal, |(_, mask)| mask)
    }
}

/// How many of `offset` earlier tokens a block with this window still needs.
pub(crate) fn kept_tokens(offset: i32, window: Option<i32>) -> i32 {
    window.map_or(offset, |window| offset.min(window - 1))
}

/// Each token's distance from the first key of its segment, from `[b, 1, s, s]`: i32 `[b · s]`.
fn from_own_beginning(same: &Array, length: i32) -> Result<Array> {
    let index = mlx_rs::ops::arange::<_, i32>(0, length, None)?;
    let first = mlx_rs::ops::select(same, &index, Array::from_int(length))?.min_axis(-1, false)?; // [b, 1, s]
    Ok(index.subtract(first)?.reshape(&[-1])?)
}

/// `k ≤ q` and, with a window, `q − k < window`, for the keys that are kept: bool `[1, 1, s, t]`.
pub(crate) fn positions_allowed(offset: i32, length: i32, window: Option<i32>) -> Result<Array> {
    let total = offset + length;
    let first = offset - kept_tokens(offset, window);
    let query = mlx_rs::ops::arange::<_, i32>(offset, total, None)?.reshape(&[1, 1, -1, 1])?;
    let key = mlx_rs::ops::arange::<_, i32>(first, total, None)?.reshape(&[1, 1, 1, -1])?;
    let causal = key.le(&query)?;
    let Some(window) = window else { return Ok(causal) };
    Ok(causal.logical_and(query.subtract(key)?.lt(Array::from_int(window))?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(mask: &AttentionMask, offset: i32, length: i32, window: Option<i32>) -> Vec<Vec<i32>> {
        let ReadyMask::Array { allowed: array, .. } = mask.of_window(offset, length, window).unwrap() else {
            panic!("expected an array");
        };
        let values = array.as_type::<i32>().unwrap().to_vec_exact::<i32>().unwrap();
        values.chunks(array.dim(-1) as usize).map(<[i32]>::to_vec).collect()
    }

    #[test]
    fn window_counts_the_token_itself() {
        let expect = vec![vec![1, 0, 0], vec![1, 1, 0], vec![0, 1, 1]];
        assert_eq!(allowed(&AttentionMask::Causal, 0, 3, Some(2)), expect);
        // After four tokens, of which one is kept.
        assert_eq!(
            allowed(&AttentionMask::Causal, 4, 2, Some(2)),
            vec![vec![1, 1, 0], vec![0, 1, 1]]
        );
    }

    #[test]
    fn segments_do_not_see_each_other() {
        let segment_ids = Array::from_slice(&[0, 0, 1, 1], &[1, 4]);
        let expect = vec![vec![1, 0, 0, 0], vec![1, 1, 0, 0], vec![0, 0, 1, 0], vec![0, 0, 1, 1]];
        assert_eq!(allowed(&AttentionMask::Packed { segment_ids }, 0, 4, None), expect);
    }

    #[test]
    fn short_input_within_the_window_needs_no_array() {
        assert!(matches!(
            AttentionMask::Causal.of_window(0, 4, Some(4)).unwrap(),
            ReadyMask::Causal
        ));
        assert!(matches!(
            AttentionMask::Causal.of_window(7, 1, None).unwrap(),
            ReadyMask::Full
        ));
    }

    #[test]
    fn err_packed_batch_after_a_cache() {
        let mask = AttentionMask::Packed {
            segment_ids: Array::from_slice(&[0, 0], &[1, 2]),
        };
        assert!(matches!(mask.of_window(1, 2, None), Err(Error::PackedWithCache)));
    }
}
