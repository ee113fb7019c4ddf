//! Where MLX is: `MLX_PREFIX`, else the cache, else PyPI.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use wheel_fetch::mlx::{self, Flavour};

use super::Result;
use super::blas;
use super::target::Target;

pub struct Mlx {
    /// Directory with `include/` and `lib/`.
    prefix: PathBuf,
    /// Name for `DEP_MLX_FLAVOUR`.
    flavour: &'static str,
}

pub fn locate(target: &Target) -> Result<Mlx> {
    println!("cargo::rerun-if-env-changed=MLX_PREFIX");
    if let Some(prefix) = env::var_os("MLX_PREFIX").filter(|value| !value.is_empty()) {
        return from_prefix(PathBuf::from(prefix), target);
    }
    for name in ["PLANISH_CACHE", "XDG_CACHE_HOME", "HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let cuda = env::var_os("CARGO_FEATURE_CUDA").is_some();
    let flavour = Flavour::for_target(&target.os, &target.arch, cuda, target.macos_version())?;
    let prefix = mlx::prefix(flavour, |root| blas::replace_reference_blas(flavour, root))?;
    Ok(Mlx {
        prefix,
        flavour: flavour.name(),
    })
}

fn from_prefix(prefix: PathBuf, target: &Target) -> Result<Mlx> {
    let prefix = fs::canonicalize(&prefix).map_err(|error| format!("MLX_PREFIX {}: {error}", prefix.display()))?;
    mlx::check_version(&prefix)?;
    let library = prefix.join("lib").join(library_name(target));
    if !library.exists() {
        return Err(format!(
            "MLX_PREFIX: {} does not exist; expected a directory with include/ and lib/",
            library.display()
        )
        .into());
    }
    Ok(Mlx {
        prefix,
        flavour: "prefix",
    })
}

fn library_name(target: &Target) -> &'static str {
    if target.is_macos() { "libmlx.dylib" } else { "libmlx.so" }
}

impl Mlx {
    pub fn include(&self) -> PathBuf {
        self.prefix.join("include")
    }

    fn lib(&self) -> PathBuf {
        self.prefix.join("lib")
    }

    /// Tells cargo and dependents how to link, and how the program finds the library.
    pub fn link(&self) -> Result<()> {
        let version_header = self.include().join("mlx/version.h");
        // A cache that was deleted must lead to another fetch, not to a missing library.
        println!("cargo::rerun-if-changed={}", version_header.display());
        println!("cargo::rustc-link-search=native={}", self.link_directory()?.display());
        println!("cargo::rustc-link-lib=dylib=mlx");
        println!("cargo::metadata=lib_dir={}", self.lib().display());
        println!("cargo::metadata=flavour={}", self.flavour);
        Ok(())
    }

    /// `cargo run`, `test` and `bench` add link directories to the loader's path only if they lie inside the target
    /// directory, so MLX is linked through a symlink there. libmlx finds its neighbours from where the link points to.
    fn link_directory(&self) -> Result<PathBuf> {
        let link = PathBuf::from(env::var("OUT_DIR")?).join("mlx-lib");
        match fs::remove_file(&link) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        symlink(&self.lib(), &link)?;
        Ok(link)
    }
}

#[cfg(unix)]
fn symlink(original: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(original, link)
}

#[cfg(not(unix))]
fn symlink(_original: &Path, _link: &Path) -> std::io::Result<()> {
    Err(std::io::Error::other("MLX builds on macOS and Linux only"))
}
