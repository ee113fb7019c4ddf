//! Orders and draws that depend on a key and nothing else: the same on every machine and in every version.
//!
//! The generator is SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2714064.2660195). Random crates promise no
//! stable streams across versions, and a resumed run must see the order of the first.

/// What a stream of numbers is for, so that equal seeds do not give related orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Rows = 1,
    Windows = 2,
    Sampler = 3,
}

/// A keyed generator.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64, epoch: u64, purpose: Purpose) -> Self {
        let mut state = Self(seed);
        let key = state.next() ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut state = Self(key);
        Self(state.next() ^ ((purpose as u64) << 56))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, each equally likely (Lemire 2019, arXiv 1805.10941).
    fn below(&mut self, bound: u64) -> u64 {
        let mut product = u128::from(self.next()) * u128::from(bound);
        let threshold = bound.wrapping_neg() % bound;
        while (product as u64) < threshold {
            product = u128::from(self.next()) * u128::from(bound);
        }
        (product >> 64) as u64
    }

    /// A number in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Fisher and Yates.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

/// How often each item is drawn in one epoch: systematic resampling with one random offset.
///
/// Item `i` comes `⌊e⌋` or `⌈e⌉` times, `e = n · wᵢ / Σw`, and `e` times on average.
pub(crate) fn systematic_copies(weights: &[f64], offset: f64) -> Vec<usize> {
    let total: f64 = weights.iter().sum();
    let scale = weights.len() as f64 / total;
    let mut sum = 0.0;
    let mut drawn = 0usize;
    let mut copies: Vec<usize> = weights
        .iter()
        .map(|weight| {
            sum += weight * scale;
            // Draws stand at offset, offset + 1, …; those below the running sum are taken.
            let upto = (sum - offset).ceil().max(0.0) as usize;
            let count = upto.saturating_sub(drawn);
            drawn += count;
            count
        })
        .collect();
    // The last sum may miss n by a rounding error, and with it one draw.
    if let Some(last) = copies.iter_mut().rev().find(|_| drawn != weights.len()) {
        *last = (*last + weights.len()).saturating_sub(drawn);
    }
    copies
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_pinned() {
        let mut items: Vec<u32> = (0..8).collect();
        Random::new(0, 0, Purpose::Rows).shuffle(&mut items);
        let first = items.clone();
        let mut again: Vec<u32> = (0..8).collect();
        Random::new(0, 0, Purpose::Rows).shuffle(&mut again);
        assert_eq!(first, again);
        for (seed, epoch, purpose) in [(1, 0, Purpose::Rows), (0, 1, Purpose::Rows), (0, 0, Purpose::Windows)] {
            let mut other: Vec<u32> = (0..8).collect();
            Random::new(seed, epoch, purpose).shuffle(&mut other);
            assert_ne!(first, other);
        }
    }

    #[test]
    fn every_order_is_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            let mut items = [0, 1, 2];
            Random::new(7, epoch, Purpose::Rows).shuffle(&mut items);
            *counts.entry(items).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        // Standard deviation 29 around 1000.
        assert!(counts.values().all(|count| (880..1120).contains(count)), "{counts:?}");
    }

    proptest::proptest! {
        #[test]
        fn prop_copies_are_floor_or_ceiling_and_add_up(
            weights in proptest::collection::vec(0.01..5.0f64, 1..60), seed: u64, epoch in 0u64..1000,
        ) {
            let copies = systematic_copies(&weights, Random::new(seed, epoch, Purpose::Sampler).unit());
            let scale = weights.len() as f64 / weights.iter().sum::<f64>();
            proptest::prop_assert_eq!(copies.iter().sum::<usize>(), weights.len());
            for (count, weight) in copies.iter().zip(&weights) {
                let (expected, rounding) = (weight * scale, 1e-9);
                proptest::prop_assert!(*count as f64 >= (expected - rounding).floor());
                proptest::prop_assert!(*count as f64 <= (expected + rounding).ceil());
            }
        }
    }

    #[test]
    fn copies_stay_within_floor_and_ceil_and_meet_their_mean() {
        let weights = [0.1, 0.7, 1.0, 2.2, 1.0];
        let total: f64 = weights.iter().sum();
        let mut sums = [0usize; 5];
        let epochs = 10_000;
        for epoch in 0..epochs {
            let copies = systematic_copies(&weights, Random::new(3, epoch, Purpose::Sampler).unit());
            assert_eq!(copies.iter().sum::<usize>(), 5);
            for ((count, weight), sum) in copies.iter().zip(weights).zip(&mut sums) {
                let expected = 5.0 * weight / total;
                assert!((*count as f64 - expected).abs() < 1.0, "{count} for {expected}");
                *sum += count;
            }
        }
        for (sum, weight) in sums.iter().zip(weights) {
            let expected = 5.0 * weight / total;
            let mean = *sum as f64 / epochs as f64;
            // One draw a boundary: standard error sqrt(p(1-p)/10000) ≤ 0.005; 1 % for expectations of 1 and more.
            assert!(
                (mean - expected).abs() < 0.01 * expected.max(1.0),
                "{mean} for {expected}"
            );
        }
    }
}
