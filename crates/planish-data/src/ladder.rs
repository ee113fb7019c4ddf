//! The lengths that batches may have: few, so that few shapes are ever compiled.

use crate::error::{Error, Result};

/// Where the lengths of a plan will run; decides the short rungs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rungs {
    /// 32, 64 and 96 besides the multiples of 128: CPU and Metal.
    #[default]
    Fine,
    /// Multiples of 128 only: CUDA, whose fused attention has a gradient for no other query length.
    Cuda,
}

/// Lengths in increasing order; every batch has one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ladder {
    rungs: Vec<usize>,
}

const STEP: usize = 128;

impl Ladder {
    /// The rungs for inputs of up to `max_length` tokens: 128 · {1, 2, 3, 4, 6, 8, 12, 16, …}, and `max_length` rounded
    /// up to a multiple of 128; below 128 also 32, 64 and 96 where the backend allows.
    ///
    /// ```
    /// use planish_data::{Ladder, Rungs};
    /// assert_eq!(Ladder::new(600, Rungs::Fine).rungs(), [32, 64, 96, 128, 256, 384, 512, 640]);
    /// assert_eq!(Ladder::new(600, Rungs::Cuda).rungs(), [128, 256, 384, 512, 640]);
    /// assert_eq!(Ladder::new(40, Rungs::Fine).rungs(), [32, 64]);
    /// ```
    pub fn new(max_length: usize, kind: Rungs) -> Self {
        let short: &[usize] = if kind == Rungs::Fine { &[32, 64, 96] } else { &[] };
        let all = short.iter().copied().chain(multiples());
        let mut rungs: Vec<usize> = all.take_while(|rung| *rung < max_length).collect();
        let fits_short = short.iter().copied().find(|rung| *rung >= max_length);
        rungs.push(fits_short.unwrap_or_else(|| max_length.max(1).next_multiple_of(STEP)));
        Self { rungs }
    }

    /// The rungs, increasing.
    pub fn rungs(&self) -> &[usize] {
        &self.rungs
    }

    /// The lowest rung that holds `length` tokens.
    pub(crate) fn fit(&self, length: usize) -> Result<usize> {
        let at = self.rungs.partition_point(|rung| *rung < length);
        self.rungs.get(at).copied().ok_or_else(|| {
            Error::plan(
                format!(
                    "an example has {length} inputs, and the longest batch {}",
                    self.rungs.last().unwrap_or(&0)
                ),
                "plan with the max_seq_length that the data was read with",
            )
        })
    }

    /// Takes rungs out until at most `max_shapes` are used, each time the one that costs the least padding.
    ///
    /// `lengths` are those of the batches, one each.
    pub(crate) fn thin(&self, lengths: &[usize], max_shapes: usize) -> Result<Self> {
        let mut used: Vec<(usize, usize)> = Vec::new();
        for length in lengths {
            let rung = self.fit(*length)?;
            match used.iter_mut().find(|(known, _)| *known == rung) {
                Some((_, count)) => *count += 1,
                None => used.push((rung, 1)),
            }
        }
        used.sort_unstable();
        while used.len() > max_shapes.max(1) {
            let cost = |at: &usize| used[*at].1 * (used[at + 1].0 - used[*at].0);
            let Some(at) = (0..used.len() - 1).min_by_key(cost) else {
                break;
            };
            let (_, count) = used.remove(at);
            used[at].1 += count;
        }
        Ok(Self {
            rungs: used.into_iter().map(|(rung, _)| rung).collect(),
        })
    }
}

/// 128 · {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, …}: powers of two and the numbers halfway between.
fn multiples() -> impl Iterator<Item = usize> {
    let doubled = (1..usize::BITS - 9).flat_map(|power| [2usize << (power - 1), 3usize << (power - 1)]);
    std::iter::once(1).chain(doubled).map(|multiple| multiple * STEP)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn multiples_follow_the_design() {
        let first: Vec<usize> = multiples().map(|rung| rung / STEP).take(11).collect();
        assert_eq!(first, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]);
    }

    #[test]
    fn thinning_takes_out_the_rung_that_costs_least() {
        let lengths: Vec<usize> = std::iter::repeat_n(30, 100).chain([60, 200]).collect();
        let thin = Ladder::new(256, Rungs::Fine).thin(&lengths, 2).unwrap();
        assert_eq!(
            thin.rungs(),
            [32, 256],
            "one batch of 60 in 256 pads less than a hundred of 30 in 64"
        );
    }

    proptest! {
        #[test]
        fn prop_every_length_fits_tightly(max in 1usize..40_000, share in 0.0f64..=1.0) {
            let length = ((max as f64 * share) as usize).max(1);
            for kind in [Rungs::Fine, Rungs::Cuda] {
                let ladder = Ladder::new(max, kind);
                let rung = ladder.fit(length).unwrap();
                prop_assert!(rung >= length && rung <= max.next_multiple_of(128));
                prop_assert!(rung.is_multiple_of(128) || kind == Rungs::Fine && [32, 64, 96].contains(&rung));
                prop_assert!(ladder.rungs().is_sorted_by(|a, b| a < b));
            }
        }

        #[test]
        fn prop_thinning_keeps_the_longest_and_meets_the_limit(
            lengths in prop::collection::vec(1usize..5000, 1..60), max_shapes in 1usize..8,
        ) {
            let ladder = Ladder::new(5000, Rungs::Fine);
            let thin = ladder.thin(&lengths, max_shapes).unwrap();
            prop_assert!(thin.rungs().len() <= max_shapes);
            for length in &lengths {
                prop_assert!(thin.fit(*length).unwrap() >= *length);
            }
        }
    }
}
