//! Where token ids wait between reading and training: in memory, or in an unnamed file when they are many.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// Set in a stored id whose token is trained; no vocabulary comes near this size.
const TRAINED: u32 = 1 << 31;

/// Ids and their trained flags, one after another; examples are ranges of it.
#[derive(Debug)]
pub(crate) struct TokenStore {
    memory: Vec<u32>,
    limit: usize,
    /// Present once the limit was passed: everything up to `spilled` tokens lies there.
    file: Option<File>,
    spilled: usize,
}

impl TokenStore {
    /// Keeps up to `limit_bytes` in memory.
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self {
            memory: Vec::new(),
            limit: (limit_bytes / size_of::<u32>()).max(1),
            file: None,
            spilled: 0,
        }
    }

    /// Appends an example; gives the position of its first token.
    pub(crate) fn push(&mut self, ids: &[u32], trained: &[bool]) -> io::Result<usize> {
        let at = self.spilled + self.memory.len();
        self.memory.extend(
            ids.iter()
                .zip(trained)
                .map(|(id, trained)| id | if *trained { TRAINED } else { 0 }),
        );
        if self.memory.len() > self.limit {
            self.spill()?;
        }
        Ok(at)
    }

    /// Ends writing: later reads see everything.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        if self.file.is_some() {
            self.spill()?;
        }
        self.memory.shrink_to_fit();
        Ok(())
    }

    /// The ids and flags of `len` tokens from a position that [`push`](Self::push) gave.
    pub(crate) fn get(&self, at: usize, len: usize) -> io::Result<(Vec<u32>, Vec<bool>)> {
        let words = if at >= self.spilled {
            self.memory[at - self.spilled..][..len].to_vec()
        } else {
            let file = self
                .file
                .as_ref()
                .ok_or_else(|| io::Error::other("the token file is gone"))?;
            let mut bytes = vec![0; len * size_of::<u32>()];
            file.read_exact_at(&mut bytes, (at * size_of::<u32>()) as u64)?;
            bytes
                .chunks_exact(4)
                .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect()
        };
        Ok(words
            .into_iter()
            .map(|word| (word & !TRAINED, word & TRAINED != 0))
            .unzip())
    }

    fn spill(&mut self) -> io::Result<()> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => tempfile::tempfile()?,
        };
        let bytes: Vec<u8> = self.memory.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all(&bytes)?;
        self.spilled += self.memory.len();
        self.memory.clear();
        self.file = Some(file);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_gives_back_what_was_put_in_on_disk_and_in_memory() {
        for limit_bytes in [1 << 20, 100, 4] {
            let mut store = TokenStore::new(limit_bytes);
            let rows: Vec<(Vec<u32>, Vec<bool>)> = (0..50u32)
                .map(|row| {
                    (
                        (0..row).map(|k| row * 100 + k).collect(),
                        (0..row).map(|k| k % 3 == 0).collect(),
                    )
                })
                .collect();
            let places: Vec<_> = rows
                .iter()
                .map(|(ids, trained)| store.push(ids, trained).unwrap())
                .collect();
            store.finish().unwrap();
            assert_eq!(store.file.is_some(), limit_bytes < 1 << 20);
            for (row, at) in rows.iter().zip(places) {
                assert_eq!(store.get(at, row.0.len()).unwrap(), *row);
            }
        }
    }
}
