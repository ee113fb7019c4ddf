use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Holds `run.lock` of a run directory, so that no second process writes there; let go when dropped.
///
/// The lock is the operating system's lock on the file, which ends with the process that holds it: a crash leaves
/// nothing to clean up. The file says who holds it, as `pid start` with the kernel's start time of the process where
/// it can be had. That text is heeded too, for file systems without locks and for locks written by others: a process
/// that is alive and started then is not disturbed.
#[derive(Debug)]
pub struct RunLock {
    file: File,
}

pub(super) const LOCK_FILE: &str = "run.lock";

impl RunLock {
    /// Takes the lock of a run directory, which must exist. The lock of a dead process is taken over.
    ///
    /// # Errors
    /// [`Error::Locked`] with the holder; [`Error::Write`].
    pub fn take(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_FILE);
        let write_error = |e| Error::write(&path, e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(write_error)?;
        let mut text = String::new();
        // A lock that is not text was not written by a lock holder that we know.
        let _ = (&mut file).take(100).read_to_string(&mut text);
        let locked = |pid: Option<u32>| Error::Locked {
            path: path.clone(),
            pid,
        };
        let holder = Holder::parse(&text);
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(locked(holder.map(|holder| holder.pid))),
            // Without locks in the file system the text alone decides.
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(write_error(e)),
        }
        if let Some(holder) = holder.filter(Holder::is_running) {
            return Err(locked(Some(holder.pid)));
        }
        let own = Holder::current();
        rewrite(&mut file, &format!("{} {}\n", own.pid, own.started.unwrap_or_default())).map_err(write_error)?;
        Ok(Self { file })
    }

    /// The path of the lock file in a run directory.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join(LOCK_FILE)
    }
}

/// Empties the file: an empty lock is free. The file stays, because removing it would race with a process that has just
/// opened it.
impl Drop for RunLock {
    fn drop(&mut self) {
        let _ = rewrite(&mut self.file, "");
        // Closing alone would not do while a child process that is being started still has the file open.
        let _ = self.file.unlock();
    }
}

fn rewrite(file: &mut File, text: &str) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// The process that a lock file names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    /// Start time in the kernel's unit; tells apart two processes that had one number.
    started: Option<u64>,
}

impl Holder {
    fn current() -> Self {
        let pid = std::process::id();
        Self {
            pid,
            started: start_time(pid),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let pid = words.next()?.parse().ok()?;
        Some(Self {
            pid,
            started: words
                .next()
                .and_then(|word| word.parse().ok())
                .filter(|started| *started != 0),
        })
    }

    fn is_running(&self) -> bool {
        is_alive(self.pid) && (self.started.is_none() || start_time(self.pid).is_none_or(|t| Some(t) == self.started))
    }
}

/// Signal 0 asks whether a process exists; a refusal means that it does, under another user.
fn is_alive(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else {
        return false;
    };
    !matches!(rustix::process::test_kill_process(pid), Err(rustix::io::Errno::SRCH))
}

/// Clock ticks from boot to the start of a process: field 22 of its `stat` on Linux, unknown elsewhere.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets, which may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock_text(dir: &Path) -> String {
        std::fs::read_to_string(dir.join(LOCK_FILE)).unwrap()
    }

    #[test]
    fn second_holder_is_refused_until_the_first_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let first = RunLock::take(dir.path()).unwrap();
        let pid = std::process::id();
        assert!(lock_text(dir.path()).starts_with(&format!("{pid} ")));
        assert!(matches!(RunLock::take(dir.path()), Err(Error::Locked { pid: Some(p), .. }) if p == pid));
        drop(first);
        RunLock::take(dir.path()).unwrap();
    }

    #[test]
    fn lock_of_a_dead_process_is_taken_over() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(LOCK_FILE), format!("{} 12345\n", child.id())).unwrap();
        RunLock::take(dir.path()).unwrap();
    }

    #[test]
    fn lock_text_of_a_living_process_is_heeded() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        std::fs::write(dir.path().join(LOCK_FILE), format!("{}\n", child.id())).unwrap();
        let result = RunLock::take(dir.path());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(result, Err(Error::Locked { .. })));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_new_process_with_an_old_number_is_no_holder() {
        let dir = tempfile::tempdir().unwrap();
        let (pid, started) = (std::process::id(), start_time(std::process::id()).unwrap());
        std::fs::write(dir.path().join(LOCK_FILE), format!("{pid} {}\n", started - 1)).unwrap();
        RunLock::take(dir.path()).unwrap();
    }

    #[test]
    fn unreadable_lock_is_free() {
        let dir = tempfile::tempdir().unwrap();
        for text in [&b""[..], b"hello", b"\xff\xff", b"99999999999999 1"] {
            std::fs::write(dir.path().join(LOCK_FILE), text).unwrap();
            RunLock::take(dir.path()).unwrap();
        }
    }
}
