//! Who sees whom.

use planish_mlx::Array;
use planish_nn::AttentionMask;

use crate::{largest, logits, logits_masked, max_difference, small_random, tiny_llama};

const TEXT: [u32; 16] = [
    641, 280, 1220, 274, 349, 284, 500, 84, 479, 366, 683, 293, 277, 14, 285, 323,
];

#[test]
fn changed_token_leaves_all_logits_before_it_bit_identical() {
    let model = tiny_llama();
    let before = logits(&model, &[&TEXT]);
    for changed in [1, 7, 15] {
        let mut other = TEXT;
        other[changed] = 99;
        let after = logits(&model, &[&other]);
        let boundary = changed * 2048;
        assert_eq!(before[..boundary], after[..boundary], "token {changed}");
        assert_ne!(before[boundary..], after[boundary..], "token {changed}");
    }
}

#[test]
fn batch_of_rows_equals_rows_one_by_one() {
    let model = tiny_llama();
    let reversed: Vec<u32> = TEXT.iter().rev().copied().collect();
    let together = logits(&model, &[&TEXT, &reversed]);
    let apart = [logits(&model, &[&TEXT]), logits(&model, &[&reversed])].concat();
    assert!(max_difference(&together, &apart) < 1e-5 * largest(&apart));
}

#[test]
fn right_padding_changes_no_real_token() {
    let model = tiny_llama();
    let padded = [&TEXT[..], &[0; 16]].concat();
    let padded_other = [&TEXT[..], &[5; 16]].concat();
    let found = logits(&model, &[&padded]);
    assert!(max_difference(&found[..16 * 2048], &logits(&model, &[&TEXT])) < 1e-4);
    assert_eq!(found[..16 * 2048], logits(&model, &[&padded_other])[..16 * 2048]);
}

#[test]
fn packed_segments_equal_separate_rows() {
    let model = small_random();
    let (one, other): (Vec<u32>, Vec<u32>) = ((3..13).collect(), (20..27).collect());
    let packed = [&one[..], &other, &[0; 3]].concat();
    let segment_ids: Vec<i32> = [vec![0; 10], vec![1; 7], vec![2; 3]].concat();
    let mask = AttentionMask::Packed {
        segment_ids: Array::from_slice(&segment_ids, &[1, 20]),
    };
    let found = logits_masked(&model, &[&packed], &mask);
    let v = 50;
    for (segment, at) in [(&one, 0), (&other, 10)] {
        let expect = logits(&model, &[segment]);
        let found = &found[at * v..(at + segment.len()) * v];
        // Positions run on in the packed row; attention depends on their differences only.
        assert!(
            max_difference(found, &expect) < 1e-5 * largest(&expect),
            "segment at {at}"
        );
    }
    let unmasked = logits(&model, &[&packed]);
    assert!(
        max_difference(&unmasked[10 * v..17 * v], &found[10 * v..17 * v]) > 1e-3,
        "the mask does nothing"
    );
}

#[test]
fn changed_segment_leaves_the_next_one_bit_identical() {
    let model = small_random();
    let segment_ids = Array::from_slice(&[0, 0, 0, 1, 1, 1], &[1, 6]);
    let mask = AttentionMask::Packed { segment_ids };
    let one = logits_masked(&model, &[&[1, 2, 3, 7, 8, 9]], &mask);
    let other = logits_masked(&model, &[&[4, 2, 3, 7, 8, 9]], &mask);
    assert_eq!(one[3 * 50..], other[3 * 50..]);
}
