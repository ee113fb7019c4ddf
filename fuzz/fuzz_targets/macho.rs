//! Any bytes as a macOS library or program.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(image) = metal_check::macho::parse(data) {
        let _ = (image.foreign_libraries().len(), image.relative_rpaths().len());
    }
});
