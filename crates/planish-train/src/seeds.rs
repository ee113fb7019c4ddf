//! Keys for random draws on the device, each a function of the seed and of where in the run it is used.

use mlx_rs::Array;

use crate::Result;

/// The key from which every dropout mask of one forward pass derives.
pub(crate) fn dropout_key(seed: u64, step: usize, micro_batch: usize) -> Result<Array> {
    let mixed = mix(mix(mix(seed) ^ step as u64) ^ micro_batch as u64);
    Ok(mlx_rs::random::key(mixed)?)
}

/// Finaliser of splitmix64 (Steele et al. 2014), a bijection of 64 bits.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_its_own_key() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..3 {
            for step in 0..20 {
                for micro in 0..4 {
                    seen.insert(dropout_key(seed, step, micro).unwrap().as_slice::<u32>().to_vec());
                }
            }
        }
        assert_eq!(seen.len(), 3 * 20 * 4);
    }
}
