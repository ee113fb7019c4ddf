//! Remembered verdicts, so that a program does not probe at every start.

use std::path::{Path, PathBuf};

use planish_core::{fs, hash};
use serde::{Deserialize, Serialize};

use crate::report::{ProbeReport, SCHEMA};
use crate::{Backend, Error, Machine, Result, files};

/// Everything that a verdict depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheKey {
    /// The probed device kind.
    pub backend: Backend,
    /// Version of the report's layout.
    pub schema: u32,
    /// Size and time of change of the executable.
    pub executable: String,
    /// The same of MLX's library and of its compiled kernels.
    pub mlx_files: Vec<String>,
    /// Version of the MLX library.
    pub mlx_version: String,
    /// Version and build of the system.
    pub system: String,
    /// Processor, GPUs and their driver, as the system names them.
    pub devices: Vec<String>,
    /// Environment variables that MLX and its libraries read, with their values.
    pub environment: Vec<(String, String)>,
}

impl CacheKey {
    /// The key for this program on this machine.
    ///
    /// # Errors
    /// [`Error::Io`] when the executable cannot be looked at.
    pub fn of(backend: Backend, executable: &Path, machine: &Machine) -> Result<Self> {
        let library = planish_mlx::library::path();
        let metallib = library.as_deref().and_then(files::metallib_of);
        let mlx_files: Result<Vec<String>> = library.iter().chain(&metallib).map(|path| state_of(path)).collect();
        let mut environment: Vec<(String, String)> = std::env::vars().filter(|(name, _)| is_relevant(name)).collect();
        environment.sort();
        let named = [&machine.processor, &machine.nvidia_driver].into_iter().flatten();
        Ok(Self {
            backend,
            schema: SCHEMA,
            executable: state_of(executable)?,
            mlx_files: mlx_files?,
            mlx_version: planish_mlx::version()?,
            system: format!("{} {}", std::env::consts::OS, machine.system),
            devices: named.chain(&machine.nvidia).cloned().collect(),
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

/// Size and time of change.
fn state_of(path: &Path) -> Result<String> {
    let meta = std::fs::metadata(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        action: "look at",
        source,
    })?;
    let changed = meta.modified().ok();
    let changed = changed.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    Ok(format!(
        "{} {} {}",
        path.display(),
        meta.len(),
        changed.map_or(0, |time| time.as_nanos())
    ))
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
            mlx_files: Vec::new(),
            mlx_version: "0.32.2".into(),
            system: "test".into(),
            devices: Vec::new(),
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
