//! Apple's prebuilt MLX: which wheel serves which machine, and where its unpacked copy lies.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::cache::{CacheLock, cache_dir};
use crate::error::{Error, Result, io_at};
use crate::pip::{Wheel, download};
use crate::unpack::{sha256_file, unpack, verify_record};

/// The MLX that mlx-c in `mlx-sys` 0.7.0 is written for. MLX's C++ interface changes between patch versions.
pub const VERSION: &str = "0.32.2";

/// Bump when the files that a build adds to an unpacked wheel change, so that old copies are left alone.
const LAYOUT: &str = "r1";

const fn mlx(package: &'static str, platform: &'static str, sha256: &'static str) -> Wheel {
    Wheel {
        package,
        version: VERSION,
        platform,
        sha256,
        instead: "MLX_PREFIX",
    }
}

const fn openblas(platform: &'static str, sha256: &'static str) -> Wheel {
    Wheel {
        package: "scipy-openblas32",
        version: "0.3.34.481.3",
        platform,
        sha256,
        instead: "MLX_PREFIX",
    }
}

const fn clang(platform: &'static str, sha256: &'static str) -> Wheel {
    Wheel {
        package: "libclang",
        version: "18.1.1",
        platform,
        sha256,
        instead: "LIBCLANG_PATH",
    }
}

const CPU_X86_64: Wheel = mlx(
    "mlx-cpu",
    "manylinux_2_35_x86_64",
    "fc5d31b90fc4f457b2f9614ed45651a567d22a6a11a03d114a90a4e10bdd8878",
);
const CPU_AARCH64: Wheel = mlx(
    "mlx-cpu",
    "manylinux_2_35_aarch64",
    "d0f94625588b51a878786dd51cec5617894ce586cf3c94645ce1b64e24c27c0b",
);
const CUDA13_X86_64: Wheel = mlx(
    "mlx-cuda-13",
    "manylinux_2_35_x86_64",
    "335094ccd1c0c6dc3e09c8caba207c8180602bacc0c38ba20c1d81e9456ab394",
);
const METAL_14: Wheel = mlx(
    "mlx-metal",
    "macosx_14_0_arm64",
    "3825fff379dbc107dd3413e564a06caeaa24819910ec49c0439e454c06a1b9b8",
);
const METAL_15: Wheel = mlx(
    "mlx-metal",
    "macosx_15_0_arm64",
    "55a369250d220b2cf10213a87a2ac1b1a420608c5b35b1df4e7147ac8e32f121",
);
const METAL_26: Wheel = mlx(
    "mlx-metal",
    "macosx_26_0_arm64",
    "e6abeac9ac5265830c9c1541b6f96e9be37a85c2446763a46ad466c63a3837ab",
);
const OPENBLAS_X86_64: Wheel = openblas(
    "manylinux_2_28_x86_64",
    "0595f94cd58c1f8a0d90c975621f4587337a003916b1979e834ebdf2cb5d9504",
);
const OPENBLAS_AARCH64: Wheel = openblas(
    "manylinux_2_28_aarch64",
    "e085dddbc5b9aa130f83def515d31c440e69f387a90c7e63b154a5575b4466bc",
);
const CLANG_X86_64: Wheel = clang(
    "manylinux2010_x86_64",
    "c533091d8a3bbf7460a00cb6c1a71da93bffe148f172c7d03b1c31fbf8aa2a0b",
);
const CLANG_AARCH64: Wheel = clang(
    "manylinux2014_aarch64",
    "54dda940a4a0491a9d1532bf071ea3ef26e6dbaf03b5000ed94dd7174e8f9592",
);

/// One prebuilt MLX for one kind of machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// Linux x86-64 on the CPU.
    LinuxCpuX86_64,
    /// Linux arm64 on the CPU.
    LinuxCpuAarch64,
    /// Linux x86-64 with CUDA 13. The CUDA libraries themselves come from NVIDIA's own wheels.
    LinuxCuda13X86_64,
    /// macOS 14, arm64.
    Macos14,
    /// macOS 15, 26.0 and 26.1, arm64.
    Macos15,
    /// macOS 26.2 and later, arm64 (the wheel's tag says 26.0, its library 26.2).
    Macos26,
}

impl Flavour {
    /// Every flavour, for listings.
    pub const ALL: [Self; 6] = [
        Self::LinuxCpuX86_64,
        Self::LinuxCpuAarch64,
        Self::LinuxCuda13X86_64,
        Self::Macos14,
        Self::Macos15,
        Self::Macos26,
    ];

    /// The flavour for a target; `macos` is the version of the macOS that will run it.
    ///
    /// # Errors
    /// [`Error::NoWheel`] when Apple publishes none.
    pub fn for_target(os: &str, arch: &str, cuda: bool, macos: (u32, u32)) -> Result<Self> {
        match (os, arch, cuda) {
            ("linux", "x86_64", true) => Ok(Self::LinuxCuda13X86_64),
            ("linux", "x86_64", false) => Ok(Self::LinuxCpuX86_64),
            ("linux", "aarch64", false) => Ok(Self::LinuxCpuAarch64),
            ("macos", "aarch64", false) if macos >= (26, 2) => Ok(Self::Macos26),
            ("macos", "aarch64", false) if macos >= (15, 0) => Ok(Self::Macos15),
            ("macos", "aarch64", false) if macos >= (14, 0) => Ok(Self::Macos14),
            _ => {
                let version = if os == "macos" {
                    format!(" {}.{}", macos.0, macos.1)
                } else {
                    String::new()
                };
                let with = if cuda { " with CUDA" } else { "" };
                Err(Error::NoWheel {
                    version: VERSION,
                    target: format!("{os}{version} on {arch}{with}"),
                })
            }
        }
    }

    /// A stable name, used for directories and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::LinuxCpuX86_64 => "linux-x86_64-cpu",
            Self::LinuxCpuAarch64 => "linux-aarch64-cpu",
            Self::LinuxCuda13X86_64 => "linux-x86_64-cuda13",
            Self::Macos14 => "macos14-arm64",
            Self::Macos15 => "macos15-arm64",
            Self::Macos26 => "macos26-arm64",
        }
    }

    /// The MLX wheel.
    #[must_use]
    pub fn mlx(self) -> Wheel {
        match self {
            Self::LinuxCpuX86_64 => CPU_X86_64,
            Self::LinuxCpuAarch64 => CPU_AARCH64,
            Self::LinuxCuda13X86_64 => CUDA13_X86_64,
            Self::Macos14 => METAL_14,
            Self::Macos15 => METAL_15,
            Self::Macos26 => METAL_26,
        }
    }

    /// The OpenBLAS that takes the place of the reference BLAS in a Linux wheel. macOS has Accelerate.
    #[must_use]
    pub fn openblas(self) -> Option<Wheel> {
        match self {
            Self::LinuxCpuX86_64 | Self::LinuxCuda13X86_64 => Some(OPENBLAS_X86_64),
            Self::LinuxCpuAarch64 => Some(OPENBLAS_AARCH64),
            Self::Macos14 | Self::Macos15 | Self::Macos26 => None,
        }
    }

    /// The directory of the wheel in which libmlx looks for its BLAS, relative to the unpacked root.
    #[must_use]
    pub fn bundled_libraries(self) -> Option<&'static str> {
        match self {
            Self::LinuxCpuX86_64 | Self::LinuxCpuAarch64 => Some("mlx_cpu.libs"),
            Self::LinuxCuda13X86_64 => Some("mlx_cuda_13.libs"),
            Self::Macos14 | Self::Macos15 | Self::Macos26 => None,
        }
    }
}

/// Returns the MLX prefix (a directory with `include/` and `lib/`) of a flavour from the cache, fetching it if needed.
///
/// `finish` gets the freshly unpacked root before it is moved into place, and may add to it (the fast BLAS). A copy
/// found in the cache is compared with the wheel's own record of hashes before it is used.
///
/// # Errors
/// Those of [`download`], [`unpack`] and [`check_version`]; [`Error::Altered`] for a cached copy that was changed;
/// whatever `finish` returns.
pub fn prefix(flavour: Flavour, finish: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let cache = cache_dir()?;
    let parent = cache.join("mlx");
    let root = parent.join(format!("{VERSION}-{}-{LAYOUT}", flavour.name()));
    let _lock = CacheLock::acquire(&parent)?;
    if !root.exists() {
        let staging = tempfile::Builder::new()
            .prefix(".unpack-")
            .tempdir_in(&parent)
            .map_err(io_at(&parent))?;
        unpack(&wheel_file(&flavour.mlx())?, staging.path(), |_| true)?;
        check_version(&staging.path().join("mlx"))?;
        finish(staging.path())?;
        publish(staging, &root)?;
    }
    verify(flavour, &root)?;
    Ok(root.join("mlx"))
}

/// Returns the directory of `libclang.so` from the `libclang` wheel for the machine that builds, fetching it if needed.
///
/// # Errors
/// Those of [`download`] and [`unpack`]; [`Error::NoWheel`] on other hosts than Linux x86-64 and arm64.
pub fn libclang(host_arch: &str) -> Result<PathBuf> {
    let wheel = match host_arch {
        "x86_64" => CLANG_X86_64,
        "aarch64" => CLANG_AARCH64,
        _ => {
            return Err(Error::NoWheel {
                version: "libclang 18",
                target: format!("linux on {host_arch}"),
            });
        }
    };
    let parent = cache_dir()?.join("libclang");
    let root = parent.join(format!("{}-{host_arch}", wheel.version));
    let _lock = CacheLock::acquire(&parent)?;
    if !root.exists() {
        let staging = tempfile::Builder::new()
            .prefix(".unpack-")
            .tempdir_in(&parent)
            .map_err(io_at(&parent))?;
        unpack(&wheel_file(&wheel)?, staging.path(), |name| {
            name.ends_with("libclang.so")
        })?;
        publish(staging, &root)?;
    }
    Ok(root.join(format!("libclang-{}.data/platlib/clang/native", wheel.version)))
}

/// Returns a wheel's checked file in the cache, downloading it if it is not there.
///
/// # Errors
/// Those of [`download`]. A cached file with the wrong hash is [`Error::HashMismatch`], never used.
pub fn wheel_file(wheel: &Wheel) -> Result<PathBuf> {
    let dir = cache_dir()?.join("wheels");
    // The file name carries every tag of the wheel; the hash is what identifies it, so that is the name of its directory.
    let dir = dir.join(format!("{}-{}-{}", wheel.package, wheel.version, &wheel.sha256[..12]));
    let cached = fs::read_dir(&dir)
        .ok()
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let Some(file) = cached
        .into_iter()
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
    else {
        return download(wheel, &dir);
    };
    let found = sha256_file(&file)?;
    if found != wheel.sha256 {
        return Err(Error::HashMismatch {
            path: file,
            expected: wheel.sha256.to_owned(),
            found,
        });
    }
    Ok(file)
}

/// Reads `include/mlx/version.h` under a prefix and refuses every MLX but [`VERSION`].
///
/// # Errors
/// [`Error::WrongMlxVersion`]; [`Error::Io`] when the header is not there.
pub fn check_version(prefix: &Path) -> Result<()> {
    let path = prefix.join("include/mlx/version.h");
    let text = fs::read_to_string(&path).map_err(io_at(&path))?;
    let part = |name: &str| {
        text.lines().find_map(|line| {
            line.trim()
                .strip_prefix("#define ")?
                .strip_prefix(name)?
                .trim()
                .parse::<u32>()
                .ok()
        })
    };
    let number = |part: Option<u32>| part.map_or_else(|| "?".to_owned(), |value| value.to_string());
    let found = ["MLX_VERSION_MAJOR", "MLX_VERSION_MINOR", "MLX_VERSION_PATCH"]
        .map(|name| number(part(name)))
        .join(".");
    if found == VERSION {
        return Ok(());
    }
    let hint = if env::var_os("MLX_PREFIX").is_some() {
        "MLX_PREFIX points at another version: unset it to fetch the right one"
    } else {
        "delete the directory and build again"
    };
    Err(Error::WrongMlxVersion {
        path,
        found,
        expected: VERSION,
        hint,
    })
}

fn verify(flavour: Flavour, root: &Path) -> Result<()> {
    let package = flavour.mlx().package.replace('-', "_");
    let record = root.join(format!("{package}-{VERSION}.dist-info/RECORD"));
    // The bundled BLAS is replaced on purpose; everything else must be Apple's bytes.
    let bundled = flavour.bundled_libraries();
    verify_record(root, &record, |name| {
        name.starts_with("mlx/") && bundled.is_none_or(|dir| !name.starts_with(dir))
    })
}

fn publish(staging: tempfile::TempDir, root: &Path) -> Result<()> {
    let dir = staging.keep();
    if let Err(source) = fs::rename(&dir, root) {
        let _ = fs::remove_dir_all(&dir);
        return Err(Error::Io {
            path: root.to_owned(),
            source,
        });
    }
    // A directory entry survives a power cut only after its parent is synced.
    let parent = root.parent().unwrap_or(root);
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(io_at(parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheel_is_chosen_by_the_running_macos() {
        let check = |macos, expect| {
            assert_eq!(
                Flavour::for_target("macos", "aarch64", false, macos).unwrap(),
                expect,
                "{macos:?}"
            );
        };
        check((14, 0), Flavour::Macos14);
        check((14, 7), Flavour::Macos14);
        check((15, 0), Flavour::Macos15);
        check((26, 0), Flavour::Macos15);
        check((26, 1), Flavour::Macos15);
        check((26, 2), Flavour::Macos26);
        check((27, 0), Flavour::Macos26);
    }

    #[test]
    fn err_machines_without_a_wheel() {
        for (os, arch, cuda, macos) in [
            ("macos", "aarch64", false, (13, 6)),
            ("macos", "x86_64", false, (15, 0)),
            ("linux", "riscv64", false, (0, 0)),
            ("linux", "aarch64", true, (0, 0)),
            ("windows", "x86_64", false, (0, 0)),
        ] {
            let error = Flavour::for_target(os, arch, cuda, macos).unwrap_err();
            assert!(matches!(error, Error::NoWheel { .. }), "{error}");
        }
    }

    #[test]
    fn every_wheel_is_pinned_by_a_whole_hash() {
        for flavour in Flavour::ALL {
            for wheel in [Some(flavour.mlx()), flavour.openblas()].into_iter().flatten() {
                assert_eq!(wheel.sha256.len(), 64, "{}", flavour.name());
            }
        }
    }

    #[test]
    fn err_wrong_version_names_both() {
        let dir = tempfile::tempdir().unwrap();
        let include = dir.path().join("include/mlx");
        fs::create_dir_all(&include).unwrap();
        let header = |patch: u32| {
            format!(
                "#define MLX_VERSION_MAJOR 0\n#define MLX_VERSION_MINOR 32\n#define MLX_VERSION_PATCH {patch}\n#define MLX_VERSION_NUMERIC (1)\n"
            )
        };
        fs::write(include.join("version.h"), header(2)).unwrap();
        check_version(dir.path()).unwrap();
        fs::write(include.join("version.h"), header(3)).unwrap();
        let error = check_version(dir.path()).unwrap_err().to_string();
        assert!(error.contains("0.32.3") && error.contains("0.32.2"), "{error}");
    }
}
