//! Which prebuilt MLX fits which macOS.

use crate::version::Version;
use serde::{Deserialize, Serialize};

/// The MLX of the wheels below, which is the one that mlx-c in mlx-sys 0.7.0 is written for.
pub const MLX_VERSION: &str = "0.32.2";

/// One mlx-metal wheel and what its bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Wheel {
    /// Platform tag of the file name. It may promise more than the bytes hold.
    pub tag: &'static str,
    /// SHA-256 of the wheel.
    pub sha256: &'static str,
    /// Oldest macOS that loads its libmlx, from the load commands.
    pub minos: Version,
    /// Size of its mlx.metallib in bytes.
    pub metallib_bytes: u64,
}

/// The three published wheels, oldest system first.
pub const WHEELS: [Wheel; 3] = [
    Wheel {
        tag: "macosx_14_0_arm64",
        sha256: "3825fff379dbc107dd3413e564a06caeaa24819910ec49c0439e454c06a1b9b8",
        minos: Version(14, 0, 0),
        metallib_bytes: 135_865_440,
    },
    Wheel {
        tag: "macosx_15_0_arm64",
        sha256: "55a369250d220b2cf10213a87a2ac1b1a420608c5b35b1df4e7147ac8e32f121",
        minos: Version(15, 0, 0),
        metallib_bytes: 135_842_224,
    },
    // The tag says 26.0, the library 26.2: on 26.0 and 26.1 it would not load.
    Wheel {
        tag: "macosx_26_0_arm64",
        sha256: "e6abeac9ac5265830c9c1541b6f96e9be37a85c2446763a46ad466c63a3837ab",
        minos: Version(26, 2, 0),
        metallib_bytes: 182_351_120,
    },
];

/// Why no wheel fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unsupported {
    /// Older than macOS 14.
    OsTooOld,
    /// Not an Apple processor.
    Architecture,
}

/// The newest wheel whose library loads on that macOS.
///
/// ```
/// use metal_check::wheel::select;
/// for (macos, tag) in [("14.7", "macosx_14_0_arm64"), ("15.6.1", "macosx_15_0_arm64"), ("26.1", "macosx_15_0_arm64"), ("26.2", "macosx_26_0_arm64"), ("27.0", "macosx_26_0_arm64")] {
///     assert_eq!(select(macos.parse().unwrap(), "arm64").unwrap().tag, tag);
/// }
/// assert!(select("13.6".parse().unwrap(), "arm64").is_err());
/// ```
///
/// # Errors
/// [`Unsupported`] for an older macOS or another processor.
pub fn select(macos: Version, arch: &str) -> Result<Wheel, Unsupported> {
    if !matches!(arch, "arm64" | "aarch64") {
        return Err(Unsupported::Architecture);
    }
    WHEELS
        .into_iter()
        .rev()
        .find(|wheel| wheel.minos <= macos)
        .ok_or(Unsupported::OsTooOld)
}
