//! mlx-c, the C interface to MLX: found through cargo, compiled against the prebuilt headers.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Result;
use super::prefix::Mlx;
use super::target::Target;

/// The directory of mlx-c's sources inside the published `mlx-sys` package.
///
/// `upstream/Cargo.toml` depends on that package and nothing builds it: cargo fetches it, checks it against the lock
/// file's checksum and says where it lies.
pub fn locate_sources() -> Result<PathBuf> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("upstream/Cargo.toml");
    let output = Command::new(env::var("CARGO")?)
        .args(["metadata", "--locked", "--format-version", "1", "--manifest-path"])
        .arg(&manifest)
        .output()?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "cargo could not fetch the published mlx-sys 0.7.0, which carries mlx-c:\n{}",
            message.trim()
        )
        .into());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let package = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "mlx-sys" && package["version"] == "0.7.0")
        .and_then(|package| package["manifest_path"].as_str())
        .ok_or("cargo metadata names no mlx-sys 0.7.0")?;
    let sources = Path::new(package).with_file_name("src").join("mlx-c");
    if !sources.join("mlx/c/mlx.h").exists() {
        return Err(format!("{} holds no mlx-c", sources.display()).into());
    }
    Ok(sources)
}

/// Compiles mlx-c and our shims into one static library.
pub fn compile(target: &Target, mlx: &Mlx, sources: &Path) -> Result<()> {
    let shim = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("shim");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .warnings(false)
        .include(sources)
        .flag("-isystem")
        .flag(mlx.include())
        .flag("-include")
        .flag(shim.join("format.h"))
        .files(cpp_files(&sources.join("mlx/c"))?);
    if target.arch != "aarch64" {
        build.file(shim.join("half.cpp"));
    }
    build.try_compile("mlxc")?;
    if !target.is_macos() {
        cc::Build::new()
            .file(shim.join("mach_time.c"))
            .try_compile("mach_time")?;
    }
    Ok(())
}

fn cpp_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("cpp")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
