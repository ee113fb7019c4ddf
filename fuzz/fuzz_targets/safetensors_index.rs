//! The index of a sharded model: any text must give an index or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| planish_tensors::fuzzing::safetensors_index(bytes));
