//! What the probe process does: the stages, one JSON line each, flushed as they come.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use metal_check::predict::Prediction;
use serde_json::json;

use crate::files::MlxFiles;
use crate::report::{Backend, Check, DeviceReport};
use crate::stages::{self, Sink};
use crate::{Error, Result};

/// The hidden subcommand that a program hands to [`child_main`].
pub const PROBE_COMMAND: &str = "__probe";

/// Probes one device and writes what it finds into a file. `arguments` are those after [`PROBE_COMMAND`].
///
/// Not standard output: MLX's own error handler prints there.
///
/// # Errors
/// [`Error::Usage`]; [`Error::Io`]; those of MLX, which the parent reads as a failed stage.
pub fn child_main(arguments: &[String]) -> Result<()> {
    let [backend, path, seed] = arguments else {
        return Err(Error::Usage);
    };
    let backend: Backend = backend.parse().map_err(|_| Error::Usage)?;
    let seed: u64 = seed.parse().map_err(|_| Error::Usage)?;
    let path = PathBuf::from(path);
    die_with_parent();
    let file = File::create(&path).map_err(|source| Error::Io {
        path: path.clone(),
        action: "create",
        source,
    })?;
    let mut lines = Lines {
        file,
        path,
        started: Instant::now(),
    };
    lines.write(json!({"event": "start", "mlx_version": planish_mlx::version()?}))?;
    if let Err(error) = stages::run(backend, seed, &mut lines) {
        lines.write(json!({"event": "error", "message": error.to_string()}))?;
    }
    lines.write(json!({"event": "done"}))
}

/// Ends this process when the one that started it has ended: a device may hold it for ever, and it must not be left behind.
pub fn die_with_parent() {
    #[cfg(unix)]
    std::thread::spawn(|| {
        let parent = rustix::process::getppid();
        while rustix::process::getppid() == parent {
            std::thread::sleep(Duration::from_millis(200));
        }
        std::process::exit(1);
    });
}

struct Lines {
    file: File,
    path: PathBuf,
    started: Instant,
}

impl Lines {
    /// Each line says when it was written: what a slow probe spends its time on can then be read.
    fn write(&mut self, mut line: serde_json::Value) -> Result<()> {
        line["at_ms"] = json!(self.started.elapsed().as_millis() as u64);
        let text = format!("{line}\n");
        let io = |source| Error::Io {
            path: self.path.clone(),
            action: "append to",
            source,
        };
        self.file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.flush())
            .map_err(io)
    }
}

impl Sink for Lines {
    fn stage(&mut self, name: &str) -> Result<()> {
        self.write(json!({"event": "stage", "stage": name}))
    }

    fn device(&mut self, device: &DeviceReport) -> Result<()> {
        self.write(json!({"event": "device", "device": device}))
    }

    fn check(&mut self, check: &Check) -> Result<()> {
        self.write(json!({"event": "check", "check": check}))
    }

    fn files(&mut self, files: &MlxFiles) -> Result<()> {
        self.write(json!({"event": "files", "files": files}))
    }

    fn predicted(&mut self, prediction: &Prediction) -> Result<()> {
        self.write(json!({"event": "predicted", "code": prediction.code, "detail": prediction.detail}))
    }

    fn speed(&mut self, gflops: f64, cpu_gflops: f64) -> Result<()> {
        self.write(json!({"event": "speed", "gflops": gflops, "cpu_gflops": cpu_gflops}))
    }
}
