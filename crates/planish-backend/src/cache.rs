//! Remembered verdicts, so that a program does not probe at every start.

use std::path::{Path, PathBuf};

use planish_core::{fs, hash};
use serde::{Deserialize, Serialize};

use crate::report::{ProbeReport, SCHEMA};
use crate::{Backend, Error, Result};

/// Everything that a verdict depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheKey {
    /// The probed device kind.
    pub backend: Backend,
    /// Version of the report's layout.
    pub schema: u32,
    /// Size and time of change of the executable.
    pub executable: String,
    /// Version of the MLX library.
    pub mlx_version: String,
    /// Version and build of the system.
    pub system: String,
    /// Environment variables that MLX and its libraries read, with their values.
    pub environment: Vec<(String, String)>,
}

impl CacheKey {
    /// The key for this program on this machine.
    ///
    /// # Errors
    /// [`Error::Io`] when the executable cannot be looked at.
    pub fn of(backend: Backend, executable: &Path) -> Result<Self> {
        let io = |source| Error::Io {
            path: executable.to_owned(),
            action: "look at",
            source,
        };
        let meta = std::fs::metadata(executable).map_err(io)?;
        let changed = meta
            .modified()
            .ok()
            .and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        let mut environment: Vec<(String, String)> = std::env::vars().filter(|(name, _)| is_relevant(name)).collect();
        environment.sort();
        Ok(Self {
            backend,
            schema: SCHEMA,
            executable: format!("{} {}", meta.len(), changed.map_or(0, |t| t.as_nanos())),
            mlx_version: planish_mlx::version()?,
            system: system(),
            environment,
        })
    }

    fn file_name(&self) -> String {
        let text = serde_json::to_string(self).unwrap_or_default();
        format!(
            "probe-{}-{}.json",
            self.backend,
            &hash::sha256_hex(text.as_bytes())[..16]
        )
    }
}

/// A folder of verdicts.
#[derive(Debug, Clone)]
pub struct VerdictCache {
    dir: PathBuf,
}

impl VerdictCache {
    /// Verdicts in `dir`, which need not exist.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The remembered report, marked as such; a file that cannot be read is none.
    pub fn get(&self, key: &CacheKey) -> Option<ProbeReport> {
        let text = std::fs::read_to_string(self.dir.join(key.file_name())).ok()?;
        let mut report: ProbeReport = serde_json::from_str(&text).ok()?;
        report.cached = true;
        (report.backend == key.backend && report.schema == SCHEMA).then_some(report)
    }

    /// Remembers a report, unless its cause may pass by itself.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put(&self, key: &CacheKey, report: &ProbeReport) -> Result<()> {
        if !report.verdict.is_lasting() || report.code == "COMPILER_SERVICE_DEAD" {
            return Ok(());
        }
        let path = self.dir.join(key.file_name());
        let io = |source| Error::Io {
            path: path.clone(),
            action: "write",
            source,
        };
        std::fs::create_dir_all(&self.dir).map_err(io)?;
        let text = serde_json::to_string_pretty(report).unwrap_or_default();
        fs::write_atomic(&path, text.as_bytes()).map_err(io)
    }
}

fn is_relevant(name: &str) -> bool {
    [
        "MLX_",
        "METAL_",
        "MTL_",
        "CUDA_",
        "NVIDIA_",
        "LD_LIBRARY_PATH",
        "DYLD_",
        "OPENBLAS_",
    ]
    .iter()
    .any(|prefix| name.starts_with(prefix))
}

/// What identifies the system: its build on macOS, the kernel elsewhere.
fn system() -> String {
    let plist = std::fs::read_to_string("/System/Library/CoreServices/SystemVersion.plist");
    let kernel = || std::fs::read_to_string("/proc/sys/kernel/osrelease");
    let text = plist.or_else(|_| kernel()).unwrap_or_default();
    format!("{} {}", std::env::consts::OS, hash::sha256_hex(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Verdict;
    use crate::probe::report_of_nothing;

    fn key(executable: &str) -> CacheKey {
        CacheKey {
            backend: Backend::Metal,
            schema: SCHEMA,
            executable: executable.into(),
            mlx_version: "0.32.2".into(),
            system: "test".into(),
            environment: Vec::new(),
        }
    }

    #[test]
    fn lasting_verdicts_come_back_and_say_so() {
        let dir = tempfile::tempdir().unwrap();
        let cache = VerdictCache::new(dir.path().join("sub"));
        assert_eq!(cache.get(&key("a")), None);
        let report = ProbeReport {
            verdict: Verdict::WrongResults,
            ..report_of_nothing(Backend::Metal, 7)
        };
        cache.put(&key("a"), &report).unwrap();
        assert_eq!(cache.get(&key("a")), Some(ProbeReport { cached: true, ..report }));
        assert_eq!(cache.get(&key("another build")), None);
    }

    #[test]
    fn passing_verdicts_are_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let cache = VerdictCache::new(dir.path().into());
        for verdict in [Verdict::Hung, Verdict::NoReport, Verdict::Oom] {
            let report = ProbeReport {
                verdict,
                ..report_of_nothing(Backend::Metal, 7)
            };
            cache.put(&key("a"), &report).unwrap();
            assert_eq!(cache.get(&key("a")), None, "{verdict:?}");
        }
    }

    #[test]
    fn a_damaged_file_is_no_verdict() {
        let dir = tempfile::tempdir().unwrap();
        let cache = VerdictCache::new(dir.path().into());
        std::fs::write(dir.path().join(key("a").file_name()), "{\"schema\": 1,").unwrap();
        assert_eq!(cache.get(&key("a")), None);
    }
}
