//! A GGUF file of a stranger's: any bytes must give an answer or an error, in memory bounded by their number.
#![no_main]

use libfuzzer_sys::fuzz_target;
use planish_hub::gguf::{Gguf, check, dequantize};

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = Gguf::from_bytes(bytes.to_vec(), "fuzz.gguf".as_ref()) else { return };
    for tensor in file.tensors() {
        let row = tensor.shape.last().copied().unwrap_or(1);
        let stored = file.bytes(tensor);
        let mut values = vec![0.0; row];
        dequantize(tensor.kind, &stored[..row / tensor.kind.block_len() * tensor.kind.block_bytes()], &mut values);
    }
    let _ = check(&file);
});
