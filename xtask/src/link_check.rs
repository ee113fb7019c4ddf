//! `cargo xtask link-check`: compiles and links the whole program for Apple silicon from Debian, and reads the result.
//!
//! No Mac is needed: Debian's rustc builds the standard library for the target from its own sources, zig brings a C++
//! compiler, a linker and the system's headers, and the prebuilt mlx-metal wheel is what it links against. zig links its own
//! C++ library, so the result proves that everything compiles and links, and is never shipped.

mod tools;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use metal_check::macho::{self, Image};
use metal_check::version::Version;
use wheel_fetch::mlx::Flavour;

use self::tools::Tools;
use crate::repo;

const TARGET: &str = "aarch64-apple-darwin";
/// Oldest macOS the program promises to run on.
const MINIMUM: Version = Version(14, 0, 0);
/// Where an installed program finds its library besides the cache.
const BESIDE: &str = "@executable_path/../lib";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only read a program that was built before
    #[arg(long, value_name = "FILE")]
    only_read: Option<PathBuf>,
}

/// Builds and reads; says why when this machine cannot.
pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(program) = &args.only_read {
        return read(program);
    }
    if let Some(reason) = tools::unsuitable() {
        println!("skipped: {reason}");
        return Ok(());
    }
    let tools = Tools::prepare()?;
    let mlx = wheel_fetch::mlx::prefix(Flavour::Macos14, |_| Ok(()))?;
    read(&build(&tools, &mlx)?)
}

fn build(tools: &Tools, mlx: &Path) -> Result<PathBuf> {
    let target_dir = repo::root().join("target/link-check");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(repo::root())
        .args([
            "build",
            "--locked",
            "--release",
            "-Z",
            "build-std=std,panic_unwind",
            "--target",
            TARGET,
            "-p",
            "planish-cli",
        ])
        .envs(environment(tools, mlx))
        .env("CARGO_TARGET_DIR", &target_dir)
        .env_remove("RUSTFLAGS");
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the program does not compile or link for {TARGET}; the compiler's or linker's message is above");
    }
    Ok(target_dir.join(TARGET).join("release/planish"))
}

fn environment(tools: &Tools, mlx: &Path) -> Vec<(&'static str, OsString)> {
    let headers = format!(
        "-isystem {} -isystem {}",
        tools.zig.join("lib/include").display(),
        tools.zig.join("lib/libc/include/any-darwin-any").display()
    );
    vec![
        // `-Z` and building the standard library are unstable; the compiler is a released one all the same.
        ("RUSTC_BOOTSTRAP", "1".into()),
        ("RUSTC", tools.wrapper("rustc").into()),
        (
            "CARGO_TARGET_AARCH64_APPLE_DARWIN_LINKER",
            tools.wrapper("zig-cc").into(),
        ),
        ("CC_aarch64_apple_darwin", tools.wrapper("zig-cc").into()),
        ("CXX_aarch64_apple_darwin", tools.wrapper("zig-c++").into()),
        ("AR_aarch64_apple_darwin", tools.wrapper("zig-ar").into()),
        ("BINDGEN_EXTRA_CLANG_ARGS_aarch64_apple_darwin", headers.into()),
        // Apple's strip does not exist here, and zig's linker leaves what others would strip.
        ("CARGO_PROFILE_RELEASE_STRIP", "none".into()),
        ("MACOSX_DEPLOYMENT_TARGET", MINIMUM.to_string().into()),
        ("MLX_PREFIX", mlx.into()),
    ]
}

fn read(program: &Path) -> Result<()> {
    let bytes = std::fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let image = macho::parse(&bytes)?;
    let complaints = complaints(&image);
    println!("{} ({:.1} MB)", program.display(), bytes.len() as f64 / 1e6);
    println!(
        "  arm64 {}, macOS {} or later",
        image.kind,
        image.minos.map_or_else(|| "?".into(), |minos| minos.to_string())
    );
    for (what, list) in [("needs", &image.libraries), ("run path", &image.rpaths)] {
        list.iter().for_each(|line| println!("  {what} {line}"));
    }
    if !complaints.is_empty() {
        bail!("the program is not what it must be: {}", complaints.join("; "));
    }
    println!("link-check: the whole program compiles and links for {TARGET}");
    Ok(())
}

/// Everything about the program that is not as it must be.
fn complaints(image: &Image) -> Vec<String> {
    let mut complaints = Vec::new();
    if image.kind != "program" {
        complaints.push(format!("it is a {}, not a program", image.kind));
    }
    if image.minos != Some(MINIMUM) {
        complaints.push(format!("it names macOS {:?} as the oldest, not {MINIMUM}", image.minos));
    }
    if image.foreign_libraries() != ["@rpath/libmlx.dylib"] {
        complaints.push(format!(
            "besides the system's libraries it needs {:?}, not only @rpath/libmlx.dylib",
            image.foreign_libraries()
        ));
    }
    if !image.rpaths.iter().any(|path| path == BESIDE) {
        complaints.push(format!("its run paths {:?} lack {BESIDE}", image.rpaths));
    }
    if !image.relative_rpaths().is_empty() {
        complaints.push(format!(
            "run paths {:?} depend on the working directory",
            image.relative_rpaths()
        ));
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Image {
        Image {
            kind: "program".into(),
            minos: Some(MINIMUM),
            libraries: vec!["@rpath/libmlx.dylib".into(), "/usr/lib/libSystem.B.dylib".into()],
            rpaths: vec!["/cache/mlx/lib".into(), BESIDE.into()],
            ..Image::default()
        }
    }

    #[test]
    fn every_demand_is_checked() {
        assert_eq!(complaints(&good()), [""; 0]);
        let spoilt: [fn(&mut Image); 6] = [
            |image| image.kind = "library".into(),
            |image| image.minos = Some(Version(26, 2, 0)),
            |image| image.libraries.push("/opt/homebrew/lib/libx.dylib".into()),
            |image| image.libraries.clear(),
            |image| image.rpaths.clear(),
            |image| image.rpaths.push("lib".into()),
        ];
        for spoil in spoilt {
            let mut image = good();
            spoil(&mut image);
            assert_eq!(complaints(&image).len(), 1, "{image:?}");
        }
    }
}
