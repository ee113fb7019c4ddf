//! A stranger's `config.json`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| planish_core::fuzzing::model_config(bytes));
