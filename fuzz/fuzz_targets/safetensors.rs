//! A safetensors file of a stranger's: what the header declares must lie inside the file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| planish_tensors::fuzzing::safetensors(bytes));
