//! Any bytes as a Metal library: header and list of functions.
#![no_main]

use libfuzzer_sys::fuzz_target;
use metal_check::metallib::{parse_functions, parse_header, summarize};

fuzz_target!(|data: &[u8]| {
    let _ = parse_header(data, data.len() as u64);
    if let Ok(functions) = parse_functions(data) {
        let _ = summarize(&functions);
    }
});
