//! A fast BLAS under the Linux wheels.
//!
//! The wheels bring netlib's reference BLAS and LAPACK (3 to 7 GFLOP/s). OpenBLAS from PyPI is 50 times faster but
//! prefixes every symbol with `scipy_`. Two small libraries with the reference libraries' file names take their place in
//! the unpacked copy and forward the 24 functions that libmlx imports, each with one jump.

use std::fs;
use std::path::Path;
use std::process::Command;

use wheel_fetch::mlx::{Flavour, wheel_file};
use wheel_fetch::{Error, Result, unpack};

const BLAS: [&str; 3] = ["cblas_sgemm", "cblas_dgemm", "cblas_cgemm"];

const LAPACK: [&str; 21] = [
    "sgeev_", "dgeev_", "cgeev_", "sgeqrf_", "dgeqrf_", "sgesdd_", "dgesdd_", "cgesdd_", "sgetrf_", "dgetrf_",
    "sgetri_", "dgetri_", "sorgqr_", "dorgqr_", "spotrf_", "dpotrf_", "ssyevd_", "dsyevd_", "cheevd_", "strtri_",
    "dtrtri_",
];

const OPENBLAS: &str = "libscipy_openblas.so";

/// Puts OpenBLAS and the forwarding libraries into an unpacked wheel; nothing to do where there is no bundled BLAS.
pub fn replace_reference_blas(flavour: Flavour, root: &Path) -> Result<()> {
    let (Some(openblas), Some(bundled)) = (flavour.openblas(), flavour.bundled_libraries()) else {
        return Ok(());
    };
    let libraries = root.join(bundled);
    unpack(&wheel_file(&openblas)?, &libraries, |name| {
        name.ends_with(OPENBLAS) || name.contains("licenses/")
    })?;
    let inside = libraries.join("scipy_openblas32/lib").join(OPENBLAS);
    fs::rename(&inside, libraries.join(OPENBLAS)).map_err(|source| Error::Io { path: inside, source })?;
    for (prefix, symbols) in [("libblas-", &BLAS[..]), ("liblapack-", &LAPACK[..])] {
        let name = bundled_name(&libraries, prefix)?;
        forward(&libraries, &name, symbols)?;
    }
    Ok(())
}

/// The loader asks for the very file name, hash and all, that auditwheel gave the library.
fn bundled_name(libraries: &Path, prefix: &str) -> Result<String> {
    let io = |source| Error::Io {
        path: libraries.to_owned(),
        source,
    };
    for entry in fs::read_dir(libraries).map_err(io)? {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) {
            return Ok(name);
        }
    }
    Err(Error::BadArchive {
        path: libraries.to_owned(),
        message: format!("holds no {prefix}*"),
    })
}

fn forward(libraries: &Path, name: &str, symbols: &[&str]) -> Result<()> {
    let source = libraries.join("forward.s");
    let target = libraries.join(name);
    fs::write(&source, jumps(symbols)).map_err(|error| Error::Io {
        path: source.clone(),
        source: error,
    })?;
    fs::remove_file(&target).map_err(|error| Error::Io {
        path: target.clone(),
        source: error,
    })?;
    let compiler = cc::Build::new().opt_level(0).get_compiler();
    let mut command = Command::new(compiler.path());
    command
        .args([
            "-shared",
            "-nostdlib",
            "-Wl,--disable-new-dtags",
            "-Wl,-rpath,$ORIGIN",
            "-Wl,-z,noexecstack",
        ])
        .arg(format!("-Wl,-soname,{name}"))
        .arg("-o")
        .arg(&target)
        .arg(&source)
        .arg(libraries.join(OPENBLAS));
    let output = command.output().map_err(|error| Error::Io {
        path: compiler.path().to_owned(),
        source: error,
    })?;
    fs::remove_file(&source).map_err(|error| Error::Io {
        path: source,
        source: error,
    })?;
    if output.status.success() {
        return Ok(());
    }
    let message = format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Err(Error::Io {
        path: target,
        source: std::io::Error::other(message),
    })
}

fn jumps(symbols: &[&str]) -> String {
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let jump = |symbol: &str| match arch.as_str() {
        "aarch64" => format!("b scipy_{symbol}"),
        _ => format!("jmp scipy_{symbol}@PLT"),
    };
    let mut text = String::from(".text\n");
    for symbol in symbols {
        text += &format!(
            ".globl {symbol}\n.type {symbol},%function\n{symbol}:\n\t{}\n",
            jump(symbol)
        );
    }
    text
}
