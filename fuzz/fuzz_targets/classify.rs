//! Any bytes as a log: always an answer from the table, never a panic, and UNKNOWN never blames anybody.
#![no_main]

use libfuzzer_sys::fuzz_target;
use metal_check::catalogue::{Owner, entry};

fuzz_target!(|data: &[u8]| {
    let answer = metal_check::classify::classify(data);
    assert!(entry(&answer.code).is_some());
    assert!(answer.code != "UNKNOWN" || answer.owner == Owner::None);
});
