//! Any bytes as a run configuration, and its lines as arguments of `--set`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| planish_core::fuzzing::run_toml(bytes));
