//! Rust declarations for mlx-c's headers.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Result;
use super::target::Target;

pub fn generate(target: &Target, sources: &Path) -> Result<()> {
    ensure_libclang(target)?;
    let mut builder = bindgen::Builder::default()
        .clang_arg(format!("-I{}", sources.display()))
        // Their sizes trip a lint of rustc; the published crate leaves them out too.
        .blocklist_function("malloc")
        .blocklist_function("realloc")
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()));
    for argument in system_include_arguments(target) {
        builder = builder.clang_arg(argument);
    }
    for header in headers(&sources.join("mlx/c"))? {
        builder = builder.header(header.to_string_lossy());
    }
    let bindings = builder.generate()?;
    bindings.write_to_file(PathBuf::from(env::var("OUT_DIR")?).join("bindings.rs"))?;
    Ok(())
}

/// Uses the system's libclang if there is one, else the one from PyPI.
fn ensure_libclang(target: &Target) -> Result<()> {
    println!("cargo::rerun-if-env-changed=LIBCLANG_PATH");
    // Old libclangs do not know `__bf16`, which the arm headers use: a cross build takes the pinned one.
    let wants_pinned = target.is_cross && env::var_os("LIBCLANG_PATH").is_none();
    if !wants_pinned && clang_sys::load().is_ok() {
        return Ok(());
    }
    if cfg!(not(target_os = "linux")) {
        return Err(
            "libclang was not found: install the Command Line Tools (xcode-select --install) or set LIBCLANG_PATH"
                .into(),
        );
    }
    let directory = wheel_fetch::mlx::libclang(env::consts::ARCH)?;
    // SAFETY: a build script's main thread; no other thread reads the environment at the same time.
    unsafe { env::set_var("LIBCLANG_PATH", directory) };
    clang_sys::load().map_err(|error| format!("libclang from PyPI does not load: {error}"))?;
    Ok(())
}

/// The wheel's libclang comes without its own headers (`stdbool.h`), so it borrows the C compiler's.
fn system_include_arguments(target: &Target) -> Vec<String> {
    if target.is_cross {
        // BINDGEN_EXTRA_CLANG_ARGS_<target>, which bindgen reads itself, names the target's headers.
        return vec![format!("--target={}", target.triple)];
    }
    if target.is_macos() {
        return Vec::new();
    }
    let printed = cc::Build::new()
        .try_get_compiler()
        .ok()
        .and_then(|compiler| {
            Command::new(compiler.path())
                .arg("-print-file-name=include")
                .output()
                .ok()
        })
        .and_then(|output| String::from_utf8(output.stdout).ok());
    printed
        .map(|path| vec!["-isystem".to_owned(), path.trim().to_owned()])
        .unwrap_or_default()
}

fn headers(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut headers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("h")) {
            headers.push(path);
        }
    }
    headers.sort();
    Ok(headers)
}
