//! The configuration of an adapter, read as mlx-lm's, as PEFT's and as our sidecar.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| planish_checkpoint::adapter::fuzzing::adapter_config(bytes));
