//! Writes the throw-away crate that builds one candidate and tries it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use metal_check::candidate::{Candidate, Features, Route};

/// Directories of one candidate, all its own.
pub(super) struct Places {
    /// The crate.
    pub(super) source: PathBuf,
    /// `CARGO_TARGET_DIR`.
    pub(super) target: PathBuf,
    /// `MLX_RS_METAL_PATH`: without it two builds would overwrite each other's shaders in the user's home.
    pub(super) metallib: PathBuf,
    /// Both streams of the build.
    pub(super) build_log: PathBuf,
    /// Both streams of the probe.
    pub(super) probe_log: PathBuf,
    /// Lines written by the probe.
    pub(super) probe_report: PathBuf,
}

impl Places {
    pub(super) fn of(run: &Path, candidate: &Candidate) -> Self {
        let base = run.join(candidate.to_string().replace(['/', '+'], "_"));
        Self {
            source: base.join("crate"),
            target: base.join("target"),
            metallib: base.join("metallib"),
            build_log: base.join("build.log"),
            probe_log: base.join("probe.log"),
            probe_report: base.join("probe.jsonl"),
        }
    }

    /// The program that the build leaves behind.
    pub(super) fn program(&self) -> PathBuf {
        self.target.join("release/metal-check-probe")
    }
}

/// Writes the crate; `root` is the repository, whose `mlx-sys` is the prebuilt route.
pub(super) fn write(places: &Places, candidate: &Candidate, root: &Path) -> Result<()> {
    for directory in [&places.source.join("src"), &places.target, &places.metallib] {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let files = [
        ("Cargo.toml", manifest(candidate, root)),
        ("build.rs", include_str!("probe/build.rs.in").to_owned()),
        ("src/main.rs", program(candidate)),
    ];
    for (name, text) in files {
        let path = places.source.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn manifest(candidate: &Candidate, root: &Path) -> String {
    let features: &[&str] = match candidate.features {
        Features::Metal => &["metal"],
        Features::MetalAccelerate if candidate.route == Route::SourceJit => &["metal", "metal-jit", "accelerate"],
        Features::MetalAccelerate => &["metal", "accelerate"],
        Features::Accelerate => &["accelerate"],
        Features::Cpu => &[],
        Features::Cuda => &["cuda"],
    };
    let patch = match candidate.route {
        Route::Prebuilt => format!(
            "\n[patch.crates-io]\nmlx-sys = {{ path = {:?} }}\n",
            root.join("crates/mlx-sys")
        ),
        Route::Source | Route::SourceJit => String::new(),
    };
    format!(
        "[package]\nname = \"metal-check-probe\"\nversion = \"0.0.0\"\nedition = \"2021\"\npublish = false\n\n[workspace]\n\n\
         [dependencies]\nmlx-sys = {{ version = \"={}\", default-features = false, features = {features:?} }}\n{patch}",
        candidate.generation.mlx_sys
    )
}

/// `mlx_device_count`, the honest question, came with MLX 0.32; older ones are asked whether they have Metal at all.
fn program(candidate: &Candidate) -> String {
    let count = if candidate.generation.mlx_sys.starts_with("0.2.") {
        "let mut available = false; if sys::mlx_metal_is_available(&mut available) == 0 && available { 1 } else { 0 }"
    } else {
        "let mut count = 0; if sys::mlx_device_count(&mut count, kind) == 0 { count } else { 0 }"
    };
    include_str!("probe/main.rs.in").replace("/*COUNT*/", count)
}
