//! How many logits exist at one time.

use planish_mlx::device::{self, DeviceKind};

use crate::{Error, Result};

/// Logits of a chunk may take this much before chunks get smaller.
const LOGITS_BYTES: usize = 128 << 20;
/// The same on a GPU, where products of 1024 rows are faster than of half as many.
const LOGITS_BYTES_GPU: usize = 512 << 20;
/// A chunk on a GPU that does not hold everything is a multiple of this.
const CHUNK_STEP_GPU: usize = 128;
/// Trained positions of a chunk when all at once would take more.
pub const CHUNK_TOKENS: usize = 1024;

/// Positions of a chunk: as asked for, else [as many as fit](automatic_chunk).
pub(super) fn size(asked: Option<usize>, trained: usize, vocab_size: usize) -> Result<i32> {
    let chunk = match asked {
        Some(chunk) => chunk,
        None => automatic_chunk(device::default_kind()?, trained, vocab_size),
    };
    match i32::try_from(chunk) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(Error::OutOfRange {
            name: "loss.chunk_tokens",
            value: chunk as f64,
            range: "1 to 2147483647",
            row: None,
        }),
    }
}

/// All of `trained` positions where their logits take up to 128 MiB (512 MiB on a GPU), else as many as do, and at most
/// [`CHUNK_TOKENS`].
pub fn automatic_chunk(device: DeviceKind, trained: usize, vocab_size: usize) -> usize {
    match device {
        DeviceKind::Cpu => chunk_within(LOGITS_BYTES, trained, vocab_size),
        DeviceKind::Gpu => match chunk_within(LOGITS_BYTES_GPU, trained, vocab_size) {
            part if part < trained && part > CHUNK_STEP_GPU => part / CHUNK_STEP_GPU * CHUNK_STEP_GPU,
            chunk => chunk,
        },
    }
}

fn chunk_within(bytes: usize, trained: usize, vocab_size: usize) -> usize {
    let that_fit = (bytes / (vocab_size * size_of::<f32>()).max(1)).max(1);
    if trained <= that_fit {
        trained.max(1)
    } else {
        that_fit.min(CHUNK_TOKENS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_bounded_by_memory_and_by_count() {
        let cpu = |trained, vocab_size| automatic_chunk(DeviceKind::Cpu, trained, vocab_size);
        assert_eq!(cpu(500, 32_000), 500);
        assert_eq!(cpu(0, 32_000), 1);
        assert_eq!(cpu(4096, 32_000), 1024);
        assert_eq!(cpu(4096, 131_072), 256);
        assert_eq!(cpu(10, 1 << 40), 1);
        let gpu = |trained, vocab_size| automatic_chunk(DeviceKind::Gpu, trained, vocab_size);
        assert_eq!(gpu(4096, 128_256), 1024);
        assert_eq!(gpu(4096, 151_936), 768);
        assert_eq!(gpu(500, 151_936), 500);
        assert_eq!(gpu(4096, 49_152), 1024);
    }
}
