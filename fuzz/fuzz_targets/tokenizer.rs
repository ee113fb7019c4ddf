//! A stranger's `tokenizer.json`, encoding and decoding with it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(
    // The fuzzer's own hook ends the process at any panic, also at one that is caught and becomes an error.
    init: planish_data::fuzzing::quiet_where_guarded(),
    |bytes: &[u8]| planish_data::fuzzing::tokenizer(bytes)
);
