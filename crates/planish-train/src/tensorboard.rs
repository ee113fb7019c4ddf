//! TensorBoard event files, written from the same records as `metrics.jsonl`.
//!
//! A file is a sequence of frames (length, masked CRC-32C of the length, data, masked CRC-32C of the data), the data a
//! protocol-buffer `Event` with one scalar a field. Every frame is flushed, so a viewer can follow the run.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::metrics::Record;
use crate::{Error, Result};

/// Writes the scalars of records.
#[derive(Debug)]
pub struct TensorBoard {
    file: File,
    path: PathBuf,
}

impl TensorBoard {
    /// Starts an event file in `dir`; each part of a resumed run has its own.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path) -> Result<Self> {
        let now = seconds_now();
        let path = dir.join(format!("events.out.tfevents.{:.0}.{}.planish", now, std::process::id()));
        let file = File::create(&path).map_err(|source| Error::Io {
            path: path.clone(),
            action: "create",
            source,
        })?;
        let mut writer = Self { file, path };
        writer.frame(&event(now, 0, &field_bytes(3, b"brain.Event:2")))?;
        Ok(writer)
    }

    /// Writes every number of a record as `<kind>/<field>` at its step.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let fields = record.fields();
        let kind = fields
            .get("kind")
            .and_then(|kind| kind.as_str())
            .unwrap_or_default()
            .to_owned();
        let step = fields.get("step").and_then(|step| step.as_u64()).unwrap_or(0);
        let mut summary = Vec::new();
        for (name, value) in &fields {
            if let (Some(number), false) = (value.as_f64(), ["step", "micro_step"].contains(&name.as_str())) {
                let mut scalar = field_bytes(1, format!("{kind}/{name}").as_bytes());
                scalar.push(2 << 3 | 5);
                scalar.extend((number as f32).to_le_bytes());
                summary.extend(field_bytes(1, &scalar));
            }
        }
        self.frame(&event(seconds_now(), step, &field_bytes(5, &summary)))
    }

    fn frame(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut frame = length.to_vec();
        frame.extend(masked_crc(&length).to_le_bytes());
        frame.extend(data);
        frame.extend(masked_crc(data).to_le_bytes());
        let io = |source| Error::Io {
            path: self.path.clone(),
            action: "append to",
            source,
        };
        self.file.write_all(&frame).and_then(|()| self.file.flush()).map_err(io)
    }
}

/// An `Event`: wall time, step, and one more field.
fn event(seconds: f64, step: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![1 << 3 | 1];
    bytes.extend(seconds.to_le_bytes());
    bytes.push(2 << 3);
    bytes.extend(varint(step));
    bytes.extend(rest);
    bytes
}

/// A length-delimited field.
fn field_bytes(number: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    bytes.extend(varint(value.len() as u64));
    bytes.extend(value);
    bytes
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// The checksum of a frame: CRC-32C, rotated and shifted so that a checksum of checksums stays useful.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), bit by bit: event files are small.
fn crc32c(data: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    !data.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 }
        })
    })
}

fn seconds_now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Position;

    #[test]
    fn checksum_matches_the_published_vectors() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa); // RFC 3720 B.4
    }

    #[test]
    fn frames_hold_their_data_with_right_checksums() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(dir.path()).unwrap();
        let mut record = Record::new(
            "train",
            Position {
                step: 300,
                ..Position::default()
            },
        );
        record.number("loss", 1.5);
        board.write(&record).unwrap();
        let bytes = std::fs::read(&board.path).unwrap();
        let (mut at, mut frames) = (0, Vec::new());
        while at < bytes.len() {
            let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let crc = |from: usize| u32::from_le_bytes(bytes[from..from + 4].try_into().unwrap());
            assert_eq!(crc(at + 8), masked_crc(&bytes[at..at + 8]));
            let data = &bytes[at + 12..at + 12 + length];
            assert_eq!(crc(at + 12 + length), masked_crc(data));
            frames.push(data.to_vec());
            at += 16 + length;
        }
        assert_eq!(frames.len(), 2);
        let holds = |frame: &[u8], part: &[u8]| frame.windows(part.len()).any(|window| window == part);
        assert!(holds(&frames[0], b"brain.Event:2"));
        assert!(holds(&frames[1], b"train/loss") && holds(&frames[1], &1.5f32.to_le_bytes()));
        assert!(holds(&frames[1], &[2 << 3, 0xac, 0x02]), "step 300 as a varint");
    }
}
