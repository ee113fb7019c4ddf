//! The state and the manifest of a checkpoint: what is accepted must come back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| planish_checkpoint::run_state::fuzzing::checkpoint_state(bytes));
