//! The end of what a process says, without ever holding more of it.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes kept.
const KEPT: usize = 1 << 16;
/// Lines given.
const LINES: usize = 20;
/// Characters of a line given.
const WIDTH: usize = 500;
/// How long the reader may go on after the process has ended: somebody else may hold the other end.
const PATIENCE: Duration = Duration::from_millis(500);

/// Reads a stream on a thread of its own, so that a full pipe stops nobody.
pub(crate) struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
    reader: JoinHandle<()>,
}

impl Tail {
    pub(crate) fn of(mut stream: impl Read + Send + 'static) -> Self {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let shared = Arc::clone(&kept);
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut chunk) {
                let mut kept = shared.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(&chunk[..count]);
                let surplus = kept.len().saturating_sub(KEPT);
                kept.drain(..surplus);
            }
        });
        Self { kept, reader }
    }

    /// The last lines that are not empty.
    pub(crate) fn lines(self) -> Vec<String> {
        let asked = Instant::now();
        while !self.reader.is_finished() && asked.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        let bytes: Vec<u8> = self
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .copied()
            .collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(LINES)..]
            .iter()
            .map(|line| line.chars().take(WIDTH).collect())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_its_last_lines() {
        let flood: String = (0..200_000).map(|i| format!("line {i}\n\n")).collect();
        let lines = Tail::of(std::io::Cursor::new(flood)).lines();
        assert_eq!(lines.len(), LINES);
        assert_eq!(lines[LINES - 1], "line 199999");
    }

    #[test]
    fn bad_text_and_long_lines_are_cut_not_refused() {
        let bytes = [b"\xff\xfe".as_slice(), "ä".repeat(2000).as_bytes()].concat();
        let lines = Tail::of(std::io::Cursor::new(bytes)).lines();
        assert_eq!(lines[0].chars().count(), WIDTH);
    }
}
